"""A folder of drawn images: PNGs that say how they were drawn, so that a second call draws only what is not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pixart_jax import png
from pixart_jax.pipeline import fingerprint

GRID = "grid.png"
GRID_MOST = 100  # images on a sheet


class Drawings:
    """The images of one call in a folder.

    wanted: the settings of each image (with prompt, index and seed). An image is there when a PNG of its name carries the very
    same settings; one with other settings is kept, and the new one is written beside it under a number.
    """

    def __init__(self, folder: str | os.PathLike, wanted: Sequence[Mapping]):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.folder):  # an unwritable folder shows before the work, not after it
            pass
        self.wanted = [dict(settings) for settings in wanted]
        found = [self._find(settings) for settings in self.wanted]
        self.paths = [path for path, _ in found]
        self.missing = [n for n, (_, there) in enumerate(found) if not there]

    def _find(self, settings: Mapping) -> tuple[Path, bool]:
        """(where the image is or will be, whether it is there)."""
        name = f"{settings['index']:04d}_{png.slug(settings['prompt'])}_{settings['seed']}"
        number = 1
        while True:
            path = self.folder / (f"{name}.png" if number == 1 else f"{name}_{number}.png")
            if not path.exists():
                return path, False
            there = png.settings(path)
            if there == settings:
                return path, True
            number += 1

    def write(self, n: int, image: np.ndarray) -> Path:
        """Image n of those wanted, uint8 [h, w, 3]."""
        png.write(self.paths[n], image, self.wanted[n])
        return self.paths[n]

    def write_grid(self) -> Path:
        """A sheet of the wanted images, the first GRID_MOST of them, with their prompts."""
        from PIL import Image

        images = []
        for path in self.paths[:GRID_MOST]:
            with Image.open(path) as image:
                images.append(np.asarray(image.convert("RGB")))
        sheet = png.grid(images, [settings["prompt"] for settings in self.wanted[:GRID_MOST]])
        png.write(self.folder / GRID, sheet)
        return self.folder / GRID


def model_hash(folder: str | os.PathLike) -> str:
    """Ten hex digits that change when a model's transformer does."""
    return fingerprint.of_folder(Path(folder) / "transformer")
