"""A folder of generated images: PNGs that record their settings, so that a second call generates
only what is missing; written by threads, and shared by any number of processes.

Processes never communicate: the list of images alone says whose an image is, and the folder what is
there. So a process that dies holds up nobody, and the same command, or one with another number of
processes, generates the rest.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from pixart_jax.errors import UserError
from pixart_jax.images import image_grid, png_settings, slug, write_png
from pixart_jax.parallel import processes
from pixart_jax.remote_path import REQUESTS, Location, RemotePath, located

GRID = "grid.png"
GRID_LIMIT = 100  # images on a sheet
QUEUE_LIMIT = 64  # images that wait to be written; of 1024 px, 200 MB
# packing a PNG of 1024 px keeps a core busy for a third of a second, without Python's lock
_THREADS = 4


@dataclasses.dataclass(frozen=True)
class PromptShard:
    """index: of this process, from 0. count: of all processes."""

    index: int = 0
    count: int = 1

    def of(self, groups: Sequence[Hashable]) -> list[int]:
        """Numbers of the images that are this shard's. groups: what each image's compiled shapes
        depend on; they are dealt out group by group, as many to each process, give or take one."""
        first = {group: n for n, group in reversed([*enumerate(groups)])}
        order = sorted(range(len(groups)), key=lambda n: first[groups[n]])
        return sorted(order[self.index :: self.count])


def parse_share(text: str | None) -> PromptShard:
    """'K/N' → that shard; 'cluster' → as JAX's multi-process runtime detects it (Cloud TPU, GKE,
    SLURM, Open MPI), before its first use; None → all, or this process's shard where a launcher
    names it (``python -m pixart_jax launch``) or the runtime was started."""
    import jax

    if text is None:
        if jax.distributed.is_initialized():
            return PromptShard(jax.process_index(), jax.process_count())
        given, _ = processes.pop_distributed_flags([])
        index, count = given.process_index or 0, given.processes or 1
        return PromptShard(index, count)
    if text == "cluster":
        return _detected_share()
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        index, count = -1, 0
    if not 0 <= index < count:
        form = "the share's number from 0 and how many there are (0/4 … 3/4), or 'cluster'"
        raise UserError(f"--share {text!r}: K/N is needed, {form}")
    return PromptShard(index, count)


def _detected_share() -> PromptShard:
    """This process's place in the cluster. The runtime is left at once: under it the death of one
    process would end all, and the first to finish would wait for the last."""
    import jax
    from jax._src import distributed  # process_index() would open the devices of the whole cluster

    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        line = (str(error).splitlines() or [""])[0]
        instead = "--share K/N names the share outright"
        raise UserError(
            f"--share cluster: JAX finds no cluster to join ({line}); {instead}"
        ) from None
    share = PromptShard(distributed.global_state.process_id, distributed.global_state.num_processes)
    jax.distributed.shutdown()
    return share


class OutputFolder:
    """The images of one call in a folder, of a disk or a bucket.

    wanted: the settings of each image (with prompt, index, seed, height, width and guidance). An
    image is there when a PNG of its name has exactly these settings; one with other settings stays,
    and the new one is written beside it under a number. ``mine`` are the numbers of this shard's
    images, ``missing`` those of them not yet there.
    """

    def __init__(
        self, folder: str | os.PathLike, wanted: Sequence[Mapping], share: PromptShard | None = None
    ):
        self.folder = located(folder)
        # an unwritable folder shows before the work, not after it
        if isinstance(self.folder, RemotePath):
            probe = self.folder / f".probe-{secrets.token_hex(8)}"
            probe.touch()
            probe.unlink()
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        self.wanted = [dict(settings) for settings in wanted]
        self.share = share or PromptShard()
        self.mine = self.share.of([self.group(settings) for settings in self.wanted])
        found = self._find_all(self.mine)
        self.paths = {n: path for n, (path, _) in found.items()}
        self.missing = [n for n, (_, there) in found.items() if not there]

    @staticmethod
    def group(settings: Mapping) -> tuple:
        """What the images of one call of ``Pipeline.generate`` have in common; their batches are
        alike where all are guided or none is, and edited alike or not at all."""
        edit = {"image", "mask", "reference", "control", "toward"} & settings.keys()
        how = [
            settings.get(n)
            for n in ("strength", "mask_padding", "outpaint", "upscale", "variation")
        ]
        if settings.get("mask_padding") is not None:
            how.append(settings["image_hash"])  # the result has the image's size
        sides = settings["height"], settings["width"]
        return *sides, settings["guidance"] == 1, *sorted(edit), str(how)

    def groups(self) -> list[list[int]]:
        """Numbers of the missing images, by group."""
        groups: dict[tuple, list[int]] = {}
        for n in self.missing:
            groups.setdefault(self.group(self.wanted[n]), []).append(n)
        return list(groups.values())

    def wait(
        self,
        on_progress: Callable[[int], object] = lambda count: None,
        patience: float = 600,
        every: float = 1,
    ) -> None:
        """Wait for the other shards' images, by their files alone; on_progress(count) is called as
        they appear. Raises UserError where none has appeared for ``patience`` seconds."""
        awaited = [n for n in range(len(self.wanted)) if n not in self.paths]
        last = time.monotonic()
        while awaited:
            places = self._find_all(awaited)
            found = {n: path for n, (path, there) in places.items() if there}
            self.paths |= found
            awaited = [n for n in awaited if n not in found]
            on_progress(len(found))
            if found:
                last = time.monotonic()
            elif time.monotonic() - last > patience:
                raise UserError(
                    f"{len(awaited)} images of the other processes are not in {self.folder}, and "
                    f"none has come for {patience:.0f} s: this share is done; start the others "
                    "again, and this one for the sheet"
                )
            if awaited:
                time.sleep(every)

    def _find_all(self, numbers: Sequence[int]) -> dict[int, tuple[Location, bool]]:
        """:func:`_find` of each; of a bucket after one listing."""
        if not isinstance(self.folder, RemotePath):
            return {n: self._find(self.wanted[n], self.folder) for n in numbers}
        listed = RemotePath(self.folder)
        listed.names  # noqa: B018  # before the threads ask
        with concurrent.futures.ThreadPoolExecutor(REQUESTS) as pool:
            found = pool.map(lambda n: self._find(self.wanted[n], listed), numbers)
            return dict(zip(numbers, found))

    def _find(self, settings: Mapping, folder: Location) -> tuple[Location, bool]:
        """(where the image is or will be, whether it is there)."""
        name = f"{settings['index']:04d}_{slug(settings['prompt'])}_{settings['seed']}"
        if "frame" in settings:  # between two prompts of a walk
            name += f"_frame{settings['frame']:04d}"
        number = 1
        while True:
            file = f"{name}.png" if number == 1 else f"{name}_{number}.png"
            path, whole = folder / file, True
            if isinstance(folder, RemotePath) and file in folder.names:
                path, whole = folder.listed(file), False
            elif isinstance(folder, RemotePath) or not path.exists():
                return path, False
            if png_settings(path, whole) == settings:
                return path, True
            number += 1

    def write(self, n: int, image: np.ndarray) -> Location:
        """Image n of those wanted, uint8 [h, w, 3]."""
        write_png(self.paths[n], image, self.wanted[n])
        return self.paths[n]

    def write_grid(self) -> Location:
        """A sheet of the first GRID_LIMIT images with their prompts (of all shards)."""
        from PIL import Image

        images = []
        for n in range(min(len(self.wanted), GRID_LIMIT)):
            with self.paths[n].open("rb") as file, Image.open(file) as image:
                images.append(np.asarray(image.convert("RGB")))
        sheet = image_grid(images, [settings["prompt"] for settings in self.wanted[:GRID_LIMIT]])
        write_png(self.folder / GRID, sheet)
        return self.folder / GRID


class AsyncWriter:
    """Calls ``write(*arguments)`` in threads, as a context manager.

    :meth:`put` returns at once while fewer than ``limit`` calls wait, so a slow disk delays nothing
    until then and memory stays bounded. An exception of a call cancels those that have not begun,
    and is raised by a later put or at the end.
    """

    def __init__(self, write: Callable[..., object], limit: int = QUEUE_LIMIT):
        self._write, self._limit = write, limit
        self._pool = concurrent.futures.ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))
        self._calls: collections.deque[concurrent.futures.Future] = collections.deque()

    def put(self, *arguments: Any) -> None:
        while self._calls and (len(self._calls) >= self._limit or self._calls[0].done()):
            self._calls.popleft().result()
        self._calls.append(self._pool.submit(self._write, *arguments))

    def __enter__(self) -> AsyncWriter:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        done, _ = concurrent.futures.wait(self._calls, return_when="FIRST_EXCEPTION")
        failed = kind is not None or any(call.exception() for call in done)
        # on a full disk each further file would fail as the first did
        self._pool.shutdown(wait=True, cancel_futures=failed)
        for call in self._calls if kind is None else ():
            call.result()
