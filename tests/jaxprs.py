"""Looking into traced programs, in words that every JAX from 0.10 on has."""

from __future__ import annotations

import jax.extend


def within(equation) -> list[jax.extend.core.Jaxpr]:
    """The programs that an equation holds: a loop's body, a call's function …"""
    return list(jax.extend.core.jaxprs_in_params(equation.params))


def stacked(scan) -> list:
    """A scan's outputs that hold a row of each turn, without what is carried: those with an axis
    more than the body gives."""
    (body,) = within(scan)
    return [
        out
        for out, one in zip(scan.outvars, body.outvars, strict=True)
        if out.aval.ndim > one.aval.ndim
    ]
