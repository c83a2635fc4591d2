"""Kill a training run again and again, and see that it ends as if nothing had happened: python
benchmarks/interruptions.py --kills 100.

A small curriculum of three stages is trained once without a break. Then the same command runs in
another workdir and is
ended by SIGKILL or SIGTERM: at any moment from its start on, a few steps after the place it went on
from, or inside a save, the moment Orbax's temporary folder is there. It is started again until the
run is through; then the next run begins, until there have been as many kills as asked for. After
each death and each run it is checked that

- no committed save is gone: the newest one never lies before what it was, and the next start goes
  on from it;
- what SIGTERM stopped with status 75 has lost no step at all;
- at the end the last save (parameters, optimizer, average) and the exported model are equal to the
  bit to those of the uninterrupted run, and so is every line of metrics.jsonl but for what the
  clock decides (training.metrics.TIMING).

Prints a table and a verdict; exit status 1 where something differs. With --processes N the run is N
processes on this machine (python -m pixart_jax launch), and SIGKILL strikes one of them, or all.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "training")]

import numpy as np  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
import tiny_run  # noqa: E402

from pixart_jax.training.metrics import TIMING, read  # noqa: E402
from pixart_jax.training.summary import summary  # noqa: E402

MOMENTS = {"any time": 2, "some steps on": 3, "in a save": 4}  # how often each is chosen
PATIENCE = 900.0  # seconds that a start, or an ending, may take


@dataclasses.dataclass
class Death:
    """How one start of the program ended."""

    moment: str
    asked: str  # the signal
    status: int
    committed: int | None  # newest save then


class Broken(Exception):
    """A promise that did not hold."""


def recipe(folder: Path, steps: int) -> Path:
    """The tests' curriculum with ``steps`` steps a stage and a save every fourth, as a file that
    train.py takes."""
    tiny_run.curriculum(folder)  # makes the data
    file = folder / "interrupted.py"
    file.write_text(
        "import dataclasses\nimport sys\nfrom pathlib import Path\nsys.path.insert(0, "
        f"{str(ROOT / 'tests' / 'training')!r})\n"
        "from tiny_run import curriculum\n\n\ndef get_config():\n    config = "
        f"curriculum(Path({str(folder)!r}))\n"
        f"    stages = tuple(dataclasses.replace(stage, steps={steps}) for stage in "
        "config.stages)\n"
        "    return dataclasses.replace(config, stages=stages, checkpoint_every=4, "
        "keep_checkpoints=2)\n"
    )
    return file


def command(recipe: Path, workdir: Path, processes: int) -> list[str]:
    program = [str(ROOT / "train.py"), str(recipe), "--workdir", str(workdir)]
    if processes == 1:
        return [sys.executable, *program]
    return [
        sys.executable,
        "-m",
        "pixart_jax",
        "launch",
        "--processes",
        str(processes),
        "--",
        *program,
    ]


def committed(workdir: Path) -> int | None:
    """The newest save that bears its name."""
    folder = workdir / "checkpoints"
    return (
        max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=None)
        if folder.is_dir()
        else None
    )


def logged(workdir: Path) -> int:
    """The last step that metrics.jsonl has."""
    lines = read(workdir / "metrics.jsonl")
    return lines[-1]["total_step"] if lines else 0


def saving(workdir: Path) -> bool:
    return (
        any("tmp" in p.name for p in (workdir / "checkpoints").iterdir())
        if (workdir / "checkpoints").is_dir()
        else False
    )


def await_moment(
    moment: str, workdir: Path, process: subprocess.Popen, rng: random.Random, typical: float
) -> None:
    """Returns when it is time to strike, or the process has ended. typical: seconds that a start
    lives without a kill."""
    begun, start = time.monotonic(), committed(workdir) or 0
    starts = len(read(workdir / "attempts.jsonl"))
    steps, blink, delay = rng.randint(1, 12), rng.uniform(0, 0.08), rng.uniform(0, typical)
    saves, seen = rng.randint(1, 3), 0
    was = False
    while process.poll() is None and time.monotonic() - begun < PATIENCE:
        if moment == "any time" and time.monotonic() - begun >= delay:
            return
        # what lies there is this start's own
        trains = moment != "any time" and len(read(workdir / "attempts.jsonl")) > starts
        if trains and moment == "some steps on" and logged(workdir) >= start + steps:
            time.sleep(blink)
            return
        if trains and moment == "in a save":
            now = saving(workdir)
            seen += now and not was
            was = now
            if seen >= saves:
                time.sleep(blink)
                return
        time.sleep(0.002 if moment == "in a save" else 0.01)


def children(pid: int) -> list[int]:
    """Processes below one, its launcher's workers."""
    try:
        found = [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return found + [deeper for child in found for deeper in children(child)]


def strike(process: subprocess.Popen, asked: signal.Signals, rng: random.Random) -> None:
    """SIGTERM goes to the program; SIGKILL to it, or to one or all of its workers."""
    below = children(process.pid)
    if asked is signal.SIGTERM or not below:
        process.send_signal(asked)
        return
    for pid in below if rng.random() < 0.5 else [rng.choice(below)]:
        try:
            os.kill(pid, asked)
        except ProcessLookupError:
            pass  # it had just ended


def one_start(
    line: list[str], workdir: Path, rng: random.Random, log: Path, kill: bool, typical: float
) -> Death:
    before = committed(workdir)
    starts = len(read(workdir / "attempts.jsonl"))
    moment = rng.choices(list(MOMENTS), list(MOMENTS.values()))[0] if kill else "none"
    asked = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
    with open(log, "ab") as out:
        process = subprocess.Popen(line, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        try:
            if kill:
                await_moment(moment, workdir, process, rng, typical)
                strike(process, asked, rng)
            status = process.wait(PATIENCE)
        finally:
            if process.poll() is None:
                process.kill()
    death = Death(moment, asked.name if kill else "", status, committed(workdir))
    check_death(death, before, starts, workdir, log)
    return death


def check_death(death: Death, before: int | None, starts: int, workdir: Path, log: Path) -> None:
    tail = log.read_text(errors="replace")[-2000:]
    if death.status not in (0, 75, -9, -15, 137, 143) and not (
        death.asked == "SIGKILL" and death.status > 0
    ):
        raise Broken(f"status {death.status} after {death.asked}:\n{tail}")
    if (death.committed or -1) < (before or -1):
        raise Broken(f"the newest save was {before} and is {death.committed}")
    attempts = read(workdir / "attempts.jsonl")
    if len(attempts) > starts and attempts[-1]["total_step"] != (before or 0):
        raise Broken(
            f"the newest save was {before}, and the run went on from {attempts[-1]['total_step']}"
        )
    if death.status == 75 and len(attempts) > starts and logged(workdir) != (death.committed or 0):
        raise Broken(
            f"SIGTERM saved step {death.committed}, and step {logged(workdir)} had been done"
        )


def leaves(workdir: Path):
    import jax

    folder = workdir / "checkpoints" / str(committed(workdir)) / "state"
    shapes = ocp.StandardCheckpointHandler().metadata(folder).tree
    # whatever mesh of whatever processes saved it
    whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    state = ocp.PyTreeCheckpointer().restore(folder, restore_args=whole)
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def check_end(workdir: Path, reference: Path) -> None:
    mine, theirs = leaves(workdir), leaves(reference)
    other = [
        name for name in theirs if name not in mine or not np.array_equal(mine[name], theirs[name])
    ]
    if other or len(mine) != len(theirs):
        raise Broken(f"{len(other)} of {len(theirs)} arrays differ at the end, as {other[:3]}")
    curves = [
        [{k: v for k, v in line.items() if k not in TIMING} for line in read(run / "metrics.jsonl")]
        for run in (workdir, reference)
    ]
    if curves[0] != curves[1]:
        raise Broken("metrics.jsonl differs from that of the uninterrupted run")
    for file in sorted((reference / "model").rglob("*.safetensors")):
        if (
            file.read_bytes()
            != (workdir / "model" / file.relative_to(reference / "model")).read_bytes()
        ):
            raise Broken(f"model/{file.relative_to(reference / 'model')} differs")


def table(deaths: list[Death]) -> str:
    rows = [("moment", "signal", "kills", "ended -9/-15", "saved, status 75", "had ended", "other")]
    counted = collections.Counter((d.moment, d.asked) for d in deaths)
    for moment, asked in sorted(counted):
        found = [d.status for d in deaths if (d.moment, d.asked) == (moment, asked)]
        died, saved, through = (
            sum(s in (-9, -15, 137, 143) for s in found),
            found.count(75),
            found.count(0),
        )
        rows.append(
            (
                moment,
                asked,
                str(len(found)),
                str(died),
                str(saved),
                str(through),
                str(len(found) - died - saved - through),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=100)
    options.add_argument("--steps", type=int, default=24, help="of each of the three stages")
    options.add_argument("--processes", type=int, default=1)
    options.add_argument("--seed", type=int, default=None)
    options.add_argument(
        "--workdir", type=Path, default=None, help="where the runs lie; default: a temporary folder"
    )
    args = options.parse_args()
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(2**32)
    rng, begun = random.Random(seed), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.workdir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compilation_cache"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        print(
            f"seed {seed}, {args.kills} kills, 3 stages of {args.steps} steps, {args.processes} "
            "process(es)",
            flush=True,
        )
        file, log = recipe(folder / "world", args.steps), folder / "log.txt"
        reference, deaths, runs = folder / "uninterrupted", [], 0
        try:
            one_start(
                command(file, reference, args.processes), reference, rng, log, kill=False, typical=0
            )
            while sum(d.moment != "none" and d.status != 0 for d in deaths) < args.kills:
                workdir = folder / f"run{runs}"
                while True:
                    kill = sum(d.status != 0 for d in deaths) < args.kills
                    second = time.monotonic()
                    deaths.append(
                        one_start(
                            command(file, workdir, args.processes),
                            workdir,
                            rng,
                            log,
                            kill,
                            typical=30.0,
                        )
                    )
                    d = deaths[-1]
                    print(
                        f"run {runs}: {d.asked or 'no signal'} {d.moment}, status {d.status}, "
                        f"committed {d.committed}, "
                        f"{time.monotonic() - second:.0f} s",
                        flush=True,
                    )
                    if d.status == 0:
                        break
                check_end(workdir, reference)
                runs += 1
        except Broken as broken:
            print(
                f"\n{table([d for d in deaths if d.asked])}\nBROKEN after {len(deaths)} starts, "
                f"seed {seed}: {broken}"
            )
            return 1
        struck = [d for d in deaths if d.asked]
        print(f"\n{table(struck)}\n\nthe last run's own account:\n{summary(workdir)}")
        killed = sum(d.status != 0 for d in struck)
        print(
            f"\n{killed} kills in {runs} runs, {len(deaths)} starts, "
            f"{(time.monotonic() - begun) / 60:.0f} min: "
            "every run ended equal to the bit to the uninterrupted one; no committed step was lost"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
