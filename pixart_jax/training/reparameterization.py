"""Stage 1 → stage 2: a class-conditional DiT becomes a PixArt transformer that starts as the
class-free DiT.

In DiT each block i has a modulation network of its own, S_i(t, c) = W_i φ(t, c) + b_i with φ =
SiLU(t-embedding + class embedding). PixArt has one for all, S(t) = W φ(t) + b, and a table E_i a
block: its block uses E_i + S(t). (PixArt-α, §2.3)

1. Without a class, φ(t) = SiLU(embed(t) + e_null). e_null is added to the last bias of the timestep
   embedder: φ is then the same function in both models.
2. E_i = S_i(500) − S(500), so every block is exactly DiT's at t = 500. The error at another t is
   (W − W_i)(φ(t) − φ(500)), and the sum of its squares over blocks and timesteps is least at W =
   mean over i of W_i, whatever φ and the weights of the timesteps. b cancels out; the mean of the
   b_i is taken, so that S is the blocks' mean modulation and the tables their deviations from it at
   t = 500.
3. The final layer's modulation is table + t-embedding (no SiLU, no network) in PixArt: its table is
   DiT's final modulation at t = 500 less the embedding of 500.
4. Cross-attention's output projection is zero, so text changes nothing yet; its other parameters,
   the caption projection and the null caption are freshly initialised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.errors import UserError
from pixart_jax.models.configs import DiTConfig, TransformerConfig
from pixart_jax.models.dit import DiT
from pixart_jax.models.transformer import PixArtTransformer
from pixart_jax.weights.table import flatten, unflatten

TIMESTEP = 500.0  # where the two models agree

_SAME = ("depth", "width", "heads", "patch_size", "in_channels", "out_channels", "mlp_ratio")
_COPIED = ("patch_embedder/", "timestep_embedder/", "blocks/attn/", "blocks/mlp/", "final/")


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1.0 + np.exp(-x))


def _dense(layer: Mapping, x: np.ndarray, i: int | slice = slice(None)) -> np.ndarray:
    """x · kernel + bias in fp64; i: of the stacked layer i."""
    kernel, bias = (np.asarray(layer[name][i], np.float64) for name in ("kernel", "bias"))
    return x @ kernel + bias


def _embed(embedder: Mapping, timesteps: np.ndarray) -> np.ndarray:
    """ScalarEmbedder in fp64: timesteps [n] → [n, d]."""
    frequencies = np.exp(-np.log(10000.0) * np.arange(128) / 128)
    angles = np.asarray(timesteps, np.float64)[:, None] * frequencies
    x = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    return _dense(embedder["fc2"], _silu(_dense(embedder["fc1"], x)))


def _class_free_embedder(dit: Mapping) -> dict:
    """The timestep embedder with "no class" in its last bias."""
    embedder, null = dit["timestep_embedder"], np.asarray(dit["label_embedder"]["table"])[-1]
    bias = (np.asarray(embedder["fc2"]["bias"], np.float64) + null).astype(np.float32)
    return {**embedder, "fc2": {**embedder["fc2"], "bias": bias}}


def _check(dit_config: DiTConfig, config: TransformerConfig) -> None:
    for field in _SAME:
        theirs, ours = getattr(dit_config, field), getattr(config, field)
        if theirs != ours:
            raise UserError(
                f"a DiT with {field} = {theirs!r} cannot become a transformer with {field} = "
                f"{ours!r}: they must be equal"
            )
    extra = {"qk_norm": config.qk_norm, "kv_compression": config.kv_compression > 1}
    for field in (name for name, present in extra.items() if present):
        raise UserError(
            f"a DiT cannot become a transformer with {field}: it has nothing like it, and the "
            "result would differ from it"
        )


def from_dit(
    dit_params: Mapping, dit_config: DiTConfig, config: TransformerConfig, key: jax.Array
) -> dict:
    """Parameters of PixArtTransformer(config), fp32 on the host, from those of DiT(dit_config).

    At t = 500 and with equal positions the result computes what the DiT computes without a class,
    for any text (and any size: the size embedders of a multi-scale model are fresh and end in
    zeros). key: initialises what a DiT does not have. UserError where the two geometries differ.
    """
    _check(dit_config, config)
    old = {path: np.asarray(value) for path, value in flatten(nn.unbox(dit_params)).items()}
    new = {path: value for path, value in old.items() if path.startswith(_COPIED)}
    dit = unflatten(old)

    embedder = _class_free_embedder(dit)
    new["timestep_embedder/fc2/bias"] = embedder["fc2"]["bias"]
    t = _embed(embedder, np.array([TIMESTEP]))  # [1, d]

    modulation = dit["blocks"]["modulation"]
    mean = {name: w.mean(0, dtype=np.float64).astype(np.float32) for name, w in modulation.items()}
    new |= {f"t_block/{name}": value for name, value in mean.items()}
    blocks = np.concatenate([_dense(modulation, _silu(t), i) for i in range(config.depth)])
    tables = blocks - _dense(mean, _silu(t))  # [depth, 6d]
    new["blocks/table"] = tables.reshape(config.depth, 6, config.width).astype(np.float32)
    final = _dense(dit["final_modulation"], _silu(t)).reshape(2, config.width)
    new["final_table"] = (final - t).astype(np.float32)

    new |= _fresh(config, key, set(new))
    for name in ("size_embedder", "ratio_embedder") if config.size_conditions else ():
        new[f"{name}/fc2/kernel"] = np.zeros_like(new[f"{name}/fc2/kernel"])
    return unflatten(new)


def _fresh(config: TransformerConfig, key: jax.Array, known: set[str]) -> dict[str, np.ndarray]:
    """The parameters of a newly initialised transformer that are not known."""

    def init(key):
        one, text = jnp.ones((1,)), jnp.zeros((1, 1, config.caption_width))
        latents = jnp.zeros((1, config.patch_size, config.patch_size, config.in_channels))
        inputs = (latents, one, text, one, jnp.ones((1, 2)), one)
        params = nn.unbox(PixArtTransformer(config).init(key, *inputs))["params"]
        return {path: value for path, value in flatten(params).items() if path not in known}

    return {path: np.asarray(value) for path, value in jax.jit(init)(key).items()}


@dataclasses.dataclass(frozen=True)
class ReparameterizationError:
    """Error of the transformer against the class-free DiT, ‖difference‖ / ‖DiT's‖ throughout."""

    timesteps: np.ndarray  # [n]
    blocks: np.ndarray  # [depth, n]: modulation of each block (shift, scale and gate, both halves)
    final: np.ndarray  # [n]: modulation of the final layer
    output: np.ndarray  # [n]: the model's output, over the given latents

    def summary(self) -> dict[str, float]:
        """Mean and maximum over the timesteps, and the output's error at t = 500 if among them."""
        values = {
            "blocks_mean": float(self.blocks.mean()),
            "blocks_max": float(self.blocks.max()),
            "final_mean": float(self.final.mean()),
            "output_mean": float(self.output.mean()),
            "output_max": float(self.output.max()),
        }
        at = np.flatnonzero(self.timesteps == TIMESTEP)
        return values | ({"output_at_500": float(self.output[at[0]])} if at.size else {})


def reparameterization_error(
    dit_params: Mapping,
    dit_config: DiTConfig,
    params: Mapping,
    config: TransformerConfig,
    latents: jax.Array,  # [b, h, w, c]; for the output's error
    timesteps: Sequence[float] = (0, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999),
) -> ReparameterizationError:
    """The error of a re-parameterised transformer at each timestep, before any further training."""
    old, new = unflatten(flatten(nn.unbox(dit_params))), unflatten(flatten(nn.unbox(params)))
    times = np.asarray(timesteps, np.float64)
    theirs = _silu(_embed(_class_free_embedder(old), times))  # [n, d]
    ours = _embed(new["timestep_embedder"], times)
    shared = _dense(new["t_block"], _silu(ours))  # [n, 6d]

    def relative(value, reference):  # [n, …] each
        difference, reference = (
            np.linalg.norm(np.reshape(x, (len(times), -1)), axis=-1)
            for x in (value - reference, reference)
        )
        return difference / np.maximum(reference, np.finfo(np.float64).tiny)

    tables = np.asarray(new["blocks"]["table"], np.float64).reshape(config.depth, 1, -1)
    modulation = old["blocks"]["modulation"]
    blocks = [
        relative(tables[i] + shared, _dense(modulation, theirs, i)) for i in range(config.depth)
    ]
    final = relative(
        np.asarray(new["final_table"], np.float64)[None] + ours[:, None],
        _dense(old["final_modulation"], theirs).reshape(-1, 2, config.width),
    )

    b = latents.shape[0]
    labels, lengths = jnp.full((b,), dit_config.num_classes), jnp.ones((b,), jnp.int32)
    size = (jnp.ones((b, 2)), jnp.ones((b,))) if config.size_conditions else (None, None)

    @jax.jit
    def both(old, new, latents, time):
        time = jnp.full((b,), time, jnp.float32)
        text = jnp.zeros((b, 1, config.caption_width))  # any text: it has no effect yet
        ours = PixArtTransformer(config).apply({"params": new}, latents, time, text, lengths, *size)
        return ours, DiT(dit_config).apply({"params": old}, latents, time, labels)

    pairs = [both(old, new, latents, time) for time in times.astype(np.float32)]
    output = relative(*(np.stack([np.asarray(p[k], np.float64) for p in pairs]) for k in (0, 1)))
    return ReparameterizationError(times, np.stack(blocks), final, output)
