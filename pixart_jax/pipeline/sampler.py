"""The compiled core of sampling: noise and text → latents → pixels, one program.

What does not change from step to step is computed once, before the scan: every block's keys and
values of the text, and the embedding and modulation of all times. Both halves of guidance are one
batch; guided and unguided steps lie in scans of their own, so that the second kind costs half
(block_cache.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax import diffusion, finite
from pixart_jax.diffusion.guidance import combine_guidance
from pixart_jax.diffusion.sampling import Preview, sample, timesteps
from pixart_jax.models.transformer import Conditioning, TextKV
from pixart_jax.pipeline import block_cache
from pixart_jax.pipeline.decoder import DecodeSpec, decode_latents

States = tuple[jax.Array, jax.Array]  # (text states [b, l, c], lengths [b])


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
    """All that the compiled program depends on beside the shapes of its arrays. preview: as
    diffusion.sample's; None without one."""

    module: nn.Module
    schedule: diffusion.Schedule
    prediction: str
    solver: diffusion.solvers.Solver
    steps: int
    times: str
    guided: bool
    plan: block_cache.CachePlan
    preview: Preview | None = None


def sample_latents(
    spec: SamplerSpec,
    params: Mapping,
    noise: jax.Array,  # [b, h, w, c]
    keys: jax.Array | None,  # [b], or one key
    text: States,
    negative: States | TextKV | None,  # may be one row for all images; None where not guided
    size: jax.Array | None,  # [b, 2]
    aspect_ratio: jax.Array | None,  # [b]
    scale: jax.Array,  # [b] of guidance
) -> jax.Array:  # [b, h, w, c] fp32
    """From noise to latents, to be traced in a jit."""
    apply = functools.partial(spec.module.apply, {"params": params})
    config, batch = spec.module.config, noise.shape[0]
    t = timesteps(spec.solver, spec.steps, spec.schedule, spec.times)
    conditionings = apply(t.astype(np.float32), size, aspect_ratio, method="encode_times")
    texts = {False: apply(*text, method="encode_text")}
    if spec.guided:
        assert negative is not None, "guided, so there is a negative prompt"
        if not isinstance(negative, TextKV):
            negative = TextKV(*apply(*negative, method="encode_text"))
        texts[True] = _both_halves(negative, texts[False], batch)

    def denoise(guided, x, conditioning, cache):
        if guided:
            x = jnp.concatenate([x, x])
            conditioning = Conditioning(
                *(a if len(a) == 1 else jnp.concatenate([a, a]) for a in conditioning)
            )
        output, outputs = apply(x, conditioning, texts[guided], cache, method="denoise")
        return combine_guidance(output, scale, config.in_channels) if guided else output, outputs

    tokens = int(np.prod(config.grid(noise.shape)))
    shape = (config.depth, batch, tokens, config.width)
    return sample(
        block_cache.segments(spec.plan, denoise, shape, spec.module.dtype),
        noise,
        solver=spec.solver,
        steps=spec.steps,
        schedule=spec.schedule,
        key=keys,
        times=spec.times,
        prediction=spec.prediction,
        preview=spec.preview,
        per_step=(conditionings, spec.plan.recompute),
    )


@functools.partial(jax.jit, static_argnames="spec")
def sample_latents_jit(spec: SamplerSpec, params, *arguments) -> tuple[jax.Array, jax.Array]:
    """(latents, bool [b]: whether an image's are finite)."""
    latents = sample_latents(spec, params, *arguments)
    return latents, finite.rows(latents)


@functools.partial(jax.jit, static_argnames=("spec", "decode"), donate_argnames="noise")
def generate_jit(spec: SamplerSpec, decode: DecodeSpec, vae_params, params, noise, *arguments):
    """Arguments as :func:`sample_latents` → (latents [b, h, w, c] fp32, in the memory of the noise,
    images [b, height, width, 3] of about [−1, 1], bool [b]: whether both are finite): one program
    from noise to pixels."""
    latents = sample_latents(spec, params, noise, *arguments)
    images = decode_latents(decode, vae_params, latents)
    return latents, images, finite.rows(latents, images)


@functools.partial(jax.jit, static_argnames="module")
def encode_text_jit(module: nn.Module, params, states: jax.Array, lengths: jax.Array) -> TextKV:
    """The keys and values of texts, [depth, n, l, k, h]."""
    return module.apply({"params": params}, states, lengths, method="encode_text")


def _both_halves(negative: TextKV, text: TextKV, batch: int) -> TextKV:
    """In diffusers' order, the unconditional half first; the shorter text is padded, and one row
    becomes ``batch``."""
    length = max(negative.keys.shape[2], text.keys.shape[2])

    def padded(a):
        a = jnp.pad(a, ((0, 0), (0, 0), (0, length - a.shape[2]), (0, 0), (0, 0)))
        return jnp.broadcast_to(a, (a.shape[0], batch, *a.shape[2:]))

    keys, values = (
        jnp.concatenate([padded(a), padded(b)], axis=1) for a, b in zip(negative[:2], text[:2])
    )
    lengths = jnp.broadcast_to(negative.lengths, (batch,))
    return TextKV(keys, values, jnp.concatenate([lengths, text.lengths]))
