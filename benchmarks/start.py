"""Seconds from a command to its first result: one prompt to a PNG, and each command's --help.

    python benchmarks/start.py [--repeat 3] [--doc docs/benchmarks.md]

first: neither bytecode nor compiled programs are cached; again: both are. Every start is a fresh
process, and every figure the median of them. Shares: *import* until the last module is loaded,
*trace* Python to XLA's input, *compile* XLA, or reading a compiled program; *rest* reads the
weights, generates and writes the PNG. Cold file caches of the system are not part of it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.speed.table import flag_parser, table, tell, write_between  # noqa: E402
from pixart_jax.__main__ import COMMANDS  # noqa: E402

COLUMNS = ("first s", "again s", "import s", "trace s", "compile s", "rest s")
MARKS = "<!-- start times -->", "<!-- end of start times -->"
EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "trace",
    "/jax/core/compile/backend_compile_duration": "compile",
}


def sample_and_report(out: str, began: float) -> None:
    """In a child: what sample.py does, and a JSON line of where the seconds went."""
    import jax.monitoring

    import pixart_jax.commands.sample
    import pixart_jax.pipeline.pipeline  # noqa: F401
    from pixart_jax.__main__ import main

    parts = {"import": time.time() - began, "trace": 0.0, "compile": 0.0}

    def add(event: str, seconds: float, **_) -> None:
        if event in EVENTS:
            parts[EVENTS[event]] += seconds

    jax.monitoring.register_event_duration_secs_listener(add)
    main(["sample", "--prompt", "a large red star", "--out", out])
    parts["rest"] = time.time() - began - sum(parts.values())
    print(json.dumps(parts))


def start(command: list[str], environment: dict[str, str]) -> tuple[float, str]:
    """(seconds, stdout) of a program."""
    began = time.time()
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-300:]}")
    return time.time() - began, done.stdout


def measure(cache: Path, number: int) -> tuple[float, dict[str, float]]:
    """(seconds of sample.py, its parts in a second process) with the caches under ``cache``."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "PIXART_"))}
    environment |= {"PIXART_JAX_CACHE": str(cache), "PYTHONPYCACHEPREFIX": str(cache / "bytecode")}
    sample = ["sample.py", "--prompt", "a large red star", "--out", str(cache / f"out{number}")]
    seconds, _ = start(sample, environment)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from benchmarks import start; "
    code += f"start.sample_and_report({str(cache / f'parts{number}')!r}, {time.time()})"
    return seconds, json.loads(start(["-c", code], environment)[1].splitlines()[-1])


def main() -> None:
    parser = flag_parser(__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--doc", type=Path, help="the page whose table is replaced")
    options = parser.parse_args()
    first, again, parts = [], [], []
    for number in range(options.repeat):
        tell(f"sample.py, {number + 1} of {options.repeat}")
        with tempfile.TemporaryDirectory() as cache:
            first.append(measure(Path(cache), 0)[0])
            seconds, found = measure(Path(cache), 1)
        again.append(seconds)
        parts.append(found)
    shares = [statistics.median(part[name] for part in parts) for name in parts[0]]
    figures = [statistics.median(first), statistics.median(again), *shares]
    helps = []
    for name in COMMANDS:
        tell(f"{name} --help")
        words = ["configs/shapes.py"] if name == "train" else []
        times = [
            start(["-m", "pixart_jax", name, *words, "--help"], dict(os.environ))[0]
            for _ in range(options.repeat)
        ]
        helps.append(f"{name} {statistics.median(times):.1f}")
    text = table(COLUMNS, [[f"{value:.1f}" for value in figures]])
    text += f"\n`--help`, in seconds: {', '.join(helps)}.\n"
    print(text)
    if options.doc:
        write_between(options.doc, *MARKS, text)


if __name__ == "__main__":
    main()
