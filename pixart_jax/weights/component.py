"""The kinds of components, and :func:`load_component`, which opens any of them."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.errors import Notice, UserError, nearest
from pixart_jax.models import controlnet as control_models
from pixart_jax.models.configs import TransformerConfig
from pixart_jax.models.dit import DiT as DiTModule
from pixart_jax.models.hed import HED as HEDModule
from pixart_jax.models.lora import combine, merge
from pixart_jax.models.t5 import T5Encoder, check_quantization
from pixart_jax.models.transformer import PixArtTransformer
from pixart_jax.models.vae import AutoencoderKL, tiled_decode
from pixart_jax.weights import controlnet, dit, hed, lora, t5, transformer, vae
from pixart_jax.weights.base import CONFIG as CONFIG
from pixart_jax.weights.base import Component, write_tensors
from pixart_jax.weights.cache import ParamCache
from pixart_jax.weights.checkpoints import select
from pixart_jax.weights.files import (
    SafetensorsFile,
    Tensors,
    find_weights,
    naming,
    open_tensors,
    read_json,
)
from pixart_jax.weights.hub import model_folder
from pixart_jax.weights.table import ParamMapping, flatten, write

# beside the transformer's weights: diffusers does not store it and would warn of its key
NULL_CAPTION = "null_caption.safetensors"
_NULL_KEY = "caption_projection.y_embedding"  # its key in old diffusers files


class Transformer(Component):
    """The PixArt transformer. ``params`` may lack null_caption, as files do."""

    module_class: ClassVar = PixArtTransformer
    names: ClassVar = transformer
    _wide = tuple(
        "timestep_embedder/ size_embedder/ ratio_embedder/ t_block/ kv_compression/".split()
    )

    def apply(
        self,
        latents,
        timesteps,
        text_states,
        text_lengths,
        size=None,
        aspect_ratio=None,
        controlnet: ControlNet | None = None,
        control=None,
        control_scale: float = 1.0,
    ) -> jax.Array:
        """[b, h, w, 4], [b] fp32, [b, l, c], [b] int, [b, 2] (height, width in px), [b] → [b, h, w,
        8] fp32. control: the condition's scaled latents [b, h, w, 4], with a ControlNet."""
        arguments = latents, timesteps, text_states, text_lengths, size, aspect_ratio
        if controlnet is None and control is None:
            return self._call("__call__", *arguments)
        if controlnet is None or control is None:
            raise UserError(
                "controlnet and control (the condition's latents) are given together, or neither is"
            )
        joined = self.with_controlnet(controlnet)
        return joined._call("controlled", control, jnp.float32(control_scale), *arguments)

    def with_controlnet(self, controlnet: ControlNet) -> ControlledTransformer:
        """Both as one component, whose module is models/controlnet.py's. The parameters are shared.
        Raises UserError for a ControlNet of another model."""
        control_models.check_fits(controlnet.config, self.config)
        params = {**self.params, "control": controlnet.params}
        return ControlledTransformer(self.config, params, self.dtype, self.mesh)

    def with_lora(
        self,
        paths: str | os.PathLike | Sequence[str | os.PathLike],
        weights: float | Sequence[float] | None = None,
        alpha: float | None = None,
    ) -> Self:
        """A transformer with these adapters merged into its kernels, each times its weight (1); it
        shares the other parameters, and this one stays as it is.

        paths: one or several files, folders or hub ids of any layout that weights/lora.py reads.
        alpha: of those that do not say theirs. Raises UserError for an adapter that cannot be read
        or is of another model, and for DoRA among several.
        """
        paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        weights = 1.0 if weights is None else weights
        factors = [weights] * len(paths) if isinstance(weights, int | float) else list(weights)
        if len(factors) != len(paths):
            raise UserError(f"{len(factors)} weights for {len(paths)} adapters: give one each")
        trees = [lora.read(path, self.params, alpha=alpha).tree for path in paths]
        return self.with_adapters(trees, factors)

    def with_adapters(self, trees: Sequence[Mapping], weights: Sequence[float]) -> Self:
        """As :meth:`with_lora`, of adapter trees (models/lora.py)."""
        if not trees:
            return self
        return self.replace(params=merge(self.params, combine(trees, weights)))

    @classmethod
    def _example(cls, config):
        side = config.patch_size
        latents = np.zeros((1, side, side, config.in_channels), np.float32)
        text = np.zeros((1, 1, config.caption_width), np.float32), np.ones((1,), np.int32)
        one = np.ones((1,), np.float32)
        return latents, one, *text, np.ones((1, 2), np.float32), one

    def _write_weights(self, folder, params):
        params = dict(params)
        null = params.pop("null_caption", None)
        super()._write_weights(folder, params)
        if null is not None:
            alone = write([ParamMapping("null_caption", "null_caption")], {"null_caption": null})
            write_tensors(folder / NULL_CAPTION, alone)
        elif jax.process_index() == 0:
            (folder / NULL_CAPTION).unlink(missing_ok=True)


class ControlledTransformer(Transformer):
    """A transformer with a ControlNet, whose parameters are params["control"], loaded apart."""

    @functools.cached_property
    def module(self) -> nn.Module:
        units = len(self.params["control"]["units"]["block"]["table"])
        return control_models.ControlledTransformer(self.config, dtype=self.dtype, units=units)


class ControlNet(Component):
    """The trained part of a ControlNet-Transformer."""

    module_class: ClassVar = control_models.ControlNet
    names: ClassVar = controlnet

    def save_official(self, path: str | os.PathLike, base: Transformer | None = None) -> None:
        """Write one .safetensors file under the official code's names, with ``base`` in it, which
        its models load together; processes as of :meth:`save`."""
        params = nn.unbox(dict(self.params))
        tensors: dict[str, Any] = dict(write(controlnet.OFFICIAL, params))
        if base is not None:
            theirs = transformer.to_official(base.config, base.params)
            tensors |= {f"{controlnet.BASE}{key}": tensor for key, tensor in theirs.items()}
        write_tensors(Path(path), tensors)

    @classmethod
    def _example(cls, config):
        tokens = np.zeros((1, 1, config.width), np.float32)
        modulation = np.zeros((1, 6, config.width), np.float32)
        return tokens, modulation, tokens, np.ones((1,), np.int32)


class DiT(Component):
    """The class-conditional DiT of stage 1, saved under the official names."""

    module_class: ClassVar = DiTModule
    names: ClassVar = dit
    _wide = ("timestep_embedder/", "blocks/modulation/", "final_modulation/")

    def apply(self, latents, timesteps, labels) -> jax.Array:
        """[b, h, w, 4], [b] fp32, [b] int (num_classes: no class) → [b, h, w, 8] fp32."""
        return self._call("__call__", latents, timesteps, labels)

    @classmethod
    def _example(cls, config):
        side = config.patch_size
        latents = np.zeros((1, side, side, config.in_channels), np.float32)
        return latents, np.zeros((1,), np.float32), np.zeros((1,), np.int32)


class TextEncoder(Component):
    """The T5 encoder. T5-XXL takes 9.5 GB in bfloat16, and 4.9 GB loaded with quantization="int8":
    int8 kernels with an fp32 scale per output channel."""

    module_class: ClassVar = T5Encoder
    names: ClassVar = t5
    weights_file = "model.safetensors"

    def apply(self, input_ids, lengths) -> jax.Array:
        """[b, l] int, [b] int → states [b, l, c] fp32."""
        return self._call("__call__", input_ids, lengths)

    @property
    def quantization(self) -> str | None:
        """'int8', or None for float kernels (and without parameters)."""
        quantized = any(hasattr(leaf, "qvalue") for leaf in flatten(self.params).values())
        return "int8" if quantized else None

    @functools.cached_property
    def module(self) -> nn.Module:
        return T5Encoder(self.config, dtype=self.dtype, quantization=self.quantization)

    def save(self, folder: str | os.PathLike) -> None:
        if self.quantization:
            raise UserError(
                f"an encoder of {self.quantization} values cannot be saved: open it without"
            )
        super().save(folder)

    @classmethod
    def _example(cls, config):
        return np.zeros((1, 1), np.int32), np.ones((1,), np.int32)

    @classmethod
    def _stored_dtype(cls, path, dtype):
        return np.dtype(dtype) if path == "embedding" else super()._stored_dtype(path, dtype)

    def _config_to_json(self, params):
        return {**t5.config_to_json(self.config), "torch_dtype": str(params["embedding"].dtype)}


class VAE(Component):
    """The autoencoder; images in [-1, 1], latents unscaled."""

    module_class: ClassVar = AutoencoderKL
    names: ClassVar = vae

    def encode(self, images) -> tuple[jax.Array, jax.Array]:
        """[b, H, W, 3] in [-1, 1] → (mean, std), each [b, H/f, W/f, 4] fp32."""
        return self._call("encode", images)

    def decode(self, latents, tile: int | None = None, overlap: int = 16) -> jax.Array:
        """[b, h, w, 4] → [b, h · f, w · f, 3] fp32. tile: decodes in blended tiles of this many
        latent cells a side, for large images."""
        if tile is None:
            return self._call("decode", latents)
        decode = functools.partial(self._call, "decode")
        return tiled_decode(decode, jnp.asarray(latents), tile, overlap)

    @classmethod
    def _example(cls, config):
        return (np.zeros((1, config.factor, config.factor, config.in_channels), np.float32),)


class HED(Component):
    """The edge network of the ControlNet's conditions."""

    module_class: ClassVar = HEDModule
    names: ClassVar = hed

    def apply(self, images) -> jax.Array:
        """uint8 [b, H, W, 3] → edges [b, H, W] fp32 in 0 … 1."""
        return self._call("__call__", images)

    @classmethod
    def _example(cls, config):
        side = 2 ** len(config.widths)
        return (np.zeros((1, side, side, 3), np.uint8),)


# by config.json's _class_name (diffusers) or model_type (transformers)
_KINDS: dict[str, type[Component]] = {
    transformer.CLASS_NAME: Transformer,
    dit.CLASS_NAME: DiT,
    dit.DIFFUSERS_CLASS_NAME: DiT,
    vae.CLASS_NAME: VAE,
    hed.CLASS_NAME: HED,
    controlnet.CLASS_NAME: ControlNet,
    controlnet.SIZED_CLASS_NAME: ControlNet,
    "t5": TextEncoder,
}
# Early diffusers files have one class name for every transformer; the norm tells them apart.
_OLD_CLASS_NAME = "Transformer2DModel"
_OF_NORM = {"ada_norm_single": transformer.CLASS_NAME, "ada_norm_zero": dit.DIFFUSERS_CLASS_NAME}


def load_component(
    folder: str | os.PathLike,
    dtype=None,
    mesh: jax.sharding.Mesh | None = None,
    *,
    cache: str | os.PathLike | None = None,
    quantization: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    branch: str | None = None,
    average: bool = True,
) -> Component:
    """Load one part of a model: a folder or hub id of a transformer, DiT, T5 encoder, VAE,
    ControlNet or HED network, as written by diffusers, transformers or this package; or the file of
    a ControlNet or of ControlNetHED.

    dtype: of the computation, fp32 by default; kernels are stored in it. mesh: where parallel.rules
    places the parameters, each device reading its own part. cache: a folder for converted weights
    of large models, so that the next load converts nothing (cache.py). quantization: 'int8', for a
    T5 encoder. variant: such as "fp16", of the weights' files; by default the plain or only ones.
    Prefixes of other tools before the names are removed; branch and average choose among the
    branches of a checkpoint (checkpoints.py). Raises UserError for a folder that is missing, a
    whole model, of an unknown kind, or without weights, and for weights that do not fit.
    """
    folder = model_folder(folder, revision=revision, variant=variant)
    values = _config(folder)
    kind: Any = str(values.get("_class_name") or values.get("model_type"))
    if kind == _OLD_CLASS_NAME:
        kind = _OF_NORM.get(str(values.get("norm_type")), kind)
        values = {**values, "_class_name": kind}
    if kind not in _KINDS:
        raise UserError(
            f"{folder / CONFIG} describes {kind!r}, which is not known{nearest(kind, _KINDS)}"
        )
    component = _KINDS[kind]
    check_quantization(quantization)
    if quantization and component is not TextEncoder:
        raise UserError(
            f"{folder} is a {component.__name__}: quantization {quantization!r} is for a T5 encoder"
        )
    try:
        with naming(folder / CONFIG):
            config = component.names.config_from_json(values)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    found = open_tensors(folder if folder.is_file() else find_weights(folder, variant))
    selected = select(found, component.names.ANCHORS, branch=branch, average=average)
    tensors = under_current_names(selected.tensors, component.names)
    if selected.notes:
        warnings.warn(f"{tensors.source}: {'; '.join(selected.notes)}", Notice, stacklevel=2)
    if (folder / NULL_CAPTION).is_file() and component is Transformer:
        beside = SafetensorsFile(folder / NULL_CAPTION)
        if "null_caption" not in beside:
            raise UserError(f"{folder / NULL_CAPTION} holds no null_caption")
        entries = {**tensors.entries, _NULL_KEY: beside.entries["null_caption"]}
        tensors = Tensors(tensors.source, entries)
    dtype = jnp.dtype(dtype or jnp.float32)
    cache = None if folder.is_file() else cache
    stored = ParamCache(cache, folder, (dtype.name, quantization, *([variant] if variant else [])))
    options = {"quantization": quantization} if quantization else {}
    return component._load(config, values, tensors, dtype, mesh, stored, **options)


def controlnet_of(path: str | os.PathLike, model: TransformerConfig) -> Path:
    """The ControlNet at a folder, hub id or file, for load_component; its weights are not read.
    Raises UserError where it is something else, or of another model than ``model``."""
    path = model_folder(path)
    values = _config(path)
    if _KINDS.get(str(values.get("_class_name"))) is not ControlNet:
        raise UserError(f"{path} is a {values.get('_class_name')}: a ControlNet is needed")
    try:
        control_models.check_fits(controlnet.config_from_json(values), model)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return path


def under_current_names(tensors: Tensors, names: ModuleType) -> Tensors:
    """Without tensors of other models, and with current names for old ones."""
    aliases, others = getattr(names, "ALIASES", {}), getattr(names, "IGNORED_PREFIXES", ())
    keys = [key for key in tensors if not key.startswith(others)]
    old = {aliases[key]: key for key in keys if key in aliases}
    return tensors.renamed(old | {key: key for key in keys if key not in aliases})


def _config(path: Path) -> dict:
    """The config.json of a folder, or of a file whose tensors say which model it is."""
    if path.is_dir():
        if (path / "model_index.json").is_file():
            parts = sorted(file.parent.name for file in path.glob(f"*/{CONFIG}"))
            whole = f"{path} is a whole model: give one of its parts ({', '.join(parts)})"
            raise UserError(f"{whole} or use Pipeline")
        return read_json(path / CONFIG)
    if not path.is_file():
        wanted = "give the folder of one part, with config.json and weights"
        raise UserError(f"no folder {path}: {wanted}")
    tensors = open_tensors(path)
    for names in (hed, controlnet):
        found = select(tensors, names.ANCHORS).tensors
        if any(anchor in found for anchor in names.ANCHORS):
            return names.config_of_tensors(found)
    raise UserError(f"{path} is not of a ControlNet or HED network: convert it to a folder first")
