"""One run on many meshes: how far loss curves and final parameters lie apart when the devices and
processes change, and nothing else.

    python benchmarks/curves.py --folder out/curves [--steps 50] [--doc docs/pods.md --png
    docs/images/curves.png]

Runs the real train.py, in subprocesses with simulated CPU devices, on a curriculum of three stages
(class-conditional, text, text at two aspect ratios) of random latents: on 1 device, 8 of fsdp, 4 ×
2 of fsdp × tensor, 2 × 2 × 2 of data × context × tensor, 2 processes × 4 devices, and on 8 → 4 → 1
→ 2 × 4 devices, killed (SIGKILL) and moved three times on its way. Prints the largest relative
difference of the losses and of the parameters from those of 1 device; exit status 1 where one is
over its limit. A second call with the same folder runs only what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
LOSS_LIMIT = 1e-4  # relative, every step
PARAMETER_LIMIT = 1e-4  # ‖difference‖ / ‖parameters‖ of the worst array; see `difference`
BEGIN, END = "<!-- curves: begin -->", "<!-- curves: end -->"
# What is added to all keys adds one number to all of a query's scores, which softmax ignores: the
# gradient is 0, computed as rounding.
UNTRAINED = ("attn1.to_k.bias", "attn2.to_k.bias")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a part of a run is computed. mesh: axes' sizes; processes × devices simulated
    devices."""

    devices: int
    mesh: tuple[tuple[str, int], ...]
    processes: int = 1

    def command(
        self, recipe: Path, workdir: Path, options: tuple[str, ...]
    ) -> tuple[list[str], dict[str, str]]:
        sizes = [part for axis, size in self.mesh for part in (f"--mesh.{axis}", str(size))]
        program = ["train.py", str(recipe), "--workdir", str(workdir), *sizes, *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        environment["XLA_FLAGS"] = (
            f"--xla_force_host_platform_device_count={self.devices // self.processes}"
        )
        if self.processes == 1:
            return [sys.executable, *program], environment
        launcher = [
            "-m",
            "pixart_jax",
            "launch",
            "--processes",
            str(self.processes),
            "--patience",
            "2",
        ]
        return [sys.executable, *launcher, "--", *program], environment


ONE = Place(1, ())
EIGHT = Place(8, (("data", 1), ("fsdp", 8)))
FOUR = Place(4, (("data", 1), ("fsdp", 4)))
TWO_BY_FOUR = Place(8, (("data", 2), ("fsdp", 4)), 2)
# name: the places of the run, each but the last left by SIGKILL when its part of the steps is done
RUNS: dict[str, tuple[Place, ...]] = {
    "1 device": (ONE,),
    "fsdp 8": (EIGHT,),
    "fsdp 4 × tensor 2": (Place(8, (("data", 1), ("fsdp", 4), ("tensor", 2))),),
    "data 2 × context 2 × tensor 2": (Place(8, (("data", 2), ("context", 2), ("tensor", 2))),),
    "2 processes × 4 devices": (TWO_BY_FOUR,),
    "moved 8 → 4 → 1 → 2 × 4": (EIGHT, FOUR, ONE, TWO_BY_FOUR),
}


def recipe(folder: Path, steps: int, stages: int = 3) -> Path:
    """The curriculum as a file for train.py, its data beside it; every mesh divides its sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    tests = ROOT / "tests" / "training"
    first = steps // stages
    counts = (*(first,) * (stages - 1), steps - first * (stages - 1))
    file = folder / "curves.py"
    file.write_text(f'''"""Three short stages, Adam at a rate that rounding does not upset."""
import dataclasses, sys
from pathlib import Path
sys.path.insert(0, {str(tests)!r})
import tiny_run
from pixart_jax.config import OptimizerConfig


def get_config():
    config = tiny_run.curriculum(Path({str(folder)!r}))
    adam = OptimizerConfig(learning_rate=3e-4, warmup_steps=5, clip=1.0, ema=0.9, eps=1e-6)
    stages = [
        dataclasses.replace(stage, steps=steps, batch_size=16, optimizer=dataclasses.replace(adam, accumulate=stage.optimizer.accumulate))
        for stage, steps in zip(config.stages, {counts!r})
    ]
    return dataclasses.replace(config, stages=tuple(stages), log_every=1, checkpoint_every=4)
''')  # noqa: E501
    sys.path[:0] = [str(ROOT), str(tests)]
    import tiny_run

    tiny_run.curriculum(folder)
    return file


def run(
    places: tuple[Place, ...],
    recipe: Path,
    workdir: Path,
    steps: int,
    options: tuple[str, ...] = (),
) -> None:
    """Train to the end, moved from place to place after equal parts of the steps."""
    for number, place in enumerate(places):
        last = number == len(places) - 1
        command, environment = place.command(recipe, workdir, options)
        stop = steps * (number + 1) // len(places)
        if not last and saved(workdir) >= stop:
            continue
        with open(workdir.with_suffix(f".{number}.log"), "ab") as log:
            child = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
            try:
                while not last and child.poll() is None and saved(workdir) < stop:
                    time.sleep(0.05)
                if last:
                    child.wait()
                elif child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
        if child.returncode not in ((0,) if last else (0, -signal.SIGKILL)):
            raise SystemExit(
                f"{workdir.name}: status {child.returncode}; "
                f"{workdir.with_suffix(f'.{number}.log')} says why"
            )


def saved(workdir: Path) -> int:
    """The newest committed step."""
    folder = workdir / "checkpoints"
    return (
        max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0)
        if folder.exists()
        else 0
    )


def losses(workdir: Path) -> np.ndarray:
    """The loss of every step, [steps]."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return np.array([line["loss"] for line in lines])


def parameters(workdir: Path) -> dict[str, np.ndarray]:
    """Name → array of the exported transformer: the average of the last stage's parameters."""
    from safetensors.numpy import load_file

    return load_file(workdir / "model" / "transformer" / "diffusion_pytorch_model.safetensors")


def difference(
    one: dict[str, np.ndarray], other: dict[str, np.ndarray]
) -> tuple[float, float, str]:
    """(‖difference‖ / ‖parameters‖ over all, that of the worst array, its name).

    By norms and not value by value: where a gradient is zero but for rounding, Adam divides
    rounding by rounding, and a value may move by a step of the learning rate either way; such
    values are few and small, and their array's norm shows them. The keys' biases are such values
    altogether (UNTRAINED), and left out.
    """
    assert one.keys() == other.keys()
    one, other = (
        {name: array for name, array in of.items() if not name.endswith(UNTRAINED)}
        for of in (one, other)
    )
    gaps = {name: np.linalg.norm(one[name].astype(np.float64) - other[name]) for name in one}
    norms = {name: np.linalg.norm(one[name].astype(np.float64)) for name in one}
    relative = {name: gaps[name] / norms[name] if norms[name] else gaps[name] for name in one}
    worst = max(relative, key=relative.get)
    total = np.sqrt(sum(gap**2 for gap in gaps.values()) / sum(norm**2 for norm in norms.values()))
    return float(total), float(relative[worst]), worst


def picture(curves: dict[str, np.ndarray]) -> np.ndarray:
    """uint8 [h, w, 3]: above the losses on top of each other, below log10 of each one's relative
    difference from the first."""
    from PIL import Image, ImageDraw, ImageFont

    width, height, left, top = 960, 620, 70, 40
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    colours = [
        (0, 0, 0),
        (31, 119, 180),
        (214, 100, 20),
        (44, 140, 44),
        (148, 60, 170),
        (200, 40, 60),
    ]
    first = next(iter(curves.values()))
    panels = [
        ("loss", {name: curve for name, curve in curves.items()}, top, 330),
        (
            "log10 of the relative difference from 1 device",
            {
                name: np.log10(np.maximum(np.abs(curve / first - 1), 1e-9))
                for name, curve in list(curves.items())[1:]
            },
            390,
            590,
        ),
    ]
    for title, rows, high, low in panels:
        least, most = (
            min(row.min() for row in rows.values()),
            max(row.max() for row in rows.values()),
        )
        for k in range(5):
            y, level = low - (low - high) * k / 4, least + (most - least) * k / 4
            draw.line((left, y, width - 20, y), fill=(225, 225, 225))
            draw.text((8, y - 8), f"{level:.3g}", fill=(90, 90, 90), font=font)
        draw.text((left, high - 20), title, fill=(60, 60, 60), font=font)
        for name, row in rows.items():
            number = list(curves).index(name)
            points = [
                (
                    left + (width - left - 20) * k / (len(row) - 1),
                    low - (low - high) * (value - least) / max(most - least, 1e-12),
                )
                for k, value in enumerate(row)
            ]
            draw.line(points, fill=colours[number % 6], width=3 if number == 0 else 1)
    for number, name in enumerate(curves):
        draw.text(
            (left + 300 * (number % 3), 338 + 14 * (number // 3)),
            name.replace("×", "x").replace("→", "-"),
            fill=colours[number % 6],
            font=font,
        )
    return np.asarray(sheet)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("out/curves"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--only", help="a part of the names of the runs to make, beside 1 device")
    parser.add_argument("--png", type=Path, help="the curves, drawn on top of each other")
    parser.add_argument(
        "--doc", type=Path, help="a page that takes the table between its markers, docs/pods.md"
    )
    arguments = parser.parse_args()
    file = recipe(arguments.folder.absolute(), arguments.steps)
    curves, rows, failed = {}, [], False
    for number, (name, places) in enumerate(RUNS.items()):
        if arguments.only and number and arguments.only not in name:
            continue
        workdir = arguments.folder.absolute() / f"run-{number}"
        began = time.perf_counter()
        if not (workdir / "model" / "model_index.json").exists():
            run(places, file, workdir, arguments.steps)
        curves[name] = losses(workdir)
        if number == 0:
            one = parameters(workdir)
        gap = np.abs(curves[name] / curves["1 device"] - 1)
        total, worst, where = difference(one, parameters(workdir))
        failed |= bool(
            gap.max() > LOSS_LIMIT or worst > PARAMETER_LIMIT or len(gap) != arguments.steps
        )
        rows.append(
            f"| {name} | {len(gap)} | {gap.max():.1e} (step {gap.argmax() + 1}) | {total:.1e} | "
            f"{worst:.1e} ({where}) |"
        )
        print(
            f"{name}: {time.perf_counter() - began:.0f} s; losses {gap.max():.1e}, parameters "
            f"{total:.1e}, worst array {worst:.1e}",
            flush=True,
        )
    table = "\n".join(
        ["| run | steps | losses | all parameters | worst array |", "|---|---|---|---|---|", *rows]
    )
    print(f"\n{table}")
    if arguments.doc:
        before, rest = arguments.doc.read_text(encoding="utf-8").split(BEGIN)
        arguments.doc.write_text(
            f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}", encoding="utf-8"
        )
    if arguments.png:
        from pixart_jax.images import write_png

        arguments.png.parent.mkdir(parents=True, exist_ok=True)
        write_png(arguments.png, picture(curves))
    verdict = "FAILED" if failed else "held"
    print(
        f"largest relative difference allowed: losses {LOSS_LIMIT:g}, an array of parameters "
        f"{PARAMETER_LIMIT:g}: {verdict}"
    )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
