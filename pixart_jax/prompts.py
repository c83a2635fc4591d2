"""Prompt files: one prompt a line, or a 'prompt' column of a .csv, or a 'prompt' field of a .jsonl."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

from pixart_jax.errors import UserError


def read(path: str | os.PathLike) -> list[str]:
    """The prompts of a file in their order, blank ones left out. UserError where there is none, or a line cannot be read."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no prompt file {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: give a file of prompts (.txt, .csv or .jsonl)") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: give a file of prompts (.txt, .csv or .jsonl)") from None
    reader = {".csv": _csv, ".jsonl": _jsonl}.get(path.suffix.lower(), str.splitlines)
    try:
        prompts = [prompt.strip() for prompt in reader(text)]
    except UserError as fault:
        raise UserError(f"{path}: {fault}") from None
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise UserError(f"{path} holds no prompt: write one a line")
    return prompts


def _csv(text: str) -> list[str]:
    rows = csv.DictReader(io.StringIO(text))
    if rows.fieldnames is not None and "prompt" not in rows.fieldnames:
        raise UserError(f"no column 'prompt' (columns: {', '.join(rows.fieldnames)})")
    return [row["prompt"] or "" for row in rows]


def _jsonl(text: str) -> list[str]:
    prompts = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as fault:
            raise UserError(f"line {number} is no JSON: {fault}") from None
        value = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(value, str):
            raise UserError(f'line {number} has no text "prompt"')
        prompts.append(value)
    return prompts
