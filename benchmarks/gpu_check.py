"""On a GPU: each attention backend that is there beside xla's in fp32, output and gradients, at
PixArt's shapes; and the limits.

    python benchmarks/gpu_check.py [--json FILE] [--tiny]

Exit status 1 where a backend differs by more than bfloat16's rounding explains. A backend that this
platform or this version does not have is left out, and the reason is said and recorded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.speed import limits, ours  # noqa: E402
from benchmarks.speed.record import Record  # noqa: E402
from benchmarks.speed.table import limits_line, render  # noqa: E402
from pixart_jax import cli  # noqa: E402
from pixart_jax.errors import UserError  # noqa: E402
from pixart_jax.models.attention import attention, check_backend  # noqa: E402

BACKENDS = ("xla", "cudnn", "auto")
BOUND = 2e-2  # relative, root mean square, of bfloat16 beside fp32
COLUMNS = ("attention", "batch, queries, keys", "backend", "output", "dq", "dk", "dv", "")
# name: (batch, queries, keys, with lengths)
SHAPES = {
    "self, 256 px": (4, 256, 256, False),
    "self, 512 px": (2, 1024, 1024, False),
    "self, 1024 px": (1, 4096, 4096, False),
    "cross, 256 px": (4, 256, 120, True),
    "cross, 1024 px": (2, 4096, 120, True),
    "cross, 300 tokens": (2, 1024, 300, True),
}
TINY = {"self": (2, 64, 64, False), "cross": (2, 64, 24, True)}
HEADS, HEAD_DIM = 16, 72


def results(q, k, v, weights, lengths, backend: str) -> list[np.ndarray]:
    """Output, and the gradients of a weighted sum of it by q, k and v."""

    def weighted(q, k, v):
        out = attention(q, k, v, lengths=lengths, backend=backend)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    gradients, out = jax.jit(jax.grad(weighted, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x, np.float64) for x in (out, *gradients)]


def compared(name: str, shape: tuple, backend: str) -> tuple[list[str], bool]:
    """(cells of the table, whether it holds). A shape with lengths has a sample without any key
    beside others."""
    batch, queries, keys, some = shape
    parts = jax.random.split(jax.random.key(0), 4)
    q, v, weights = (
        jax.random.normal(parts[n], (batch, m, HEADS, HEAD_DIM))
        for n, m in ((0, queries), (2, keys), (3, queries))
    )
    k = jax.random.normal(parts[1], (batch, keys, HEADS, HEAD_DIM))
    lengths = jnp.asarray(np.linspace(1, keys, batch).round(), jnp.int32) if some else None
    narrow = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    first = [name, f"{batch}, {queries}, {keys}", backend]
    try:
        check_backend(backend)
        mine = results(*narrow, weights, lengths, backend)
    except UserError as fault:
        return [*first, "", "", "", "", f"left out: {fault}"], True
    with jax.default_matmul_precision("highest"):
        theirs = results(*[x.astype(jnp.float32) for x in narrow], weights, lengths, "xla")
    errors = [
        float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(mine, theirs, strict=True)
    ]
    holds = all(error < BOUND for error in errors)  # false for a number that is none
    return [*first, *(f"{error:.1e}" for error in errors), "" if holds else "over"], holds


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see it work")
    flags = parser.parse_args(argv)
    dtype = "float32" if flags.tiny else "bfloat16"
    record = Record(
        flags.json,
        " ".join(["python gpu_check.py", *argv]),
        columns=list(COLUMNS),
        title="Attention beside fp32",
        cells=[],
    )
    record.run["machine"] |= ours.described()
    record.run["limits"] = {dtype: {"ours": limits.of_jax(dtype)}}
    held = True
    for name, shape in (TINY if flags.tiny else SHAPES).items():
        for backend in BACKENDS:
            cells, holds = compared(name, shape, backend)
            record.run["cells"].append(cells)
            record.write()
            held &= holds
    print(render(COLUMNS, record.run["cells"], "Attention beside fp32"))
    print(limits_line([record.run]))
    return int(not held)


if __name__ == "__main__":
    sys.exit(cli.run(main))
