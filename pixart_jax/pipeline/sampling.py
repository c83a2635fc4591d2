"""How a model wants to be drawn with where nobody says.

sampling_config.json in its folder, which diffusers does not read; without one, what its scheduler
tells: a folder whose scheduler is an LCMScheduler holds a distilled model, which draws in 4 steps
without guidance. The best guidance belongs to
the model: PixArt's own is 4.5, a small model that saw few pictures breaks under as much.

What stands for "no prompt" is the model's too: ``null`` in that file, or, where it says nothing of
it, in one of the same name beside the transformer's weights (a converted official checkpoint that
holds a null caption says 'embedding' there, as the official code draws). Where neither says, it is
'text', as diffusers draws.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from pixart_jax.diffusion import solvers
from pixart_jax.errors import UserError, nearest

FILE = "sampling_config.json"
NULLS = ("text", "embedding")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """What stands in for a guidance scale, a number of steps, a solver and a meaning of "no prompt"
    that are not given.

    null: 'text', the text encoder's states of "", or 'embedding', the transformer's null caption
    under the prompt's length.
    """

    guidance: float = 4.5
    steps: int = 20
    solver: str = "dpm++"
    null: str = "text"

    def __post_init__(self):
        if (
            isinstance(self.guidance, bool)
            or not isinstance(self.guidance, int | float)
            or not math.isfinite(self.guidance)
        ):
            raise UserError(f"guidance = {self.guidance!r}: a finite number is needed")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise UserError(f"steps = {self.steps!r}: a whole number of at least 1 is needed")
        if self.solver not in solvers.NAMES:
            raise UserError(
                f"solver = {self.solver!r} is unknown{nearest(str(self.solver), solvers.NAMES)}"
            )
        if self.null not in NULLS:
            raise UserError(f"null = {self.null!r} is unknown{nearest(str(self.null), NULLS)}")

    def with_defaults(
        self, steps: int | None, guidance: float | None, solver: str | None
    ) -> tuple[int, float, str]:
        """(steps, guidance, solver), these where they are given. A solver that is asked for takes
        its own steps by default."""
        if solver is not None and solver != self.solver and steps is None:
            steps = {"lcm": 4, "dmd": 1}.get(solver, SamplingConfig.steps)
        return (
            self.steps if steps is None else steps,
            self.guidance if guidance is None else guidance,
            self.solver if solver is None else solver,
        )

    def resolve_null(self, null: str) -> str:
        """'text' or 'embedding': this, where it is not 'auto'."""
        return self.null if null == "auto" else null


_OF_SCHEDULER = {"LCMScheduler": SamplingConfig(guidance=1.0, steps=4, solver="lcm")}


def read(folder: str | os.PathLike) -> SamplingConfig:
    """The settings of a model folder; its scheduler's, or PixArt's, where it has no such file."""
    path = Path(folder) / FILE
    told = _told(Path(folder) / "transformer" / FILE)
    null = {"null": told.null} if told is not None else {}
    if not path.is_file():
        return dataclasses.replace(
            _OF_SCHEDULER.get(_scheduler(Path(folder)), SamplingConfig()), **null
        )
    return _told(path, null)


def _told(path: Path, otherwise: Mapping = MappingProxyType({})) -> SamplingConfig | None:
    """The settings that a file holds, ``otherwise`` where it says nothing; None where there is no
    file."""
    if not path.is_file():
        return None
    try:
        return SamplingConfig(**{**otherwise, **json.loads(path.read_text())})
    except (ValueError, TypeError) as fault:
        known = ", ".join(field.name for field in dataclasses.fields(SamplingConfig))
        raise UserError(f"{path} is no JSON object with any of {known}: {fault}") from None
    except UserError as fault:
        raise UserError(f"{path}: {fault}") from None


def write(config: SamplingConfig, folder: str | os.PathLike) -> None:
    """folder/sampling_config.json."""
    (Path(folder) / FILE).write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def _scheduler(folder: Path) -> str:
    """Class of the folder's scheduler; '' where none is named. What else is wrong there,
    pipeline.scheduler says."""
    try:
        return str(
            json.loads((folder / "scheduler" / "scheduler_config.json").read_text()).get(
                "_class_name", ""
            )
        )
    except (OSError, ValueError, AttributeError):
        return ""
