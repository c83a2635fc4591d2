"""The starts of a run, one line each in attempts.jsonl: what goodput is measured against, whatever
died in between."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import jax

from pixart_jax.training.metrics import read


class RestartLog:
    """Adds this start to the file. total: the step of the run that it goes on from.

    first: Unix time of the first start; restarts: how many came after it. Of several processes the
    first one writes.
    """

    def __init__(self, folder: Path, total: int, devices: int, kind: str):
        file = Path(folder) / "attempts.jsonl"
        now = time.time()
        line = {
            "time": now,
            "total_step": total,
            "processes": jax.process_count(),
            "devices": devices,
            "kind": kind,
            "jax": jax.__version__,
        }
        before = read(file)
        if jax.process_index() == 0:
            with open(file, "rb+" if file.exists() else "wb") as out:
                _drop_cut_line(out)
                out.write((json.dumps(line) + "\n").encode())
                out.flush()
                os.fsync(out.fileno())
        self.first: float = before[0]["time"] if before else now
        self.restarts: int = len(before)

    def goodput(self, productive: float) -> float:
        """The share of the wall time since the first start that went into steps which count:
        productive, in seconds."""
        return productive / max(time.time() - self.first, 1e-9)


def _drop_cut_line(out) -> None:
    """Goes to the end of the last whole line: a start that was killed while it wrote left half of
    one."""
    text = out.read() if out.readable() else b""
    out.seek(text.rfind(b"\n") + 1)
    out.truncate()
