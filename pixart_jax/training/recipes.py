"""The command line of train.py: a recipe's name or path, a workdir, and overrides of its fields.

JAX is imported only once a recipe is found.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pixart_jax import cli
from pixart_jax.errors import UserError, nearest
from pixart_jax.files import Address, bundled, is_remote

if TYPE_CHECKING:
    from pixart_jax.config import Config

RECIPES = bundled("configs")
USAGE = "python train.py configs/NAME.py --workdir DIR [--scratch DIR] [--FIELD VALUE …]"


def split(argv: Sequence[str]) -> tuple[Path, Address, str | None, list[str]]:
    """(the recipe's file, the workdir, its scratch folder, the remaining overrides)."""
    argv = list(argv)
    names = ", ".join(known())
    if not argv:
        raise UserError(f"which recipe? {USAGE}; there are {names}")
    if argv[0] in ("-h", "--help"):
        how = "`python train.py NAME --help` lists the options of one."
        print(f"usage: {USAGE}\n\nrecipes: {names}\n{how}")
        raise SystemExit(0)
    if argv[0].startswith("-"):
        raise UserError(f"the recipe comes first: {USAGE}")
    recipe, rest = find(argv[0]), argv[1:]
    given, rest = pop_flag("--workdir", rest, "--workdir needs a folder, gs://… or s3://…")
    scratch, rest = pop_flag("--scratch", rest, "--scratch needs a local folder")
    if given is None:
        if not {"-h", "--help"} & set(rest):
            raise UserError(f"--workdir is missing, the folder of the run: {USAGE}")
        return recipe, Path(), None, rest  # --help ends the program
    if is_remote(given):
        return recipe, given, scratch, rest
    if scratch is not None:
        raise UserError(f"--scratch {scratch}: only a workdir in gs:// or s3:// has one")
    return recipe, Path(given), None, rest


def pop_flag(flag: str, argv: Sequence[str], error: str) -> tuple[str | None, list[str]]:
    """(the value of a flag, the remaining arguments): the last one of several. UserError(error)
    without a value."""
    value, rest, tokens = None, [], iter(argv)
    for token in tokens:
        if token != flag and not token.startswith(f"{flag}="):
            rest.append(token)
            continue
        value = next(tokens, None) if token == flag else token.split("=", 1)[1]
        if value is None or value.startswith("--"):
            raise UserError(error)
    return value, rest


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

    from pixart_jax.config import Config, MeshConfig
    from pixart_jax.parallel.processes import usage

    mesh, overrides = pop_flag(
        "--mesh", overrides, "--mesh needs the sizes of its axes, as --mesh fsdp=8,tensor=2"
    )
    base, overrides = pop_flag("--base", overrides, "--base needs a model's folder or hub id")
    config = load(recipe) if base is None else with_base(load(recipe), base)
    config, overrides = with_stage_flags(config, overrides)
    if mesh is not None:
        config = dataclasses.replace(config, mesh=MeshConfig.parse(mesh))
    return cli.parse(
        tyro.conf.AvoidSubcommands[Config],
        overrides,
        prog=f"train.py {recipe.stem}",
        default=config,
        description=f"Options of {recipe.name}.\n\n{usage()}",
    )


def with_base(config: Config, base: str) -> Config:
    """The config with the model in a folder or of a hub id as its start: the sizes, pixels and
    prediction are that model's, and so are its VAE and text encoder."""
    from pixart_jax.pipeline.scheduler import SchedulerConfig
    from pixart_jax.weights.files import read_json
    from pixart_jax.weights.hub import model_folder
    from pixart_jax.weights.transformer import config_from_json

    folder = model_folder(base)
    transformer, scheduler = (
        folder / part for part in ("transformer/config.json", "scheduler/scheduler_config.json")
    )
    if not (transformer.is_file() and scheduler.is_file()):
        raise UserError(
            f"--base {base}: no model: a folder with transformer/ and scheduler/ in it is needed"
        )
    model = config_from_json(read_json(transformer))
    process = SchedulerConfig.from_json(read_json(scheduler), scheduler)
    side = 8 * model.sample_size
    first = config.stages[0]
    stage = dataclasses.replace(
        first,
        start=base,
        data=dataclasses.replace(
            first.data, buckets=((side, side),), max_text_tokens=model.text_tokens
        ),
        objective=dataclasses.replace(
            first.objective,
            prediction=process.prediction,
            timesteps=process.timesteps,
            beta_start=process.beta_start,
            beta_end=process.beta_end,
            learned_range=model.out_channels == 2 * model.in_channels,
        ),
    )
    stages = (stage, *config.stages[1:])
    return dataclasses.replace(config, stages=stages, model=model, vae=base, text_encoder=base)


def with_stage_flags(config: Config, overrides: Sequence[str]) -> tuple[Config, list[str]]:
    """The config and overrides with --lora.FIELD VALUE and --dreambooth.FIELD VALUE rewritten as
    --stages.N.lora.FIELD VALUE of every text-to-image stage; it gets a LoraConfig where it has
    none."""
    from pixart_jax.config import TEXT_TO_IMAGE, LoraConfig

    short = ("--lora.", "--dreambooth.")
    flags = [token for token in overrides if token.startswith(short)]
    if not flags:
        return config, list(overrides)
    adapts = any(flag.startswith("--lora.") for flag in flags)
    stages, numbers = list(config.stages), list[int]()
    for number, stage in enumerate(stages):
        if stage.task in TEXT_TO_IMAGE:
            lora = (stage.lora or LoraConfig()) if adapts else stage.lora
            stages[number] = dataclasses.replace(stage, lora=lora)
            numbers.append(number)
    if not numbers:
        raise UserError(f"{flags[0]}: {config.name} has no text_to_image stage")
    rest, group = list[str](), list[str]()
    for token in [*overrides, "--"]:  # group: a flag and its values
        if token.startswith("--"):
            chosen = bool(group) and group[0].startswith(short)
            for number in numbers if chosen else ():
                rest += [f"--stages.{number}.{group[0][2:]}", *group[1:]]
            rest += [] if chosen else group
            group = []
        group.append(token)
    return dataclasses.replace(config, stages=tuple(stages)), rest


def load(recipe: Path) -> Config:
    """What the file's get_config() returns."""
    from pixart_jax.config import Config

    # recipes import each other as configs.NAME, also where the folder has another name
    if str(RECIPES) not in getattr(sys.modules.get("configs"), "__path__", ()):
        package = types.ModuleType("configs")
        package.__path__ = [str(RECIPES)]
        sys.modules["configs"] = package
    spec = importlib.util.spec_from_file_location(f"recipe_{recipe.stem}", recipe)
    assert spec is not None and spec.loader is not None, recipe
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except (SyntaxError, ImportError, AttributeError, NameError) as error:
        raise UserError(f"{recipe} is not a recipe: {error}") from error
    if not isinstance(config, Config):
        raise UserError(f"{recipe}: get_config() returned {type(config).__name__}, want Config")
    return config
