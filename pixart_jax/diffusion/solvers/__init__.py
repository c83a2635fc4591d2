"""The solvers, each a frozen dataclass of its options, and their names."""

from __future__ import annotations

from pixart_jax.diffusion.solvers.ancestral import DDIM, DDPM
from pixart_jax.diffusion.solvers.base import Solver, StepTable
from pixart_jax.diffusion.solvers.dmd import DMD, TDM
from pixart_jax.diffusion.solvers.dpm import DPMSolver
from pixart_jax.diffusion.solvers.lcm import LCM
from pixart_jax.diffusion.solvers.sa import SASolver
from pixart_jax.errors import UserError, nearest

NAMES = ("ddpm", "ddim", "dpm++", "sa", "lcm", "dmd", "tdm")

__all__ = [
    "DDIM",
    "DDPM",
    "DMD",
    "DPMSolver",
    "LCM",
    "NAMES",
    "SASolver",
    "Solver",
    "StepTable",
    "TDM",
    "by_name",
]


def by_name(name: str, *, order: int = 2, eta: float = 0.0) -> Solver:
    """The solver of that name with PixArt's settings. order: of dpm++. eta: of ddim."""
    if name == "ddim":
        return DDIM(eta=eta)
    if name == "dpm++":
        return DPMSolver(order=order)
    others = {"ddpm": DDPM, "sa": SASolver, "lcm": LCM, "dmd": DMD, "tdm": TDM}
    if name in others:
        return others[name]()
    raise UserError(f"unknown solver {name!r}{nearest(name, NAMES)}")
