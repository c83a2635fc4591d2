"""Webdataset tars, as img2dataset writes them, read at random through an index of their members,
which is cached on disk until the tar changes."""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
import pathlib
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.feather
from PIL.ContainerIO import ContainerIO

from pixart_jax.data.faults import BadRecord, BadRecords
from pixart_jax.data.images import PICTURES
from pixart_jax.data.sources import texts
from pixart_jax.data.sources.indexed import Choice, Facts, IndexedSource, in_threads
from pixart_jax.errors import UserError
from pixart_jax.files import atomic_write, cache_folder
from pixart_jax.remote_path import REQUESTS, Location, RemotePath, located

_FORMAT = 5  # of the cached index
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

    A sample is an image and the members that share its name up to the first dot: .txt is the kind
    'caption', .KIND.txt that kind, each text in .json a kind, its other fields what filters see,
    .cls the class. Its key is that name, after the tar's name if an earlier tar has it too. A name
    with further dots (a.v1.jpg) is an image of its own, whose members are a.v1.*, and a.* where a
    has no other image. Links count as what they lead to.
    """

    def __init__(self, pattern: str, choice: Choice):
        self.faults = choice.faults
        inside = located(pattern)
        self.name = f"webdataset:{inside.resolve().name if inside.is_dir() else inside.name}"
        self.requests = REQUESTS if isinstance(inside, RemotePath) else 0
        self._tars, tables, kinds = self._indexed(tars_of(pattern, self.faults))
        empty = _SCHEMA.empty_table().append_column("tar", pa.array([], pa.int32()))
        self._table = pa.concat_tables([empty, *tables]).combine_chunks()
        self._unique_keys()
        self.caption_kinds = tuple(kinds)
        state = [[tar.name, tar.stat().st_size, tar.stat().st_mtime_ns] for tar in self._tars]
        self._choose(len(self._table), ["webdataset", state], choice)

    def _indexed(
        self, tars: list[Location]
    ) -> tuple[list[Location], list[pa.Table], dict[str, None]]:
        """(tars, their indices with the tar's number, caption kinds) of the readable tars."""
        readable, tables, kinds = list[Location](), list[pa.Table](), dict[str, None]()

        def read(tar: Location):
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

    def _members(self, place: int) -> dict[str, Callable[[], BinaryIO]]:
        """suffix → a function that opens the member."""
        tar = self._tars[self._table["tar"][place].as_py()]
        columns = (self._table[name][place].as_py() for name in ("suffixes", "offsets", "sizes"))
        return {suffix: functools.partial(_member, tar, *at) for suffix, *at in zip(*columns)}

    def _open(self, place: int) -> BinaryIO:
        members = self._members(place)
        return next(members[name] for name in members if name in PICTURES)()

    def _facts(self, place: int) -> Facts:
        tar = self._tars[self._table["tar"][place].as_py()].name
        readers = {
            suffix: functools.partial(_read_member, member)
            for suffix, member in self._members(place).items()
        }
        side, captions = texts.side_files(readers, f"{tar}, {self._key(place)}.", self.faults)
        label = self._table["label"][place].as_py()
        return Facts(label if label >= 0 else texts.label_of(side), side, captions)


def _member(tar: Location, offset: int, size: int) -> Any:
    """``size`` bytes at ``offset`` of a tar. Raises UserError if it is gone or cut."""
    if isinstance(tar, RemotePath):
        return tar.open("rb", start=offset, stop=offset + size)
    try:
        file = open(tar, "rb")
    except OSError as error:
        raise UserError(f"{tar} cannot be read: {error.strerror}") from None
    if os.fstat(file.fileno()).st_size < offset + size:
        file.close()
        raise UserError(f"{tar} has become shorter since it was opened")
    return ContainerIO(file, offset, size)


def _read_member(member: Callable[[], BinaryIO], limit: int = -1) -> bytes:
    with member() as file:
        return file.read(limit)


Index = tuple[pa.Table, list[str], list[BadRecord], dict[str, int]]
"""(table of samples, caption kinds, bad records, unread members by suffix) of a tar."""


def index(path: Location) -> Index:
    """The index of a tar, cached by path, size and time. Raises OSError if it cannot be read."""
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


def whole_members(path: Location, faults: BadRecords) -> Iterator[tarfile.TarInfo]:
    """The complete members of an uncompressed tar. Where it is cut or damaged, which tarfile passes
    over without a word, that is named once, with the place."""
    end, place = path.stat().st_size, path.name
    try:
        with (
            path.open("rb", 1 << 20 if isinstance(path, RemotePath) else -1) as whole,
            tarfile.open(fileobj=whole, mode="r:", encoding="utf-8", errors="replace") as tar,
        ):
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep all
                if member.isreg() and member.offset_data + member.size > end:
                    early = member.offset_data + member.size - end
                    faults.add(
                        f"{place}, {member.name}", "cut file", f"the tar ends {early:,} bytes early"
                    )
                    return
                yield member
            whole.seek(at := tar.offset)
            block = whole.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, ValueError) as error:
        faults.add(place, "cut file", f"not an uncompressed tar, or damaged: {error}")
        return
    if len(block) < tarfile.BLOCKSIZE:
        faults.add(
            place, "cut file", f"ends at byte {end:,} without an end mark: samples may be lost"
        )
    elif block.strip(b"\0"):
        detail = f"at byte {at:,} of {end:,} a header is damaged: what lies behind is lost"
        faults.add(place, "cut file", detail)


def _members(path: Location, faults: BadRecords) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each whole file of a tar, and of each link to one before."""
    files: dict[str, tuple[int, int]] = {}
    for member in whole_members(path, faults):
        name = posixpath.normpath(member.name)
        if member.isreg():
            files[name] = member.offset_data, member.size
        elif member.islnk() or member.issym():
            # a symbolic link leads from its own folder
            inside = posixpath.dirname(name) if member.issym() else ""
            target = posixpath.normpath(posixpath.join(inside, member.linkname))
            if target not in files:
                detail = f"to {member.linkname}, which is not an earlier file of the tar"
                faults.add(f"{path.name}, {name}", "unreadable link", detail)
                continue
            files[name] = files[target]
        else:
            continue
        yield name, *files[name]


def _read(path: Location) -> Index:
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
    """Key → suffix → place of the images that share a name up to the first dot."""
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
    path: Location, samples: dict[str, dict[str, tuple[int, int]]], faults: BadRecords
) -> tuple[dict[str, int], list[str]]:
    labels: dict[str, int] = {}
    kinds: dict[str, None] = {}
    looked, quiet = 0, BadRecords()  # the reader of the sample reports its JSON
    for key, members in samples.items():
        for suffix, (offset, size) in members.items():
            if kind := texts.kind_of(suffix):
                kinds[kind] = None
            elif suffix == "cls":
                data = _read_member(functools.partial(_member, path, offset, min(size, 32))).strip()
                if data.isdigit():
                    labels[key] = int(data)
                else:
                    shown = data.decode("utf-8", "replace")
                    faults.add(f"{path.name}, {key}.cls", "unreadable label", shown)
            elif suffix == "json" and looked < _LOOKED_AT:
                looked += 1
                data = _read_member(functools.partial(_member, path, offset, size))
                kinds |= dict.fromkeys(
                    texts.captions_of(texts.json_object(data, "", quiet), "", quiet)
                )
    return labels, list(kinds)


def tars_of(pattern: str, faults: BadRecords) -> list[Location]:
    """The tars of a pattern, in its order; missing ones of a range are named in ``faults``."""
    if pattern.startswith("pipe:"):
        raise UserError(
            f"webdataset:{pattern}: tars are read at random: name files, of a disk or a bucket"
        )
    if (folder := located(pattern)).is_dir():
        files = sorted(path for path in folder.glob("*") if path.is_file())
        found = [path for path in files if path.suffix.lower() == ".tar"]
        if not found:
            raise UserError(f"webdataset:{pattern}: the folder holds no .tar")
        for path in files:
            if re.search(r"\.(tgz|tar\.\w+)$", path.name.lower()):
                faults.add(path.name, "compressed tar", "it cannot be read at random: unpack it")
            elif path not in found and path.name[0] != ".":
                faults.add_unread(path.name)
        return found
    named = list[Location]()
    for name in _braces(pattern):
        if re.search(r"\.(tgz|tar\.\w+)$", name):
            raise UserError(
                f"webdataset:{name}: a compressed tar cannot be read at random: unpack it to .tar"
            )
        path = located(name)
        if not any(c in name for c in "*?[") or path.exists():
            named.append(path)
        elif isinstance(path, RemotePath):
            named += path.parent.glob(path.name)
        else:
            named += map(pathlib.Path, sorted(glob.glob(name)))
    found = []
    there = in_threads(lambda path: path.is_file(), named, f"looking for {pattern}", "tars")
    for path, is_file in zip(named, there):
        if is_file:
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
