"""Task 'text_to_image' with ``StageConfig.lora``: a low-rank adapter is learned over a model that
stays as it is.

Parameters are {"lora": tree}, the raw factors in the form of models/lora.py, fp32. The model is the
base, a separate argument of the step: kernels in the compute dtype or int8, the rest fp32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pixart_jax.config import LoraConfig, PreviewConfig
from pixart_jax.errors import UserError, nearest
from pixart_jax.models import lora
from pixart_jax.models.configs import TransformerConfig
from pixart_jax.models.layers import DROPOUT, LORA
from pixart_jax.parallel.axes import LAYERS, NORM
from pixart_jax.training.tasks.text_to_image import TextToImageOverBase
from pixart_jax.weights import lora as lora_files
from pixart_jax.weights.component import Transformer
from pixart_jax.weights.table import flatten, unflatten
from pixart_jax.weights.transformer import DIFFUSERS


def adapted_layers(model: TransformerConfig, config: LoraConfig, stage: str) -> dict[str, str]:
    """Our path of each adapted layer → diffusers' name, with {i} for the block. UserError where a
    target is the end of no layer's name."""
    present = flatten(Transformer.param_shapes(model))
    names = {
        entry.path.removesuffix("/kernel"): entry.key.removesuffix(".weight")
        for entry in DIFFUSERS
        if entry.layout in ("linear", "conv") and entry.path in present
    }
    found: dict[str, str] = {}
    for target in config.targets:
        of_target = {p: name for p, name in names.items() if f".{name}".endswith(f".{target}")}
        if not of_target:
            ends = {name.rpartition("}.")[2] for name in names.values()}
            ends |= {end.rpartition(".")[2] for end in ends}
            raise UserError(
                f"stage {stage}: lora.targets: {target!r} is the end of no layer's name"
                f"{nearest(target, ends)}"
            )
        found |= of_target
    return {path: found[path] for path in names if path in found}


@dataclasses.dataclass(frozen=True)
class TextToImageLora(TextToImageOverBase):
    """An adapter, over the model that the stage starts from."""

    @property
    def lora(self) -> LoraConfig:
        """The stage's; of a student without an adapter the defaults, which change nothing."""
        return self.stage.lora or LoraConfig()

    @property
    def targets(self) -> dict[str, str]:
        """:func:`adapted_layers` of the stage."""
        return adapted_layers(self.module.config, self.lora, self.stage.name)

    def with_lora(self, **changes) -> Self:
        """The task with fields of its LoraConfig changed."""
        stage = dataclasses.replace(self.stage, lora=dataclasses.replace(self.lora, **changes))
        return dataclasses.replace(self, stage=stage)

    # ---- the base ----

    def base_shapes(self, mesh: Mesh) -> dict:
        shapes = super().base_shapes(mesh)
        return shapes if self.lora.quantization is None else _quantized(shapes, _int8_shapes)

    def load_base(self, mesh: Mesh) -> dict:
        params = super().load_base(mesh)
        return params if self.lora.quantization is None else _quantized(params, _int8_values)

    # ---- the adapter ----

    def init(self, key: jax.Array):
        """Fresh boxed factors; also for jax.eval_shape. DoRA's magnitudes are set by
        :meth:`on_stage_start`."""
        boxed, flat, rank = flatten(self.base_boxed()), {}, self.lora.rank
        for number, path in enumerate(self.targets):
            kernel = boxed[f"{path}/kernel"]
            shape, names = kernel.value.shape, kernel.names
            lead = 1 if names[0] == LAYERS else 0  # axes before those of one layer
            values = {
                "a": ((*shape[:-1], rank), (*names[:-1], None)),
                "b": ((*shape[:lead], rank, shape[-1]), (*names[:lead], None, names[-1])),
            }
            if self.lora.dora:
                values["magnitude"] = (*shape[:lead], shape[-1]), (*names[:lead], NORM)
            for name, (size, axes) in values.items():
                first = jnp.zeros(size)
                if name == "a":
                    fan_in = math.prod(shape[lead:-1])
                    first = _first(self.lora, jax.random.fold_in(key, number), size, fan_in)
                flat[f"{path}/{name}"] = nn.LogicallyPartitioned(first, axes)
        return {LORA: unflatten(flat)}

    def on_stage_start(self, params, base=None):
        """DoRA's magnitudes are at first the lengths of the base's columns."""
        if not self.lora.dora:
            return params
        kernels, flat = flatten(base), flatten(params[LORA])
        for path in self.targets:
            lead = flat[f"{path}/magnitude"].ndim - 1
            flat[f"{path}/magnitude"] = _lengths(kernels[f"{path}/kernel"], lead)
        return {LORA: unflatten(flat)}

    def applied(self, tree: Mapping, keep: float = 1.0) -> dict:
        """The raw factors as the module reads them: b scaled; with dropout also ``keep``."""
        if "b" not in tree:
            return {name: self.applied(branch, keep) for name, branch in tree.items()}
        b = tree["b"]
        more = {"keep": jnp.full(b.shape[:-2], keep, jnp.float32)} if keep < 1 else {}
        return {**tree, "b": b * self.lora.scale, **more}

    def losses(self, params, batch, keys, base=None) -> dict[str, jax.Array]:
        """loss = mse + vb, one value a sample, of the base with the adapter. One
        random key makes the dropout masks of a whole micro-batch."""
        keep, rngs = 1 - self.lora.dropout, None
        if keep < 1:
            # DiffusionObjective.prepare splits a key in four
            rngs = {DROPOUT: jax.random.fold_in(keys[0], 4)}
        variables = {"params": base, LORA: self.applied(params[LORA], keep)}
        return self.losses_of(variables, batch, keys, rngs)

    def preview(
        self, params, batch, settings: PreviewConfig, base=None
    ) -> tuple[list[np.ndarray], list[str]]:
        """As of the base with the adapter merged."""
        return super().preview(self.merged(base, params), batch, settings)

    def merged(self, base, params) -> dict:
        """The base with the adapter merged, placed as the base; int8 kernels become floats."""

        def floats(leaf):
            return _dequantized(leaf, self.module.dtype) if _is_int8(leaf) else leaf

        return lora.merge(jax.tree.map(floats, base, is_leaf=_is_int8), self.applied(params[LORA]))

    def export(self, params, folder: Path, batches) -> None:
        """The adapter's folder, as peft and diffusers open it; beside it ``model`` where the config
        asks for the merged model."""
        how = self.lora.rank, self.lora.alpha, self.lora.rslora
        lora_files.save(folder, params[LORA], *how)
        if self.lora.merged:
            mesh = jax.tree.leaves(params)[0].sharding.mesh
            module = self.module.clone(dtype=jnp.float32)
            exact = dataclasses.replace(self.with_lora(quantization=None), module=module)
            model = exact.merged(exact.load_base(mesh), params)
            super().export(model, folder.parent / "model", batches)


def _first(config: LoraConfig, key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """The first a."""
    if config.init == "gaussian":
        return jax.random.normal(key, shape) / config.rank
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) * fan_in**-0.5


@functools.partial(jax.jit, static_argnums=1)
def _lengths(kernel, lead: int) -> jax.Array:
    """The lengths [.., out] of a kernel's columns over all axes after the first ``lead`` but the
    last."""
    kernel = _dequantized(kernel, jnp.float32) if _is_int8(kernel) else kernel
    columns = kernel.astype(jnp.float32).reshape(*kernel.shape[:lead], -1, kernel.shape[-1])
    return jnp.linalg.norm(columns, axis=-2)


# ---- int8 ----


def _is_int8(leaf) -> bool:
    return hasattr(leaf, "qvalue")


@functools.partial(jax.jit, static_argnums=1)
def _dequantized(kernel, dtype) -> jax.Array:
    return (kernel.qvalue.astype(jnp.float32) * kernel.scale).astype(dtype)


def _quantized(params: Mapping, quantize: Callable) -> dict:
    """With the kernels that compute in the compute dtype as int8 values with scales."""
    flat = flatten(params)
    for path, leaf in flat.items():
        # bfloat16 tells them apart: it narrows these alone
        if Transformer._stored_dtype(path, jnp.bfloat16) == jnp.bfloat16 and leaf.ndim < 4:
            flat[path] = quantize(leaf)
    return unflatten(flat)


def _int8_shapes(kernel: jax.ShapeDtypeStruct | jax.Array):
    from pixart_jax.models import quantization  # imports Qwix, 0.4 s

    place, shape = kernel.sharding, kernel.shape
    spec = (*place.spec, *[None] * (len(shape) - len(place.spec)))
    # the scales are not split along the input axis
    beside = NamedSharding(place.mesh, PartitionSpec(*spec[:-2], None, spec[-1]))
    values = jax.ShapeDtypeStruct(shape, jnp.int8, sharding=place)
    scale = jax.ShapeDtypeStruct((*shape[:-2], 1, shape[-1]), jnp.float32, sharding=beside)
    return quantization.leaf(values, scale)


def _int8_values(kernel: jax.Array):
    from pixart_jax.models import quantization

    places = jax.tree.map(lambda shape: shape.sharding, _int8_shapes(kernel))
    return jax.jit(quantization.quantize, out_shardings=places)(kernel)
