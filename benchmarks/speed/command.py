"""The flags that forward.py, sample.py and train_step.py share, and running cases into a table."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.speed.cases import MODELS, TINY, Case, numbers, sizes
from benchmarks.speed.contest import OURS, Contender, Contest
from benchmarks.speed.table import Record, flag_parser, runs_of, tables, tell
from pixart_jax.errors import UserError

COMPILES = {
    "none": "diffusers eager",
    "whole": "diffusers compiled",
    "blocks": "diffusers compiled by blocks",
}


def platform() -> str:
    """'gpu' where a process would find an NVIDIA GPU and JAX_PLATFORMS allows it, else 'cpu'."""
    allowed = os.environ.get("JAX_PLATFORMS", "cuda")
    found = shutil.which("nvidia-smi") or Path("/dev/nvidiactl").exists()
    return "gpu" if found and any(name in allowed for name in ("cuda", "gpu")) else "cpu"


def parser(document: str | None, px: str, repeat: int) -> argparse.ArgumentParser:
    found = flag_parser(document)
    add = found.add_argument
    add("--against", choices=("diffusers", "none"), default="diffusers", help="none: ours alone")
    add("--model", choices=MODELS, default="XL/2")
    add("--px", type=sizes, default=sizes(px), metavar="SIZES", help="256,1024ms: image sides")
    add("--batch", type=numbers, default=[1], metavar="NUMBERS", help="batch sizes, as 1,16")
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    add("--text-tokens", type=int, default=120, help="the length that texts are padded to")
    add("--repeat", type=int, default=repeat, help=f"timed runs a side ({repeat})")
    add("--budget", type=float, default=600.0, help="seconds after which no new round begins")
    add("--peer-compile", metavar="NAMES", help="of none, whole, blocks; on a GPU whole by default")
    add("--peer-backend", default="inductor", help="of torch.compile")
    add("--alone", choices=("yes", "no"), help="one side at a time; yes for training on a CPU")
    add("--keep", action="store_true", help="the same processes for all cases: faster")
    add("--compile-cache", type=Path, help="keep programs there; by default compile times are cold")
    add("--compile-time", action="store_true", help="measure only that: cold and from the cache")
    add("--json", type=Path, metavar="FILE", help="append the run to this file")
    add("--table", type=Path, metavar="FILE", help="print the tables of such a file and stop")
    return found


def begin(argv: Sequence[str], made: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the flags. This process computes on the CPU, the contenders where their environment
    says. SystemExit after the tables of --table."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    flags = made.parse_args(argv)
    if flags.table:
        print(tables(runs_of(flags.table)), end="")
        raise SystemExit(0)
    return flags


def ours(label: str = "", **options) -> Contender:
    return Contender(f"{OURS} {label}".strip(), "ours", options)


def peers(flags, suffix: str = "", **options) -> list[Contender]:
    """The peer in each way that --peer-compile names."""
    if flags.against == "none":
        return []
    names = (flags.peer_compile or ("whole" if platform() == "gpu" else "none,whole")).split(",")
    if unknown := set(names) - set(COMPILES):
        raise UserError(
            f"--peer-compile {flags.peer_compile}: {sorted(unknown)[0]!r} is none of "
            f"{', '.join(COMPILES)}"
        )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if flags.peer_backend == "inductor" and set(names) != {"none"} and not header.is_file():
        tell(f"no {header}, which torch.compile needs: the peer runs eager")
        names = ["none"]
    options["backend"] = flags.peer_backend
    return [Contender(COMPILES[n] + suffix, "peer", {"compile": n, **options}) for n in names]


def cases(kind: str, flags, **more) -> list[Case]:
    """The cases of the flags, small ones first."""
    dtype = flags.dtype or ("bfloat16" if platform() == "gpu" else "float32")
    found = [
        Case(kind, flags.model, px, batch, dtype, multi_scale, flags.text_tokens, **more)
        for batch in flags.batch
        for px, multi_scale in flags.px
    ]
    return sorted(found, key=lambda case: case.flops)


def run(
    argv: Sequence[str],
    flags,
    measured: Sequence[Case],
    contenders: Sequence[Contender],
    bounds: Mapping[str, float],
    prepare: Callable[[Case], Case] | None = None,
) -> int:
    """Measure every case and print the table; 1 where a side failed or fp32 outputs differ by more
    than bounds (output → relative error). A case that fails is recorded, and the others go on.
    prepare: case → case just before it is measured alone.
    """
    record, failed = Record(flags.json, argv), False
    large = platform() == "cpu" and any(c.kind == "train" and c.model != TINY for c in measured)
    alone = prepare is not None or (flags.alone == "yes" if flags.alone else large)
    with Contest(contenders, flags, alone) as contest:
        for case in measured:
            try:
                case = prepare(case) if prepare else case
                tell(str(case))
                for row in contest.rows(case):
                    failed |= _add(record, row, bounds, contest)
            except Exception as error:
                row = {"case": dataclasses.asdict(case), "size": case.size, "side": "all"}
                failed |= _add(record, row | {"failed": str(error)}, bounds, contest)
    print(tables([record.run]), end="", flush=True)
    return int(failed)


def _add(record: Record, row: dict, bounds: Mapping[str, float], contest: Contest) -> bool:
    """Write a row; whether it failed or its outputs differ."""
    dtype = row["case"]["dtype"]
    record.run["rows"].append(row)
    record.run["limits"] |= contest.measured_limits
    record.run["machine"] |= contest.machine
    record.write()
    wrong = [f"failed: {row['failed']}"] if "failed" in row else []
    for name, error in (row.get("errors") or {}).items():
        if dtype == "float32" and error > bounds[name]:
            wrong.append(f"{name} differs from ours by {error:.1e}, more than {bounds[name]:.0e}")
    for text in wrong:
        tell(f"{row['side']}: {text}")
    return bool(wrong)
