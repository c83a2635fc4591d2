"""``python -m pixart_jax convert SRC OUT``: a released checkpoint → a folder that this project and
diffusers open, and the reverse."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pixart_jax import cli
from pixart_jax.errors import UserError

PATCHES = "x_embedder.proj.weight"  # any official model has it
LABELS = "y_embedder.embedding_table.weight"  # only a DiT has it
CAPTIONS = "y_embedder.y_proj.fc1.weight"  # only a PixArt transformer has it
NULL_CAPTION = "y_embedder.y_embedding"
DIFFUSERS = "adaln_single.linear.weight"  # a PixArt transformer under diffusers' names
WRAPPERS = ("module.", "_orig_mod.", "model.")  # what PyTorch's wrappers put before every name


@dataclasses.dataclass(frozen=True)
class Flags:
    """Convert a PixArt .pth, a DiT .pt, a .safetensors file of either or a diffusers folder into a
    component folder (config.json and safetensors), or into one .safetensors file under the official
    code's names.

    A .pth does not say how many heads its model has, nor always how its positions are scaled; for
    the released widths (384, 768, 1024,
    1152) the heads are known.
    """

    src: tyro.conf.Positional[Path]
    """An official .pth, .pt or .safetensors file, a diffusers transformer folder, or a whole model
    (its transformer is taken)."""
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


def main(argv: list[str]) -> int:
    flags = cli.parse(Flags, argv, prog="python -m pixart_jax convert")
    if not flags.src.exists():
        raise UserError(
            f"{flags.src} does not exist: give a .pth, a .pt, a .safetensors or a diffusers folder"
        )
    check_out(flags)
    component, origin = from_folder(flags) if flags.src.is_dir() else from_file(flags)
    if flags.format == "official":
        note = save_official(component, flags.out)
    else:
        note = save(component, flags.out, official=flags.src.is_file())
    print(f"{flags.out}: {describe(component)}\nfrom {origin}" + (f"\n{note}" if note else ""))
    return 0


# ---- reading ----


def from_folder(flags: Flags):
    """A diffusers folder's transformer, its positions rescaled where a flag says so."""
    from pixart_jax.pipeline import folder
    from pixart_jax.weights import component

    whole = (flags.src / folder.INDEX).is_file()
    source = flags.src / "transformer" if whole else flags.src
    if flags.heads is not None or flags.sample_size is not None:
        raise UserError(
            "--heads and --sample-size are for .pth, .pt and .safetensors files: "
            f"{source / 'config.json'} says both"
        )
    part = component.load_component(source)
    changes = {} if flags.scale is None else {"position_scale": flags.scale}
    said = None
    if isinstance(part, component.Transformer):
        if (
            "text_tokens" in json.loads((source / component.CONFIG).read_text(encoding="utf-8"))
            or "null_caption" in part.params
        ):
            said = part.config.text_tokens
        elif whole and folder.pipeline_class(flags.src) == "PixArtSigmaPipeline":
            said = 300
        changes["text_tokens"] = caption_tokens(part.config, said, flags)
    elif flags.tokens is not None or (
        flags.scale is not None and not isinstance(part, component.DiT)
    ):
        raise UserError(
            f"--tokens and --scale are for a transformer: {source} is a {type(part).__name__}"
        )
    if changes:
        part = part.replace(config=dataclasses.replace(part.config, **changes))
    return part, f"{source}" + assumed(part, said, flags)


def from_file(flags: Flags):
    """An official checkpoint: PixArt's or DiT's, told apart by their tensors."""
    from pixart_jax.weights import component, dit, transformer
    from pixart_jax.weights.files import open_tensors
    from pixart_jax.weights.streaming import read

    branches = ("state_dict_ema", "ema", "state_dict", "model")
    tensors = open_tensors(flags.src, branches if flags.ema else ("state_dict", "model"))
    names = official_names(tensors)
    shapes = {name: tensors.shape(key) for name, key in names.items()}
    told = {"heads": flags.heads, "sample_size": flags.sample_size}
    told["pos_embed"] = tensors[names["pos_embed"]] if "pos_embed" in shapes else None
    said = shapes[NULL_CAPTION][0] if NULL_CAPTION in shapes else None
    if CAPTIONS in shapes:
        tokens = flags.tokens if said is None else None
        config = transformer.config_from_official(
            shapes, position_scale=flags.scale, text_tokens=tokens, **told
        )
        caption_tokens(config, said, flags)
        kind, table, ignore = (
            component.Transformer,
            transformer.official(config),
            transformer.OFFICIAL_IGNORE,
        )
    elif LABELS in shapes:
        if flags.tokens is not None:
            raise UserError(
                f"--tokens is for a PixArt transformer: {flags.src} is a DiT, which reads no "
                "captions"
            )
        config = dit.config_from_official(shapes, **told)
        if flags.scale is not None:
            config = dataclasses.replace(config, position_scale=flags.scale)
        kind, table, ignore = component.DiT, dit.OFFICIAL, dit.OFFICIAL_IGNORE
    elif DIFFUSERS in shapes:
        raise UserError(
            f"{flags.src} has diffusers' names: give the folder it is in, with its config.json"
        )
    else:
        held = ", ".join(list(shapes)[:4])
        raise UserError(
            f"{flags.src} is neither a PixArt transformer ({CAPTIONS}) nor a DiT ({LABELS}): it "
            f"holds {held} …"
        )
    wanted = parameter_shapes(kind(config, {}).module)
    params = read(table, wanted, tensors.renamed(names), source=str(flags.src), ignore=ignore)
    part = kind(config, params)
    branch = getattr(tensors, "branch", None)
    return part, f"{flags.src}" + (f" ({branch})" if branch else "") + assumed(part, said, flags)


def official_names(keys) -> dict[str, str]:
    """{official name: key in the file}, without what wrappers (data parallel, compiled, averaged)
    put before each."""
    prefix = next((key.removesuffix(PATCHES) for key in keys if key.endswith(PATCHES)), "")
    rest = prefix
    while rest.startswith(WRAPPERS):
        rest = rest[rest.index(".") + 1 :]
    return {key: key for key in keys} if rest else {key.removeprefix(prefix): key for key in keys}


def caption_tokens(config, said: int | None, flags: Flags) -> int:
    """The captions' length: what the source says, else the flag, else PixArt-α's.

    UserError where the flag contradicts the source, and where neither says it of a model that can
    only be a PixArt-Σ: as a PixArt-α it would open without complaint and read less than half of a
    long caption.
    """
    from pixart_jax.weights.transformer import looks_like_sigma

    if said is not None and flags.tokens not in (None, said):
        known = {120: " (PixArt-α)", 300: " (PixArt-Σ)"}.get(said, "")
        raise UserError(
            f"--tokens {flags.tokens}: {flags.src} says itself that its captions are of {said} "
            f"tokens{known}"
        )
    if said is None and flags.tokens is None and looks_like_sigma(config):
        raise UserError(
            f"{flags.src} does not say how long its captions are, and looks like PixArt-Σ: give "
            "--tokens 300, or 120 if it is PixArt-α"
        )
    return next((tokens for tokens in (said, flags.tokens) if tokens is not None), 120)


def assumed(part, said: int | None, flags: Flags) -> str:
    """What had to be taken for granted of a transformer."""
    if said is not None or flags.tokens is not None or not hasattr(part.config, "text_tokens"):
        return ""
    return (
        f"; it does not say how long its captions are: {part.config.text_tokens} tokens, as "
        "PixArt-α's (PixArt-Σ: give --tokens 300)"
    )


def parameter_shapes(module):
    """The tree of a transformer's or DiT's parameter shapes; nothing is computed."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    config = module.config
    inputs = [
        jnp.zeros((1, config.patch_size, config.patch_size, config.in_channels)),
        jnp.zeros((1,)),
    ]
    if hasattr(config, "caption_width"):
        inputs += [
            jnp.zeros((1, 1, config.caption_width)),
            jnp.ones((1,), int),
            jnp.ones((1, 2)),
            jnp.ones((1,)),
        ]
    else:
        inputs += [jnp.zeros((1,), int)]
    return nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])


# ---- writing ----


def check_out(flags: Flags) -> None:
    """UserError where OUT is there or cannot be made, before gigabytes are read."""
    out = flags.out
    if flags.format == "official" and out.suffix != ".safetensors":
        raise UserError(f"{out}: --format official writes one .safetensors file: name it so")
    if os.path.lexists(out) and not (
        flags.format == "folder" and out.is_dir() and not any(out.iterdir())
    ):
        raise UserError(
            f"{out} is there already: name a new {'folder' if flags.format == 'folder' else 'file'}"
        )
    above = next(parent for parent in out.absolute().parents if os.path.lexists(parent))
    if not above.is_dir():
        raise UserError(f"cannot write {out}: {above} is no folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {out}: {above} may not be written to")


def save(component, out: Path, *, official: bool) -> str:
    """The component's folder, whole or not at all: written beside its place and then renamed.

    official: the source was the official code's, which draws with the null caption that it holds;
    the folder says so.
    """
    from pixart_jax.files import write_json
    from pixart_jax.pipeline import sampling_config

    staged = None
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
        component.save(staged)
        if official and "null_caption" in component.params:
            write_json(staged / sampling_config.FILE, {"null": "embedding"})
        os.chmod(staged, 0o777 & ~_umask())  # mkdtemp's folders are for their owner alone
        os.replace(staged, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    except UserError as error:  # of a file in it
        raise UserError(str(error).replace(str(staged), str(out))) from None
    finally:
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)
    return ""


def save_official(part, out: Path) -> str:
    """One file under the official code's names; a line about what it lacks."""
    from pixart_jax.weights import component, dit, transformer
    from pixart_jax.weights.files import write_safetensors

    to_official = {
        component.Transformer: transformer.to_official,
        component.DiT: dit.to_official,
    }.get(type(part))
    if to_official is None:
        raise UserError(
            "--format official is for a transformer or a DiT: the source is a "
            f"{type(part).__name__}"
        )
    tensors = to_official(part.config, part.params)
    write_safetensors(out, tensors)
    if type(part) is component.Transformer and NULL_CAPTION not in tensors:
        return (
            f"without {NULL_CAPTION}, which the source does not hold: the official code loads "
            "it with strict=False"
        )
    return ""


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def describe(component) -> str:
    """The model in one line."""
    import jax

    count = sum(leaf.size for leaf in jax.tree.leaves(component.params))
    facts = {
        name: value
        for name, value in dataclasses.asdict(component.config).items()
        if value is not None
    }
    return f"{type(component).__name__}, {count:,} parameters, {json.dumps(facts)[1:-1]}".replace(
        '"', ""
    )
