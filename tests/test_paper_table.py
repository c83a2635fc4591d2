"""docs/paper.md: every `file:line` it names is the line of the definition beside it.

python tests/test_paper_table.py --fix    # rewrite stale lines; find definitions that moved
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "paper.md"
ENTRY = re.compile(r"`([\w/]+\.py):(\d+)` `([\w.]+)`")


def definition_line(file: Path, symbol: str) -> int | None:
    """Line of a function, class, method ('Class.method') or module constant; None if absent."""
    body, line = ast.parse(file.read_text(encoding="utf-8")).body, None
    for name in symbol.split("."):
        for node in body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            names = {getattr(node, "name", None), *(getattr(t, "id", None) for t in targets)}
            if name in names:
                body, line = getattr(node, "body", []), node.lineno
                break
        else:
            return None
    return line


def entries() -> list[tuple[str, int, str]]:
    return [(f, int(n), s) for f, n, s in ENTRY.findall(PAGE.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("file, line, symbol", entries(), ids=lambda value: str(value))
def test_the_line_holds_the_definition(file, line, symbol):
    assert (ROOT / file).is_file(), f"{file} does not exist: python {__file__} --fix"
    found = definition_line(ROOT / file, symbol)
    assert found is not None, f"{file} does not define {symbol}"
    assert line == found, f"{symbol} is at line {found}: python {__file__} --fix"


def test_every_row_names_code():
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\|(?!---|.*\| code \|).*", text, re.M)
    assert len(rows) == len(entries()) > 30


def fix() -> list[str]:
    """Rewrite the page with current files and lines; return the symbols that were not found."""
    lost = []

    def current(match: re.Match) -> str:
        named, _, symbol = match.groups()
        others = sorted((ROOT / "pixart_jax").rglob("*.py"))
        found = [
            (file, line)
            for file in (ROOT / named, *others)
            if file.is_file() and (line := definition_line(file, symbol)) is not None
        ]
        if not found:
            lost.append(f"{named}: {symbol}")
            return match[0]
        file, line = found[0]
        return f"`{file.relative_to(ROOT).as_posix()}:{line}` `{symbol}`"

    PAGE.write_text(ENTRY.sub(current, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return lost


if __name__ == "__main__":
    if sys.argv[1:] != ["--fix"]:
        sys.exit(f"usage: python {sys.argv[0]} --fix")
    sys.exit("\n".join(f"not found: {row}" for row in fix()) or 0)
