"""The base of all components: a model's config, module and parameters, loaded from and saved to a
folder that diffusers or transformers opens."""

from __future__ import annotations

import abc
import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.files import write_json
from pixart_jax.parallel.rules import on_mesh, parameter_shardings
from pixart_jax.weights.cache import ParamCache
from pixart_jax.weights.files import LazyTensor, write_order, write_safetensors
from pixart_jax.weights.streaming import map_params, read
from pixart_jax.weights.table import flatten, unflatten, write

CONFIG = "config.json"


def _apply(module: nn.Module, method: str, params, *arguments):
    return module.apply({"params": params}, *arguments, method=method)


# One executable per (module, method, shapes). Modules of equal configs are equal, so other
# parameters do not recompile.
_run = jax.jit(_apply, static_argnums=(0, 1))
# A CPU multiplies bfloat16 as fp32, and XLA would convert a scan's whole stack of parameters before
# the loop: 19 GB for T5-XXL.
_run_layer_by_layer = jax.jit(
    _apply,
    static_argnums=(0, 1),
    compiler_options={"xla_disable_hlo_passes": "while-loop-invariant-code-motion"},
)


@dataclasses.dataclass(frozen=True, eq=False)
class Component(abc.ABC):
    """config: the model's dataclass. params: nested dict of arrays. dtype: of the computation.
    mesh: where the parameters are, or None.

    Loaded with dtype=bfloat16, the kernels of what computes in it are stored in it too: half the
    memory. Norms, tables, biases and modules that compute in fp32 stay fp32.
    """

    config: Any
    params: Mapping
    dtype: jnp.dtype = jnp.float32
    mesh: jax.sharding.Mesh | None = None

    module_class: ClassVar[type[nn.Module]]
    # weights/transformer.py, dit.py, t5.py or vae.py: table, config_from_json, config_to_json
    names: ClassVar[ModuleType]
    weights_file: ClassVar[str] = "diffusion_pytorch_model.safetensors"
    _wide: ClassVar[tuple[str, ...]] = ()  # modules that always compute in fp32

    def __post_init__(self):
        # one spelling of a dtype, so that equal modules hash alike
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

    @functools.cached_property
    def module(self) -> nn.Module:
        """The Flax module: hashable, and equal for equal config and dtype."""
        return self.module_class(self.config, dtype=self.dtype)

    def replace(self, **changes) -> Self:
        """The same component with other params (or config, dtype, mesh)."""
        return dataclasses.replace(self, **changes)

    def save(self, folder: str | os.PathLike) -> None:
        """Write config.json and the weights, each atomically, in the dtypes of params.

        Where several processes share the parameters all must call it: they gather one tensor, or
        layer of a stack, at a time; the first writes. UserError where it cannot.
        """
        params, folder = nn.unbox(dict(self.params)), Path(folder)
        arrays = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
        first = jax.process_index() == 0
        if first or not all(array.is_fully_addressable for array in arrays):
            self._write_weights(folder, params)
        if first:
            write_json(folder / CONFIG, self._config_to_json(params), ensure_ascii=False)

    @classmethod
    @abc.abstractmethod
    def _example(cls, config) -> tuple:
        """Arguments of the module's init."""

    def _config_to_json(self, params: Mapping) -> dict:
        """The config.json to save."""
        return self.names.config_to_json(self.config)

    def _write_weights(self, folder: Path, params: Mapping) -> None:
        table, _ = self.names.table(self.config, self._config_to_json(params))
        write_tensors(folder / self.weights_file, write(table, params))

    @classmethod
    def _stored_dtype(cls, path: str, dtype) -> np.dtype:
        """The dtype of a stored parameter under a computation in ``dtype``."""
        narrow = path.endswith("kernel") and not path.startswith(cls._wide)
        return np.dtype(dtype) if narrow else np.dtype(np.float32)

    @classmethod
    def cast_for_compute(cls, params, dtype):
        """Cast fp32 parameters to the dtypes of a component loaded with ``dtype``.

        Cast once, ahead of the loop over blocks, when the parameters are used several times. The
        module's results are the same to the bit.
        """

        def cast(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            stored = cls._stored_dtype(name, dtype)
            return leaf.astype(stored) if leaf.dtype == jnp.float32 else leaf

        return jax.tree_util.tree_map_with_path(cast, params)

    @classmethod
    def abstract(cls, config, dtype, mesh: jax.sharding.Mesh) -> Self:
        """The component as loaded on ``mesh``, with shapes, dtypes and shardings for parameters."""
        boxed = cls.param_shapes(config, dtype := jnp.dtype(dtype))
        shapes, shardings = flatten(nn.unbox(boxed)), flatten(parameter_shardings(boxed, mesh))
        params = {
            path: jax.ShapeDtypeStruct(
                shape.shape, cls._stored_dtype(path, dtype), sharding=shardings[path]
            )
            for path, shape in shapes.items()
        }
        return cls(config, unflatten(params), dtype, mesh)

    @classmethod
    def param_shapes(cls, config, dtype=jnp.float32, **options) -> Mapping:
        """The shapes of the module's parameters, boxed with axis names; nothing is computed."""
        init = cls.module_class(config, dtype=dtype, **options).init
        return jax.eval_shape(init, jax.random.key(0), *cls._example(config))["params"]

    @classmethod
    def _load(cls, config, values, tensors, dtype, mesh, cache: ParamCache, **options) -> Self:
        """values: of config.json. tensors: of the file. options: quantization."""
        cached = cache.find()
        if cached is not None and mesh is None:
            return cls(config, map_params(cached), dtype)
        boxed = cls.param_shapes(config, dtype, **options)
        shardings = None if mesh is None else parameter_shardings(boxed, mesh)
        if cached is not None:
            return cls(config, map_params(cached, shardings), dtype, mesh)
        table, ignore = cls.names.table(config, values, tensors)
        params = read(
            table,
            nn.unbox(boxed),
            tensors,
            ignore=ignore,
            dtype=functools.partial(cls._stored_dtype, dtype=dtype),
            shardings=shardings,
            **options,
        )
        cache.store(params)
        return cls(config, params, dtype, mesh)

    def _call(self, method: str, *arguments):
        arguments = tuple(None if a is None else jnp.asarray(a) for a in arguments)
        with on_mesh(self.mesh):
            return self._executable(self.module, method, self.params, *arguments)

    @property
    def _executable(self):
        narrow = any(leaf.dtype.itemsize < 4 for leaf in jax.tree.leaves(self.params))
        return _run_layer_by_layer if narrow and jax.default_backend() == "cpu" else _run


def write_tensors(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write the file on the first process; the others take part in gathering each tensor."""
    if jax.process_index() == 0:
        write_safetensors(path, tensors)
        return
    for key in write_order(tensors):
        for _ in tensors[key].parts():
            pass
