"""Which of a record's fields are captions, and what a caption may look like."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from pixart_jax.data.faults import BadRecords

LONGEST = 100_000
"""Bytes of a caption; one that is longer is named and left out. (120 tokens are some 600 bytes.)"""

FILE_FIELDS = (
    "key",
    "file",
    "file_name",
    "filename",
    "file_path",
    "path",
    "image",
    "image_path",
    "__key__",
)
"""Fields of a row that may name its picture, the first of them that is there."""

# Text, but no caption: what img2dataset, LAION and Hugging Face write beside them.
_NOT_CAPTIONS = {
    *FILE_FIELDS,
    "url",
    "image_url",
    "uid",
    "id",
    "hash",
    "md5",
    "sha1",
    "sha256",
    "phash",
    "exif",
    "status",
    "error_message",
    "error",
    "license",
    "similarity",
    "format",
    "mode",
    "split",
    "dataset",
    "source",
    "model",
    "date",
    "finish",
    "prompt_id",
    "kind",
}
_NUMBER = re.compile(r"\s*[-+]?[\d.]+(?:[eE][-+]?\d+)?\s*")
# What no text holds: C0 without tab, line feed, vertical tab, form feed and carriage return; DEL;
# surrogates; non-characters.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def is_caption(name: str, value: object) -> bool:
    """Whether a field of a row is a text, or several, that says something of the picture."""
    if not isinstance(name, str) or name in _NOT_CAPTIONS:
        return False
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(text, str) for text in value)
    return isinstance(value, str) and not _NUMBER.fullmatch(value)


def captions_of(
    fields: Mapping[str, object], place: str, faults: BadRecords
) -> dict[str, tuple[str, ...]]:
    """Caption kind → texts of a row, each cleared by :func:`cleared`; empty ones are none.

    A row with a caption and a ``kind`` (as the command caption writes them) has that one text of
    that kind: its others, as the prompt, are what it was made with.
    """
    found: dict[str, tuple[str, ...]] = {}
    if (
        isinstance(fields.get("caption"), str)
        and isinstance(kind := fields.get("kind"), str)
        and kind
    ):
        fields = {kind: fields["caption"]}
    for name, value in fields.items():
        if is_caption(name, value):
            texts = tuple(
                clean_text(text, place, name, faults)
                for text in ([value] if isinstance(value, str) else value)
            )
            if texts := tuple(text for text in texts if text):
                found[name] = texts
    return found


def decoded(data: bytes, place: str, kind: str, faults: BadRecords) -> str:
    """The text of a caption file's bytes; '' where it is too long. A byte order mark goes, bytes
    that are no UTF-8 become U+FFFD."""
    if len(data) > LONGEST:
        return clean_text(" " * len(data), place, kind, faults)
    text = data.decode("utf-8-sig", "replace")
    if "\ufffd" in text and b"\xef\xbf\xbd" not in data:
        faults.add(place, "not UTF-8", f"caption of kind {kind!r}", mended=True)
    return clean_text(text, place, kind, faults)


def clean_text(text: str, place: str, kind: str, faults: BadRecords) -> str:
    """A caption without control characters and outer blanks; '' for one beyond LONGEST. Both are
    named in ``faults``: the first as mended, the second as left out."""
    if (
        len(text) > LONGEST
        or len(text) * 4 > LONGEST
        and len(text.encode("utf-8", "replace")) > LONGEST
    ):
        faults.add(
            place,
            "caption too long",
            f"kind {kind!r}, {len(text):,} characters, at most {LONGEST:,} bytes are taken",
        )
        return ""
    if _CONTROL.search(text):
        faults.add(place, "control characters", f"caption of kind {kind!r}", mended=True)
        text = _CONTROL.sub("", text)
    return text.strip()


def merged(*captions: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Captions of several places as one: texts of a kind follow each other, each once."""
    out: dict[str, tuple[str, ...]] = {}
    for some in captions:
        for kind, texts in some.items():
            out[kind] = tuple(dict.fromkeys((*out.get(kind, ()), *texts)))
    return out


def label_of(fields: Mapping[str, object]) -> int:
    """A row's class, −1 where it has none."""
    value = fields.get("label", fields.get("cls"))
    if isinstance(value, bool) or value is None:
        return -1
    if isinstance(value, (int, np.integer)):
        return int(value)
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else -1
