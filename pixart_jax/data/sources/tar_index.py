"""Where everything lies in a tar: one pass over its headers, kept in the cache folder as long as
the file is the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib

import numpy as np

from pixart_jax.data.faults import BadRecord, BadRecords
from pixart_jax.data.sources import texts
from pixart_jax.data.sources.listed import write_cache_file
from pixart_jax.data.sources.tar_headers import members
from pixart_jax.files import cache_folder

FORMAT = 1
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_LOOKED_AT = 200  # .json members of a tar that are read to learn which kinds of text there are


@dataclasses.dataclass(frozen=True)
class TarIndex:
    """Samples of a tar: those members whose names agree up to the first dot behind the last '/'.

    keys: name of each sample. first: int64 [n + 1], a sample's members are those from first[i] to
    first[i + 1]. suffix: uint16 [m], the number of a member's suffix in ``suffixes`` (lower case,
    without the dot). offset, size: int64 [m], bytes. label: int64 [n], −1 without a .cls. kinds: of
    text. faults: what is wrong with the tar.
    """

    keys: list[str]
    first: np.ndarray
    suffix: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    suffixes: list[str]
    kinds: list[str]
    faults: list[BadRecord]


def index(path: pathlib.Path) -> TarIndex:
    """The index of a tar, from the cache where the file has its size and time still. OSError where
    it cannot be read."""
    status = path.stat()
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    file = cache_folder() / "tars" / f"{name}.npz"
    seal = json.dumps([FORMAT, status.st_size, status.st_mtime_ns])
    if file.exists():
        with np.load(file) as kept:
            said = json.loads(kept["said"].tobytes())
            if said["seal"] == seal:
                arrays = {
                    name: kept[name] for name in ("first", "suffix", "offset", "size", "label")
                }
                return TarIndex(
                    said["keys"],
                    **arrays,
                    suffixes=said["suffixes"],
                    kinds=said["kinds"],
                    faults=_faults(said["faults"]),
                )
    made = _read(path)
    said = {"seal": seal, "keys": made.keys, "suffixes": made.suffixes, "kinds": made.kinds}
    said["faults"] = [dataclasses.astuple(fault) for fault in made.faults]
    text = np.frombuffer(json.dumps(said).encode(), np.uint8)
    arrays = {name: getattr(made, name) for name in ("first", "suffix", "offset", "size", "label")}
    write_cache_file(file, lambda out: np.savez(out, said=text, **arrays))
    return made


def _faults(kept: list[list]) -> list[BadRecord]:
    return [BadRecord(*fault) for fault in kept]


def _read(path: pathlib.Path) -> TarIndex:
    """One pass over the headers; bytes are read of labels and of the first JSON texts alone."""
    faults = BadRecords()
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    labels: dict[str, int] = {}
    kinds: dict[str, None] = {}
    looked = 0
    with open(path, "rb") as file:
        for name, offset, size in members(path, faults):
            folder, slash, base = name.rpartition("/")
            stem, dot, suffix = base.partition(".")
            suffix = suffix.lower()
            if not dot or not stem:
                continue
            key, place = f"{folder}{slash}{stem}", f"{path.name}, {name}"
            if suffix.endswith("txt") and size > texts.LONGEST:
                faults.add(
                    place,
                    "caption too long",
                    f"{size:,} bytes, at most {texts.LONGEST:,} are taken",
                )
                continue
            held = samples.setdefault(key, {})
            if suffix in held or (suffix in PICTURES and any(other in PICTURES for other in held)):
                faults.add(
                    place,
                    "key twice",
                    f"the tar holds another {'picture' if suffix in PICTURES else f'.{suffix}'} "
                    f"of {key!r}",
                )
                continue
            held[suffix] = (offset, size)
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
    for key in [
        key for key, held in samples.items() if not any(suffix in PICTURES for suffix in held)
    ]:
        held = samples.pop(key)
        if any(suffix.endswith("txt") or suffix == "json" for suffix in held):
            faults.add(
                f"{path.name}, {key}",
                "caption without picture",
                ", ".join(f".{suffix}" for suffix in held),
            )
    suffixes = sorted({suffix for held in samples.values() for suffix in held})
    number = {suffix: i for i, suffix in enumerate(suffixes)}
    flat = [(number[suffix], *where) for held in samples.values() for suffix, where in held.items()]
    table = np.array(flat, np.int64).reshape(-1, 3)
    return TarIndex(
        list(samples),
        np.cumsum([0, *(len(held) for held in samples.values())]).astype(np.int64),
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
    return texts.captions_of(fields, "", BadRecords()) if isinstance(fields, dict) else {}
