"""Ancestral sampling (DDPM, arXiv 2006.11239; respacing and learned range as Improved DDPM, arXiv
2102.09672)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.diffusion.posterior import learned_log_variance, posterior
from pixart_jax.diffusion.respacing import respace_schedule, space_timesteps
from pixart_jax.diffusion.schedule import Schedule
from pixart_jax.diffusion.solvers.base import State, StepTable, check_start


@dataclasses.dataclass(frozen=True)
class DDPM:
    """Draws x_{t−1} from p(x_{t−1} | x_t): mean (7), variance (9) where the denoiser returns [b, …,
    2c] (the prediction, then the logits), else β̃_t (8). No noise at the last step; without a key,
    none at all. x_0 is not clipped.

    ``steps``: N, 'N', 'a,b,c' or 'ddimN' as respacing.kept_times reads it. Times are whole by
    construction.
    """

    def plan(
        self, schedule: Schedule, steps: int | str, *, times: str, start: int, stochastic: bool
    ) -> StepTable:
        kept = space_timesteps(schedule.timesteps, steps)
        check_start(start, len(kept))
        process = respace_schedule(schedule, kept)
        tables = posterior(process)
        order = np.arange(len(kept))[::-1][start:]  # from the noisiest down
        return StepTable(
            t=kept[order].astype(np.float64),
            alpha=np.sqrt(process.alphas_cumprod[order]),
            sigma=np.sqrt(1.0 - process.alphas_cumprod[order]),
            coefficients={
                "x0": tables.x0[order],
                "x": tables.x_t[order],
                "log_small": tables.log_variance_min[order],
                "log_large": tables.log_variance_max[order],
                "noise": (order > 0).astype(np.float64),
            },
            noisy=stochastic,
        )

    def init(self, x: jax.Array) -> State:
        return (x,)

    def update(
        self,
        state: State,
        x0: jax.Array,
        logits: jax.Array | None,
        c: dict[str, jax.Array],
        noise: jax.Array | None,
    ) -> State:
        mean = c["x0"] * x0 + c["x"] * state[0]
        if noise is None:
            return (mean,)
        log_variance = (
            c["log_small"]
            if logits is None
            else learned_log_variance(logits, c["log_small"], c["log_large"])
        )
        return (mean + c["noise"] * jnp.exp(0.5 * log_variance) * noise,)
