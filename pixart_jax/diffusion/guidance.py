"""Classifier-free guidance (arXiv 2207.12598): a function from denoiser to denoiser, so no solver knows of it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.diffusion.gaussian import per_image, split_output
from pixart_jax.errors import UserError

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]


def guided(
    both: Denoiser,
    scale: float | jax.Array,
    *,
    conditional: Denoiser | None = None,
    interval: tuple[float, float] | None = None,
) -> Denoiser:
    """uncond + scale · (cond − uncond), on every channel of the prediction.

    both: (x [2b, …], t [2b]) → [2b, …, c or 2c]; the first b rows are to be unconditional (or under the negative prompt),
        the last b conditional: diffusers' order. It sees the same x and t in both halves.
    scale: one number, or [b], one for each image; may be traced. The plain number 1 does no second pass.
    conditional: (x [b, …], t [b]) → [b, …], the conditional half alone. Needed where scale is 1 and for an interval.
    interval: guide only where low ≤ t ≤ high, in the model's timesteps (0 … T − 1); elsewhere the conditional half runs alone and
        costs half (a branch, not a mask). All images of a batch are at the same t.

    The variance logits of a 2c-channel model are those of the conditional half, unguided. ε and v may both be guided: they
    differ by a multiple of x_t, the same in both halves.
    """
    plain = not isinstance(scale, jax.Array) and np.ndim(scale) == 0 and float(scale) == 1.0
    if conditional is None and (plain or interval is not None):
        raise UserError("guidance with scale 1 or an interval needs the conditional denoiser alone: give conditional=")
    if plain:
        return conditional

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        output = both(jnp.concatenate([x, x]), jnp.concatenate([t, t]))
        unconditional, conditioned = jnp.split(output, 2)
        base, _ = split_output(unconditional, x.shape[-1])
        towards, logits = split_output(conditioned, x.shape[-1])
        prediction = base + per_image(jnp.asarray(scale), base) * (towards - base)
        return prediction if logits is None else jnp.concatenate([prediction, logits], axis=-1)

    if interval is None:
        return denoise
    low, high = interval
    return lambda x, t: jax.lax.cond((low <= t[0]) & (t[0] <= high), denoise, conditional, x, t)
