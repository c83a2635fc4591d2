"""The JSON file of a benchmark: a list of runs, each with its machine, limits and rows, written
anew as they come.

python -m benchmarks.speed.record FILE PART STATUS SECONDS      (what gpu.sh notes of a part)
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.speed import machine


def runs_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())["runs"] if path.is_file() else []


class Record:
    """One run in the file. Runs that lie there already stay."""

    def __init__(self, path: Path | None, command: str, **facts):
        self._path = path
        self.run = {
            "command": command,
            "machine": machine.described(),
            "limits": {},
            "rows": [],
            **facts,
        }
        self._before = runs_of(path) if path else []

    def write(self) -> None:
        if self._path:
            replace(self._path, [*self._before, self.run])


def replace(path: Path, runs: list[dict]) -> None:
    """The file whole or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        json.dump({"runs": runs}, file, indent=1)
        file.write("\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def main(argv: list[str]) -> None:
    path, part, status, seconds = argv
    replace(
        Path(path),
        [*runs_of(Path(path)), {"part": part, "status": status, "seconds": float(seconds)}],
    )


if __name__ == "__main__":
    main(sys.argv[1:])
