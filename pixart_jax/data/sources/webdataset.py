"""Webdataset tars, as img2dataset writes them, read at random through an index of their members.

The index of a tar is made once by a pass over its headers and cached on disk until the file
changes.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import io
import json
import os
import pathlib
import posixpath
import re
from collections.abc import Callable, Iterator
from tarfile import BLOCKSIZE, HeaderError, nti  # type: ignore[attr-defined]
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.feather

from pixart_jax.data.faults import BadRecord, BadRecords
from pixart_jax.data.images import PICTURES
from pixart_jax.data.sources import texts
from pixart_jax.data.sources.indexed import Choice, Facts, IndexedSource, in_threads
from pixart_jax.errors import UserError
from pixart_jax.files import atomic_write, cache_folder

_FORMAT = 4  # of the cached index
_LOOKED_AT = 200  # .json members of a tar that are read to find the kinds of captions
_SCHEMA = pa.schema(
    {  # a row a sample, whose members are three lists of one length
        "key": pa.large_string(),
        "label": pa.int64(),
        "suffixes": pa.large_list(pa.large_string()),  # lower case, without the dot
        "offsets": pa.large_list(pa.int64()),
        "sizes": pa.large_list(pa.int64()),
    }
)


class WebdatasetSource(IndexedSource):
    """Samples of tars; ``pattern`` is a tar, a folder of them, or names with {000..012}, {a,b}, *.

    A sample is an image (jpg, png, webp …) and the members that share its name up to the first dot:
    .txt is the kind 'caption', .KIND.txt that kind, each text in .json a kind, its other fields
    what filters see, .cls the class. Its key is that name; after the tar's name if an earlier tar
    of the set has it too. A name with further dots (a.v1.jpg) is an image of its own, whose members
    are a.v1.*, and a.* where a has no other image. Links count as what they lead to. Tars are
    uncompressed and stay where they are; members that belong to no image are counted by suffix.
    """

    def __init__(self, pattern: str, choice: Choice):
        self.faults = choice.faults
        inside = pathlib.Path(pattern)
        self.name = f"webdataset:{inside.resolve().name if inside.is_dir() else inside.name}"
        self._tars, tables, kinds = self._indexed(tars_of(pattern, self.faults))
        empty = _SCHEMA.empty_table().append_column("tar", pa.array([], pa.int32()))
        self._table = pa.concat_tables([empty, *tables]).combine_chunks()
        self._unique_keys()
        self.caption_kinds = tuple(kinds)
        labels = self._table["label"].to_numpy()
        self.num_classes = int(labels.max(initial=-1)) + 1 or None
        state = [[tar.name, tar.stat().st_size, tar.stat().st_mtime_ns] for tar in self._tars]
        self._choose(len(self._table), ["webdataset", state], choice)

    def _indexed(
        self, tars: list[pathlib.Path]
    ) -> tuple[list[pathlib.Path], list[pa.Table], dict[str, None]]:
        """(tars, their indices with the tar's number, caption kinds) of the readable tars."""
        readable, tables, kinds = list[pathlib.Path](), list[pa.Table](), dict[str, None]()

        def read(tar: pathlib.Path):
            try:
                return index(tar)
            except OSError as error:
                return error

        made = in_threads(read, tars, f"headers of {self.name}", "tars")
        for tar, found in zip(tars, made, strict=True):
            if isinstance(found, OSError):
                self.faults.add(tar.name, "unreadable file", str(found))
                continue
            table, some, faults, unread = found
            self.faults.extend(faults)
            for suffix, count in unread.items():
                self.faults.add_unread(f"x{suffix}", count)
            number = pa.array([len(readable)] * len(table), pa.int32())
            tables.append(table.append_column("tar", number))
            kinds.update(dict.fromkeys(some))
            readable.append(tar)
        return readable, tables, kinds

    def _unique_keys(self) -> None:
        keys, taken = self._table["key"].to_pylist(), set()
        for number, key in enumerate(keys):
            if key in taken:
                keys[number] = f"{self._tars[self._table['tar'][number].as_py()].stem}/{key}"
            taken.add(key)
        if len(taken) < len(keys):
            self._table = self._table.set_column(0, "key", pa.array(keys, pa.large_string()))

    # ---- a sample ----

    def _members(self, place: int) -> dict[str, Callable[[], _Member]]:
        """suffix → a function that opens the member."""
        tar = self._tars[self._table["tar"][place].as_py()]
        columns = (self._table[name][place].as_py() for name in ("suffixes", "offsets", "sizes"))
        return {suffix: functools.partial(_Member, tar, *at) for suffix, *at in zip(*columns)}

    def _open(self, place: int) -> BinaryIO:
        members = self._members(place)
        return io.BufferedReader(next(members[name] for name in members if name in PICTURES)())

    def _facts(self, place: int) -> Facts:
        tar = self._tars[self._table["tar"][place].as_py()].name
        readers = {
            suffix: functools.partial(_read_member, member)
            for suffix, member in self._members(place).items()
        }
        side, captions = texts.side_files(readers, f"{tar}, {self._key(place)}.", self.faults)
        label = self._table["label"][place].as_py()
        return Facts(label if label >= 0 else texts.label_of(side), side, captions)


class _Member(io.RawIOBase):
    """A member of a tar, ``size`` bytes at ``offset``, as a file. Raises UserError if the tar is
    gone or has become shorter."""

    def __init__(self, tar: pathlib.Path, offset: int, size: int):
        self._tar, self._start, self._size, self._at = tar, offset, size, 0
        try:
            self._file = open(tar, "rb", buffering=0)
        except OSError as error:
            raise UserError(f"{tar} cannot be read: {error.strerror}") from None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def readinto(self, buffer) -> int:
        wanted, start = max(0, min(len(buffer), self._size - self._at)), self._start + self._at
        data = os.pread(self._file.fileno(), wanted, start)
        if wanted and not data:
            raise UserError(
                f"{self._tar} has become shorter since it was opened: {wanted} bytes at {start:,} "
                "are not there"
            )
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def readall(self) -> bytes:
        return self.read(max(0, self._size - self._at)) or b""

    def close(self) -> None:
        self._file.close()
        super().close()


def _read_member(member: Callable[[], _Member], limit: int = -1) -> bytes:
    with member() as file:
        return file.read(limit) or b""


# ---- the index ----


Index = tuple[pa.Table, list[str], list[BadRecord], dict[str, int]]
"""(table of samples, caption kinds, bad records, unread members by suffix) of a tar."""


def index(path: pathlib.Path) -> Index:
    """The index of a tar; from the cache if path, size and time of the file are the same. Raises
    OSError if it cannot be read."""
    status = path.stat()
    identity = repr((_FORMAT, str(path.resolve()), status.st_size, status.st_mtime_ns))
    name = hashlib.sha256(os.fsencode(identity)).hexdigest()[:32]
    file = cache_folder() / "tars" / f"{name}.arrow"
    if file.exists():
        table = pyarrow.feather.read_table(file, memory_map=False)
        kinds, faults, unread = json.loads(table.schema.metadata[b"pixart"])
        return table, kinds, [BadRecord(*fault) for fault in faults], unread
    table, kinds, faults, unread = _read(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as out:
        described = table.replace_schema_metadata({"pixart": json.dumps([kinds, faults, unread])})
        pyarrow.feather.write_feather(described, out, compression="uncompressed")
    return table, kinds, faults, unread


def _members(path: pathlib.Path, faults: BadRecords) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each whole regular file of a POSIX or GNU tar, from its headers, and
    of each link to one before it.

    The tarfile module takes four times as long, and ends without a word where a tar is cut or
    damaged; here that is named once, with the place. Name, size and link that do not fit into a
    header are in a member before it, of type L and K (GNU) or x (pax).
    """
    end, at, place = path.stat().st_size, 0, path.name
    files: dict[str, tuple[int, int]] = {}
    given: dict[str, Any] = {}  # name, link and size from members before a header
    with open(path, "rb", buffering=0) as file:
        while True:
            block = os.pread(file.fileno(), BLOCKSIZE, at)
            if len(block) < BLOCKSIZE:
                cut = f"ends at byte {end:,} without an end mark: samples may be lost"
                break
            if not block.strip(b"\0"):
                return
            try:
                length = given.get("size", nti(block[124:136]))
                intact = nti(block[148:156]) == sum(block) - sum(block[148:156]) + 8 * 32
            except HeaderError:
                intact = False
            if not intact or length < 0:
                cut = f"at byte {at:,} of {end:,} a header is damaged: what lies behind is lost"
                break
            name = given.get("name", _text(block[:100]))
            if "name" not in given and block[257:263] == b"ustar\0" and block[345]:
                name = f"{_text(block[345:500])}/{name}"
            kind, start = block[156:157], at + BLOCKSIZE
            at = start + -(-length // BLOCKSIZE) * BLOCKSIZE
            if start + length > end:
                cut, place = (
                    f"the tar ends {start + length - end:,} bytes early",
                    f"{place}, {name}",
                )
                break
            if kind in b"LKx":
                data = os.pread(file.fileno(), length, start)
                if kind != b"x":
                    given["name" if kind == b"L" else "link"] = _text(data)
                for field, value in re.findall(rb"\d+ ([^=\n]+)=([^\n]*)\n", data) * (kind == b"x"):
                    if field in (b"path", b"linkpath"):
                        given["name" if field == b"path" else "link"] = _text(value)
                    elif field == b"size" and value.isdigit():
                        given["size"] = int(value)
                continue
            if kind == b"g":  # stands between a name and its member
                continue
            name = posixpath.normpath(name) if not name.endswith("/") else ""
            found: tuple[int, int] | None = (start, length)
            if kind in b"12":
                target = given.get("link", _text(block[157:257]))
                # a symbolic link leads from its own folder
                inside = posixpath.dirname(name) if kind == b"2" else ""
                if (found := files.get(posixpath.normpath(posixpath.join(inside, target)))) is None:
                    detail = f"to {target}, which is not an earlier file of the tar"
                    faults.add(f"{path.name}, {name}", "unreadable link", detail)
            elif kind not in b"0\0" + b"7":
                found = None
            if name and found is not None:
                files[name] = found
                yield name, *found
            given = {}
    faults.add(place, "cut file", cut)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "replace")


def _read(path: pathlib.Path) -> Index:
    """One pass over the headers; of the data only labels and the first JSON texts are read."""
    faults = BadRecords()
    groups: dict[str, dict[str, tuple[int, int]]] = {}  # name up to the first dot → suffix → place
    for name, offset, size in _members(path, faults):
        folder, slash, base = name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if texts.kind_of(suffix) and size > texts.LONGEST:
            detail = f"{size:,} bytes, at most {texts.LONGEST:,} are taken"
            faults.add(f"{path.name}, {name}", "caption too long", detail, True)
        elif not stem or not suffix:
            faults.add_unread(base)
        elif suffix.lower() in (members := groups.setdefault(f"{folder}{slash}{stem}", {})):
            detail = f"the tar holds another .{suffix.lower()} of {stem!r}"
            faults.add(f"{path.name}, {name}", "key twice", detail)
        else:
            members[suffix.lower()] = (offset, size)
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for key, members in groups.items():
        samples |= _samples(key, members, path.name, faults)
    labels, kinds = _labels_and_kinds(path, samples, faults)
    columns = [
        list(samples),
        [labels.get(key, -1) for key in samples],
        [list(members) for members in samples.values()],
        [[offset for offset, _ in members.values()] for members in samples.values()],
        [[size for _, size in members.values()] for members in samples.values()],
    ]
    return pa.table(columns, _SCHEMA), kinds, list(faults), dict(faults.unread)


def _samples(
    key: str, members: dict[str, tuple[int, int]], tar: str, faults: BadRecords
) -> dict[str, dict[str, tuple[int, int]]]:
    """Key → suffix → place of the images that share a name up to the first dot: one, or those of
    names with further dots."""
    images: dict[str, str] = {}  # the name's further parts ('' or 'v1') → suffix of the image
    for suffix in members:
        more, _, last = suffix.rpartition(".")
        if last not in PICTURES:
            continue
        if more in images:
            detail = f"the tar holds another picture of {key!r}"
            faults.add(f"{tar}, {key}.{suffix}", "key twice", detail)
        else:
            images[more] = suffix
    if "" in images:  # others are masks, depths … of it
        images = {"": images[""]}
    found: dict[str, dict[str, tuple[int, int]]] = {more: {} for more in images}
    unused = []
    for suffix, place in members.items():
        own = [more for more in images if more and suffix.startswith(f"{more}.")]
        last, is_image = suffix.rpartition(".")[2], suffix in images.values()
        if not images and (last == "json" or last in texts.TEXTS):
            unused.append(suffix)
        elif not is_image and last not in (*texts.TEXTS, "json", "cls"):
            faults.add_unread(f"{key}.{suffix}")
        elif own:
            longest = max(own, key=len)
            found[longest][suffix[len(longest) + 1 :]] = place
        else:
            for these in found.values():
                these.setdefault(suffix, place)
    if unused:
        detail = ", ".join(f".{suffix}" for suffix in unused)
        faults.add(f"{tar}, {key}", "caption without picture", detail)
    return {f"{key}.{more}".removesuffix("."): these for more, these in found.items()}


def _labels_and_kinds(
    path: pathlib.Path, samples: dict[str, dict[str, tuple[int, int]]], faults: BadRecords
) -> tuple[dict[str, int], list[str]]:
    labels: dict[str, int] = {}
    kinds: dict[str, None] = {}
    looked, quiet = 0, BadRecords()  # the reader of the sample reports its JSON
    for key, members in samples.items():
        for suffix, (offset, size) in members.items():
            if kind := texts.kind_of(suffix):
                kinds[kind] = None
            elif suffix == "cls":
                data = _read_member(functools.partial(_Member, path, offset, min(size, 32))).strip()
                if data.isdigit():
                    labels[key] = int(data)
                else:
                    shown = data.decode("utf-8", "replace")
                    faults.add(f"{path.name}, {key}.cls", "unreadable label", shown)
            elif suffix == "json" and looked < _LOOKED_AT:
                looked += 1
                data = _read_member(functools.partial(_Member, path, offset, size))
                kinds |= dict.fromkeys(
                    texts.captions_of(texts.json_object(data, "", quiet), "", quiet)
                )
    return labels, list(kinds)


# ---- names of tars ----


def tars_of(pattern: str, faults: BadRecords) -> list[pathlib.Path]:
    """The tars of a pattern, in its order; missing ones of a range are named in ``faults``."""
    if re.match(r"[a-z0-9]+://|pipe:", pattern):
        raise UserError(
            f"webdataset:{pattern}: tars are read at random, from a disk; copy them to one first"
        )
    if pathlib.Path(pattern).is_dir():
        files = sorted(path for path in pathlib.Path(pattern).iterdir() if path.is_file())
        found = [path for path in files if path.suffix.lower() == ".tar"]
        if not found:
            raise UserError(f"webdataset:{pattern}: the folder holds no .tar")
        for path in files:
            if re.search(r"\.(tgz|tar\.\w+)$", path.name.lower()):
                faults.add(path.name, "compressed tar", "it cannot be read at random: unpack it")
            elif path not in found and path.name[0] != ".":
                faults.add_unread(path.name)
        return found
    found = []
    for name in _braces(pattern):
        if re.search(r"\.(tgz|tar\.\w+)$", name):
            raise UserError(
                f"webdataset:{name}: a compressed tar cannot be read at random: unpack it to .tar"
            )
        wild = any(c in name for c in "*?[") and not os.path.exists(name)
        for path in map(pathlib.Path, sorted(glob.glob(name)) if wild else [name]):
            if path.is_file():
                found.append(path)
            else:
                faults.add(str(path), "missing file")
    if not found:
        raise UserError(f"webdataset:{pattern}: no such tar")
    return found


def _braces(pattern: str) -> Iterator[str]:
    """'a{00..11}.tar' → a00.tar … a11.tar; '{a,b}' likewise; several multiply."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not found:
        yield pattern
        return
    first, last, names = found.groups()
    if names is None:
        if int(last) < int(first):
            raise UserError(f"webdataset:{pattern}: the range {first}..{last} runs backwards")
        choices = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    else:
        choices = names.split(",")
    for choice in choices:
        yield from _braces(pattern[: found.start()] + choice + pattern[found.end() :])
