"""A whole model on disk, in the diffusers form."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.errors import UserError, nearest
from pixart_jax.files import cache_folder, folder_fingerprint, is_remote, write_json
from pixart_jax.models.configs import TransformerConfig, VAEConfig
from pixart_jax.pipeline import sampling_config, text_states
from pixart_jax.pipeline.sampling_config import SamplingConfig, check_choice
from pixart_jax.pipeline.scheduler import SchedulerConfig, class_of
from pixart_jax.remote_path import Location, RemotePath, located
from pixart_jax.text import FastTokenizer, load_tokenizer, save_tokenizer
from pixart_jax.weights import component, transformer, vae
from pixart_jax.weights.files import (
    TORCH_SUFFIXES,
    SafetensorsFile,
    find_weights,
    naming,
    open_tensors,
    part_variants,
    read_json,
    weight_sets,
)
from pixart_jax.weights.hub import model_folder

INDEX = "model_index.json"
PARTS = ("text_encoder", "transformer", "vae")  # with weights, in the order of their use
_CLASSES = {
    "text_encoder": ["transformers", "T5EncoderModel"],
    "transformer": ["diffusers", "PixArtTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
_ALPHA, _SIGMA = "PixArtAlphaPipeline", "PixArtSigmaPipeline"
# where the transformer's config does not say; diffusers keeps them in its pipelines' code
_TEXT_TOKENS = {_ALPHA: 120, _SIGMA: 300}
# the version whose PixArtAlphaPipeline is tested to open what is written here
_DIFFUSERS = "0.42.1"
OFFLOADS = ("auto", "always", "never")
DTYPES = ("auto", "float32", "bfloat16")
_MEMORY_SHARE = 0.6  # of a device's, for parameters; the rest is for activations


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A model folder's configs, parsed once and checked against each other; no weight is read."""

    path: Path
    name: str  # of the folder, or the hub id
    transformer: TransformerConfig
    vae: VAEConfig
    scheduler: SchedulerConfig
    sampling: SamplingConfig  # the model's own, with defaults filled in
    variants: Mapping[str, str | None] = dataclasses.field(default_factory=dict)  # by part

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike,
        parts: Sequence[str] = PARTS,
        revision: str | None = None,
        variant: str | None = None,
    ) -> ModelFolder:
        """folder: a folder, also of a bucket, or a hub id, of whose weights only those of ``parts``
        are downloaded.
        variant: of the weights' files, where a part has it. Raises UserError where a part is
        missing, damaged or of another model."""
        given, folder = located(folder), model_folder(folder, parts, revision, variant)
        name = (
            given.resolve().name if isinstance(given, RemotePath) or given.exists() else str(given)
        )
        if not folder.is_dir():
            form = "model_index.json, transformer/, text_encoder/, vae/ …"
            raise UserError(f"no model folder {folder}: give a diffusers folder ({form})")
        folders = ("transformer", "text_encoder", "vae", "tokenizer", "scheduler")
        if missing := [f"{part}/" for part in folders if not (folder / part).is_dir()]:
            alone = (folder / "config.json").is_file()
            found = "a part of a model" if alone else "not a whole model"
            raise UserError(f"{folder} is {found}: it has no {', '.join(missing)}")
        scheduler_file = folder / "scheduler" / "scheduler_config.json"
        scheduler = read_json(scheduler_file)
        vae_file = folder / "vae" / "config.json"
        with naming(scheduler_file):
            parsed = SchedulerConfig.from_json(scheduler, scheduler_file)
        with naming(vae_file):
            vae_config = vae.config_from_json(read_json(vae_file))
        ours = _transformer_config(folder)
        if vae_config.latent_channels != ours.in_channels:
            raise UserError(
                f"{folder}: latents of vae/ have {vae_config.latent_channels} channels, those of "
                f"transformer/ {ours.in_channels}: the parts are of two models"
            )
        return cls(
            folder,
            name,
            ours,
            vae_config,
            parsed,
            sampling_config.read(folder, str(scheduler.get("_class_name", ""))),
            part_variants(folder, parts, variant),
        )

    def check_weights(self, parts: Sequence[str] = PARTS) -> None:
        """Raise UserError where weights are missing, cut short or damaged, as far as headers and
        sizes show. PyTorch files have no such header: they are checked when they are opened."""
        for part in parts:
            if (tensors := _tensors(self.path / part, self.variants.get(part))) is not None:
                for key in tensors:
                    tensors.shape(key)  # opens each shard

    def load(
        self,
        dtype=None,
        mesh: jax.sharding.Mesh | None = None,
        parts: Sequence[str] = PARTS,
        quantization: str | None = None,
        cache: str | os.PathLike | None = None,
    ) -> dict[str, Any]:
        """Components by name. quantization: of the text encoder. cache: as ``load_component``."""
        found = {}
        for name in parts:
            held = quantization if name == "text_encoder" else None
            options = {"dtype": dtype, "mesh": mesh, "quantization": held, "cache": cache}
            options["variant"] = self.variants.get(name)
            found[name] = component.load_component(self.path / name, **options)
        if "transformer" in found:
            own = found["transformer"].config
            config = dataclasses.replace(own, text_tokens=self.transformer.text_tokens)
            found["transformer"] = found["transformer"].replace(config=config)
        return found

    def fingerprint(self, part: str) -> str:
        """Of the part's files; of several variants also which one was named."""
        found, variant = folder_fingerprint(self.path / part), self.variants.get(part)
        several = variant and len(weight_sets(os.listdir(self.path / part))) > 1
        return f"{found}-{variant}" if several else found

    def tokenizer(self):
        return load_tokenizer(self.path / "tokenizer")

    def text_identity(
        self, dtype=None, clean: Callable[[str], str] | None = None, quantization: str | None = None
    ) -> dict[str, str]:
        """What this folder's text states are computed with, from its files. clean: how texts are
        cleaned, if known.

        Folders of one identity give the same states of the same texts (computed_in: to that
        precision). A folder without the text encoder's weights does not name them.
        """
        found = {
            "width": str(self.transformer.caption_width),
            "text_tokens": str(self.transformer.text_tokens),
            "tokenizer": folder_fingerprint(self.path / "tokenizer"),
            "computed_in": jnp.dtype(dtype or jnp.float32).name
            + (f" from {quantization}" if quantization else ""),
        }
        encoder = self.path / "text_encoder"
        if any(encoder.glob("*.safetensors")) or any(encoder.glob("*.bin")):
            found["text_encoder"] = self.fingerprint("text_encoder")
        return found if clean is None else {**found, "cleaning": text_states.cleaning_id(clean)}

    def should_offload(
        self, dtype=None, mesh: jax.sharding.Mesh | None = None, quantization: str | None = None
    ) -> bool:
        """Whether all parts together would take more than 0.6 of the memory of a device.

        Sizes are those of the tensors on disk, in the dtype that each part is held in. The memory
        is ``memory_stats()['bytes_limit']``; on a CPU MemAvailable of /proc/meminfo, which all
        devices share. A device without that figure counts as too small: to encode all texts first
        costs little, and the images are the same.
        """
        held = jnp.dtype(dtype or jnp.float32).itemsize
        needed = sum(
            parameter_count(self.path / part, self.variants.get(part))
            * (1 if quantization and part == "text_encoder" else held)
            for part in PARTS
        )
        cuts = 1 if mesh is None else mesh.shape["fsdp"] * mesh.shape["tensor"]
        device = jax.local_devices()[0] if mesh is None else mesh.local_devices[0]
        if device.platform == "cpu":
            copies = 1 if mesh is None else mesh.devices.size // cuts
            return needed * copies > _MEMORY_SHARE * available_memory()
        limit = (device.memory_stats() or {}).get("bytes_limit")
        return limit is None or needed / cuts > _MEMORY_SHARE * limit


def compute_dtype(name: str) -> str:
    """'float32' or 'bfloat16'; 'auto' is bfloat16 on accelerators. Raises UserError for others."""
    if check_choice("dtype", name, DTYPES) != "auto":
        return name
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def weights_cache(name: str) -> Path | None:
    """The folder of converted weights by flag: 'auto' ($PIXART_JAX_CACHE), 'none' or a path."""
    if name == "none":
        return None
    if is_remote(name):
        raise UserError(f"weights cache {name}: a local path is needed")
    return cache_folder() / "weights" if name == "auto" else Path(name)


def parameter_count(folder: Path, variant: str | None = None) -> int:
    """Parameters of a component folder, from the headers of its files; of PyTorch files by size."""
    tensors = _tensors(folder, variant)
    if tensors is None:
        files = [file for file in folder.iterdir() if file.suffix in TORCH_SUFFIXES]
        return sum(file.stat().st_size for file in files) // 4
    return sum(int(np.prod(tensors.shape(key))) for key in tensors)


def available_memory() -> float:
    """Bytes of main memory that programs can still have; inf where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else math.inf


def _tensors(folder: Path, variant: str | None = None):
    """The tensors of a component folder, by their headers; None for PyTorch's."""
    path = find_weights(folder, variant)
    is_torch = path.name.removesuffix(".index.json").endswith(TORCH_SUFFIXES)
    return None if is_torch else open_tensors(path)


def pipeline_class(folder: Location) -> str:
    """The pipeline that the folder's index names. Raises UserError where it names no known one."""
    name = str(read_json(folder / INDEX).get("_class_name"))
    if name not in _TEXT_TOKENS:
        raise UserError(
            f"{folder / INDEX} names an unknown pipeline {name!r}{nearest(name, _TEXT_TOKENS)}"
        )
    return name


def _transformer_config(folder: Path) -> TransformerConfig:
    """With the text length of the folder's pipeline.

    Raises UserError for a Σ transformer in an α folder, or the reverse, whose texts would be cut at
    the wrong length, and for another T5.
    """
    file, named = folder / "transformer" / "config.json", pipeline_class(folder)
    with naming(file):
        config = transformer.config_from_json(values := read_json(file))
    tokens = _TEXT_TOKENS[named]
    if "text_tokens" not in values:
        if named == _ALPHA and transformer.looks_like_sigma(config):
            raise UserError(
                f"{folder / INDEX} names {_ALPHA}, but transformer/ looks like PixArt-Σ's, which "
                f"reads {_TEXT_TOKENS[_SIGMA]} tokens of a prompt: name {_SIGMA} in {INDEX}; or "
                f'put "text_tokens": {tokens} into transformer/config.json if it is a PixArt-α'
            )
        config = dataclasses.replace(config, text_tokens=tokens)
    wants = {"its config.json": config.text_tokens}
    if (path := folder / "transformer" / component.NULL_CAPTION).is_file():
        null = SafetensorsFile(path)
        if "null_caption" in null:
            wants[f"its {component.NULL_CAPTION}"] = null.shape("null_caption")[0]
    of_pipeline = {count: name for name, count in _TEXT_TOKENS.items()}
    for where, count in wants.items():
        if count != tokens and count in of_pipeline:
            raise UserError(
                f"{folder / INDEX} names {named}, which reads {tokens} tokens of a prompt, but "
                f"transformer/ wants {count} ({where}): it is a transformer of "
                f"{of_pipeline[count]}; name that one in {INDEX}, or put the right transformer "
                "there"
            )
    text_encoder = read_json(folder / "text_encoder" / "config.json")
    width = text_encoder.get("d_model", config.caption_width)
    if width != config.caption_width:
        raise UserError(
            f"{folder}: text_encoder/ is of width {width}, transformer/ of {config.caption_width}"
        )
    return config


def write_model(
    folder: str | os.PathLike,
    *,
    transformer,
    text_encoder,
    vae,
    tokenizer,
    scheduler: SchedulerConfig,
    sampling: SamplingConfig,
) -> None:
    """Write the parts beside the folder, then put each in its place, the index last: an interrupted
    call leaves no half-written part.

    Where several processes share a part's parameters all must call it; the first one writes.
    """
    folder = Path(folder)
    parts = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
    if jax.process_index() > 0:
        for part in parts.values():
            part.save(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving.", dir=folder))
    try:
        for name, part in parts.items():
            part.save(staging / name)
        save_tokenizer(tokenizer, staging / "tokenizer")
        scheduler.write(staging / "scheduler", sampling.solver)
        sampling_config.write(sampling, staging)
        is_sigma = transformer.config.text_tokens == _TEXT_TOKENS[_SIGMA]
        fast = isinstance(tokenizer, FastTokenizer)
        tokenizer_class = tokenizer.tokenizer_class if fast else type(tokenizer).__name__
        index = {
            "_class_name": _SIGMA if is_sigma else _ALPHA,
            "_diffusers_version": _DIFFUSERS,
            **_CLASSES,
            "scheduler": ["diffusers", class_of(sampling.solver)],
            "tokenizer": ["transformers", tokenizer_class],
        }
        write_json(staging / INDEX, dict(sorted(index.items())))
        for path in sorted(staging.iterdir(), key=lambda path: path.name == INDEX):
            target = folder / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
