"""The base of all sources: numbered records, filter and limit, image sizes, the fingerprint."""

from __future__ import annotations

import abc
import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from pixart_jax.data import images
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.sources.sample import Captions, Sample
from pixart_jax.errors import UserError, nearest
from pixart_jax.files import atomic_write, cache_folder

READERS = 16  # threads of a pass over headers, which waits for the disk
_CACHED_FROM = 5_000  # samples; smaller sets are read again in seconds

Item = TypeVar("Item")
Result = TypeVar("Result")
Filter = Callable[[Mapping[str, Any]], bool]
FILTERS: dict[str, Filter] = {
    "single": lambda fields: int(fields["count"]) == 1,
    "labelled": lambda fields: int(fields["label"]) >= 0,
}
"""Filters by name, over a record's fields (all but the image decoded). A set without such a field
is an error."""


class Facts(NamedTuple):
    """A record without its image. fields: beside the captions, which are read on demand."""

    label: int
    fields: Mapping[str, Any]
    captions: Callable[[], Captions]


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which records become samples. where: a filter. limit: the first so many that pass."""

    where: str | None = None
    limit: int | None = None
    faults: BadRecords = dataclasses.field(default_factory=BadRecords)

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit {self.limit}: must be at least 1, or none for all")


class IndexedSource(abc.ABC):
    """A set whose records are numbered (their *places*); a filter and a limit choose the samples. A
    subclass sets name, faults and caption_kinds, then calls :meth:`_choose`."""

    name: str
    fingerprint: str
    faults: BadRecords
    caption_kinds: tuple[str, ...]
    requests = 0  # in flight at a time, where images come from a bucket
    same_fields = False  # whether all records have the same fields
    _table: pa.Table  # a row a record, with a column 'key'; where a subclass keeps its records so

    def _key(self, place: int) -> str:
        return self._table["key"][place].as_py()

    @abc.abstractmethod
    def _facts(self, place: int) -> Facts: ...

    @abc.abstractmethod
    def _open(self, place: int) -> BinaryIO:
        """The image as a file, of which a caller may read the header alone."""

    def _sample(self, place: int) -> Sample:
        key, facts = self._key(place), self._facts(place)
        try:
            with self._open(place) as file:
                image = file.read()
        except OSError as error:
            raise images.UnreadableImage(f"{key}: {error}") from None
        return Sample(key, image, facts.captions(), facts.label)

    def _choose(self, records: int, state: object, choice: Choice) -> None:
        """Choose among ``records`` records. state: of the data, for the fingerprint."""
        where, limit = choice.where, choice.limit
        identity = json.dumps([state, records, filter_identity(where), limit], sort_keys=True)
        self.fingerprint = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()
        self._places: range | np.ndarray = range(records if limit is None else min(records, limit))
        if where is not None:
            self._places = self._passing(where, records, limit)
        self._found_sizes: np.ndarray | None = None
        if len(self) == 0:
            passing = f" that passes the filter {where!r}" if where and records else ""
            skipped = f" ({self.faults.summary()})" if len(self.faults) else ""
            raise UserError(f"{self.name} holds no sample{passing}{skipped}")

    def _passing(self, where: str, records: int, limit: int | None) -> np.ndarray:
        """int64 places of the records that pass. Records without a needed field are skipped."""
        passes, chosen, lacking = get_filter(where), list[int](), 0
        bar = tqdm(range(records), f"filter {where}", unit=" samples", delay=2, leave=False)
        for place in bar:
            if len(chosen) == limit:
                break
            try:
                if passes(self._fields(place)):
                    chosen.append(place)
            except KeyError as error:
                lacking += 1
                field = f"{str(error.args[0])!r}"
                if self.same_fields or lacking == records:
                    raise UserError(
                        f"filter {where!r} needs the field {field}, which {self.name} does not have"
                    ) from None
                detail = f"{field}, which the filter {where!r} asks for"
                self.faults.add(self._key(place), "missing field", detail)
            except images.UnreadableImage as error:
                self.faults.add(self._key(place), "unreadable image", str(error))
            except UserError:
                raise
            except Exception as error:  # in the user's own code
                what = f"{type(error).__name__}: {error}"
                raise UserError(f"filter {where!r} fails on {self._key(place)}: {what}") from error
        return np.array(chosen, np.int64)

    def _fields(self, place: int) -> Mapping[str, Any]:
        """What a filter sees of a record."""
        label, fields, captions = self._facts(place)

        def caption(kind: str) -> Any:
            found = captions()[kind]
            return found[0] if len(found) == 1 else found

        lazy: dict[str, Callable[[], Any]] = {"captions": captions}
        lazy |= {kind: functools.partial(caption, kind) for kind in self.caption_kinds}
        lazy |= {"height": lambda: self._size(place)[0], "width": lambda: self._size(place)[1]}
        known = {name: value for name, value in fields.items() if name not in lazy}
        return _LazyFields({**known, "key": self._key(place), "label": label}, lazy)

    def __len__(self) -> int:
        return len(self._places)

    def _place(self, index: int) -> int:
        return int(self._places[range(len(self))[index]])

    def __getitem__(self, index: int) -> Sample:
        return self._sample(self._place(index))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def captions_at(self, index: int) -> tuple[str, Captions]:
        """(key, captions) of a sample, without its image."""
        place = self._place(index)
        return self._key(place), self._facts(place).captions()

    def sizes(self) -> np.ndarray:
        """int32 [n, 2]: (height, width) of every sample, (0, 0) if unreadable; cached on disk."""
        if self._found_sizes is None:
            identity, count = self._sizes_identity(), len(self)
            self._found_sizes = cached_array("sizes", identity, count, self._read_sizes)
        return self._found_sizes

    def _sizes_identity(self) -> str:
        return self.fingerprint

    def _read_sizes(self) -> np.ndarray:
        def read(index: int) -> tuple[int, int]:
            try:
                return self._size(self._place(index))
            except images.UnreadableImage:  # the reader of the sample reports it
                return 0, 0

        what, threads = f"sizes of {self.name}", max(READERS, self.requests)
        found = in_threads(read, range(len(self)), what, threads=threads)
        return np.array(list(found), np.int32).reshape(-1, 2)

    def _size(self, place: int) -> tuple[int, int]:
        """(height, width) from the header. Raises UnreadableImage."""
        try:
            with self._open(place) as file:
                return images.size(file)
        except OSError as error:
            raise images.UnreadableImage(f"{self._key(place)}: {error}") from None


class _LazyFields(Mapping[str, Any]):
    """Fields computed on demand: only a filter over sizes reads image headers."""

    def __init__(self, known: dict[str, Any], lazy: Mapping[str, Callable[[], Any]]):
        self._known, self._lazy = known, lazy

    def __getitem__(self, name: str) -> Any:
        if name not in self._known:
            self._known[name] = self._lazy[name]()
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._known, **self._lazy})

    def __len__(self) -> int:
        return len({**self._known, **self._lazy})


def get_filter(where: str) -> Filter:
    """A filter by name, or 'package.module:function'. Raises UserError if there is none."""
    if where in FILTERS:
        return FILTERS[where]
    module, colon, function = where.partition(":")
    if not colon:
        raise UserError(
            f"unknown filter {where!r}{nearest(where, FILTERS)}; your own goes as "
            "'package.module:function'"
        )
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"filter {where!r} cannot be imported: {error}") from None


def filter_identity(where: str | None) -> str | None:
    """A filter in a fingerprint: its name, and a hash of the source of the user's own."""
    if where is None or where in FILTERS:
        return where
    try:
        source = inspect.getsource(get_filter(where))
    except (OSError, TypeError):  # made without a source file
        return where
    return f"{where} {hashlib.sha256(source.encode()).hexdigest()[:16]}"


def in_threads(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    description: str,
    unit: str = "images",
    threads: int = READERS,
) -> Iterator[Result]:
    """Yield function(item) of each item, in order, with a progress bar if it takes long."""
    with (
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
        tqdm(items, description, unit=f" {unit}", delay=2, leave=False) as bar,
    ):
        for start in range(0, len(items), 4096):  # a bounded number of tasks
            for result in pool.map(function, items[start : start + 4096]):
                bar.update()
                yield result


def cached_array(
    kind: str, identity: str, count: int, make: Callable[[], np.ndarray]
) -> np.ndarray:
    """make(); for a set of many samples (``count``) computed once and cached on disk."""
    if count < _CACHED_FROM:
        return make()
    file = cache_folder() / kind / f"{identity}.npy"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        array = make()
        with atomic_write(file) as out:
            np.save(out, array)
    return np.load(file)


def cached_json(kind: str, identity: str, count: int, make: Callable[[], Any]) -> Any:
    """:func:`cached_array` for a value of JSON; tuples come back as lists."""

    def encode() -> np.ndarray:
        return np.frombuffer(json.dumps(make()).encode(), np.uint8)

    return json.loads(cached_array(kind, identity, count, encode).tobytes())
