"""What all sets have in common that are a list of records: the choice of samples, the sizes, the
fingerprint."""

from __future__ import annotations

import abc
import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from pixart_jax.data import images
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.sources import filters
from pixart_jax.data.sources.sample import Sample
from pixart_jax.errors import UserError
from pixart_jax.files import cache_folder

READERS = 16  # threads of a pass over headers: what takes time is the disk
_KEPT_FROM = 5_000  # samples; the sizes of fewer are read anew in seconds


class IndexedSource(abc.ABC):
    """A set whose records have numbers, its *places*, of which a filter and a limit choose the
    samples.

    A set of a kind finds its records, sets name, caption_kinds and num_classes, and calls
    :meth:`_choose` at last.
    """

    name: str
    fingerprint: str
    caption_kinds: tuple[str, ...]
    num_classes: int | None
    faults: BadRecords

    @abc.abstractmethod
    def _sample(self, place: int) -> Sample: ...

    @abc.abstractmethod
    def _key(self, place: int) -> str: ...

    @abc.abstractmethod
    def _fields(self, place: int) -> filters.LazyFields:
        """What a filter sees."""

    @abc.abstractmethod
    def _picture(self, place: int) -> contextlib.AbstractContextManager[BinaryIO]:
        """The picture's bytes as a file, of which little more than the header will be read."""

    def _choose(self, records: int, state: object, where: str | None, limit: int | None) -> None:
        """records: how many there are. state: what the fingerprint is made of, beside filter and
        limit; JSON can hold it."""
        if limit is not None and limit < 1:
            raise UserError(f"limit {limit}: must be at least 1, or none for all")
        # Whatever asks for an order of samples asks for it by this.
        said = json.dumps([state, records, filters.identity(where), limit], sort_keys=True)
        self.fingerprint = hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()
        self._records, self._places = records, None
        if where is not None:
            self._places = self._passing(where, limit)
        elif limit is not None:
            self._records = min(records, limit)
        self._found_sizes: np.ndarray | None = None
        if len(self) == 0:
            left = f" ({self.faults.summary()})" if len(self.faults) else ""
            raise UserError(
                f"{self.name} holds no "
                f"sample{f' that passes the filter {where!r}' if where and records else ''}{left}"
            )

    def _passing(self, where: str, limit: int | None) -> np.ndarray:
        """int64: places that pass the filter. A record that lacks a field which others have is
        named and left out."""
        passes, kept, lacking, missing = filters.get_filter(where), [], 0, ""
        for place in tqdm(
            range(self._records), desc=f"filter {where}", unit=" samples", delay=2, leave=False
        ):
            if len(kept) == limit:
                break
            try:
                if passes(self._fields(place)):
                    kept.append(place)
            except KeyError as fault:
                lacking, missing = lacking + 1, str(fault.args[0])
                self.faults.add(
                    self._key(place),
                    "missing field",
                    f"{missing!r}, which the filter {where!r} asks for",
                )
            except images.UnreadableImage as fault:
                self.faults.add(self._key(place), "unreadable image", str(fault))
            except UserError:
                raise
            # in a person's own code: its traceback follows, and the record is said
            except Exception as fault:
                raise UserError(
                    f"filter {where!r} fails on {self._key(place)}: {type(fault).__name__}: {fault}"
                ) from fault
        if lacking and lacking == self._records:
            raise UserError(
                f"filter {where!r} needs the field {missing!r}, which {self.name} does not have"
            )
        return np.array(kept, np.int64)

    def __len__(self) -> int:
        return self._records if self._places is None else len(self._places)

    def _place(self, index: int) -> int:
        index = range(len(self))[index]
        return index if self._places is None else int(self._places[index])

    def __getitem__(self, index: int) -> Sample:
        return self._sample(self._place(index))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def sizes(self) -> np.ndarray:
        """int32 [n, 2]: (height, width) of every sample; (0, 0) for an unreadable image. One pass
        over headers, then kept; that of a large set in the cache folder too."""
        if self._found_sizes is None:
            self._found_sizes = image_sizes(
                len(self), lambda index: self._size(self._place(index)), self.fingerprint, self.name
            )
        return self._found_sizes

    def _size(self, place: int) -> tuple[int, int]:
        """UnreadableImage where the header tells none."""
        try:
            with self._picture(place) as file:
                return images.size(file)
        except OSError as fault:
            raise images.UnreadableImage(f"{self._key(place)}: {fault}") from None


def image_sizes(
    count: int, size_of: Callable[[int], tuple[int, int]], identity: str, name: str
) -> np.ndarray:
    """int32 [n, 2] of ``size_of``, (0, 0) where it raises UnreadableImage; by many threads, with a
    bar where it takes long.

    identity: of the set; what a set of some size gave is kept under it.
    """
    file = cache_folder() / "sizes" / f"{identity}.npy"
    if count >= _KEPT_FROM and file.exists():
        kept = np.load(file)
        if kept.shape == (count, 2):
            return kept
    sizes = np.zeros((count, 2), np.int32)

    def some(start: int) -> int:
        end = min(start + 64, count)
        for index in range(start, end):
            with contextlib.suppress(images.UnreadableImage):  # whoever reads the sample names it
                sizes[index] = size_of(index)
        return end - start

    with (
        concurrent.futures.ThreadPoolExecutor(READERS) as readers,
        tqdm(total=count, desc=f"sizes of {name}", unit=" images", delay=2, leave=False) as bar,
    ):
        for done in readers.map(some, range(0, count, 64)):
            bar.update(done)
    if count >= _KEPT_FROM:
        write_cache_file(file, lambda out: np.save(out, sizes))
    return sizes


def write_cache_file(file: pathlib.Path, write: Callable[[BinaryIO], object]) -> None:
    """A file of the cache, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=file.parent, prefix=".", suffix=".partial")
    try:
        with open(handle, "wb") as out:
            write(out)
        os.replace(partial, file)
    except BaseException:
        pathlib.Path(partial).unlink(missing_ok=True)
        raise
