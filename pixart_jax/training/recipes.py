"""The command line of train.py: a recipe's name or path, a workdir, and overrides of its fields."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from pixart_jax import cli
from pixart_jax.config import Config, MeshConfig
from pixart_jax.errors import UserError, nearest
from pixart_jax.files import bundled
from pixart_jax.parallel.processes import usage

RECIPES = bundled("configs")
USAGE = "python train.py configs/NAME.py --workdir DIR [--FIELD VALUE …]"


def split(argv: Sequence[str]) -> tuple[Path, Path | None, list[str]]:
    """(the recipe's file, the workdir, the overrides that are left)."""
    argv = list(argv)
    names = known()
    if not argv or argv[0] in ("-h", "--help"):
        text = (
            f"usage: {USAGE}\n\nrecipes: {', '.join(names)}\n`python train.py NAME --help` "
            f"lists the options of one.\n\n{usage()}"
        )
        if argv:
            print(text)
            raise SystemExit(0)
        raise UserError(f"which recipe? {USAGE}; there are {', '.join(names)}")
    if argv[0].startswith("-"):
        raise UserError(f"the recipe comes first: {USAGE}")
    recipe, rest = find(argv[0]), argv[1:]
    workdir = None
    for i, token in enumerate(rest):
        if token == "--workdir" or token.startswith("--workdir="):
            if token == "--workdir" and (i + 1 == len(rest) or rest[i + 1].startswith("--")):
                raise UserError("--workdir needs a folder")
            workdir = Path(rest[i + 1] if token == "--workdir" else token.split("=", 1)[1])
            rest = rest[:i] + rest[i + (2 if token == "--workdir" else 1) :]
            break
    if workdir is not None and re.match(r"[A-Za-z][\w+.-]+:/", str(workdir)):
        raise UserError(
            f"--workdir {workdir}: a folder is needed, on a disk that all processes see; an "
            "address is none: mount it"
        )
    if workdir is None and not {"-h", "--help"} & set(rest):
        raise UserError(f"--workdir is missing, the folder of the run: {USAGE}")
    return recipe, workdir, rest


def known() -> list[str]:
    """Names of the recipes in configs/."""
    return sorted(path.stem for path in RECIPES.glob("*.py") if not path.stem.startswith("_"))


def find(name: str) -> Path:
    """A recipe by path or by bare name; UserError with the nearest."""
    path = Path(name)
    for candidate in (path, RECIPES / f"{name}.py", RECIPES / name):
        if candidate.is_file() and candidate.suffix == ".py":
            return candidate
    raise UserError(f"no recipe {name!r}{nearest(path.stem, known())}")


def parse_config(recipe: Path, overrides: Sequence[str]) -> Config:
    """The recipe's config with its overrides; every complaint is a UserError of one line."""
    import tyro

    default, overrides = apply_mesh_flag(load(recipe), overrides)
    return cli.parse(
        tyro.conf.AvoidSubcommands[Config],
        overrides,
        prog=f"train.py {recipe.stem}",
        default=default,
        description=f"Options of {recipe.name}.\n\n{usage()}",
    )


def apply_mesh_flag(config: Config, overrides: Sequence[str]) -> tuple[Config, list[str]]:
    """``--mesh fsdp=8,tensor=2``, the whole mesh in one flag, set in the config; (the config, the
    overrides that are left)."""
    left: list[str] = []
    rest = iter(overrides)
    for token in rest:
        if token != "--mesh" and not token.startswith("--mesh="):
            left.append(token)
            continue
        text = next(rest, None) if token == "--mesh" else token.split("=", 1)[1]
        if text is None or text.startswith("--"):
            raise UserError("--mesh needs the sizes of its axes, as --mesh fsdp=8,tensor=2")
        config = dataclasses.replace(config, mesh=MeshConfig.parse(text))
    return config, left


def load(recipe: Path) -> Config:
    """What the file's get_config() returns."""
    spec = importlib.util.spec_from_file_location(f"recipe_{recipe.stem}", recipe)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        make = module.get_config
    except UserError:
        raise
    except (SyntaxError, ImportError, AttributeError, NameError) as fault:
        raise UserError(f"{recipe} is no recipe: {fault}") from fault
    config = make()
    if not isinstance(config, Config):
        raise UserError(f"{recipe}: get_config() returned {type(config).__name__}, want Config")
    return config
