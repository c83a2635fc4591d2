"""A whole model on disk, in the diffusers form: transformer, text encoder, VAE, tokenizer,
scheduler and their index."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pixart_jax.errors import UserError, nearest
from pixart_jax.pipeline import sampling as samplings
from pixart_jax.pipeline import scheduler as schedulers
from pixart_jax.text import load_tokenizer, save_tokenizer

INDEX = "model_index.json"
# those with weights, in the order in which a drawing needs them
PARTS = ("text_encoder", "transformer", "vae")
_CLASSES = {
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "transformer": ["diffusers", "PixArtTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
_ALPHA, _SIGMA = "PixArtAlphaPipeline", "PixArtSigmaPipeline"
# where the transformer's config does not say; diffusers keeps them in its pipelines' code
_TEXT_TOKENS = {_ALPHA: 120, _SIGMA: 300}
# the version whose PixArtAlphaPipeline is tested to open what is written here
_DIFFUSERS = "0.42.1"


def check(folder: str | os.PathLike) -> Path:
    """The folder, or UserError that says what of a model is missing there."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"no model folder {folder}: give a diffusers folder (model_index.json, transformer/, "
            "text_encoder/, vae/ …)"
        )
    missing = [
        name
        for name in ("transformer", "text_encoder", "vae", "tokenizer", "scheduler")
        if not (folder / name).is_dir()
    ]
    if missing:
        found = "a part of a model" if (folder / "config.json").is_file() else "not a whole model"
        raise UserError(
            f"{folder} is {found}: it has no {', '.join(f'{name}/' for name in missing)}"
        )
    pipeline_class(folder)
    return folder


def pipeline_class(folder: Path) -> str:
    """The pipeline that the folder's index names; UserError where it names none that is known."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {INDEX}: it is no whole model, or was never wholly written"
        ) from None
    except ValueError as fault:
        raise UserError(f"{folder / INDEX} is no JSON: {fault}") from None
    name = index.get("_class_name") if isinstance(index, dict) else None
    if name not in _TEXT_TOKENS:
        raise UserError(
            f"{folder / INDEX} names {name!r}{nearest(str(name), _TEXT_TOKENS)}: that pipeline is "
            "not known"
        )
    return name


def configs(folder: str | os.PathLike):
    """(TransformerConfig, VAEConfig) of a model folder; no weight is read. UserError where its
    parts do not fit each other."""
    from pixart_jax.weights import transformer, vae

    folder = check(folder)
    values = _config(folder / "transformer")
    config = transformer.config_from_json(values)
    tokens = _TEXT_TOKENS[pipeline_class(folder)]
    if "text_tokens" not in values:
        if pipeline_class(folder) == _ALPHA and transformer.looks_like_sigma(config):
            raise UserError(
                f"{folder / INDEX} names {_ALPHA}, but transformer/ looks like PixArt-Σ's, which "
                f"reads {_TEXT_TOKENS[_SIGMA]} tokens of a "
                f'prompt: name {_SIGMA} in {INDEX}; or put "text_tokens": {tokens} into '
                "transformer/config.json if it is a PixArt-α"
            )
        config = dataclasses.replace(config, text_tokens=tokens)
    _check_fit(folder, config, tokens)
    return config, vae.config_from_json(_config(folder / "vae"))


def _config(folder: Path) -> dict:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json") from None
    except ValueError as fault:
        raise UserError(f"{folder / 'config.json'} is no JSON: {fault}") from None
    if not isinstance(values, dict):
        raise UserError(f"{folder / 'config.json'} holds no JSON object")
    return values


def _check_fit(folder: Path, transformer, tokens: int) -> None:
    """A Σ transformer in an α folder, or the reverse, would be drawn with texts cut at the wrong
    length; another T5 not at all."""
    from pixart_jax.weights.component import NULL_CAPTION
    from pixart_jax.weights.files import SafetensorsFile

    named = pipeline_class(folder)
    wants = {"its config.json": transformer.text_tokens}
    if (path := folder / "transformer" / NULL_CAPTION).is_file():
        null = SafetensorsFile(path)
        wants[f"its {NULL_CAPTION}"] = (
            null.shape("null_caption")[0] if "null_caption" in null else transformer.text_tokens
        )
    of_pipeline = {count: name for name, count in _TEXT_TOKENS.items()}
    for where, count in wants.items():
        if count != tokens and count in of_pipeline:
            raise UserError(
                f"{folder / INDEX} names {named}, which reads {tokens} tokens of a prompt, but "
                f"transformer/ wants {count} ({where}): "
                f"it is a transformer of {of_pipeline[count]}; name that one in {INDEX}, or put "
                "the right transformer there"
            )
    width = _config(folder / "text_encoder").get("d_model", transformer.caption_width)
    if width != transformer.caption_width:
        raise UserError(
            f"{folder}: text_encoder/ gives states of width {width}, transformer/ wants "
            f"{transformer.caption_width}: they are of two models"
        )


def check_weights(folder: str | os.PathLike, parts: Sequence[str] = PARTS) -> None:
    """UserError where the weights of a part are missing, cut short or damaged, as their headers and
    sizes tell; nothing else is read.

    PyTorch's files have no such header: they are judged when they are opened.
    """
    from pixart_jax.weights.files import TORCH_SUFFIXES, find_weights, open_tensors

    for part in parts:
        path = find_weights(Path(folder) / part)
        if path.name.removesuffix(".index.json").endswith(TORCH_SUFFIXES):
            continue
        tensors = open_tensors(path)
        for key in tensors:
            tensors.shape(key)  # opens each shard


def read(
    folder: str | os.PathLike,
    dtype=None,
    mesh=None,
    parts: Sequence[str] = PARTS,
    quantization: str | None = None,
    cache: str | os.PathLike | None = None,
) -> dict:
    """{'transformer', 'text_encoder', 'vae', 'tokenizer', 'scheduler', 'sampling'} of a model
    folder; of the first three only ``parts``.

    quantization: of the text encoder. cache: as ``load_component``.
    """
    from pixart_jax.weights.component import load_component

    folder = check(folder)
    config, _ = configs(folder)
    found = {
        "tokenizer": load_tokenizer(folder / "tokenizer"),
        "scheduler": schedulers.read(folder / "scheduler"),
        "sampling": samplings.read(folder),
    }
    for name in parts:
        held = quantization if name == "text_encoder" else None
        found[name] = load_component(
            folder / name, dtype=dtype, mesh=mesh, quantization=held, cache=cache
        )
    if "transformer" in found and found["transformer"].config.text_tokens != config.text_tokens:
        own = dataclasses.replace(found["transformer"].config, text_tokens=config.text_tokens)
        found["transformer"] = found["transformer"].replace(config=own)
    return found


def write(
    folder: str | os.PathLike,
    *,
    transformer,
    text_encoder,
    vae,
    tokenizer,
    scheduler: schedulers.SchedulerConfig,
    sampling: samplings.SamplingConfig,
) -> None:
    """Write the parts beside the folder and then put each in its place, the index last: an
    interrupted call leaves no half part.

    Where several processes share a part's parameters all must call it; the first one writes.
    """
    import jax

    folder = Path(folder)
    if jax.process_index() > 0:
        for part in (transformer, text_encoder, vae):
            part.save(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving.", dir=folder))
    try:
        transformer.save(staging / "transformer")
        text_encoder.save(staging / "text_encoder")
        vae.save(staging / "vae")
        save_tokenizer(tokenizer, staging / "tokenizer")
        schedulers.write(scheduler, staging / "scheduler")
        samplings.write(sampling, staging)
        index = {
            "_class_name": _SIGMA
            if transformer.config.text_tokens == _TEXT_TOKENS[_SIGMA]
            else _ALPHA,
            "_diffusers_version": _DIFFUSERS,
            **_CLASSES,
            "tokenizer": ["transformers", type(tokenizer).__name__],
        }
        (staging / INDEX).write_text(json.dumps(dict(sorted(index.items())), indent=2) + "\n")
        for part in sorted(staging.iterdir(), key=lambda path: path.name == INDEX):
            target = folder / part.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(part, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
