"""Kill and move real runs, and compare what they end with to what an undisturbed run makes.

    python benchmarks/interruptions.py train --kills 100 [--processes 2]
    python benchmarks/interruptions.py curves [--doc docs/pods.md --png docs/images/curves.png]

train: a curriculum of three stages is ended by SIGKILL or SIGTERM at any moment, a few steps after
its start, or while it writes a checkpoint, and started again, until there were as many kills. Each
time no committed checkpoint is lost, the next start continues from the newest, and exit status 75
has lost no step; at the end the last checkpoint, the exported model and metrics.jsonl (but for
timings) are equal to the bit. With --processes, SIGKILL ends one of them or all.

curves: the same curriculum on several meshes of simulated devices and processes, one run killed and
moved three times; losses and final parameters agree with those of one device within 1e-4.

A second call with the same --folder runs only what is missing of `curves`. Exit status 1 and the
reason on the last line where a promise is broken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "training")]

from benchmarks.speed.table import flag_parser, write_between  # noqa: E402

WAIT = 900.0  # seconds that a start, or an ending, may take
STRUCK = (-9, -15, 137, 143)  # exit statuses of a program that a signal ended


class Broken(Exception):
    """A promise does not hold."""


# ---- runs ----


def recipe(folder: Path, steps: Sequence[int]) -> Path:
    """A curriculum of so many steps a stage (the last stages), as a file for train.py, its data
    beside it. Adam's rate is one that rounding does not upset; every mesh divides the sizes."""
    import tiny_run

    folder.mkdir(parents=True, exist_ok=True)
    tiny_run.curriculum(folder)  # writes the data
    file = folder / "interrupted.py"
    file.write_text(f'''"""A short curriculum."""
import dataclasses, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "tests" / "training")!r})
import tiny_run
from pixart_jax.config import OptimizerConfig


def get_config():
    config, stages = tiny_run.curriculum(Path({str(folder)!r})), []
    adam = OptimizerConfig(learning_rate=3e-4, warmup_steps=5, clip=1.0, ema=0.9, eps=1e-6)
    for stage, steps in zip(config.stages, {tuple(steps)!r}):
        optimizer = dataclasses.replace(adam, accumulate=stage.optimizer.accumulate)
        stages.append(dataclasses.replace(stage, steps=steps, batch_size=16, optimizer=optimizer))
    return dataclasses.replace(config, stages=tuple(stages), checkpoint_every=4, keep_checkpoints=2)
''')
    return file


def train_command(recipe: Path, workdir: Path, processes: int = 1, *options: str) -> list[str]:
    program = [str(ROOT / "train.py"), str(recipe), "--workdir", str(workdir), *options]
    if processes == 1:
        return [sys.executable, *program]
    launch = ["launch", "--processes", str(processes), "--patience", "2", "--"]
    return [sys.executable, "-m", "pixart_jax", *launch, *program]


@contextlib.contextmanager
def started(command: Sequence[str], log: Path, **env: str) -> Iterator[subprocess.Popen]:
    """A program, which is killed at the end of the block if it still runs."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **env}
    how = {"cwd": ROOT, "env": environment, "stderr": subprocess.STDOUT}
    with open(log, "ab") as out:
        process = subprocess.Popen(command, stdout=out, start_new_session=True, **how)
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def committed(workdir: Path) -> int:
    """The newest committed step; 0 where there is none."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def lines(workdir: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The complete lines of a JSONL file of a run."""
    path = workdir / name
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def logged(workdir: Path) -> int:
    """The last step in metrics.jsonl."""
    return max((line["total_step"] for line in lines(workdir)), default=0)


# ---- train ----

MOMENTS = {"any time": 2, "some steps on": 3, "in a checkpoint": 4}  # how often each is chosen


def await_moment(moment: str, workdir: Path, process: subprocess.Popen, rng: random.Random) -> None:
    """Return when it is time to strike, or the process has ended."""
    begun, start, was, seen = time.monotonic(), committed(workdir), False, 0
    starts = len(lines(workdir, "attempts.jsonl"))
    steps, delay, writes = rng.randint(1, 12), rng.uniform(0, 30), rng.randint(1, 3)
    while process.poll() is None and time.monotonic() - begun < WAIT:
        time.sleep(0.002 if moment == "in a checkpoint" else 0.01)
        if moment == "any time":
            if time.monotonic() - begun >= delay:
                return
        elif len(lines(workdir, "attempts.jsonl")) > starts:  # what lies there is this start's own
            now = any("tmp" in p.name for p in (workdir / "checkpoints").glob("*"))
            seen, was = seen + (now and not was), now
            done = logged(workdir) >= start + steps if moment == "some steps on" else seen >= writes
            if done:
                time.sleep(rng.uniform(0, 0.08))
                return


def strike(process: subprocess.Popen, asked: signal.Signals, rng: random.Random) -> None:
    """SIGTERM goes to the program; SIGKILL to it, or to one or all of its workers."""
    with contextlib.suppress(OSError):
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [int(pid) for pid in listed]
        if asked is signal.SIGKILL and workers:
            for pid in workers if rng.random() < 0.5 else [rng.choice(workers)]:
                os.kill(pid, asked)
            return
    process.send_signal(asked)


def attempt(
    command: list[str], workdir: Path, log: Path, rng: random.Random, kill: bool
) -> tuple[str, int]:
    """Start once and check what that leaves; (signal and moment, exit status)."""
    before, starts = committed(workdir), len(lines(workdir, "attempts.jsonl"))
    moment = rng.choices(list(MOMENTS), list(MOMENTS.values()))[0] if kill else "none"
    asked = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
    with started(command, log) as process:
        if kill:
            await_moment(moment, workdir, process, rng)
            strike(process, asked, rng)
        status = process.wait(WAIT)
    after, attempts = committed(workdir), lines(workdir, "attempts.jsonl")
    killed = kill and asked is signal.SIGKILL  # the launcher then reports its workers' death
    if status not in (0, 75, *STRUCK) and not (killed and status > 0):
        raise Broken(f"status {status} after {asked.name}:\n{log.read_text()[-2000:]}")
    if after < before:
        raise Broken(f"the newest checkpoint was {before} and is {after}")
    if len(attempts) > starts:
        if attempts[-1]["total_step"] != before:
            raise Broken(f"committed {before}, continued from {attempts[-1]['total_step']}")
        if status == 75 and logged(workdir) != after:
            raise Broken(f"SIGTERM saved step {after} of {logged(workdir)}")
    return f"{asked.name} {moment}" if kill else "no signal", status


def state(workdir: Path) -> dict[str, np.ndarray]:
    """Name → array of the last checkpoint, whatever mesh saved it."""
    import jax
    import orbax.checkpoint as ocp

    folder = workdir / "checkpoints" / str(committed(workdir)) / "state"
    shapes = ocp.StandardCheckpointHandler().metadata(folder).tree
    whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    found = ocp.PyTreeCheckpointer().restore(folder, restore_args=whole)
    leaves = jax.tree_util.tree_leaves_with_path(found)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def check_end(workdir: Path, reference: Path) -> None:
    """Broken where a finished run differs from the reference."""
    from pixart_jax.training.metrics import TIMING

    mine, theirs = state(workdir), state(reference)
    other = [n for n in theirs if n not in mine or not np.array_equal(mine[n], theirs[n])]
    if other or len(mine) != len(theirs):
        raise Broken(f"{len(other)} of {len(theirs)} arrays differ at the end, as {other[:3]}")
    curves = [
        [{k: v for k, v in line.items() if k not in TIMING} for line in lines(run)]
        for run in (workdir, reference)
    ]
    if curves[0] != curves[1]:
        raise Broken("metrics.jsonl differs from that of the uninterrupted run")
    for file in sorted((reference / "model").rglob("*.safetensors")):
        name = file.relative_to(reference)
        if file.read_bytes() != (workdir / name).read_bytes():
            raise Broken(f"{name} differs")


def train(flags, folder: Path, rng: random.Random) -> str:
    """Kill training runs; the verdict."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compilation_cache"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    file, log = recipe(folder / "world", (flags.steps,) * 3), folder / "log.txt"
    reference, runs, starts = folder / "uninterrupted", 0, 0
    attempt(train_command(file, reference, flags.processes), reference, log, rng, kill=False)
    kills = 0
    while kills < flags.kills:
        workdir, status = folder / f"run{runs}", None
        while status != 0:
            command = train_command(file, workdir, flags.processes)
            how, status = attempt(command, workdir, log, rng, kills < flags.kills)
            kills, starts = kills + (status != 0), starts + 1
            print(f"run {runs}: {how}, status {status}, step {committed(workdir)}", flush=True)
        check_end(workdir, reference)
        runs += 1
    return (
        f"{kills} kills in {runs} runs, {starts} starts: every run ended equal to the bit to the "
        "uninterrupted one; no committed step was lost"
    )


# ---- curves ----

LIMIT = 1e-4  # relative: of every step's loss, and of the worst array's ‖difference‖ / ‖parameters‖
BEGIN, END = "<!-- curves: begin -->", "<!-- curves: end -->"
# What is added to all keys adds one number to all of a query's scores, which softmax ignores: the
# gradient is 0, computed as rounding.
UNTRAINED = ("attn1.to_k.bias", "attn2.to_k.bias")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a part of a run is computed: simulated devices over processes; mesh: axes' sizes."""

    devices: int
    processes: int = 1
    mesh: tuple[tuple[str, int], ...] = ()

    def start(self, recipe: Path, workdir: Path, log: Path):
        options = [part for axis, size in self.mesh for part in (f"--mesh.{axis}", str(size))]
        devices = f"--xla_force_host_platform_device_count={self.devices // self.processes}"
        command = train_command(recipe, workdir, self.processes, *options)
        return started(command, log, XLA_FLAGS=devices)


ONE = Place(1)
EIGHT = Place(8, mesh=(("data", 1), ("fsdp", 8)))
TWO_BY_FOUR = Place(8, 2, (("data", 2), ("fsdp", 4)))
# name: the places of the run, each but the last left by SIGKILL when its part of the steps is done
RUNS: dict[str, tuple[Place, ...]] = {
    "1 device": (ONE,),
    "fsdp 8": (EIGHT,),
    "fsdp 4 × tensor 2": (Place(8, mesh=(("data", 1), ("fsdp", 4), ("tensor", 2))),),
    "data 2 × context 2 × tensor 2": (Place(8, mesh=(("data", 2), ("context", 2), ("tensor", 2))),),
    "2 processes × 4 devices": (TWO_BY_FOUR,),
    "moved 8 → 4 → 1 → 2 × 4": (EIGHT, Place(4, mesh=(("data", 1), ("fsdp", 4))), ONE, TWO_BY_FOUR),
}


def run(places: Sequence[Place], recipe: Path, workdir: Path, steps: int) -> None:
    """Train to the end, moved from place to place after equal parts of the steps."""
    for number, place in enumerate(places):
        last, stop = number == len(places) - 1, steps * (number + 1) // len(places)
        if not last and committed(workdir) >= stop:
            continue
        log = workdir.with_suffix(f".{number}.log")
        with place.start(recipe, workdir, log) as process:
            while process.poll() is None and (last or committed(workdir) < stop):
                time.sleep(0.05)
            status = process.poll()
        if status not in ((0,) if last else (0, None)):
            raise Broken(f"{workdir.name}: status {status}; {log} has its output")


def losses(workdir: Path) -> np.ndarray:
    """The loss of every step, [steps]."""
    return np.array([line["loss"] for line in lines(workdir)])


def parameters(workdir: Path) -> dict[str, np.ndarray]:
    """Name → array of the exported transformer: the average of the last stage's parameters."""
    from safetensors.numpy import load_file

    return load_file(workdir / "model" / "transformer" / "diffusion_pytorch_model.safetensors")


def difference(one: dict, other: dict) -> tuple[float, float, str]:
    """(‖difference‖ / ‖parameters‖ over all, that of the worst array, its name).

    By norms and not value by value: where a gradient is zero but for rounding, Adam divides
    rounding by rounding, and a value may move by a step of the learning rate either way; such
    values are few and small. The keys' biases are such values altogether (UNTRAINED).
    """
    assert one.keys() == other.keys()
    names = [name for name in one if not name.endswith(UNTRAINED)]
    gaps = {n: float(np.linalg.norm(one[n].astype(np.float64) - other[n])) for n in names}
    norms = {n: float(np.linalg.norm(one[n].astype(np.float64))) for n in names}
    relative = {n: gaps[n] / norms[n] if norms[n] else gaps[n] for n in names}
    worst = max(names, key=relative.__getitem__)
    total = np.linalg.norm(list(gaps.values())) / np.linalg.norm(list(norms.values()))
    return float(total), relative[worst], worst


def plot(path: Path, curves: dict[str, np.ndarray]) -> None:
    """The losses, and below them each one's relative difference from the first."""
    from matplotlib.figure import Figure

    figure = Figure((9.6, 6.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    first = next(iter(curves.values()))
    for number, (name, curve) in enumerate(curves.items()):
        style = {"color": f"C{number}", "label": name, "linewidth": 1 if number else 3}
        above.plot(curve, **style)
        if number:
            below.semilogy(np.maximum(np.abs(curve / first - 1), 1e-9), **style)
    above.set_ylabel("loss")
    below.set_ylabel("relative difference from 1 device")
    below.set_xlabel("step")
    above.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def curves(flags, folder: Path, rng: random.Random) -> str:
    """Run on every mesh; the verdict."""
    part = flags.steps // 3
    file = recipe(folder, (part, part, flags.steps - 2 * part))
    found: dict[str, np.ndarray] = {}
    rows, over, one = [], [], {}
    for number, (name, places) in enumerate(RUNS.items()):
        if flags.only and number and flags.only not in name:
            continue
        workdir = folder / f"run-{number}"
        if not (workdir / "model" / "model_index.json").exists():
            run(places, file, workdir, flags.steps)
        found[name], one = losses(workdir), one or parameters(workdir)
        gap = np.abs(found[name] / found["1 device"] - 1)
        total, worst, where = difference(one, parameters(workdir))
        if gap.max() > LIMIT or worst > LIMIT or len(gap) != flags.steps:
            over.append(name)
        step = f"{gap.max():.1e} (step {gap.argmax() + 1})"
        rows.append(f"| {name} | {len(gap)} | {step} | {total:.1e} | {worst:.1e} ({where}) |")
    head = ["| run | steps | losses | all parameters | worst array |", "|---|---|---|---|---|"]
    table = "\n".join([*head, *rows])
    print(table)
    if flags.doc:
        write_between(flags.doc, BEGIN, END, f"{table}\n")
    if flags.png:
        plot(flags.png, found)
    if over:
        raise Broken(f"over {LIMIT:g}: {', '.join(over)}")
    return f"losses and parameters agree with those of 1 device within {LIMIT:g}"


def main(argv: Sequence[str]) -> int:
    parser = flag_parser(__doc__)
    what = parser.add_subparsers(dest="what", required=True)
    training, meshes = (what.add_parser(each.__name__) for each in (train, curves))
    training.add_argument("--kills", type=int, default=20)
    training.add_argument("--steps", type=int, default=24, help="of each of the three stages")
    training.add_argument("--processes", type=int, default=1)
    meshes.add_argument("--steps", type=int, default=50, help="of the whole run")
    meshes.add_argument("--only", help="a part of the names of the runs to make, beside 1 device")
    meshes.add_argument("--png", type=Path, help="plot the curves")
    meshes.add_argument("--doc", type=Path, help="a page that takes the table between its markers")
    for each in (training, meshes):
        each.add_argument("--folder", type=Path, help="of the runs; by default a temporary one")
        each.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    flags = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (flags.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{flags.what}, seed {flags.seed}", flush=True)
        try:
            print(globals()[flags.what](flags, folder, random.Random(flags.seed)))
        except Broken as broken:
            print(f"BROKEN, seed {flags.seed}: {broken}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
