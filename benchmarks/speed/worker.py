"""One side of a contest as a process: it reads a request a line on its standard input and answers
each with a line of JSON.

    python -m benchmarks.speed.worker ours|peer

Requests: limit (a dtype), open (a case: weights, first run), run (one timed run), result (arrays to
a file), memory, close. A fault ends the process with its traceback on standard error, where
whatever libraries print goes as well.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time

import numpy as np

from benchmarks.speed import inputs, machine
from benchmarks.speed.cases import Case


class Worker:
    """side: the module benchmarks.speed.ours or benchmarks.speed.peer."""

    def __init__(self, side):
        self._side = side
        self._work = None
        self._held = 0

    def limit(self, dtype: str) -> dict:
        return self._side.limit(dtype)

    def open(self, case: dict, how: dict, folder: str, arrays: str) -> dict:
        """{'first_seconds': of the run that compiles, what the work says of itself}."""
        machine.forget_peak()
        self._held = machine.resident_bytes()
        begun = time.perf_counter()
        self._work = self._side.open_case(Case(**case), how, folder, inputs.read(arrays))
        opened = time.perf_counter()
        self._work.run()
        done = time.perf_counter()
        facts = self._work.facts()
        return {"open_seconds": opened - begun, "first_seconds": done - opened, **facts}

    def result(self, path: str) -> dict:
        np.savez(path, **self._work.result())
        return {}

    def run(self) -> dict:
        begun = time.perf_counter()
        self._work.run()
        return {"seconds": time.perf_counter() - begun}

    def memory(self) -> dict:
        """The peak of the device's memory, or on a CPU of the resident set over what the process
        held before the case."""
        on_device = self._side.peak_device_bytes()
        return {"peak_bytes": machine.peak_bytes() - self._held if on_device is None else on_device}

    def close(self) -> dict:
        self._work = None
        self._side.forget()
        return {}


def main(name: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    side = importlib.import_module(f"benchmarks.speed.{name}")
    worker = Worker(side)

    def answer(found: dict) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    answer(side.described())
    for line in sys.stdin:
        request = json.loads(line)
        answer(getattr(worker, request.pop("do"))(**request))


if __name__ == "__main__":
    main(sys.argv[1])
