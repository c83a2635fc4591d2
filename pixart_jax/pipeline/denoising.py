"""The compiled core of drawing: noise and text → latents → pixels, one program.

What does not change from step to step is made before the scan, once: every block's keys and values
of the text (of a negative prompt that all images share, of one row), and the time's embedding and
modulation of all steps. Both halves of guidance are one batch. Steps that are guided and steps that
are not lie in scans of their own, so that the second kind costs half (shortcuts.py says which are
which).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax import diffusion
from pixart_jax.diffusion import guidance as guiding
from pixart_jax.models.transformer import BlockCache, Conditioning, TextKV
from pixart_jax.pipeline.decoding import DecodeSpec, decode_latents
from pixart_jax.pipeline.shortcuts import NONE, CacheConfig


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
    """All that a compiled drawing depends on beside its arrays' shapes. preview: as
    diffusion.sample's; None without one."""

    module: nn.Module
    schedule: diffusion.Schedule
    prediction: str
    solver: diffusion.solvers.Solver
    steps: int
    times: str
    guided: bool
    shortcuts: CacheConfig = NONE
    preview: diffusion.sampling.Preview | None = None


States = tuple[jax.Array, jax.Array]  # (text states [b, l, c], lengths [b])


def sample_latents(
    run: SamplerSpec,
    params: Mapping,
    noise: jax.Array,  # [b, h, w, c]
    keys: jax.Array | None,  # [b], or one key
    text: States,
    # Text: [depth, 1, l, k, h], one row for all images; None where not guided
    negative: States | TextKV | None,
    size: jax.Array | None,  # [b, 2]
    aspect_ratio: jax.Array | None,  # [b]
    scale: jax.Array,  # of guidance
) -> jax.Array:  # [b, h, w, c] fp32
    """From noise to latents, to be traced in a jit."""
    apply = functools.partial(run.module.apply, {"params": params})
    config, batch = run.module.config, noise.shape[0]
    t = diffusion.timesteps(run.solver, run.steps, run.schedule, run.times)
    plan = run.shortcuts.plan(t, config.depth, run.guided)
    given = {
        "conditioning": apply(t.astype(np.float32), size, aspect_ratio, method="encode_times"),
        "fresh": plan.fresh,
    }
    texts = {False: apply(*text, method="encode_text")}
    if run.guided:
        negative = (
            negative if isinstance(negative, TextKV) else apply(*negative, method="encode_text")
        )
        texts[True] = _halves(negative, texts[False], batch)

    def denoise(guided, x, t, given, kept):
        del t  # its embedding is given
        conditioning = given["conditioning"]
        if guided:
            x = jnp.concatenate([x, x])
            conditioning = Conditioning(
                *(a if len(a) == 1 else jnp.concatenate([a, a]) for a in conditioning)
            )
        kept = BlockCache(given["fresh"], kept) if plan.fresh else None
        output, kept = apply(x, conditioning, texts[guided], kept, method="denoise")
        return guiding.combine_guidance(
            output, scale, config.in_channels
        ) if guided else output, kept

    tokens = int(np.prod(config.grid(noise.shape)))
    stretches = []
    for guided, steps in guiding.run_lengths(plan.guides):
        shape = (config.depth, batch * (2 if guided else 1), tokens, config.width)
        enter = functools.partial(_entered, tuple(plan.fresh), shape, run.module.dtype)
        stretches.append(diffusion.Segment(steps, functools.partial(denoise, guided), enter))
    return diffusion.sample(
        stretches,
        noise,
        solver=run.solver,
        steps=run.steps,
        schedule=run.schedule,
        key=keys,
        times=run.times,
        prediction=run.prediction,
        preview=run.preview,
        given=given,
    )


@functools.partial(jax.jit, static_argnames="run")
def sample_latents_jit(
    run: SamplerSpec, params, noise, keys, text, negative, size, aspect_ratio, scale
) -> jax.Array:
    """:func:`latents`, compiled."""
    return sample_latents(run, params, noise, keys, text, negative, size, aspect_ratio, scale)


@functools.partial(jax.jit, static_argnames=("run", "decoding"), donate_argnames="noise")
def generate_jit(
    run: SamplerSpec,
    decoding: DecodeSpec,
    params,
    noise,
    keys,
    text,
    negative,
    size,
    aspect_ratio,
    scale,
    vae_params,
):
    """(latents [b, h, w, c] fp32, in the memory of the noise, which is gone; images uint8 [b,
    height, width, 3]): one program from noise to pixels."""
    made = sample_latents(run, params, noise, keys, text, negative, size, aspect_ratio, scale)
    return made, decode_latents(decoding, vae_params, made)


@functools.partial(jax.jit, static_argnames="module")
def encode_text_jit(module: nn.Module, params, states: jax.Array, lengths: jax.Array) -> TextKV:
    """A text's keys and values, to be kept for as long as it is drawn with."""
    return module.apply({"params": params}, states, lengths, method="encode_text")


def _halves(negative: TextKV, text: TextKV, batch: int) -> TextKV:
    """Diffusers' order, the unconditional half first; the shorter text is padded, and one row
    becomes ``batch``."""
    length = max(negative.keys.shape[2], text.keys.shape[2])

    def fitted(a):
        a = jnp.pad(a, ((0, 0), (0, 0), (0, length - a.shape[2]), (0, 0), (0, 0)))
        return jnp.broadcast_to(a, (a.shape[0], batch, *a.shape[2:]))

    keys, values = (
        jnp.concatenate([fitted(a), fitted(b)], axis=1)
        for a, b in zip(negative[:2], text[:2], strict=True)
    )
    return TextKV(
        keys, values, jnp.concatenate([jnp.broadcast_to(negative.lengths, (batch,)), text.lengths])
    )


def _entered(
    parts: tuple[str, ...], shape: tuple[int, ...], dtype, before: dict | None
) -> dict[str, jax.Array]:
    """What a stretch's first step finds of each part, [depth, rows, n, d]: where guidance ended the
    mean of both halves, which cross-attention is read as from then on; where nothing fits zeros,
    which the plan has no step read."""

    def entered(kept):
        if kept is not None and kept.shape == shape:
            return kept
        if kept is not None and kept.shape[1] == 2 * shape[1]:
            return kept.reshape(shape[0], 2, *shape[1:]).mean(1, dtype=jnp.float32).astype(dtype)
        return jnp.zeros(shape, dtype)

    return {part: entered((before or {}).get(part)) for part in parts}
