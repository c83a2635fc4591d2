"""A whole model on disk, in the diffusers form: transformer, text encoder, VAE, tokenizer, scheduler and their index."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

from pixart_jax import tokenizer as tokenizers
from pixart_jax.errors import UserError, nearest
from pixart_jax.pipeline import sampling as samplings
from pixart_jax.pipeline import scheduler as schedulers

INDEX = "model_index.json"
_CLASSES = {
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "transformer": ["diffusers", "PixArtTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
_ALPHA, _SIGMA = "PixArtAlphaPipeline", "PixArtSigmaPipeline"
_TEXT_TOKENS = {_ALPHA: 120, _SIGMA: 300}  # where the transformer's config does not say; diffusers keeps them in its pipelines' code
_DIFFUSERS = "0.42.1"  # the version whose PixArtAlphaPipeline is tested to open what is written here


def check(folder: str | os.PathLike) -> Path:
    """The folder, or UserError that says what of a model is missing there."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no model folder {folder}: give a diffusers folder (model_index.json, transformer/, text_encoder/, vae/ …)")
    missing = [name for name in ("transformer", "text_encoder", "vae", "tokenizer", "scheduler") if not (folder / name).is_dir()]
    if missing:
        found = "a part of a model" if (folder / "config.json").is_file() else "not a whole model"
        raise UserError(f"{folder} is {found}: it has no {', '.join(f'{name}/' for name in missing)}")
    pipeline_class(folder)
    return folder


def pipeline_class(folder: Path) -> str:
    """The pipeline that the folder's index names; UserError where it names none that is known."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no {INDEX}: it is no whole model, or was never wholly written") from None
    except ValueError as fault:
        raise UserError(f"{folder / INDEX} is no JSON: {fault}") from None
    name = index.get("_class_name") if isinstance(index, dict) else None
    if name not in _TEXT_TOKENS:
        raise UserError(f"{folder / INDEX} names {name!r}{nearest(str(name), _TEXT_TOKENS)}: that pipeline is not known")
    return name


def configs(folder: str | os.PathLike):
    """(TransformerConfig, VAEConfig) of a model folder; no weight is read."""
    from pixart_jax.weights import transformer, vae

    folder = check(folder)
    found = []
    for name, module in (("transformer", transformer), ("vae", vae)):
        path = folder / name / "config.json"
        try:
            found.append(module.config_from_json(json.loads(path.read_text())))
        except FileNotFoundError:
            raise UserError(f"{folder / name} has no config.json") from None
        except ValueError as fault:
            raise UserError(f"{path} is no JSON: {fault}") from None
    return tuple(found)


def read(folder: str | os.PathLike, dtype=None, mesh=None) -> dict:
    """{'transformer', 'text_encoder', 'vae', 'tokenizer', 'scheduler', 'sampling'} of a model folder."""
    from pixart_jax.weights.component import load_component

    folder = check(folder)
    parts = {
        "tokenizer": tokenizers.load(folder / "tokenizer"),
        "scheduler": schedulers.read(folder / "scheduler"),
        "sampling": samplings.read(folder),
    }
    for name in ("transformer", "text_encoder", "vae"):
        parts[name] = load_component(folder / name, dtype=dtype, mesh=mesh)
    if "text_tokens" not in json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8")):
        tokens = _TEXT_TOKENS[pipeline_class(folder)]
        parts["transformer"] = parts["transformer"].replace(config=dataclasses.replace(parts["transformer"].config, text_tokens=tokens))
    return parts


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
    """Write the parts beside the folder and then put each in its place, the index last: an interrupted call leaves no half part."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving.", dir=folder))
    try:
        transformer.save(staging / "transformer")
        text_encoder.save(staging / "text_encoder")
        vae.save(staging / "vae")
        tokenizers.save(tokenizer, staging / "tokenizer")
        schedulers.write(scheduler, staging / "scheduler")
        samplings.write(sampling, staging)
        index = {
            "_class_name": _SIGMA if transformer.config.text_tokens == _TEXT_TOKENS[_SIGMA] else _ALPHA,
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
