"""Which steps are skipped: a non-finite loss or gradient, or one far above its running mean.

The step decides on the device (training/step.py). A skipped step leaves parameters, moments and
average unchanged to the bit, and the run continues with the next batch. The running means are part
of the state, so a resumed run decides as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

# good steps that the running means average over; no spike is called before there are as many
WINDOW = 100


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepGuard:
    """Counts and running means of a stage's steps; scalars, int32 and fp32. Each stage begins
    afresh."""

    skipped: jax.Array  # steps not taken
    consecutive: jax.Array  # of these, the last ones without a good step between
    accepted: jax.Array  # steps taken
    loss: jax.Array  # running means over the last WINDOW good steps
    grad_norm: jax.Array

    @classmethod
    def fresh(cls) -> StepGuard:
        """The guard before a stage's first step."""
        count, mean = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        return cls(count, count, count, mean, mean)

    def check(
        self, loss: jax.Array, grad_norm: jax.Array, spike_factor: float | None
    ) -> tuple[jax.Array, StepGuard]:
        """(whether to take a step of this loss and gradient norm, the guard after it).

        spike_factor: how many times its running mean a loss or norm may reach; None: any finite
        value passes.
        """
        ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        if spike_factor is not None:
            usual = (loss <= spike_factor * jnp.abs(self.loss)) & (
                grad_norm <= spike_factor * self.grad_norm
            )
            ok &= usual | (self.accepted < WINDOW)
        weight = 1.0 / jnp.minimum(self.accepted + 1, WINDOW).astype(jnp.float32)

        def mean(old, value):
            return jnp.where(ok, old + weight * (value - old), old)

        skipped = jnp.where(ok, 0, 1)
        after = StepGuard(
            self.skipped + skipped,
            jnp.where(ok, 0, self.consecutive + 1),
            self.accepted + 1 - skipped,
            mean(self.loss, loss),
            mean(self.grad_norm, grad_norm),
        )
        return ok, after


def describe(values: dict[str, float], keys: list[str], limit: int = 8) -> str:
    """Why a step was skipped, in words. values: its metrics; keys: the records of its batch."""
    broken = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
    why = " and ".join(f"{name} is {values[name]}" for name in broken) or (
        f"loss {values['loss']:.4g} or grad_norm {values['grad_norm']:.4g} is far above its "
        "running mean"
    )
    if not keys:
        return why
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return f"{why}; the batch held {', '.join(keys[:limit])}{more}"
