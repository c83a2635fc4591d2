"""Exponential moving average of the parameters, as an Optax transform: it is sharded, saved and
restored with the optimizer."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class EmaState(NamedTuple):
    ema: optax.Params  # the same tree, shapes and dtypes as the parameters


def parameter_ema(decay: float) -> optax.GradientTransformationExtraArgs:
    """Keep ema ← decay · ema + (1 − decay) · parameters after each update; updates pass through
    unchanged.

    It starts as a copy of the parameters, without bias correction, as PixArt's and DiT's do. It
    comes last in a chain: it averages what ``optax.apply_updates`` will make of the parameters.
    """

    def init(params):
        return EmaState(jax.tree.map(jnp.copy, params))

    def update(updates, state, params=None, **_):
        if params is None:
            raise ValueError("parameter_ema needs the parameters: update(updates, state, params)")
        new = optax.apply_updates(params, updates)
        # In this form what does not change, as the null caption, stays equal to the bit.
        return updates, EmaState(
            jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, new)
        )

    return optax.GradientTransformationExtraArgs(init, update)


def averaged(opt_state: optax.OptState) -> optax.Params | None:
    """The average inside an optimizer's state, or None where none is kept."""
    return optax.tree.get(opt_state, "ema")
