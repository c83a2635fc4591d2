"""Sets of images and what a network computes of each, in blocks that are kept and shared by
processes.

The sorted list of a set is cut into blocks of one compiled batch; a device computes a block at a
time, and process K of N takes the blocks k ≡ K (mod N). So what surrounds an image never depends
on the number of devices or processes, and its features are equal to the bit for any of them. A
finished block is a file in the cache: an interrupted run, and any later one on the same images,
reads it.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from pixart_jax.config import MeshConfig
from pixart_jax.data import images
from pixart_jax.errors import UserError, one_line
from pixart_jax.evaluation import inception
from pixart_jax.files import atomic_write, cache_folder
from pixart_jax.images import png_settings
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.parallel.rules import batch_sharding, replicated
from pixart_jax.pipeline.output import GRID, PromptShard
from pixart_jax.pipeline.prompt_encoder import one_ahead

_READERS = min(32, 2 * (os.cpu_count() or 1))  # threads that decode and resize
_PATIENCE = 600.0  # seconds that process 0 waits for another block of the others


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """names: of the images, sorted. identity: of names, sizes and times of the files. sides: of an
    image after size, which all have. settings: that sample.py recorded in each image, () where some
    have none. size: images are cut to their centre square and resized to so many px (LANCZOS)."""

    source: Path
    names: Sequence[str]
    identity: str
    sides: tuple[int, int]
    settings: Sequence[Mapping[str, Any]] = ()
    size: int | None = None
    array: np.ndarray | None = None  # uint8 [n, h, w, 3], of an .npz

    @classmethod
    def open(cls, source: Path, size: int | None = None, sizes: bool = False) -> ImageSet:
        """The images in a folder and below, hidden ones and sample.py's grid.png left out, or arr_0
        of an .npz. Raises UserError for fewer than 2, and for several sizes without ``size``,
        unless ``sizes`` may differ."""
        if source.suffix == ".npz" and source.is_file():
            return cls._of_array(source, size)
        if not source.is_dir():
            raise UserError(f"no folder of images {source}")
        names = sorted(_images_below(source))
        if len(names) < 2:
            held = f"holds {'one image' if names else 'no images'}"
            raise UserError(f"{source} {held}: at least 2 are needed, and thousands for a figure")
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            headers = list(pool.map(functools.partial(_header, source), names))
        found = collections.Counter(sides for sides, *_ in headers)
        if size is None and len(found) > 1 and not sizes:
            shown = ", ".join(f"{n} of {h}×{w}" for (h, w), n in found.most_common(3))
            fix = "--size 256 cuts all to their centre square and resizes them"
            raise UserError(f"the images in {source} differ in size ({shown}): {fix}")
        settings = [own for _, own, _ in headers if own]
        numbers = collections.Counter((s["index"], s["seed"]) for s in settings)
        if max(numbers.values(), default=1) > 1:
            (index, seed), _ = numbers.most_common(1)[0]
            twice = f"the image of index {index} and seed {seed} twice"
            raise UserError(f"{source} holds {twice}: give each run a folder of its own")
        seal = json.dumps([str(source.resolve()), names, [stat for *_, stat in headers]])
        sides = (size, size) if size else headers[0][0]
        settings = settings if len(settings) == len(names) else []
        return cls(source, names, _sha(seal.encode()), sides, settings, size)

    @classmethod
    def _of_array(cls, source: Path, size: int | None) -> ImageSet:
        try:
            with np.load(source, allow_pickle=False) as file:
                array = file["arr_0"]
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            why = one_line(error)
            raise UserError(f"{source} holds no images (arr_0) that can be read: {why}") from None
        if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8 or len(array) < 2:
            form = f"{array.dtype} {list(array.shape)}"
            raise UserError(f"{source}: arr_0 is {form}: uint8 [n, h, w, 3], n ≥ 2, is needed")
        status = source.stat()
        seal = json.dumps([str(source.resolve()), status.st_size, status.st_mtime_ns])
        names = [str(n) for n in range(len(array))]
        sides = (size, size) if size else array.shape[1:3]
        return cls(source, names, _sha(seal.encode()), sides, (), size, array)

    def check_sides(self, other: ImageSet) -> None:
        """Raise UserError where the other set's images are of another size."""
        if self.sides != other.sides:
            ours, theirs = ("{}×{}".format(*of.sides) for of in (self, other))
            differ = f"{self.source} has images of {ours}, {other.source} of {theirs}"
            raise UserError(f"{differ}: --size makes them alike")

    def pixels(self, number: int) -> tuple[np.ndarray, str]:
        """(uint8 [h, w, 3], SHA-256 of the file or pixels) of an image."""
        if self.array is not None:
            found, digest = self.array[number], _sha(self.array[number].tobytes())
        else:
            path = self.source / self.names[number]
            data = path.read_bytes()
            try:
                found, digest = images.decode(data), _sha(data)
            except images.UnreadableImage as error:
                raise UserError(f"{path}: {error}") from None
        if self.size is not None:
            from PIL import Image

            cut = Image.fromarray(square(found))
            found = np.asarray(cut.resize((self.size,) * 2, Image.Resampling.LANCZOS))
        return found, digest


def square(image: np.ndarray) -> np.ndarray:
    """The centre square of an image [h, w, 3]."""
    side = min(image.shape[:2])
    top, left = ((length - side) // 2 for length in image.shape[:2])
    return image[top : top + side, left : left + side]


def _images_below(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            is_image = Path(name).suffix.lower().removeprefix(".") in images.PICTURES
            if is_image and not name.startswith(".") and name != GRID:
                yield Path(folder, name).relative_to(root).as_posix()


def _header(root: Path, name: str) -> tuple[tuple[int, int], dict | None, list[int]]:
    """((height, width), the settings that a PNG records, [bytes, time])."""
    path = root / name
    try:
        with open(path, "rb") as file:
            sides, status = images.size(file), os.fstat(file.fileno())
    except images.UnreadableImage as error:
        raise UserError(f"{path}: {error}") from None
    settings = png_settings(path, whole=False) if path.suffix.lower() == ".png" else None
    ours = isinstance(settings, dict) and {"prompt", "index", "seed"} <= settings.keys()
    return sides, settings if ours else None, [status.st_size, status.st_mtime_ns]


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Network:
    """What computes arrays of images.

    key: what they depend on beside the images. prepare: uint8 [h, w, 3] → the network's pixels, in
    a thread that reads. compute: (pixels [n, …], numbers of the images) → arrays [n, …] by name,
    those of ``wanted`` among them; n is what ``devices`` blocks hold, and where there are fewer
    numbers the last rows are padding.
    """

    key: Sequence[Any]
    prepare: Callable[[np.ndarray], np.ndarray]
    compute: Callable[[np.ndarray, Sequence[int]], Mapping[str, Any]]
    wanted: tuple[str, ...]
    devices: int = 1


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FeatureNetwork(Network):
    """One whose arrays are features, of such widths. digest: of its weights."""

    name: str
    digest: str
    mode: str
    widths: Mapping[str, int]


def on_devices(net: inception.Inception, mode: inception.Mode) -> FeatureNetwork:
    """An Inception network on all devices of this process, a block each."""
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    params = functools.cache(lambda: jax.device_put(net.params, replicated(mesh)))
    return FeatureNetwork(
        key=(net.digest, mode),
        prepare=functools.partial(inception.preprocess, mode=mode),
        compute=lambda pixels, numbers: inception.apply(
            params(), jax.device_put(pixels, batch_sharding(mesh))
        ),
        wanted=("pool",),
        devices=mesh.size,
        name=net.name,
        digest=net.digest,
        mode=mode,
        widths=inception.WIDTHS,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Extractor:
    """batch: images of a block, which a device computes at once. share: of the blocks."""

    net: Network
    batch: int = 32
    share: PromptShard = PromptShard()

    def folder(self, of: ImageSet) -> Path:
        """Where the blocks of a set are kept."""
        key = [3, *self.net.key, self.net.wanted, of.size, self.batch, of.identity]
        return cache_folder(keep=True) / "features" / _sha(json.dumps(key).encode())[:24]

    def __call__(self, of: ImageSet, what: str) -> tuple[dict[str, np.ndarray], str] | None:
        """({name: float32 [n, width]}, SHA-256 of the images' names and contents); None in
        processes other than the first, which waits for their blocks."""
        folder, count = self.folder(of), len(of.names)
        folder.mkdir(parents=True, exist_ok=True)
        blocks = [range(n, min(n + self.batch, count)) for n in range(0, count, self.batch)]
        paths = [folder / f"{k:06d}.npz" for k in range(len(blocks))]
        mine = range(self.share.index, len(blocks), self.share.count)
        todo = [k for k in mine if not paths[k].exists()]
        total = sum(len(blocks[k]) for k in mine)
        rest = sum(len(blocks[k]) for k in todo)
        how = {"unit": " images", "desc": f"features of {what}", "disable": self.share.index > 0}
        with tqdm(total=total, initial=total - rest, **how) as bar:
            for k, arrays in self._compute(of, {k: blocks[k] for k in todo}) if todo else ():
                with atomic_write(paths[k]) as file:
                    np.savez(file, **arrays)
                bar.update(len(blocks[k]))
        if self.share.index:
            return None
        self._wait(paths)
        return self._merge(of, paths)

    def _compute(
        self, of: ImageSet, blocks: Mapping[int, range]
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(number, arrays) of the blocks, one a device at a time, while threads read the next."""
        numbers, devices = list(blocks), self.net.devices
        steps = [numbers[n : n + devices] for n in range(0, len(numbers), devices)]

        def read(number: int) -> tuple[np.ndarray, str]:
            image, digest = of.pixels(number)
            return self.net.prepare(image), digest

        def start(step: list[int], found: list[Iterable]) -> tuple:
            rows, digests = [], {}
            for k, block in zip(step, found):
                values, digests[k] = zip(*block)
                rows += [*values, *[np.zeros_like(values[0])] * (self.batch - len(values))]
            rows += [np.zeros_like(rows[0])] * (devices * self.batch - len(rows))
            listed = [n for k in step for n in blocks[k]]
            return digests, self.net.compute(np.stack(rows), listed)

        with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
            decoding = ((step, [readers.map(read, blocks[k]) for k in step]) for step in steps)
            running = (start(*batch) for batch in one_ahead(decoding))
            for digests, found in one_ahead(running):
                arrays = {name: np.asarray(found[name]) for name in self.net.wanted}
                for place, (k, listed) in enumerate(digests.items()):
                    rows = slice(place * self.batch, place * self.batch + len(listed))
                    block = {name: array[rows] for name, array in arrays.items()}
                    yield k, block | {"sha256": np.array(listed)}

    def _wait(self, paths: Sequence[Path]) -> None:
        missing, last = [path for path in paths if not path.exists()], time.monotonic()
        while missing:
            time.sleep(0.5)
            left = [path for path in missing if not path.exists()]
            if len(left) < len(missing):
                missing, last = left, time.monotonic()
            elif time.monotonic() - last > _PATIENCE:
                lost = f"{len(missing)} blocks of the other processes are not in {paths[0].parent}"
                fix = "start them again, with one $PIXART_JAX_CACHE on a shared disk"
                raise UserError(f"{lost}, and none has come for {_PATIENCE:.0f} s: {fix}")

    def _merge(self, of: ImageSet, paths: Sequence[Path]) -> tuple[dict[str, np.ndarray], str]:
        parts: dict[str, list[np.ndarray]] = {name: [] for name in (*self.net.wanted, "sha256")}
        for path in paths:
            try:
                with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                    for name, found in parts.items():
                        found.append(file[name])
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                why = one_line(error)
                raise UserError(f"{path} is damaged ({why}): delete it and run again") from None
        merged = {name: np.concatenate(found) for name, found in parts.items()}
        digests = merged.pop("sha256")
        listed = "".join(f"{digest}  {name}\n" for name, digest in zip(of.names, digests))
        return merged, _sha(listed.encode("utf-8", "surrogateescape"))
