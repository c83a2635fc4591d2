"""The members of a tar by their headers alone: POSIX (ustar, pax) and GNU, uncompressed; several
times faster than tarfile, which makes an object of all that a header says.

A header is a block of 512 bytes: name [0:100], size [124:136] (octal, or base 256 with the first
bit set), checksum [148:156], type [156], magic [257:263], in POSIX tars a prefix of the name
[345:500]. The data follow, filled up to whole blocks. A name or size that does not fit stands in a
member of its own before: type L (GNU), or x (pax, lines 'LENGTH key=value'). Two blocks of zeros
end the tar.
"""

from __future__ import annotations

import mmap
import pathlib
from collections.abc import Iterator

from pixart_jax.data.faults import BadRecords

_BLOCK = 512
_REGULAR, _LONG_NAME, _PAX = b"0\x007", b"L", b"x"


def members(path: pathlib.Path, faults: BadRecords) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each whole regular file. What is cut off or damaged is named once,
    with where it begins. OSError where the file cannot be read."""
    with open(path, "rb") as file:
        file.seek(0, 2)
        end = file.tell()
        if not end:
            faults.add(path.name, "cut file", "0 bytes")
            return
        with mmap.mmap(file.fileno(), end, access=mmap.ACCESS_READ) as data:
            yield from _members(data, end, path.name, faults)


def _members(
    data: mmap.mmap, end: int, tar: str, faults: BadRecords
) -> Iterator[tuple[str, int, int]]:
    at, name, size = 0, None, None  # name and size: what a member of its own said of the next one
    while True:
        block = data[at : at + _BLOCK]
        if len(block) < _BLOCK:
            faults.add(
                tar, "cut file", f"ends at byte {end:,} without an end mark: samples may be lost"
            )
            return
        kind = block[156:157]
        try:
            stored = int(block[148:156].strip(b" \0"), 8)
            length = _number(block[124:136]) if size is None else size
        except ValueError:
            if block.strip(b"\0"):
                faults.add(
                    tar,
                    "cut file",
                    f"at byte {at:,} of {end:,} no header can be read: what lies behind is lost",
                )
            return
        if sum(block) - sum(block[148:156]) + 8 * 32 != stored:
            faults.add(
                tar,
                "cut file",
                f"at byte {at:,} of {end:,} a header is damaged: what lies behind is lost",
            )
            return
        here = at + _BLOCK
        if name is None:
            name = _text(block[:100])
            if block[257:263] == b"ustar\0" and block[345]:
                name = f"{_text(block[345:500])}/{name}"
        if here + length > end:
            faults.add(
                f"{tar}, {name}", "cut file", f"the tar ends {here + length - end:,} bytes early"
            )
            return
        at = here + -(-length // _BLOCK) * _BLOCK
        if kind == _LONG_NAME:
            name, size = _text(data[here : here + length]), None
        elif kind == _PAX:
            said = _pax(data[here : here + length])
            name, size = (
                said.get("path"),
                int(said["size"]) if said.get("size", "").isdecimal() else None,
            )
        else:
            if kind in _REGULAR and kind and not name.endswith("/"):
                yield name.removeprefix("./"), here, length
            # a long link's name, or words on the whole tar, stand between a name and its member
            if kind not in b"Kg":
                name, size = None, None


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "replace")


def _number(field: bytes) -> int:
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _pax(data: bytes) -> dict[str, str]:
    """The lines of a pax member; what is no such line ends them."""
    found, at = {}, 0
    while at < len(data):
        length, space, _ = data[at : at + 20].partition(b" ")
        if not space or not length.isdigit() or not int(length):
            break
        key, _, value = data[at + len(length) + 1 : at + int(length) - 1].partition(b"=")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        at += int(length)
    return found
