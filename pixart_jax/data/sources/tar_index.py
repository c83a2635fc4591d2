"""Where everything lies in a tar: one pass over its headers, kept in the cache folder as long as the file is the same."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import tarfile

import numpy as np

from pixart_jax.cache import cache_folder
from pixart_jax.data.faults import Fault, Faults
from pixart_jax.data.sources import texts
from pixart_jax.data.sources.listed import keep

FORMAT = 1
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_LOOKED_AT = 200  # .json members of a tar that are read to learn which kinds of text there are
_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class TarIndex:
    """Samples of a tar: those members whose names agree up to the first dot behind the last '/'.

    keys: name of each sample. first: int64 [n + 1], a sample's members are those from first[i] to first[i + 1]. suffix: uint16 [m],
    the number of a member's suffix in ``suffixes`` (lower case, without the dot). offset, size: int64 [m], bytes. label: int64 [n], −1
    without a .cls. kinds: of text. faults: what is wrong with the tar.
    """

    keys: list[str]
    first: np.ndarray
    suffix: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    suffixes: list[str]
    kinds: list[str]
    faults: list[Fault]


def index(path: pathlib.Path) -> TarIndex:
    """The index of a tar, from the cache where the file has its size and time still. OSError where it cannot be read."""
    status = path.stat()
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    file = cache_folder() / "tars" / f"{name}.npz"
    seal = json.dumps([FORMAT, status.st_size, status.st_mtime_ns])
    if file.exists():
        with np.load(file) as kept:
            said = json.loads(kept["said"].tobytes())
            if said["seal"] == seal:
                arrays = {name: kept[name] for name in ("first", "suffix", "offset", "size", "label")}
                return TarIndex(said["keys"], **arrays, suffixes=said["suffixes"], kinds=said["kinds"], faults=_faults(said["faults"]))
    made = _read(path)
    said = {"seal": seal, "keys": made.keys, "suffixes": made.suffixes, "kinds": made.kinds}
    said["faults"] = [dataclasses.astuple(fault) for fault in made.faults]
    text = np.frombuffer(json.dumps(said).encode(), np.uint8)
    arrays = {name: getattr(made, name) for name in ("first", "suffix", "offset", "size", "label")}
    keep(file, lambda out: np.savez(out, said=text, **arrays))
    return made


def _faults(kept: list[list]) -> list[Fault]:
    return [Fault(*fault) for fault in kept]


def _read(path: pathlib.Path) -> TarIndex:
    """One pass over the headers; bytes are read of labels and of the first JSON texts alone."""
    faults = Faults()
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    labels: dict[str, int] = {}
    kinds: dict[str, None] = {}
    looked = 0
    with open(path, "rb") as file:
        for name, offset, size in _members(file, path, faults):
            folder, slash, base = name.rpartition("/")
            stem, dot, suffix = base.partition(".")
            suffix = suffix.lower()
            if not dot or not stem:
                continue
            key, place = f"{folder}{slash}{stem}", f"{path.name}, {name}"
            if suffix.endswith("txt") and size > texts.LONGEST:
                faults.add(place, "caption too long", f"{size:,} bytes, at most {texts.LONGEST:,} are taken")
                continue
            members = samples.setdefault(key, {})
            if suffix in members or (suffix in PICTURES and any(other in PICTURES for other in members)):
                faults.add(place, "key twice", f"the tar holds another {'picture' if suffix in PICTURES else f'.{suffix}'} of {key!r}")
                continue
            members[suffix] = (offset, size)
            if suffix == "txt" or suffix.endswith(".txt"):
                kinds[kind(suffix)] = None
            elif suffix == "cls":
                text = os.pread(file.fileno(), min(size, 32), offset).strip()
                if text.isdigit():
                    labels[key] = int(text)
                else:
                    faults.add(place, "unreadable label", text.decode("utf-8", "replace"))
            elif suffix == "json" and looked < _LOOKED_AT:
                looked += 1
                kinds.update(dict.fromkeys(_kinds(os.pread(file.fileno(), size, offset))))
    for key in [key for key, members in samples.items() if not any(suffix in PICTURES for suffix in members)]:
        members = samples.pop(key)
        if any(suffix.endswith("txt") or suffix == "json" for suffix in members):
            faults.add(f"{path.name}, {key}", "caption without picture", ", ".join(f".{suffix}" for suffix in members))
    suffixes = sorted({suffix for members in samples.values() for suffix in members})
    flat = [(suffixes.index(suffix), *where) for members in samples.values() for suffix, where in members.items()]
    table = np.array(flat, np.int64).reshape(-1, 3)
    return TarIndex(
        list(samples),
        np.cumsum([0, *(len(members) for members in samples.values())]).astype(np.int64),
        table[:, 0].astype(np.uint16),
        np.ascontiguousarray(table[:, 1]),
        np.ascontiguousarray(table[:, 2]),
        np.array([labels.get(key, -1) for key in samples], np.int64),
        suffixes,
        list(kinds),
        list(faults),
    )


def kind(suffix: str) -> str:
    """The kind of text of a member: 'txt' → 'caption', 'dense.txt' → 'dense'."""
    return suffix.removesuffix("txt").rstrip(".") or "caption"


def _kinds(data: bytes) -> dict[str, tuple[str, ...]]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return {}  # named when the sample is read
    return texts.captions_of(fields, "", Faults()) if isinstance(fields, dict) else {}


def _members(file: io.BufferedReader, path: pathlib.Path, faults: Faults):
    """(name, offset, size) of each whole regular file; what is cut off or damaged is named once, with where it begins."""
    end = os.fstat(file.fileno()).st_size
    if end == 0:
        faults.add(path.name, "cut file", "0 bytes")
        return
    try:
        with tarfile.open(fileobj=file, mode="r:", errorlevel=2, encoding="utf-8", errors="replace") as tar:
            while True:
                at = tar.offset
                try:
                    member = tar.next()
                except tarfile.TarError as fault:
                    faults.add(path.name, "cut file", f"at byte {at:,} of {end:,}: {fault}")
                    return
                if member is None:
                    break
                if (missing := member.offset_data + member.size - end) > 0:
                    faults.add(f"{path.name}, {member.name}", "cut file", f"the tar ends {missing:,} bytes early")
                    return
                if member.isreg():
                    yield member.name.removeprefix("./"), member.offset_data, member.size
    except tarfile.TarError as fault:
        faults.add(path.name, "cut file", str(fault))
        return
    block = os.pread(file.fileno(), _BLOCK, at)
    if block.strip(b"\0"):
        faults.add(path.name, "cut file", f"at byte {at:,} of {end:,} no header can be read: what lies behind is lost")
    elif len(block) < _BLOCK:
        faults.add(path.name, "cut file", f"ends at byte {end:,} without an end mark: samples may be lost")
