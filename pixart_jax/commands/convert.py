"""``python -m pixart_jax convert SRC OUT``: a released checkpoint or adapter → a folder that this
project and diffusers open, and the reverse."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from pixart_jax import cli
from pixart_jax.errors import UserError
from pixart_jax.files import write_json
from pixart_jax.pipeline.lora_flags import LoraFlags
from pixart_jax.remote_path import Location

if TYPE_CHECKING:
    from pixart_jax.models.configs import TransformerConfig

LABELS = "y_embedder.embedding_table.weight"  # only a DiT has it
CAPTIONS = "y_embedder.y_proj.fc1.weight"  # only a PixArt transformer has it
NULL_CAPTION = "y_embedder.y_embedding"
SIZES = "csize_embedder.mlp.0.weight"  # only the multi-scale PixArt-α has it
DIFFUSERS = "adaln_single.linear.weight"  # a PixArt transformer under diffusers' names


@dataclasses.dataclass(frozen=True)
class Flags:
    """Convert a PixArt .pth, a DiT .pt, a .safetensors file of either or a diffusers folder into a
    component folder (config.json and safetensors), or into one .safetensors file under the official
    code's names. A LoRA of any known layout becomes a folder that peft and diffusers open.

    A .pth does not say how many heads its model has, nor always how its positions are scaled; for
    the released widths (384, 768, 1024, 1152) the heads are known.
    """

    src: tyro.conf.Positional[Location]
    """A .pth, .pt or .safetensors file with the official or diffusers' names, behind any prefix, a
    diffusers transformer folder, a whole model or its hub id (its transformer is taken), or the
    file, folder or hub id of a ControlNet or a LoRA."""
    out: tyro.conf.Positional[Path]
    """The new folder; with --format official the new file, its name ending in .safetensors."""
    format: Literal["folder", "official"] = "folder"
    """folder: what this project and diffusers open. official: the official PixArt or DiT code's
    names, in one .safetensors file."""
    heads: int | None = None
    """Attention heads; needed for a width that no released model has."""
    scale: float | None = None
    """Scale of the position coordinates; by default what the file's own position table was made
    with, else pixels / 512 (PixArt-α: at least 1)."""
    sample_size: int | None = None
    """Side in latents that the model was trained at (pixels / 8); needed where the file holds no
    position table."""
    tokens: int | None = None
    """Length of a caption, 120 for PixArt-α and 300 for PixArt-Σ; needed for a PixArt-Σ model that
    does not say it: one without its null caption, or diffusers' transformer folder alone."""
    ema: Annotated[
        bool, tyro.conf.arg(help_behavior_hint="(default: the average, where the file has one)")
    ] = True
    """Take the averaged weights; --no-ema takes the raw ones."""
    branch: str | None = None
    """The part of a checkpoint to take, as 'state_dict' or 'ema_model'; by default the only one, or
    the only average."""
    variant: str | None = None
    """Of a folder's weight files, such as fp16; by default the ones without, or the only ones."""
    base: Location | None = None
    """Of a LoRA: a folder or hub id of the model that it adapts, for its layers' names and sizes;
    by default PixArt's XL/2. Of a ControlNet: its model, which --format official writes beside
    it."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of a LoRA's new files."""
    loras: tyro.conf.OmitArgPrefixes[LoraFlags] = LoraFlags()


def main(argv: list[str]) -> int:
    flags = cli.parse(Flags, argv, prog="python -m pixart_jax convert")
    from pixart_jax.weights.hub import model_folder  # imports JAX, which --help does not wait for
    from pixart_jax.weights.lora import is_adapter

    source = model_folder(flags.src, ("transformer",), variant=flags.variant)
    flags = dataclasses.replace(flags, src=source)
    if not flags.src.exists():
        raise UserError(
            f"{flags.src} does not exist: give a .pth, a .pt, a .safetensors or a diffusers folder"
        )
    check_out(flags)
    if is_adapter(source):
        return convert_adapter(source, flags)
    part, origin = from_folder(flags) if flags.src.is_dir() else from_file(flags)
    part = with_adapters(part, flags)
    note = ""
    if flags.format == "official":
        note = save_official(part, flags)
    else:
        save(part, flags)
    print(f"{flags.out}: {describe(part)}\nfrom {origin}{note}")
    return 0


def from_folder(flags: Flags) -> tuple[Any, str]:
    """(the transformer of a diffusers folder, its positions rescaled where a flag says so; its
    origin in words)."""
    from pixart_jax.pipeline import folder
    from pixart_jax.weights import component

    whole = (flags.src / folder.INDEX).is_file()
    source = flags.src / "transformer" if whole else flags.src
    if flags.heads is not None or flags.sample_size is not None:
        raise UserError(
            "--heads and --sample-size are for .pth, .pt and .safetensors files: "
            f"{source / 'config.json'} says both"
        )
    part: Any = component.load_component(
        source, variant=flags.variant, branch=flags.branch, average=flags.ema
    )
    changes: dict[str, Any] = {} if flags.scale is None else {"position_scale": flags.scale}
    config: Any = part.config
    stated = None
    if isinstance(part, component.Transformer):
        values = json.loads((source / component.CONFIG).read_text(encoding="utf-8"))
        if "text_tokens" in values or "null_caption" in part.params:
            stated = config.text_tokens
        elif whole and folder.pipeline_class(flags.src) == "PixArtSigmaPipeline":
            stated = 300
        changes["text_tokens"] = caption_tokens(config, stated, flags)
    elif flags.tokens is not None or (flags.scale and not isinstance(part, component.DiT)):
        kind = type(part).__name__
        raise UserError(f"--tokens and --scale are for a transformer: {source} is a {kind}")
    if changes:
        part = part.replace(config=dataclasses.replace(config, **changes))
    return part, f"{source}{assumed(part, stated, flags)}"


def from_file(flags: Flags) -> tuple[Any, str]:
    """(an official checkpoint, PixArt's or DiT's by its tensors; its origin in words)."""
    from flax import linen as nn

    from pixart_jax.weights import component, controlnet, dit, hed, transformer
    from pixart_jax.weights.checkpoints import select
    from pixart_jax.weights.files import open_tensors
    from pixart_jax.weights.streaming import read

    opened = open_tensors(flags.src)
    found = select(opened, controlnet.ANCHORS) if flags.branch is None else None
    # an official ControlNet's file holds its base too, which --branch base_model names
    controls = found is not None and any(key in found.tensors for key in controlnet.ANCHORS)
    if found is None or not controls:
        found = select(opened, transformer.ANCHORS, branch=flags.branch, average=flags.ema)
    tensors = found.tensors
    names = {name: name for name in tensors}
    theirs = DIFFUSERS in names  # else the official names
    if theirs:
        names = transformer.official_names(tensors)
    shapes = {name: tensors.shape(key) for name, key in names.items()}
    table = tensors[names["pos_embed"]] if "pos_embed" in shapes else None
    given = {"heads": flags.heads, "sample_size": flags.sample_size, "pos_embed": table}
    stated = shapes[NULL_CAPTION][0] if NULL_CAPTION in shapes else None
    config: Any
    kind: Any
    if controls:
        tensors = component.under_current_names(tensors, controlnet)
        config = controlnet.config_from_json(controlnet.config_of_tensors(tensors, flags.heads))
        kind, (mapping, ignore) = component.ControlNet, controlnet.table(config, {}, tensors)
    elif CAPTIONS in shapes:
        tokens = flags.tokens if stated is None else None
        if theirs and table is None and flags.sample_size is None and SIZES not in shapes:
            raise UserError(
                f"{flags.src} has diffusers' names: give the folder it is in, with its "
                "config.json, or --sample-size, the pixels / 8 it was trained at"
            )
        config = transformer.config_from_official(
            shapes, position_scale=flags.scale, text_tokens=tokens, **given
        )
        caption_tokens(config, stated, flags)
        kind = component.Transformer
        mapping, ignore = transformer.table(config, {}, tensors)
    elif LABELS in shapes:
        if flags.tokens is not None:
            raise UserError(
                f"--tokens is for a PixArt transformer: {flags.src} is a DiT, which reads no "
                "captions"
            )
        config = dit.config_from_official(shapes, **given)
        if flags.scale is not None:
            config = dataclasses.replace(config, position_scale=flags.scale)
        kind, mapping, ignore = component.DiT, dit.OFFICIAL, dit.OFFICIAL_IGNORE
    elif hed.ANCHORS[0] in shapes:
        config = hed.config_from_json(hed.config_of_tensors(tensors))
        kind, (mapping, ignore) = component.HED, hed.table(config, {})
    else:
        raise UserError(
            f"{tensors.source} is neither a PixArt transformer ({CAPTIONS}) nor a DiT ({LABELS}): "
            f"it holds {', '.join(list(shapes)[:4])} …"
        )
    wanted = nn.unbox(kind.param_shapes(config))
    part = kind(config, read(mapping, wanted, tensors, ignore=ignore))
    place = f" ({found.place})" if found.place else ""
    notes = "".join(f"; {note}" for note in found.notes)
    return part, f"{flags.src}{place}{notes}{assumed(part, stated, flags)}"


def caption_tokens(config: TransformerConfig, stated: int | None, flags: Flags) -> int:
    """The captions' length: as the source states, else the flag's, else PixArt-α's.

    UserError where the flag contradicts the source, and where neither gives it of a model that can
    only be a PixArt-Σ, which as a PixArt-α would read less than half of a long caption.
    """
    from pixart_jax.weights.transformer import looks_like_sigma

    if stated is not None and flags.tokens not in (None, stated):
        known = {120: " (PixArt-α)", 300: " (PixArt-Σ)"}.get(stated, "")
        raise UserError(
            f"--tokens {flags.tokens}: {flags.src} says itself that its captions are of {stated} "
            f"tokens{known}"
        )
    if stated is None and flags.tokens is None and looks_like_sigma(config):
        raise UserError(
            f"{flags.src} does not say how long its captions are, and looks like PixArt-Σ: give "
            "--tokens 300, or 120 if it is PixArt-α"
        )
    return next((tokens for tokens in (stated, flags.tokens) if tokens is not None), 120)


def assumed(part: Any, stated: int | None, flags: Flags) -> str:
    """What had to be assumed of a transformer, in words."""
    if stated is not None or flags.tokens is not None or not hasattr(part.config, "text_tokens"):
        return ""
    return (
        f"; it does not say how long its captions are: {part.config.text_tokens} tokens, as "
        "PixArt-α's (PixArt-Σ: give --tokens 300)"
    )


def check_out(flags: Flags) -> None:
    """UserError where OUT exists or cannot be made, before gigabytes are read."""
    out, folder = flags.out, flags.format == "folder"
    if not folder and out.suffix != ".safetensors":
        raise UserError(f"{out}: --format official writes one .safetensors file: name it so")
    if os.path.lexists(out) and not (folder and out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there already: name a new {'folder' if folder else 'file'}")
    above = next(parent for parent in out.absolute().parents if os.path.lexists(parent))
    if not above.is_dir():
        raise UserError(f"cannot write {out}: {above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {out}: {above} may not be written to")


def save(part: Any, flags: Flags) -> None:
    """Write the component's folder. The official code samples with the null caption of its file;
    the folder says so."""
    from pixart_jax.pipeline import sampling_config

    with staged_folder(flags.out) as folder:
        part.save(folder)
        if flags.src.is_file() and "null_caption" in part.params:
            write_json(folder / sampling_config.FILE, {"null": "embedding"})


def convert_adapter(src: Path, flags: Flags) -> int:
    """Write the LoRA at ``src`` as peft's folder, with diffusers' file in it."""
    import jax.numpy as jnp
    from flax import linen as nn

    from pixart_jax.models.configs import TransformerConfig
    from pixart_jax.models.lora import modules
    from pixart_jax.pipeline.folder import INDEX
    from pixart_jax.weights import component, lora, transformer
    from pixart_jax.weights.files import read_json
    from pixart_jax.weights.hub import model_folder

    if flags.format != "folder" or flags.loras.lora:
        raise UserError(f"{src} is a LoRA: --format official and --lora are for a model")
    config = TransformerConfig(size_conditions=True)
    if flags.base is not None:
        base = model_folder(flags.base, ("transformer",))
        base = base / "transformer" if (base / INDEX).is_file() else base
        config = transformer.config_from_json(read_json(base / component.CONFIG))
    shapes = nn.unbox(component.Transformer.param_shapes(config))
    try:
        adapter = lora.read(src, shapes, alpha=flags.loras.lora_alpha)
    except UserError as error:
        if flags.base or "of another model" not in str(error):
            raise
        raise UserError(f"{error}; --base names the model that it is of, if not XL/2") from None
    with staged_folder(flags.out) as folder:
        lora.save(folder, adapter.tree, dtype=jnp.dtype(flags.dtype))
    found = [module for _, module in modules(adapter.tree)]
    ranks = sorted({module["a"].shape[-1] for module in found})
    kind = "DoRA" if any("magnitude" in module for module in found) else "LoRA"
    print(f"{flags.out}: {kind} of rank {', '.join(map(str, ranks))}\nfrom {src}")
    return 0


def with_adapters(part: Any, flags: Flags) -> Any:
    """The transformer with the LoRAs of the flags merged into it."""
    from pixart_jax.weights import component

    if flags.loras.lora and not isinstance(part, component.Transformer):
        raise UserError(f"--lora is for a transformer: {flags.src} is a {type(part).__name__}")
    found = flags.loras.read(part.config)
    if not found:
        return part
    return part.with_adapters([adapter.tree for adapter, _ in found], [w for _, w in found])


@contextlib.contextmanager
def staged_folder(name: Path) -> Iterator[Path]:
    """A folder that is renamed to ``name`` when the block ends: it is written completely or not at
    all."""
    out = name.absolute()
    staged = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staged.mkdir()
        yield staged
        os.replace(staged, out)
    except OSError as error:
        raise UserError(f"cannot write {name}: {error.strerror or error}") from None
    except UserError as error:  # of a file in it
        raise UserError(str(error).replace(str(staged), str(name))) from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def save_official(part: Any, flags: Flags) -> str:
    """Write one file under the official code's names; return a line about what it lacks."""
    from pixart_jax.weights import component, dit, transformer
    from pixart_jax.weights.files import write_safetensors

    config: Any = part.config
    if isinstance(part, component.Transformer):
        tensors = transformer.to_official(config, part.params)
    elif isinstance(part, component.DiT):
        tensors = dit.to_official(config, part.params)
    elif isinstance(part, component.ControlNet):
        return save_control(part, flags)
    else:
        kind = type(part).__name__
        what = "--format official is for a transformer, a DiT or a ControlNet"
        raise UserError(f"{what}: the source is a {kind}")
    write_safetensors(flags.out, tensors)
    if isinstance(part, component.DiT) or NULL_CAPTION in tensors:
        return ""
    return (
        f"\nwithout {NULL_CAPTION}, which the source does not hold: the official code loads it "
        "with strict=False"
    )


def save_control(part: Any, flags: Flags) -> str:
    """:func:`save_official` of a ControlNet, with the model of --base in the file."""
    from pixart_jax.weights import component, controlnet
    from pixart_jax.weights.hub import model_folder

    base: Any = None
    if flags.base is not None:
        folder = model_folder(flags.base, ("transformer",))
        whole = folder / "transformer"
        base = component.load_component(whole if whole.is_dir() else folder)
        base.with_controlnet(part)  # raises where they do not fit
    part.save_official(flags.out, base)
    missing = f"{controlnet.BASE}…, which the official code loads with it: --base names the model"
    return f"\nwithout {missing}" if base is None else ""


def describe(part: Any) -> str:
    """The model in one line."""
    import jax

    count = sum(leaf.size for leaf in jax.tree.leaves(part.params))
    config = {k: v for k, v in dataclasses.asdict(part.config).items() if v is not None}
    return f"{type(part).__name__}, {count:,} parameters, {json.dumps(config)[1:-1]}".replace(
        '"', ""
    )
