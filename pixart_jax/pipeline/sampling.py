"""How a model wants to be drawn with where nobody says: sampling_config.json in its folder, which diffusers does not read.

The best guidance belongs to the model: PixArt's own is 4.5, a small model that saw few pictures breaks under as much.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path

from pixart_jax.errors import UserError

FILE = "sampling_config.json"


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """guidance: the scale that stands in for one that is not given."""

    guidance: float = 4.5


def read(folder: str | os.PathLike) -> SamplingConfig:
    """The settings of a model folder; PixArt's where it has no such file."""
    path = Path(folder) / FILE
    if not path.is_file():
        return SamplingConfig()
    try:
        found = json.loads(path.read_text())
    except ValueError as fault:
        raise UserError(f"{path} is no JSON: {fault}") from None
    guidance = found.get("guidance", SamplingConfig.guidance) if isinstance(found, dict) else None
    if isinstance(guidance, bool) or not isinstance(guidance, int | float) or not math.isfinite(guidance):
        raise UserError(f'{path}: {{"guidance": a finite number}} is needed; without the file it is {SamplingConfig.guidance}')
    return SamplingConfig(float(guidance))


def write(config: SamplingConfig, folder: str | os.PathLike) -> None:
    """folder/sampling_config.json."""
    (Path(folder) / FILE).write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
