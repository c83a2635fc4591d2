"""A part of a model, bound: config, module and parameters together, opened from and saved to a
folder of diffusers or transformers."""

from __future__ import annotations

import abc
import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.errors import UserError, nearest
from pixart_jax.models.dit import DiT as DiTModule
from pixart_jax.models.t5 import T5Encoder, check_quantization
from pixart_jax.models.transformer import PixArtTransformer
from pixart_jax.models.vae import AutoencoderKL
from pixart_jax.models.vae_tiled import tiled_decode
from pixart_jax.parallel.gather import gather_to_host
from pixart_jax.parallel.rules import on_mesh, parameter_shardings
from pixart_jax.weights import dit, t5, transformer, vae
from pixart_jax.weights.cache import ParamCache
from pixart_jax.weights.files import (
    Renamed,
    SafetensorsFile,
    Tensors,
    find_weights,
    open_tensors,
    write_json,
    write_order,
    write_safetensors,
)
from pixart_jax.weights.opening import LazyParams, PendingParams
from pixart_jax.weights.streaming import ParamReader, map_params
from pixart_jax.weights.table import LazyTensor, ParamMapping, flatten, unflatten, write

CONFIG = "config.json"
# beside the transformer's weights: diffusers has no place for it and would warn of its key
NULL_CAPTION = "null_caption.safetensors"


def _apply(module: nn.Module, method: str, params, *arguments):
    return module.apply({"params": params}, *arguments, method=method)


# One executable a (module, method, shapes); modules of equal config are equal, so other parameters
# do not recompile.
_run = jax.jit(_apply, static_argnums=(0, 1))
# A CPU multiplies narrow floats as fp32, and XLA would widen the whole stack of a scan's parameters
# before it begins: 19 GB for T5-XXL.
_run_layer_by_layer = jax.jit(
    _apply,
    static_argnums=(0, 1),
    compiler_options={"xla_disable_hlo_passes": "while-loop-invariant-code-motion"},
)


@dataclasses.dataclass(frozen=True, eq=False)
class Component(abc.ABC):
    """config: the model's dataclass. params: nested dict of arrays. dtype: of the computation.
    mesh: where params lie, or None.

    A component that was just opened reads its parameters while its caller goes on; asking for
    ``params`` waits for them (opening.py). Opened with a dtype, the matrices of what computes in it
    are held in it too, so bfloat16 is half the memory; norms, tables, biases and all that computes
    in fp32 stay in fp32.
    """

    config: object
    params: Mapping = LazyParams()
    dtype: jnp.dtype = jnp.float32
    mesh: jax.sharding.Mesh | None = None

    weights_file: ClassVar[str] = "diffusion_pytorch_model.safetensors"

    def __post_init__(self):
        # one spelling, so that equal modules hash alike
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

    @functools.cached_property
    def module(self) -> nn.Module:
        """The Flax module; equal for equal config and dtype, and hashable, so it can be a static
        argument of jit."""
        return self._module(self.config, self.dtype)

    def replace(self, **changes) -> Self:
        """The same component with other params (or config, dtype, mesh)."""
        return dataclasses.replace(self, **{"params": self._held, **changes})

    @property
    def shapes(self) -> Mapping:
        """The tree of params as jax.ShapeDtypeStruct, without waiting for those that are being
        read."""
        held = self._held
        return (
            held.shapes
            if isinstance(held, PendingParams)
            else jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), held)
        )

    @property
    def _held(self) -> Mapping | PendingParams:
        return vars(self)["params"]

    def save(self, folder: str | os.PathLike) -> None:
        """Write config.json and the weights, each whole or not at all, in the dtype that params are
        held in.

        Where several processes share the parameters all must call it: tensor by tensor, a stack's
        layer by layer, they gather what the first one writes, so that no host holds more than one
        beside its own. Raises UserError when the folder cannot be written.
        """
        params, folder = nn.unbox(dict(self.params)), Path(folder)
        if jax.process_index() == 0:
            self._write_weights(folder, params)
            write_json(folder / CONFIG, self._config_to_json(params))
        elif any(
            isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
            for leaf in jax.tree.leaves(params)
        ):
            self._write_weights(folder, params)

    # What each kind of component fills in.

    @classmethod
    @abc.abstractmethod
    def _module(cls, config, dtype) -> nn.Module:
        """The module of a config, computing in dtype."""

    @classmethod
    @abc.abstractmethod
    def _example(cls, config) -> tuple:
        """Arguments that the module's init takes."""

    @classmethod
    @abc.abstractmethod
    def _names(cls, config, values: Mapping) -> tuple[tuple[ParamMapping, ...], tuple[str, ...]]:
        """(table, keys to ignore) of a file whose config.json holds ``values``."""

    @abc.abstractmethod
    def _config_to_json(self, params: Mapping) -> dict:
        """config.json of what is saved."""

    def _write_weights(self, folder: Path, params: Mapping) -> None:
        tensors = write(self._names(self.config, self._config_to_json(params))[0], params)
        _write(folder / self.weights_file, tensors)

    # Modules that compute in fp32 whatever the model's dtype is.
    _wide: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def _keep(cls, path: str, dtype) -> np.dtype:
        """The dtype in which a parameter is held when the computation is in ``dtype``: that of the
        products that it enters."""
        narrow = path.endswith("kernel") and not path.startswith(cls._wide)
        return np.dtype(dtype) if narrow else np.dtype(np.float32)

    @classmethod
    def cast_for_compute(cls, params, dtype):
        """fp32 parameters as a component opened with ``dtype`` holds them: what enters products in
        it is cast to it, the rest is as given.

        Whoever computes more than once with fp32 parameters casts them once by it, ahead of the
        loop over blocks. The module's results are the same to the bit, for it casts to the same
        dtype what it is given in another.
        """

        def cast(path, leaf):
            held = cls._keep("/".join(key.key for key in path), dtype)
            return leaf.astype(held) if leaf.dtype == jnp.float32 else leaf

        return jax.tree_util.tree_map_with_path(cast, params)

    # Loading.

    @classmethod
    def _boxed(cls, config, dtype, *more) -> Mapping:
        """The tree of shapes that the module's init makes, each in its box of axis names; nothing
        is computed."""
        key = jax.eval_shape(jax.random.key, 0)
        return jax.eval_shape(cls._module(config, dtype, *more).init, key, *cls._example(config))[
            "params"
        ]

    @classmethod
    def abstract(cls, config, dtype, mesh: jax.sharding.Mesh) -> Self:
        """The component as it would be opened on ``mesh``, its parameters as shapes with dtypes and
        shardings alone."""
        dtype = jnp.dtype(dtype)
        boxed = cls._boxed(config, dtype)
        held = {path: cls._keep(path, dtype) for path in flatten(nn.unbox(boxed))}
        shapes, shardings = flatten(nn.unbox(boxed)), flatten(parameter_shardings(boxed, mesh))
        params = {
            p: jax.ShapeDtypeStruct(shapes[p].shape, held[p], sharding=shardings[p]) for p in shapes
        }
        return cls(config, unflatten(params), dtype, mesh)

    @classmethod
    def _load(
        cls,
        config,
        tensors: Tensors,
        values: Mapping,
        dtype,
        mesh,
        cache: ParamCache | None = None,
        quantization: str | None = None,
    ):
        held = None if cache is None else cache.find()
        if held is not None and mesh is None:
            return cls(config, map_params(held), dtype, mesh)
        boxed = cls._boxed(config, dtype, *[quantization] * bool(quantization))
        shardings = parameter_shardings(boxed, mesh) if mesh is not None else None
        if held is not None:
            return cls(config, map_params(held, shardings), dtype, mesh)
        keep = functools.partial(cls._keep, dtype=dtype)
        table, ignore = cls._names(config, values)
        reading = ParamReader(
            table,
            nn.unbox(boxed),
            tensors,
            ignore=ignore,
            dtype=keep,
            shardings=shardings,
            quantization=quantization,
        )

        def read():
            params = reading.read()
            if cache is not None:
                cache.store(params)
            return params

        return cls(config, PendingParams(reading.shapes, read), dtype, mesh)

    def _call(self, method: str, *arguments):
        arguments = [
            None if a is None else jnp.asarray(a) if not isinstance(a, jax.Array) else a
            for a in arguments
        ]
        run = self._executable
        with on_mesh(self.mesh):
            # what is made for these shapes is kept by JAX, and used below
            if isinstance(self._held, PendingParams):
                run.lower(self.module, method, self.shapes, *arguments).compile()
            return run(self.module, method, self.params, *arguments)

    @property
    def _executable(self):
        narrow = any(leaf.dtype.itemsize < 4 for leaf in jax.tree.leaves(self.shapes))
        return _run_layer_by_layer if narrow and jax.default_backend() == "cpu" else _run


class Transformer(Component):
    """The PixArt transformer. ``params`` lacks null_caption where the file held none (diffusers'
    own files hold none)."""

    _wide = (
        "timestep_embedder/",
        "size_embedder/",
        "ratio_embedder/",
        "t_block/",
        "kv_compression/",
    )

    def apply(
        self, latents, timesteps, text_states, text_lengths, size=None, aspect_ratio=None
    ) -> jax.Array:
        """[b, h, w, 4], [b] fp32, [b, l, c], [b] int, [b, 2] (height, width in px), [b] → [b, h, w,
        8] fp32."""
        return self._call(
            "__call__", latents, timesteps, text_states, text_lengths, size, aspect_ratio
        )

    @classmethod
    def _module(cls, config, dtype):
        return PixArtTransformer(config, dtype=dtype)

    @classmethod
    def _example(cls, config):
        side, width = config.patch_size, config.caption_width
        return (
            np.zeros((1, side, side, config.in_channels), np.float32),
            np.zeros((1,), np.float32),
            np.zeros((1, 1, width), np.float32),
            np.ones((1,), np.int32),
            np.ones((1, 2), np.float32),
            np.ones((1,), np.float32),
        )

    @classmethod
    def _names(cls, config, values):
        return transformer.diffusers(config), transformer.DIFFUSERS_IGNORE

    def _config_to_json(self, params):
        return transformer.config_to_json(self.config)

    def _write_weights(self, folder, params):
        null = params.get("null_caption")
        super()._write_weights(
            folder, {name: value for name, value in params.items() if name != "null_caption"}
        )
        if null is not None:
            _write(
                folder / NULL_CAPTION,
                {
                    "null_caption": LazyTensor(
                        null.shape, np.dtype(null.dtype), lambda: gather_to_host(null)
                    )
                },
            )
        elif jax.process_index() == 0:
            (folder / NULL_CAPTION).unlink(missing_ok=True)


class DiT(Component):
    """The class-conditional DiT of stage 1, saved under the official code's names."""

    _wide = ("timestep_embedder/", "blocks/modulation/", "final_modulation/")

    def apply(self, latents, timesteps, labels) -> jax.Array:
        """[b, h, w, 4], [b] fp32, [b] int (num_classes: no class) → [b, h, w, 8] fp32."""
        return self._call("__call__", latents, timesteps, labels)

    @classmethod
    def _module(cls, config, dtype):
        return DiTModule(config, dtype=dtype)

    @classmethod
    def _example(cls, config):
        latents = np.zeros(
            (1, config.patch_size, config.patch_size, config.in_channels), np.float32
        )
        return latents, np.zeros((1,), np.float32), np.zeros((1,), np.int32)

    @classmethod
    def _names(cls, config, values):
        if values.get("_class_name") == dit.DIFFUSERS_CLASS_NAME:
            return dit.DIFFUSERS, dit.diffusers_ignore(config.depth)
        return dit.OFFICIAL, dit.OFFICIAL_IGNORE

    def _config_to_json(self, params):
        return dit.config_to_json(self.config)


class TextEncoder(Component):
    """The T5 encoder. T5-XXL computing in bfloat16 is 9.5 GB; opened with quantization="int8",
    whose kernels are int8 values and an fp32 scale an output channel, it is 4.9 GB."""

    weights_file = "model.safetensors"

    def apply(self, input_ids, lengths) -> jax.Array:
        """[b, l] int, [b] int → states [b, l, c] fp32."""
        return self._call("__call__", input_ids, lengths)

    @property
    def quantization(self) -> str | None:
        """How the kernels are held: 'int8', or None for floats (and where there are no parameters
        yet)."""
        return (
            "int8"
            if any(hasattr(leaf, "qvalue") for leaf in flatten(self.shapes).values())
            else None
        )

    @functools.cached_property
    def module(self) -> nn.Module:
        return self._module(self.config, self.dtype, self.quantization)

    def save(self, folder: str | os.PathLike) -> None:
        if self.quantization:
            raise UserError(
                f"an encoder of {self.quantization} values cannot be saved to {folder}: open it "
                "without quantization to save it"
            )
        super().save(folder)

    @classmethod
    def _module(cls, config, dtype, quantization=None):
        return T5Encoder(config, dtype=dtype, quantization=quantization)

    @classmethod
    def _example(cls, config):
        return np.zeros((1, 1), np.int32), np.ones((1,), np.int32)

    @classmethod
    def _names(cls, config, values):
        return t5.TRANSFORMERS, t5.IGNORED

    @classmethod
    def _keep(cls, path, dtype):
        return np.dtype(dtype) if path == "embedding" else super()._keep(path, dtype)

    def _config_to_json(self, params):
        return {**t5.config_to_json(self.config), "torch_dtype": str(params["embedding"].dtype)}


class VAE(Component):
    """The autoencoder; images in [-1, 1], latents unscaled."""

    def encode(self, images) -> tuple[jax.Array, jax.Array]:
        """[b, H, W, 3] in [-1, 1] → (mean, std), each [b, H/f, W/f, 4] fp32."""
        return self._call("encode", images)

    def decode(self, latents, tile: int | None = None, overlap: int = 16) -> jax.Array:
        """[b, h, w, 4] → [b, h · f, w · f, 3] fp32. tile: in latent cells, decodes a large image in
        blended tiles of that side."""
        if tile is None:
            return self._call("decode", latents)
        return tiled_decode(
            lambda part: self._call("decode", part), jnp.asarray(latents), tile, overlap
        )

    @classmethod
    def _module(cls, config, dtype):
        return AutoencoderKL(config, dtype=dtype)

    @classmethod
    def _example(cls, config):
        return (np.zeros((1, config.factor, config.factor, config.in_channels), np.float32),)

    @classmethod
    def _names(cls, config, values):
        return vae.diffusers(config), ()

    def _config_to_json(self, params):
        return vae.config_to_json(self.config)


# config.json's _class_name (diffusers) or model_type (transformers) → (the component, its reader of
# config.json).
_KINDS = {
    transformer.CLASS_NAME: (Transformer, transformer.config_from_json),
    dit.CLASS_NAME: (DiT, dit.config_from_json),
    dit.DIFFUSERS_CLASS_NAME: (DiT, dit.config_from_json),
    vae.CLASS_NAME: (VAE, vae.config_from_json),
    "t5": (TextEncoder, t5.config_from_json),
}
# Early diffusers files name one class for every transformer; the norm says which it is.
_OLD_CLASS_NAME = "Transformer2DModel"
_OF_NORM = {"ada_norm_single": transformer.CLASS_NAME, "ada_norm_zero": dit.DIFFUSERS_CLASS_NAME}


def load_component(
    folder: str | os.PathLike,
    dtype=None,
    mesh: jax.sharding.Mesh | None = None,
    *,
    cache: str | os.PathLike | None = None,
    quantization: str | None = None,
) -> Component:
    """Open one part of a model: the folder of a transformer, DiT, T5 encoder or VAE that diffusers,
    transformers or this project wrote.

    dtype: of the computation, fp32 by default; matrices are held in it. mesh: parameters are laid
    over it by parallel.rules, each device reading its own part. cache: a folder where large weights
    are kept as they lie in memory, so that opening the same files again changes no axes and no
    dtype (cache.py). quantization: 'int8' for a T5 encoder (weights alone; see TextEncoder). Raises
    UserError for a folder that is missing, is a whole model, is of an unknown kind, lacks weights,
    or holds damaged ones, ones of other names, or ones of other shapes. It returns when names and
    shapes are checked; the tensors are read while the caller goes on, and whoever asks for
    ``params`` waits for them.
    """
    folder = Path(folder)
    values = _read_config(folder)
    kind = values.get("_class_name") or values.get("model_type")
    if kind == _OLD_CLASS_NAME:
        kind = _OF_NORM.get(values.get("norm_type"), kind)
        values = {**values, "_class_name": kind}
    if kind not in _KINDS:
        raise UserError(
            f"{folder / CONFIG} describes a {kind!r}{nearest(str(kind), _KINDS)}: such a part is "
            "not known"
        )
    component, config_from_json = _KINDS[kind]
    check_quantization(quantization)
    if quantization and component is not TextEncoder:
        raise UserError(
            f"{folder} is a {component.__name__}: quantization {quantization!r} is for a T5 encoder"
        )
    try:
        config = config_from_json(values)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    tensors = _canonical_keys(open_tensors(find_weights(folder)), component, config)
    if (folder / NULL_CAPTION).is_file() and component is Transformer:
        tensors = _WithNullCaption(tensors, folder / NULL_CAPTION)
    dtype = jnp.dtype(dtype or jnp.float32)
    kept = None if cache is None else ParamCache(Path(cache), folder, (dtype.name, quantization))
    return component._load(config, tensors, values, dtype, mesh, kept, quantization)


def _read_config(folder: Path) -> dict:
    if not folder.is_dir():
        raise UserError(
            f"no folder {folder}: give the folder of one part of a model, with config.json and "
            "weights in it"
        )
    if (folder / "model_index.json").is_file():
        parts = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        raise UserError(
            f"{folder} is a whole model: give one of its parts ({', '.join(parts)}), or open it "
            "with Pipeline.from_pretrained"
        )
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no {CONFIG}: it is no part of a model") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{folder / CONFIG} holds no JSON object")
    return values


def _canonical_keys(tensors: Tensors, component: type[Component], config) -> Renamed:
    """A file's tensors under today's names, without those that belong to another model (a whole
    T5's decoder)."""
    renames = {VAE: vae.aliases(config) if component is VAE else {}, TextEncoder: t5.ALIASES}.get(
        component, {}
    )
    foreign = t5.IGNORED_PREFIXES if component is TextEncoder else ()
    keys = [key for key in tensors if not key.startswith(foreign)] if foreign else list(tensors)
    return Renamed(
        tensors,
        {renames.get(key, key): key for key in keys}
        | {key: key for key in keys if key not in renames},
    )


class _WithNullCaption(Tensors):
    """A transformer's tensors and, under the name that old diffusers files give it, the null
    caption kept beside them."""

    KEY = "caption_projection.y_embedding"

    def __init__(self, tensors: Tensors, path: Path):
        super().__init__(tensors.source)
        self._tensors, self._beside = tensors, SafetensorsFile(path)
        if "null_caption" not in self._beside:
            raise UserError(f"{path} holds no null_caption")

    def __iter__(self):
        return iter({*self._tensors, self.KEY})

    def __len__(self):
        return len({*self._tensors, self.KEY})

    def shape(self, key):
        return self._beside.shape("null_caption") if key == self.KEY else self._tensors.shape(key)

    def __getitem__(self, key):
        return self._beside["null_caption"] if key == self.KEY else self._tensors[key]

    def prefetch(self, key):
        if key != self.KEY:
            self._tensors.prefetch(key)

    def release(self, key):
        if key != self.KEY:
            self._tensors.release(key)


def _write(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """The file, on the first process; the others make each tensor as it does, which is how they
    give it their parts."""
    if jax.process_index() == 0:
        write_safetensors(path, tensors)
        return
    for key in write_order(tensors):
        tensors[key].make()
