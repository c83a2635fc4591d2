"""Which fields of a record are captions, and how their texts are cleaned."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pixart_jax import tables
from pixart_jax.data.faults import BadRecords

LONGEST = 100_000
"""Bytes of a caption; a longer one is skipped and named (120 tokens are some 600 bytes)."""

# fmt: off
FILE_FIELDS = (
    "key", "file", "file_name", "filename", "file_path", "path", "image", "image_path", "__key__",
)
"""Fields of a row that may name its image; the first one present counts."""

# Texts that img2dataset, LAION and Hugging Face write beside captions.
_NOT_CAPTIONS = {
    *FILE_FIELDS, "url", "image_url", "uid", "id", "hash", "md5", "sha1", "sha256", "phash", "exif",
    "status", "error_message", "error", "license", "similarity", "format", "mode", "split",
    "dataset", "source", "model", "date", "finish", "prompt_id", "kind",
}
# fmt: on
TEXTS = ("txt", "caption")  # suffixes of caption files; kohya's scripts write the second
_NUMBER = re.compile(r"\s*[-+]?[\d.]+(?:[eE][-+]?\d+)?\s*")
# What no text holds: C0 without tab, line feed, vertical tab, form feed and carriage return; DEL;
# surrogates; non-characters.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def is_caption(name: str, value: object) -> bool:
    """Whether a field of a row is a caption or a list of captions."""
    if not isinstance(name, str) or name.lower() in _NOT_CAPTIONS:
        return False
    if isinstance(value, list | tuple):  # a null among captions is none
        return any(value) and all(isinstance(text, str | None) for text in value)
    return isinstance(value, str) and not _NUMBER.fullmatch(value)


def captions_of(
    fields: Mapping[str, Any], place: str, faults: BadRecords
) -> dict[str, tuple[str, ...]]:
    """Caption kind → cleaned texts of a row. A row with 'caption' and 'kind', as the command
    ``caption`` writes them, has that one text of that kind."""
    caption, kind = fields.get("caption"), fields.get("kind")
    if isinstance(caption, str) and isinstance(kind, str) and kind:
        fields = {kind: caption}
    found: dict[str, tuple[str, ...]] = {}
    for name, value in fields.items():
        if is_caption(name, value):
            some = [value] if isinstance(value, str) else [text for text in value if text]
            cleaned = (clean_text(text, place, name, faults) for text in some)
            if texts := tuple(text for text in cleaned if text):
                found[name] = texts
    return found


def json_object(data: bytes, place: str, faults: BadRecords) -> dict[str, Any]:
    """The JSON object in the bytes of a side file, {} for any other value or bad JSON."""
    text, replaced = tables.decode(data)
    if replaced:
        faults.add(place, tables.NOT_UTF8, repaired=True)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        faults.add(place, tables.BAD_ROW, str(error))
        return {}
    return found if isinstance(found, dict) else {}


def decoded(data: bytes, place: str, kind: str, faults: BadRecords) -> str:
    """The cleaned text of a caption file's bytes; '' if it is too long."""
    if len(data) > LONGEST:
        faults.add(place, "caption too long", f"kind {kind!r}, more than {LONGEST:,} bytes", True)
        return ""
    text, replaced = tables.decode(data)
    if replaced:
        faults.add(place, tables.NOT_UTF8, f"caption of kind {kind!r}", repaired=True)
    return clean_text(text, place, kind, faults)


def clean_text(text: str, place: str, kind: str, faults: BadRecords) -> str:
    """Strip a caption and remove its control characters; '' for one beyond LONGEST bytes."""
    if len(text) * 4 > LONGEST and len(text.encode("utf-8", "replace")) > LONGEST:
        faults.add(place, "caption too long", f"kind {kind!r}, more than {LONGEST:,} bytes", True)
        return ""
    if _CONTROL.search(text):
        faults.add(place, "control characters", f"caption of kind {kind!r}", repaired=True)
        text = _CONTROL.sub("", text)
    return text.strip()


def kind_of(suffix: str) -> str | None:
    """'txt' and 'caption' → 'caption', 'dense.TXT' → 'dense', other suffixes → None."""
    kind, _, last = suffix.lower().rpartition(".")
    return (kind or "caption") if last in TEXTS else None


def image_named(row: Mapping[str, Any]) -> str | None:
    """The path of the image that a row names: a field of FILE_FIELDS, or of an embedded image."""
    folded = {name.lower(): value for name, value in row.items() if value not in (None, "")}
    value = next((folded[name] for name in FILE_FIELDS if name in folded), None)
    value = value.get("path") if isinstance(value, dict) else value
    return None if value in (None, "") else str(value)


def side_files(
    files: Mapping[str, Callable[[int], bytes]], place: str, faults: BadRecords
) -> tuple[dict[str, Any], Callable[[], dict[str, tuple[str, ...]]]]:
    """(fields of the .json, a function that reads the captions) of the files beside an image.
    files: suffix → a function that reads at most so many bytes, −1 for all. place: for messages."""

    def read(suffix: str, limit: int) -> bytes | None:
        try:
            return files[suffix](limit)
        except OSError as error:
            faults.add(place + suffix, "unreadable file", str(error))
            return None

    side: dict[str, Any] = {}
    for suffix in files:
        if suffix.lower() == "json" and (data := read(suffix, -1)) is not None:
            side |= json_object(data, place + suffix, faults)

    def captions() -> dict[str, tuple[str, ...]]:
        found = []
        for suffix in files:
            kind = kind_of(suffix)
            if kind and (data := read(suffix, LONGEST + 1)) is not None:
                text = decoded(data, place + suffix, kind, faults)
                found.append({kind: (text,)} if text else {})
        return merged(*found, captions_of(side, f"{place}json", faults))

    return side, captions


def merged(*captions: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Captions from several places as one mapping; each text of a kind once."""
    out: dict[str, tuple[str, ...]] = {}
    for some in captions:
        for kind, texts in some.items():
            out[kind] = tuple(dict.fromkeys((*out.get(kind, ()), *texts)))
    return out


def label_of(fields: Mapping[str, Any]) -> int:
    """The class of a row, −1 if it has none."""
    value = fields.get("label", fields.get("cls"))
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else -1
