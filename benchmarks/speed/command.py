"""What the three scripts share: their flags, and running cases into a table and a JSON file."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.speed import machine
from benchmarks.speed.cases import MODELS, Case, numbers, sizes
from benchmarks.speed.contest import OURS, Contender, Contest, Rules
from benchmarks.speed.record import Record, runs_of
from benchmarks.speed.table import tables
from pixart_jax.errors import UserError

COMPILES = {
    "none": "diffusers eager",
    "whole": "diffusers compiled",
    "blocks": "diffusers compiled by blocks",
}


def platform() -> str:
    """'gpu' where a process would find an NVIDIA GPU and JAX_PLATFORMS does not forbid it, else
    'cpu'."""
    allowed = os.environ.get("JAX_PLATFORMS", "cuda")
    found = shutil.which("nvidia-smi") or Path("/dev/nvidiactl").exists()
    return "gpu" if found and any(name in allowed for name in ("cuda", "gpu")) else "cpu"


def parser(document: str, px: str, repeat: int) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=document, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add(
        "--against",
        choices=("diffusers", "none"),
        default="diffusers",
        help="the peer; none: ours alone",
    )
    add("--model", choices=MODELS, default="XL/2")
    add(
        "--px",
        type=sizes,
        default=sizes(px),
        metavar="SIZES",
        help=f"sides of square images; 1024ms: the multi-scale model ({px})",
    )
    add("--batch", type=numbers, default=[1], metavar="NUMBERS", help="batch sizes, as 1,16")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="float32 on a CPU, bfloat16 on a GPU by default",
    )
    add("--text-tokens", type=int, default=120, help="what texts are padded to")
    add("--repeat", type=int, default=repeat, help=f"timed runs a side ({repeat})")
    add(
        "--budget",
        type=float,
        default=600.0,
        help="seconds of a case's timed runs after which no new round begins",
    )
    add(
        "--peer-compile",
        metavar="NAMES",
        help="none, whole, blocks: none,whole on a CPU, whole on a GPU by default",
    )
    add("--peer-backend", default="inductor", help="of torch.compile")
    add(
        "--alone",
        choices=("auto", "yes", "no"),
        default="auto",
        help="one side at a time in memory; auto: where all would not fit",
    )
    add(
        "--keep",
        action="store_true",
        help="the same processes for all cases: faster; memory then counts from the first case on",
    )
    add(
        "--compile-cache",
        type=Path,
        help="keep what both sides compile there; by default compile times are cold",
    )
    add("--json", type=Path, metavar="FILE", help="append the run to this file")
    add("--table", type=Path, metavar="FILE", help="print the tables of such a file and stop")
    return found


def peers(flags, how: dict | None = None, suffix: str = "") -> list[Contender]:
    """The peer in each way that --peer-compile names."""
    if flags.against == "none":
        return []
    names = (flags.peer_compile or ("whole" if platform() == "gpu" else "none,whole")).split(",")
    if unknown := set(names) - set(COMPILES):
        raise UserError(
            f"--peer-compile {flags.peer_compile}: {sorted(unknown)[0]!r} is none of "
            f"{', '.join(COMPILES)}"
        )
    more = {"backend": flags.peer_backend, **(how or {})}
    return [
        Contender(COMPILES[name] + suffix, "peer", tuple({"compile": name, **more}.items()))
        for name in names
    ]


def ours(label: str = "", **how) -> Contender:
    return Contender(f"{OURS} {label}".strip(), "ours", tuple(how.items()))


def cases(kind: str, flags, **more) -> list[Case]:
    """Small ones first."""
    dtype = flags.dtype or ("bfloat16" if platform() == "gpu" else "float32")
    found = [
        Case(kind, flags.model, px, batch, dtype, told, flags.text_tokens, **more)
        for batch in flags.batch
        for px, told in flags.px
    ]
    return sorted(found, key=lambda case: case.flops)


def alone(
    flags, of: Sequence[Case], contenders: Sequence[Contender], bytes_a_parameter: int
) -> bool:
    """Whether each side must live alone: where the parameters of all, and half as much again, are
    more than the memory at hand."""
    if flags.alone != "auto":
        return flags.alone == "yes"
    if platform() == "gpu":
        return False
    largest = max((parameters(case) for case in of), default=0)
    return 1.5 * bytes_a_parameter * largest * len(contenders) > machine.available_bytes()


def parameters(case: Case) -> int:
    import jax

    from pixart_jax.weights.component import Transformer

    shapes = jax.eval_shape(
        Transformer._module(case.config, "float32").init,
        jax.random.key(0),
        *Transformer._example(case.config),
    )
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def tell(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def show(path: Path) -> int:
    print(tables(runs_of(path)), end="")
    return 0


def run(
    argv: Sequence[str],
    flags,
    of: Iterable[Case],
    contenders: Sequence[Contender],
    rules: Rules,
    check: Callable[[dict], str | None],
) -> int:
    """Every case, its table as it comes to standard output. 1 where a side failed or check(row)
    finds a fault."""
    record, faults = Record(flags.json, " ".join(["python", Path(sys.argv[0]).name, *argv])), 0
    with Contest(contenders, rules, tell) as contest:
        for case in of:
            tell(str(case))
            for one in contest.rows(case):
                record.run["rows"].append(one)
                record.run["limits"][case.dtype] = contest.limits(case.dtype)
                record.run["machine"] |= contest.machine
                record.write()
                fault = one.get("failed") or check(one)
                if fault:
                    tell(f"{one['side']}: {fault}")
                    faults += 1
    print(tables([record.run]), end="", flush=True)
    return int(faults > 0)


def rules(flags, lonely: bool) -> Rules:
    return Rules(max(flags.repeat, 1), flags.budget, lonely, flags.keep, flags.compile_cache)


def within(bounds: Mapping[str, float]) -> Callable[[dict], str | None]:
    """A check of fp32 rows: both sides computed the same. bounds: relative, an output."""

    def check(row: dict) -> str | None:
        for name, error in (row.get("errors") or {}).items():
            if row["case"]["dtype"] == "float32" and error > bounds[name]:
                return (
                    f"{name} differs from ours by {error:.1e}, more than {bounds[name]:.0e}: "
                    "the sides did not compute the same"
                )
        return None

    return check


def begin(argv: Sequence[str], made: argparse.ArgumentParser):
    """The flags; this process itself computes on the CPU, the workers where their environment
    says."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    return made.parse_args(argv)
