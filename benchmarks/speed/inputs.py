"""What both sides compute on: numpy arrays, made once a case."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed.cases import LATENT, Case
from pixart_jax.config import ObjectiveConfig
from pixart_jax.models.controlnet import config_of
from pixart_jax.training.tasks.denoising import DiffusionObjective

SCALING_FACTOR = 0.18215  # of Stable Diffusion's VAE
STEP_KEY = 0  # the random key of a training case's first step


def make(case: Case) -> dict[str, np.ndarray]:
    """Arrays as ours takes them, channels last. Text states are exact in bfloat16; an empty text
    has one token."""
    rng = np.random.default_rng(case.px + case.batch)
    b, side, width, l = case.batch, case.px // LATENT, case.config.caption_width, case.text_tokens
    latents = (b, side, side, case.config.in_channels)
    lengths = rng.integers(min(12, l), l + 1, size=b).astype(np.int32)
    states = jnp.asarray(rng.standard_normal((b, l, width), np.float32), jnp.bfloat16)
    found = {"text_states": np.asarray(states.astype(jnp.float32)), "text_lengths": lengths}
    found["size"] = np.full((b, 2), case.px, np.float32)
    found["aspect_ratio"] = np.ones((b,), np.float32)
    if case.kind == "train":
        mean, std = rng.standard_normal(latents, np.float32), np.full(latents, 0.1, np.float32)
        null = 0.02 * rng.standard_normal((case.config.text_tokens, width), np.float32)
        return found | {"mean": mean, "std": std, "null_caption": null} | _first_draws(mean, std)
    found["noise"] = rng.standard_normal(latents, np.float32)
    if case.kind == "control":
        found["control"] = rng.standard_normal(latents, np.float32)
        d, units = case.config.width, config_of(case.config).depth
        # [in, out] of the copies' projections, the last one the condition's
        found["projections"] = 0.01 * rng.standard_normal((units + 1, d, d), np.float32)
    if case.kind in ("forward", "control"):
        found["timesteps"] = np.linspace(949.0, 3.0, b).astype(np.float32)
    else:
        found["negative_states"] = np.repeat(rng.standard_normal((1, l, width), np.float32), b, 0)
        found["negative_lengths"] = np.ones((b,), np.int32)
    return found


def _first_draws(mean: np.ndarray, std: np.ndarray) -> dict[str, np.ndarray]:
    """What our first step draws from its key, for the peer's first step: x0, noise, t and which
    captions are dropped."""
    keys = jax.random.split(jax.random.key(STEP_KEY), len(mean))
    objective = DiffusionObjective(ObjectiveConfig(), SCALING_FACTOR)
    made = objective.prepare({"mean": mean, "std": std}, keys)
    names = ("x0", "noise", "t", "dropped")
    return {f"first_{name}": np.asarray(getattr(made, name)) for name in names}
