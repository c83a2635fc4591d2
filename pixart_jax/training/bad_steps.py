"""Which steps are not taken: a loss or gradient that is no number, or far above what it has lately
been.

The step decides on the device (training/step.py). A skipped one leaves parameters, moments and
average as they were to the bit, and the run goes on with the next batch. What is usual is counted
in the state, so a resumed run decides as one that never stopped.
"""

from __future__ import annotations

import math

import flax.struct
import jax
import jax.numpy as jnp

# good steps that the running means look back on; before there have been so many, no spike is called
WINDOW = 100


@flax.struct.dataclass
class StepGuard:
    """What the steps of a stage have been like; all scalars, int32 and fp32. It starts anew with
    each stage."""

    skipped: jax.Array  # steps that were not taken
    consecutive: jax.Array  # of these, the last ones without a good step between
    accepted: jax.Array  # steps that were taken
    loss: jax.Array  # running means over the last WINDOW good steps
    grad_norm: jax.Array

    @classmethod
    def fresh(cls) -> StepGuard:
        count, mean = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        return cls(count, count, count, mean, mean)

    def check(
        self, loss: jax.Array, grad_norm: jax.Array, spike_factor: float | None
    ) -> tuple[jax.Array, StepGuard]:
        """(whether a step of this loss and gradient norm is to be taken, the guard after it).

        spike_factor: how many times its running mean a loss or norm may reach; None: any finite
        value will do.
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


def describe(values: dict[str, float], keys: list[str], most: int = 8) -> str:
    """What was wrong with a step, in words. values: its metrics; keys: the records of its batch."""
    wrong = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
    if wrong:
        what = " and ".join(f"{name} is {values[name]}" for name in wrong)
    else:
        what = (
            f"loss {values['loss']:.4g} or grad_norm {values['grad_norm']:.4g} is far above "
            "its running mean"
        )
    if not keys:
        return what
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return f"{what}; the batch held {', '.join(keys[:most])}{more}"
