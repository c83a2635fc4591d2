"""``python -m pixart_jax convert SRC OUT``: a released checkpoint → a component folder that this project and diffusers open."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro

from pixart_jax import program
from pixart_jax.errors import UserError

LABELS = "y_embedder.embedding_table.weight"  # only a DiT has it
CAPTIONS = "y_embedder.y_proj.fc1.weight"  # only a PixArt transformer has it


@dataclasses.dataclass(frozen=True)
class Flags:
    """Convert a PixArt .pth, a DiT .pt or a diffusers folder into a component folder: config.json and one safetensors file.

    A .pth does not say how many heads its model has, nor always how its positions are scaled; for the released widths (384, 768, 1024,
    1152) the heads are known.
    """

    src: tyro.conf.Positional[Path]
    """An official .pth or .pt, a diffusers transformer folder, or a whole model (its transformer is taken)."""
    out: tyro.conf.Positional[Path]
    """The new folder."""
    heads: int | None = None
    """Attention heads; needed for a width that no released model has."""
    scale: float | None = None
    """Scale of the position coordinates; by default what the file's own position table was made with."""
    sample_size: int | None = None
    """Side in latents that the model was trained at (pixels / 8); needed where the file holds no position table."""
    ema: Annotated[bool, tyro.conf.arg(help_behavior_hint="(default: the average, where the file has one)")] = True
    """Take the averaged weights; --no-ema takes the raw ones."""


def main(argv: list[str]) -> int:
    flags = program.parse(Flags, argv, prog="python -m pixart_jax convert")
    if not flags.src.exists():
        raise UserError(f"{flags.src} does not exist: give a .pth, a .pt or a diffusers folder")
    if flags.out.exists() and (not flags.out.is_dir() or any(flags.out.iterdir())):
        raise UserError(f"{flags.out} is there already: name a new folder")
    component, origin = from_folder(flags) if flags.src.is_dir() else from_file(flags)
    component.save(flags.out)
    print(f"{flags.out}: {describe(component)}\nfrom {origin}")
    return 0


def from_folder(flags: Flags):
    """A diffusers folder's transformer, its positions rescaled where a flag says so."""
    from pixart_jax.weights.component import load_component

    source = flags.src / "transformer" if (flags.src / "model_index.json").is_file() else flags.src
    if flags.heads is not None or flags.sample_size is not None:
        raise UserError(f"--heads and --sample-size are for .pth and .pt files: {source / 'config.json'} says both")
    component = load_component(source)
    if flags.scale is not None:
        component = component.replace(config=dataclasses.replace(component.config, position_scale=flags.scale))
    return component, source


def from_file(flags: Flags):
    """An official checkpoint: PixArt's or DiT's, told apart by their tensors."""
    from pixart_jax.weights import component, dit, transformer
    from pixart_jax.weights.files import open_tensors
    from pixart_jax.weights.streaming import read

    branches = ("state_dict_ema", "ema", "state_dict", "model")
    tensors = open_tensors(flags.src, branches if flags.ema else ("state_dict", "model"))
    shapes = {key: tensors.shape(key) for key in tensors}
    told = {"heads": flags.heads, "sample_size": flags.sample_size}
    told["pos_embed"] = tensors["pos_embed"] if "pos_embed" in shapes else None
    if CAPTIONS in shapes:
        config = transformer.config_from_official(shapes, position_scale=flags.scale, **told)
        kind, table, ignore = component.Transformer, transformer.OFFICIAL, transformer.OFFICIAL_IGNORE
    elif LABELS in shapes:
        config = dit.config_from_official(shapes, **told)
        if flags.scale is not None:
            config = dataclasses.replace(config, position_scale=flags.scale)
        kind, table, ignore = component.DiT, dit.OFFICIAL, dit.OFFICIAL_IGNORE
    else:
        held = ", ".join(list(shapes)[:4])
        raise UserError(f"{flags.src} is neither a PixArt transformer ({CAPTIONS}) nor a DiT ({LABELS}): it holds {held} …")
    wanted = parameter_shapes(kind(config, {}).module)
    params = read(table, wanted, tensors, ignore=ignore)
    branch = getattr(tensors, "branch", None)
    return kind(config, params), f"{flags.src}" + (f" ({branch})" if branch else "")


def parameter_shapes(module):
    """The tree of a transformer's or DiT's parameter shapes; nothing is computed."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    config = module.config
    inputs = [jnp.zeros((1, config.patch_size, config.patch_size, config.in_channels)), jnp.zeros((1,))]
    if hasattr(config, "caption_width"):
        inputs += [jnp.zeros((1, 1, config.caption_width)), jnp.ones((1,), int), jnp.ones((1, 2)), jnp.ones((1,))]
    else:
        inputs += [jnp.zeros((1,), int)]
    return nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])


def describe(component) -> str:
    """The model in one line."""
    import jax

    count = sum(leaf.size for leaf in jax.tree.leaves(component.params))
    facts = {name: value for name, value in dataclasses.asdict(component.config).items() if value is not None}
    return f"{type(component).__name__}, {count:,} parameters, {json.dumps(facts)[1:-1]}".replace('"', "")
