"""A folder of drawn images: PNGs that say how they were drawn, so that a second call draws only
what is not there."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pixart_jax.errors import UserError
from pixart_jax.images import image_grid, png_settings, slug, write_png
from pixart_jax.pipeline import fingerprint
from pixart_jax.pipeline.shares import PromptShard

GRID = "grid.png"
GRID_MOST = 100  # images on a sheet


class OutputFolder:
    """The images of one call in a folder.

    wanted: the settings of each image (with prompt, index and seed). An image is there when a PNG
    of its name carries the very same settings; one with other settings is kept, and the new one is
    written beside it under a number. share: of the processes that draw them together, all by
    default; ``mine`` are the numbers of its images, ``missing`` those not yet there.
    """

    def __init__(
        self, folder: str | os.PathLike, wanted: Sequence[Mapping], share: PromptShard | None = None
    ):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        # an unwritable folder shows before the work, not after it
        with tempfile.TemporaryFile(dir=self.folder):
            pass
        self.wanted = [dict(settings) for settings in wanted]
        self.share = share or PromptShard()
        self.mine = self.share.of([self.group(settings) for settings in self.wanted])
        found = {n: self._find(self.wanted[n]) for n in self.mine}
        self.paths = {n: path for n, (path, _) in found.items()}
        self.missing = [n for n, (_, there) in found.items() if not there]

    @staticmethod
    def group(settings: Mapping) -> tuple:
        """What the images of one call of ``Pipeline.draw`` have in common: height, width and
        seed."""
        return tuple(settings[name] for name in ("height", "width", "seed"))

    def groups(self) -> list[list[int]]:
        """Numbers of the missing images, those of one group together."""
        groups: dict[tuple, list[int]] = {}
        for n in self.missing:
            groups.setdefault(self.group(self.wanted[n]), []).append(n)
        return list(groups.values())

    def wait(
        self,
        came: Callable[[int], object] = lambda count: None,
        patience: float = 600,
        every: float = 1,
    ) -> None:
        """Until the other shares' images are there too, by their files alone; came(count): told as
        they come.

        UserError where for ``patience`` seconds none has come: their processes are no longer at
        work, or never were.
        """
        awaited = [n for n in range(len(self.wanted)) if n not in self.paths]
        last = time.monotonic()
        while awaited:
            found = {
                n: path for n in awaited for path, there in [self._find(self.wanted[n])] if there
            }
            self.paths |= found
            awaited = [n for n in awaited if n not in found]
            came(len(found))
            if found:
                last = time.monotonic()
            elif time.monotonic() - last > patience:
                raise UserError(
                    f"{len(awaited)} images of the other processes are not in {self.folder}, and "
                    f"none has come for {patience:.0f} s: "
                    "this share is done; start the others again, and this one for the sheet"
                )
            if awaited:
                time.sleep(every)

    def _find(self, settings: Mapping) -> tuple[Path, bool]:
        """(where the image is or will be, whether it is there)."""
        name = f"{settings['index']:04d}_{slug(settings['prompt'])}_{settings['seed']}"
        number = 1
        while True:
            path = self.folder / (f"{name}.png" if number == 1 else f"{name}_{number}.png")
            if not path.exists():
                return path, False
            there = png_settings(path)
            if there == settings:
                return path, True
            number += 1

    def write(self, n: int, image: np.ndarray) -> Path:
        """Image n of those wanted, uint8 [h, w, 3]."""
        write_png(self.paths[n], image, self.wanted[n])
        return self.paths[n]

    def write_grid(self) -> Path:
        """A sheet of the wanted images, the first GRID_MOST of them, with their prompts; all shares
        must be there."""
        from PIL import Image

        images = []
        for n in range(min(len(self.wanted), GRID_MOST)):
            with Image.open(self.paths[n]) as image:
                images.append(np.asarray(image.convert("RGB")))
        sheet = image_grid(images, [settings["prompt"] for settings in self.wanted[:GRID_MOST]])
        write_png(self.folder / GRID, sheet)
        return self.folder / GRID


def model_hash(folder: str | os.PathLike) -> str:
    """Ten hex digits that change when a model's transformer does."""
    return fingerprint.folder_fingerprint(Path(folder) / "transformer")
