"""Classifier-free guidance (arXiv 2207.12598): a function from denoiser to denoiser, independent
of the solver."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.diffusion.gaussian import expand_to, split_output
from pixart_jax.errors import UserError

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]


def classifier_free_guidance(
    both: Denoiser, scale: float | jax.Array, *, conditional: Denoiser | None = None
) -> Denoiser:
    """uncond + scale · (cond − uncond), on every channel of the prediction.

    both: (x [2b, …], t [2b]) → [2b, …, c or 2c]; the first b rows are unconditional (or under the
        negative prompt), the last b conditional: diffusers' order. Both halves get the same x, t.
    scale: one number, or [b], one for each image; may be traced. The plain number 1 does no second
        pass.
    conditional: (x [b, …], t [b]) → [b, …], the conditional half alone. Needed where scale is 1.

    Guidance in some of the steps only is two segments of a run (sampling.Segment), so that the
    others cost half.
    """
    if not isinstance(scale, jax.Array) and np.ndim(scale) == 0 and float(scale) == 1.0:
        if conditional is None:
            raise UserError(
                "guidance with scale 1 needs the conditional denoiser alone: give conditional="
            )
        return conditional
    return lambda x, t: combine_guidance(
        both(jnp.concatenate([x, x]), jnp.concatenate([t, t])), scale, x.shape[-1]
    )


def combine_guidance(
    output: jax.Array,
    scale: float | jax.Array,
    channels: int,
    *,
    guided: bool = True,
    perturbed: float | jax.Array | None = None,
) -> jax.Array:
    """The parts' output [2b or 3b, …, c or 2c] → the guided prediction [b, …, c or 2c]; c:
    channels.

    The parts are the unconditional half (where guided), the conditional one and, where
    ``perturbed`` is a scale, the conditional one with perturbed attention (PAG, arXiv 2403.17377):
    uncond + scale · (cond − uncond) + perturbed · (cond − perturbed cond); without the first,
    cond + perturbed · (cond − perturbed cond). The variance logits of a 2c-channel model are those
    of the conditional part, unguided. ε and v may both be guided: they differ by a multiple of
    x_t, the same in all parts.
    """
    parts = jnp.split(output, guided + 1 + (perturbed is not None))
    towards, logits = split_output(parts[int(guided)], channels)
    prediction = towards
    if guided:
        base, _ = split_output(parts[0], channels)
        prediction = base + expand_to(jnp.asarray(scale), base) * (towards - base)
    if perturbed is not None:
        away, _ = split_output(parts[-1], channels)
        prediction = prediction + perturbed * (towards - away)
    return prediction if logits is None else jnp.concatenate([prediction, logits], axis=-1)


def pag_scales(t: np.ndarray, scale: float, adaptive: float = 0.0) -> np.ndarray:
    """The scale of perturbed-attention guidance at times t [n]: max(scale − adaptive · (1000 − t),
    0), as diffusers'; float32 [n]."""
    return np.maximum(scale - adaptive * (1000 - np.asarray(t)), 0).astype(np.float32)


def control_scales(steps: np.ndarray, scale: float, start: float, end: float) -> np.ndarray:
    """The scale of a ControlNet at steps [n] of a run that ends with the last of them, which they
    count from 0; 0 outside of two shares of the run. float32 [n]."""
    count = steps[-1] + 1
    acts = (steps / count >= start) & ((steps + 1) / count <= end)
    return np.where(acts, scale, 0).astype(np.float32)


def within(t: np.ndarray, interval: tuple[float, float] | None) -> np.ndarray:
    """Which of the times [n] lie in the interval (low, high), both ends counted; bool [n]. None:
    all. (arXiv 2404.07724)"""
    low, high = interval or (-np.inf, np.inf)
    return (low <= np.asarray(t)) & (np.asarray(t) <= high)


def run_lengths(flags: np.ndarray) -> list[tuple[bool, int]]:
    """Flags [n] as (flag, how many in a row)."""
    borders = np.flatnonzero(np.diff(np.asarray(flags, int))) + 1
    return [(bool(part[0]), len(part)) for part in np.split(np.asarray(flags), borders)]
