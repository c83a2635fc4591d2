"""Conventions of the repository: which package may import which, the size of files and documents,
and what no tracked file may contain.

ALLOWED is the import table of docs/architecture.md as code. A new edge is a change of design and
goes into both.
"""

from __future__ import annotations

import ast
import dataclasses
import graphlib
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pixart_jax"

# Used by every package. images and plots write through files.
_FOUNDATION = {"errors", "files", "finite", "images", "object_store", "plots", "remote_path"}
_FOUNDATION |= {"tables", "text"}
# The base: these do not import each other, except that models may use parallel's axis names.
_BASE = _FOUNDATION | {"models", "diffusion", "data", "parallel"}
_RUNS = _BASE | {"weights", "config", "pipeline", "cli"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "object_store": {"errors"},
    "files": {"errors", "object_store"},
    "finite": {"errors"},
    "images": {"errors", "files", "remote_path"},
    "plots": {"files"},
    "remote_path": {"errors", "files"},
    "tables": {"errors", "remote_path"},
    "text": {"errors", "files", "tables", "remote_path"},
    "cli": {"errors", "remote_path"},
    "parallel": _FOUNDATION,
    "models": _FOUNDATION | {"parallel.axes"},
    "diffusion": {"errors"},
    "data": _FOUNDATION,
    "task_config": {"errors"},
    "config": {"errors", "models", "task_config"},
    "weights": _FOUNDATION | {"models", "parallel"},
    "pipeline": _FOUNDATION
    | {"models", "diffusion", "weights", "parallel", "data.buckets", "data.images"},
    "training": _RUNS,
    "encoding": _RUNS,
    "captioning": _RUNS | {"encoding"},
    "planning": _RUNS | {"training"},
    "evaluation": _RUNS | {"training"},
    "serving": _RUNS | {"evaluation"},
    "commands": _RUNS | {"training", "encoding", "evaluation"},
}
# May import every package; no package imports them.
ENTRY_POINTS = {"__init__", "__main__"}

MAX_LINES = 650  # of a source file
MAX_WORDS = {"README.md": 1200, "docs": 23_000}  # as `wc -w` counts them
VAGUE = {"utils", "util", "helpers", "helper", "misc", "common", "stuff", "tools", "manager", "lib"}
VAGUE_CLASS = re.compile(r"(Manager|Helper|Helpers|Utils|Util|Misc)$")
MACHINE_PATH = re.compile(r"(?<![\w.}])/(?:home|root|Users|work|farm|opt|mnt|tmp|scratch)/[\w.-]")


# ---- reading the tree ----


def modules() -> dict[str, Path]:
    """Dotted name below the package → file: 'models.attention', 'models' (its __init__), 'errors',
    '__init__'."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = file
    return found


MODULES = modules()


def package_of(module: str) -> str:
    """The package or top-level file of a module: 'models.vae' → 'models'."""
    return module.split(".")[0]


def imports(module: str, top_level_only: bool = False) -> list[tuple[str, int]]:
    """(module of this package, line) for every import statement in a module, also those inside
    functions."""
    file = MODULES[module]
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    nodes = list(_at_import_time(tree)) if top_level_only else list(ast.walk(tree))
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "pixart_jax"]
            found += [(name.partition(".")[2] or "__init__", node.lineno) for name in names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                up = package[: len(package) - node.level + 1]
                source = ".".join([*up, node.module] if node.module else up)
            elif (node.module or "").split(".")[0] == "pixart_jax":
                source = node.module.partition(".")[2]
            else:
                continue
            # `from pixart_jax.models import attention` names a module, `import Config` does not
            for alias in node.names:
                deeper = f"{source}.{alias.name}".strip(".")
                found.append((deeper if deeper in MODULES else source or "__init__", node.lineno))
    return found


def _at_import_time(tree: ast.AST):
    """The nodes that run when the module is imported: not the bodies of functions, not `if
    TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _at_import_time(node)


def tracked() -> list[Path]:
    """Every file that git has or would take; without git, every file that is not in a folder git
    ignores."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
            text=True,
        ).stdout.split("\0")
        files = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        ignored = {".git", ".venv", ".cache", "runs", "out", "__pycache__"}
        files = [f for f in ROOT.rglob("*") if not ignored & set(f.relative_to(ROOT).parts)]
    return sorted(f for f in files if f.is_file())


def texts() -> list[tuple[str, str]]:
    """(path from the root, text) of every tracked text file."""
    found = []
    for file in tracked():
        data = file.read_bytes()
        if b"\0" not in data[:8192]:
            found.append(
                (file.relative_to(ROOT).as_posix(), data.decode("utf-8", errors="replace"))
            )
    return found


def sources() -> list[tuple[str, str]]:
    return [(name, text) for name, text in texts() if name.endswith(".py")]


# ---- imports run one way ----


def permitted(module: str, target: str) -> bool:
    here, there = package_of(module), package_of(target)
    if here == there or here in ENTRY_POINTS:
        return True
    return there in ALLOWED.get(here, set()) or target in ALLOWED.get(here, set())


def test_every_package_is_in_the_table():
    assert {package_of(module) for module in MODULES} - ENTRY_POINTS <= set(ALLOWED)


def test_the_table_has_no_cycle():
    graph = {name: {package_of(other) for other in allowed} for name, allowed in ALLOWED.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError on a cycle
    assert order[0] == "errors"


def test_imports_run_one_way():
    broken = [
        f"pixart_jax/{module.replace('.', '/')}:{line} imports {target}"
        for module in MODULES
        for target, line in imports(module)
        if not permitted(module, target)
    ]
    assert not broken, "\n".join(broken)


def test_modules_have_no_import_cycle():
    graph = {
        module: {t for t, _ in imports(module, top_level_only=True)} - {module}
        for module in MODULES
    }
    # A package's __init__ imports its modules. A module that imports a sibling through the package
    # does not depend on the names of the __init__.
    for module in graph:
        graph[module] -= {package_of(module)} if module != package_of(module) else set()
    list(graphlib.TopologicalSorter(graph).static_order())


def test_third_party_imports_are_requirements():
    """Every third-party import is a direct requirement, part of an extra, or an optional library
    that a command reports when it is missing. Optional libraries are imported inside functions, so
    that their absence is a one-line error of that command alone; the modules of serving, which
    that command imports, import theirs at the top."""
    as_imported = {
        "pillow": "PIL",
        "beautifulsoup4": "bs4",
        "orbax_checkpoint": "orbax",
        "tensorboardx": "tensorboardX",
        "google_cloud_storage": "google",
    }

    def packages(lines) -> set[str]:
        named = {re.split(r"[<>=\[!~ ]", line)[0].lower().replace("-", "_") for line in lines}
        return {as_imported.get(name, name) for name in named}

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    known = packages(requirement_lines())
    # Libraries of the extras, and those that a few commands use if they are installed.
    optional = packages(line for extra in extras.values() for line in extra) | {
        "tokamax",
        "botocore",  # of s3fs
        "requests",  # of google-cloud-storage
        "absl",
        "codecarbon",
        "pynvml",
        "nltk",
        "spacy",
    }
    optional -= known
    unknown = []
    for module, file in MODULES.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        at_import = list(_at_import_time(tree))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in (n.split(".")[0] for n in names):
                if name not in known | optional | {"pixart_jax"} | set(sys.stdlib_module_names):
                    unknown.append(f"{module}:{node.lineno} imports {name}")
                elif name in optional and node in at_import and "serving" not in module:
                    unknown.append(
                        f"{module}:{node.lineno} imports {name}, which is optional, at import time"
                    )
    assert not unknown, "\n".join(unknown)


# ---- files and names ----


def test_no_source_file_is_too_long():
    long = [
        f"{name}: {text.count(chr(10))} lines"
        for name, text in sources()
        if text.count("\n") > MAX_LINES
    ]
    assert not long, "\n".join(long)


def test_no_vague_names():
    vague = [
        name
        for name, _ in sources()
        if VAGUE & {part.removesuffix(".py") for part in name.split("/")}
    ]
    for name, text in sources():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and VAGUE_CLASS.search(node.name):
                vague.append(f"{name}:{node.lineno} class {node.name}")
    assert not vague, "\n".join(vague)


def test_every_module_has_a_docstring():
    silent = [
        name
        for name, text in sources()
        if not name.startswith("tests/") and text.strip() and not ast.get_docstring(ast.parse(text))
    ]
    assert not silent, "\n".join(silent)


def test_every_package_has_a_docstring():
    folders = {file.parent for file in MODULES.values()}
    silent = [
        folder.name
        for folder in sorted(folders)
        if not (init := folder / "__init__.py").exists()
        or not ast.get_docstring(ast.parse(init.read_text(encoding="utf-8")))
    ]
    assert not silent, silent


def test_no_machine_path_in_tracked_files():
    found = []
    for name, text in texts():
        if name == "tests/test_conventions.py":
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if MACHINE_PATH.search(line):
                found.append(f"{name}:{number}: {line.strip()[:120]}")
    assert not found, "\n".join(found)


def test_no_credentials_in_tracked_files():
    secret = re.compile(
        r"(hf_[A-Za-z0-9]{30,}|ghp_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY)"
    )
    found = [name for name, text in texts() if secret.search(text)]
    assert not found, found


# ---- documents ----

PAGES = sorted(
    file.relative_to(ROOT).as_posix()
    for file in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
)
# CHANGELOG.md names old files; docs/paper.md has a test of its own, tests/test_paper_table.py.
CURRENT_PAGES = [page for page in PAGES if page not in ("CHANGELOG.md", "docs/paper.md")]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", CURRENT_PAGES)
def test_files_that_the_documents_name_exist(page):
    named = re.findall(
        r"(?<![\w/.-])(?:(?:configs|docs|tests|benchmarks|pixart_jax|assets)/[\w./-]*\w|[\w/]+\.py\b)",
        read(page),
    )
    places = [ROOT, PACKAGE, *(ROOT / folder for folder in ("configs", "benchmarks", "docs"))]
    missing = [name for name in sorted(set(named)) if not any((p / name).exists() for p in places)]
    assert not missing, missing


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", read(page))
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing, missing


def test_the_index_lists_every_page():
    listed = set(re.findall(r"\]\(([\w]+\.md)", read("docs/index.md")))
    assert listed == {file.name for file in (ROOT / "docs").glob("*.md")} - {"index.md"}


def test_documents_stay_short():
    words = {page: len(read(page).split()) for page in PAGES}
    assert words["README.md"] <= MAX_WORDS["README.md"]
    docs = {page: count for page, count in words.items() if page.startswith("docs/")}
    assert sum(docs.values()) <= MAX_WORDS["docs"], docs


def test_the_architecture_page_has_the_import_table():
    rows = re.findall(r"^\| `(\w+)(?:/|\.py)` \|.*\| (.*) \|$", read("docs/architecture.md"), re.M)
    groups = {"foundation": _FOUNDATION, "core": _RUNS}
    documented = {
        name: set(re.findall(r"`([\w.]+)`", cell)).union(
            *(members for group, members in groups.items() if group in cell)
        )
        for name, cell in rows
    }
    packages = {package_of(module) for module in MODULES} - ENTRY_POINTS
    assert documented == {name: ALLOWED[name] for name in ALLOWED if name in packages}


def test_make_targets_that_the_documents_name_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    text = "\n".join(map(read, CURRENT_PAGES))
    named = re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", text, re.M)
    assert {name for pair in named for name in pair if name} <= targets


def test_pre_commit_runs_what_make_check_runs():
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", read("Makefile"), re.M)[1]
    commands = [line.replace("$(BIN)", ".venv/bin") for line in recipe.split("\n\t")]
    hooks = re.findall(r"entry: (.*)", read(".pre-commit-config.yaml"))
    assert hooks == [command.strip() for command in commands]


# ---- requirements ----


def requirement_lines(file: str = "requirements.txt") -> list[str]:
    lines = [
        line.partition("#")[0].strip()
        for line in (ROOT / file).read_text(encoding="utf-8").splitlines()
    ]
    return [line for line in lines if line and not line.startswith("-r")]


def test_requirements_are_the_packages_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(requirement_lines()) == sorted(project["dependencies"])


def test_the_reference_torch_is_one_version_everywhere():
    pins = [
        line for line in requirement_lines("requirements-parity.txt") if line.startswith("torch==")
    ]
    assert len(pins) == 1
    assert f"TORCH := {pins[0]}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


# ---- recipes ----

RECIPES = sorted((ROOT / "configs").glob("[!_]*.py"))


def load_recipe(file: Path):
    spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_every_recipe_builds_and_is_named_after_its_file(file):
    from pixart_jax.config import Config

    module = load_recipe(file)
    config = module.get_config()
    assert isinstance(config, Config)
    assert config.name == file.stem
    assert module.__doc__ and len(module.__doc__.split()) > 10  # cost and expected result
    assert dataclasses.replace(config) == config


# The paper's table: steps and global batch of each stage.
PAPER = {
    "xl2_256_imagenet": (300_000, 128 * 8),
    "xl2_256_sam": (150_000, 178 * 64),
    "xl2_256_aesthetic": (90_000, 178 * 64),
    "xl2_512_aesthetic": (100_000, 40 * 64),
    "xl2_1024_ms": (16_000, 12 * 32),
}


def test_the_papers_recipe_keeps_the_papers_figures():
    for name, (steps, batch) in PAPER.items():
        config = load_recipe(ROOT / "configs" / f"{name}.py").get_config()
        (stage,) = config.stages
        assert (stage.steps, stage.batch_size) == (steps, batch), name
        optimizer = stage.optimizer
        assert (optimizer.name, optimizer.learning_rate, optimizer.weight_decay, optimizer.eps) == (
            "adamw",
            2e-5,
            0.03,
            1e-10,
        ), name
        assert (optimizer.clip, optimizer.ema, optimizer.warmup_steps, optimizer.schedule) == (
            0.01,
            0.9999,
            1000,
            "constant",
        ), name
        objective = stage.objective
        assert (objective.prediction, objective.learned_range, objective.condition_dropout) == (
            "epsilon",
            True,
            0.1,
        ), name
        model = config.model
        assert (model.depth, model.width, model.heads, model.patch_size) == (28, 1152, 16, 2), name
        assert model.size_conditions == (name == "xl2_1024_ms")
        assert config.compute_dtype == "bfloat16" and config.remat != "none"


def test_the_curriculum_is_the_five_recipes_in_order():
    curriculum = load_recipe(ROOT / "configs" / "xl2_curriculum.py").get_config()
    assert [(stage.steps, stage.batch_size) for stage in curriculum.stages] == list(PAPER.values())
    parts = [load_recipe(ROOT / "configs" / f"{name}.py").get_config().stages[0] for name in PAPER]
    for stage, part in zip(curriculum.stages, parts):
        assert (stage.task, stage.data, stage.optimizer, stage.objective) == (
            part.task,
            part.data,
            part.optimizer,
            part.objective,
        )
        assert stage.start == ("fresh" if stage is curriculum.stages[0] else "previous")


def test_no_recipe_names_an_absolute_path():
    for file in RECIPES:
        config = load_recipe(file).get_config()
        for path in (
            config.vae,
            config.text_encoder,
            *(stage.data.source for stage in config.stages),
        ):
            assert path is None or not path.startswith("/"), (file.name, path)
