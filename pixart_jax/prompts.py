"""Prompt files: one prompt a line, or rows of a .csv or .jsonl with a 'prompt' and, where a row
wants its own, a size and the like."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from pixart_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt, and what its row says of height, width (pixels), seed and negative_prompt; None
    where it says nothing."""

    prompt: str
    height: int | None = None
    width: int | None = None
    seed: int | None = None
    negative_prompt: str | None = None

    def own(self) -> dict:
        """What the row says beside its prompt."""
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name != "prompt" and value is not None
        }


def read(path: str | os.PathLike) -> list[Row]:
    """The rows of a file in their order, those of a blank prompt left out. UserError where there is
    none, or one cannot be read.

    Columns of a .csv and fields of a .jsonl that Row does not know are left alone.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no prompt file {path}") from None
    except IsADirectoryError:
        raise UserError(
            f"{path} is a folder: give a file of prompts (.txt, .csv or .jsonl)"
        ) from None
    except UnicodeDecodeError:
        raise UserError(
            f"{path} is not UTF-8 text: give a file of prompts (.txt, .csv or .jsonl)"
        ) from None
    reader = {".csv": _csv, ".jsonl": _jsonl}.get(path.suffix.lower(), _lines)
    try:
        rows = [_row(number, fields) for number, fields in reader(text)]
    except UserError as fault:
        raise UserError(f"{path}: {fault}") from None
    rows = [row for row in rows if row.prompt]
    if not rows:
        raise UserError(f"{path} holds no prompt: write one a line")
    return rows


def _lines(text: str) -> Iterator[tuple[int, Mapping]]:
    for number, line in enumerate(text.splitlines(), 1):
        yield number, {"prompt": line}


def _csv(text: str) -> Iterator[tuple[int, Mapping]]:
    rows = csv.DictReader(io.StringIO(text))
    if rows.fieldnames is not None and "prompt" not in rows.fieldnames:
        raise UserError(f"no column 'prompt' (columns: {', '.join(rows.fieldnames)})")
    for fields in rows:
        yield (
            rows.line_num,
            {
                name: value
                for name, value in fields.items()
                if name == "prompt" or (value or "").strip()
            },
        )


def _jsonl(text: str) -> Iterator[tuple[int, Mapping]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as fault:
            raise UserError(f"line {number} is no JSON: {fault}") from None
        yield number, value if isinstance(value, dict) else {"prompt": value}


def _row(number: int, fields: Mapping) -> Row:
    prompt = fields.get("prompt") or ""
    if not isinstance(prompt, str) or ("prompt" not in fields):
        raise UserError(f'line {number} has no text "prompt"')
    own = {}
    for name in ("height", "width", "seed"):
        value = fields.get(name)
        if value is None:
            continue
        try:
            own[name] = int(value)
            if isinstance(value, bool) or own[name] != float(value):
                raise ValueError
        except (ValueError, TypeError):
            raise UserError(f"line {number}: {name} {value!r} is no whole number") from None
    negative = fields.get("negative_prompt")
    if negative is not None and not isinstance(negative, str):
        raise UserError(f"line {number}: negative_prompt {negative!r} is no text")
    return Row(prompt.strip(), negative_prompt=negative, **own)
