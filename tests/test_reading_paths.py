"""The paths that a newcomer reads: few files, few lines, each hop a real import and a real call.

A path is a list of (file below pixart_jax/, definition); a definition is a function, a class, a
method 'Class.method' or a module-level name. Each definition names the next one, and its file
imports the next one's from that very file; the entered definitions' lines are counted.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "pixart_jax"

# name → (most files, most lines, hops)
PATHS: dict[str, tuple[int, int, list[tuple[str, str]]]] = {
    "from commands/train.py to the loss": (
        6,
        700,
        [
            ("commands/train.py", "main"),
            ("commands/train.py", "run"),
            ("commands/train.py", "train"),
            ("commands/train.py", "train_stage"),
            ("training/step.py", "compiled_step"),
            ("training/step.py", "CompiledStep"),
            ("training/step.py", "train_step"),
            ("training/tasks/__init__.py", "Task"),
            ("training/tasks/text_to_image.py", "TextToImage"),
            ("training/tasks/denoising.py", "DiffusionObjective"),
            ("diffusion/objective.py", "training_loss"),
        ],
    ),
    "from commands/sample.py to a solver's step": (
        6,
        900,
        [
            ("commands/sample.py", "main"),
            ("commands/sample.py", "generate"),
            ("pipeline/pipeline.py", "Pipeline.generate"),
            ("pipeline/pipeline.py", "Pipeline._images"),
            ("pipeline/sampler.py", "generate_jit"),
            ("pipeline/sampler.py", "sample_latents"),
            ("diffusion/sampling.py", "integrate"),
            ("diffusion/sampling.py", "_step"),
            ("diffusion/solvers/base.py", "Solver"),
        ],
    ),
}


def definition(file: str, name: str) -> ast.AST:
    """The node that defines ``name`` in a file."""
    body = ast.parse((PACKAGE / file).read_text(encoding="utf-8")).body
    for part in name.split("."):
        for node in body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            if part in {getattr(node, "name", None), *(getattr(t, "id", None) for t in targets)}:
                break
        else:
            raise AssertionError(f"{file} does not define {name}")
        body = getattr(node, "body", [])
    return node


def names(node: ast.AST) -> set[str]:
    """Every name and attribute that the code of a definition mentions."""
    found = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    found |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    # annotations as text, under `from __future__ import annotations`, are nodes as others are
    return found


def imported(file: str) -> dict[str, tuple[str, str]]:
    """Local name → (module, its name there) of a file's imports from the package."""
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    return {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def module(file: str) -> str:
    return f"pixart_jax.{file.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}"


@pytest.mark.parametrize("path", PATHS)
def test_each_hop_is_a_real_import_and_use_of_the_next(path):
    hops = PATHS[path][2]
    for (file, name), (next_file, next_name) in zip(hops, hops[1:]):
        mentioned, imports = names(definition(file, name)), imported(file)
        wanted, *method = next_name.split(".")
        if file != next_file:
            # the definition itself, or its module, whose attribute it is then
            known = {(module(next_file), wanted), tuple(module(next_file).rsplit(".", 1))}
            local = [k for k, value in imports.items() if value in known]
            assert local, f"{file} does not import {wanted} from {next_file}"
            wanted = local[0]
        # a method is called on an instance: its own name is what the code mentions
        for word in method or [wanted]:
            assert word in mentioned, f"{name} in {file} does not use {word} ({next_name})"


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_short(path):
    most_files, most_lines, hops = PATHS[path]
    files = {file for file, _ in hops}
    lines = {}
    for file, name in hops:
        node = definition(file, name)
        lines[file, name] = node.end_lineno - node.lineno + 1
    assert len(files) <= most_files, sorted(files)
    assert sum(lines.values()) <= most_lines, lines


def test_the_step_shows_loss_gradient_update_and_average_in_one_function():
    step = definition("training/step.py", "train_step")
    assert step.end_lineno - step.lineno + 1 <= 60
    assert {"losses", "grad", "update", "apply_updates"} <= names(step)
