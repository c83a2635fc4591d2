"""``python -m pixart_jax edges IMAGES OUT``: images → edge maps for a ControlNet."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from tqdm import tqdm

from pixart_jax import cli
from pixart_jax.errors import UserError
from pixart_jax.images import png_settings, write_png
from pixart_jax.remote_path import Location

PROG = "python -m pixart_jax edges"


@dataclasses.dataclass(frozen=True)
class Flags:
    """Compute the edge maps of images, as PNGs of the same names. A second call does only what is
    missing; an image that cannot be read is named, counted and left out."""

    images: tyro.conf.Positional[Path]
    """A folder of images, with all below it, or one image."""
    out: tyro.conf.Positional[Path]
    """The folder for the maps."""
    method: Literal["hed", "canny"] = "hed"
    """hed: the network that PixArt's ControlNet was trained with. canny: needs no weights."""
    weights: Location | None = None
    """Of hed: ControlNetHED.pth, its folder, or lllyasviel/Annotators/ControlNetHED.pth on the
    hub."""
    resolution: int | None = None
    """Resize the shorter side to so many pixels first, both to multiples of 64 (controlnet_aux
    takes 512); by default the image's own size. Images of one size share one program."""
    batch_size: int = 8
    """Images of one size at once."""


def main(argv: Sequence[str]) -> int:
    flags = cli.parse(Flags, argv, prog=PROG)
    if flags.batch_size < 1 or (flags.resolution or 64) < 64:
        raise UserError("--batch-size is at least 1, and --resolution at least 64")
    from pixart_jax.pipeline.conditions import EdgeDetector

    places = find(flags.images, flags.out)
    detector = EdgeDetector.open(flags.method, flags.weights)
    settings = {"edges": detector.identity, "resolution": flags.resolution}
    missing = [place for place in places if png_settings(place[1]) != settings]
    bad, waiting = 0, dict[tuple, list]()
    bar = tqdm(total=len(places), initial=len(places) - len(missing), unit=" images", desc="edges")
    with bar, concurrent.futures.ThreadPoolExecutor(4) as readers:
        # decoding runs a few batches ahead
        for start in range(0, len(missing), 4 * flags.batch_size):
            part = missing[start : start + 4 * flags.batch_size]
            read = readers.map(lambda place: _read(place[0], flags.resolution), part)
            for (source, target), pixels in zip(part, read):
                if isinstance(pixels, str):
                    bad += 1
                    bar.write(f"left out: {source}: {pixels}", file=sys.stderr)
                    continue
                group = waiting.setdefault(pixels.shape, [])
                group.append((target, pixels))
                if len(group) == flags.batch_size:
                    bar.update(_write(detector, waiting.pop(pixels.shape), settings, len(group)))
        for group in waiting.values():
            bar.update(_write(detector, group, settings, flags.batch_size))
    left = f"; {bad} could not be read and were left out" if bad else ""
    print(f"{len(places) - bad} edge maps in {flags.out}{left}")
    return 0


def find(images: Path, out: Path) -> list[tuple[Path, Path]]:
    """(image, its map) of every image. Raises UserError where there is none, or two would have one
    map."""
    from pixart_jax.data.images import PICTURES

    if images.is_file():
        return [(images, out / f"{images.stem}.png")]
    if not images.is_dir():
        raise UserError(f"{images}: no such file or folder")
    files = [f for f in sorted(images.rglob("*")) if f.suffix.lower()[1:] in PICTURES]
    places: dict[Path, Path] = {}
    for file in files:
        if file.is_file() and not file.is_relative_to(out):
            target = out / file.relative_to(images).with_suffix(".png")
            if target in places:
                raise UserError(f"{places[target]} and {file} would both become {target}")
            places[target] = file
    if not places:
        raise UserError(f"{images} holds no image")
    return [(file, target) for target, file in places.items()]


def _read(path: Path, resolution: int | None) -> np.ndarray | str:
    """uint8 [h, w, 3], or why it cannot be read."""
    from PIL import Image

    from pixart_jax.data.images import UnreadableImage, decode

    try:
        pixels = decode(path.read_bytes())
    except (OSError, UnreadableImage) as error:
        return " ".join(str(error).split())
    if min(pixels.shape[:2]) < 16:
        return "a side is less than 16 pixels"
    if resolution is None:
        return pixels
    ratio = resolution / min(pixels.shape[:2])
    height, width = (max(64, round(side * ratio / 64) * 64) for side in pixels.shape[:2])
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


def _write(detector, group: list[tuple[Path, np.ndarray]], settings: dict, size: int) -> int:
    """Write a group's maps, filled up to a batch of ``size``; return how many."""
    pixels = [image for _, image in group] + [group[-1][1]] * (size - len(group))
    for (target, _), edges in zip(group, detector(np.stack(pixels))):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_png(target, edges, settings)
    return len(group)
