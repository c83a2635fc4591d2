"""The solvers, each a frozen dataclass of its options, and their names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from pixart_jax.diffusion.solvers.ancestral import DDIM, DDPM, Heun
from pixart_jax.diffusion.solvers.base import SPACINGS, OnGrid, Solver, StepTable
from pixart_jax.diffusion.solvers.dmd import DMD, TDM
from pixart_jax.diffusion.solvers.dpm import DPMSolver
from pixart_jax.diffusion.solvers.lcm import LCM
from pixart_jax.diffusion.solvers.sa import SASolver
from pixart_jax.diffusion.solvers.unipc import UniPC
from pixart_jax.errors import UserError, nearest

_ON_GRID: dict[str, Callable[..., Solver]] = {
    "dpm++": DPMSolver,
    "unipc": UniPC,
    "euler": functools.partial(DDIM, spacing="linspace"),
    "euler_ancestral": functools.partial(DDIM, eta=1.0, spacing="linspace"),
    "heun": Heun,
    "ddim": DDIM,
}
_ON_THEIR_OWN: dict[str, Callable[[], Solver]] = {
    "ddpm": DDPM,
    "sa": SASolver,
    "lcm": LCM,
    "dmd": DMD,
    "tdm": TDM,
}
NAMES = (*_ON_GRID, *_ON_THEIR_OWN)

__all__ = [
    "DDIM",
    "DDPM",
    "DMD",
    "DPMSolver",
    "Heun",
    "LCM",
    "NAMES",
    "OnGrid",
    "SASolver",
    "SPACINGS",
    "Solver",
    "StepTable",
    "TDM",
    "UniPC",
    "by_name",
]


def by_name(name: str, *, order: int = 2, eta: float = 0.0, **times: Any) -> Solver:
    """The solver of that name with PixArt's settings. order: of dpm++ and unipc. eta: of ddim.
    times: spacing, offset and at, of solvers whose times may be chosen (OnGrid)."""
    if name in _ON_GRID:
        own: dict[str, Any] = {"order": order} if name in ("dpm++", "unipc") else {}
        own |= {"eta": eta} if name == "ddim" else {}
        return _ON_GRID[name](**own, **times)
    if name not in _ON_THEIR_OWN:
        raise UserError(f"unknown solver {name!r}{nearest(name, NAMES)}")
    if times:
        known = ", ".join(_ON_GRID)
        raise UserError(f"solver {name!r} has its own times: spacing and timesteps are for {known}")
    return _ON_THEIR_OWN[name]()
