"""Each attention backend beside xla's in fp32, output and gradients, at PixArt's shapes; and the
limits of the machine.

    python benchmarks/gpu_check.py [--json FILE] [--tiny]

Exit status 1 where a backend differs by more than bfloat16's rounding explains, or a cell fails;
the others are measured all the same. A backend that this platform lacks is left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.speed import ours  # noqa: E402
from benchmarks.speed.table import Record, flag_parser, limits_line, render  # noqa: E402
from pixart_jax import cli  # noqa: E402
from pixart_jax.errors import UserError  # noqa: E402
from pixart_jax.files import cache_folder  # noqa: E402
from pixart_jax.models.attention import attention  # noqa: E402

BACKENDS = ("xla", "cudnn", "auto")
BOUND = 2e-2  # relative, root mean square, of bfloat16 beside fp32
TITLE = "Attention beside fp32"
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


def results(known: dict[str, list], q, k, v, weights, lengths, backend: str) -> list[np.ndarray]:
    """Output, and the gradients of a weighted sum of it by q, k and v. known: program → results;
    "auto" is the program of another backend, which is not compiled again."""

    def weighted(q, k, v):
        out = attention(q, k, v, lengths=lengths, backend=backend)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    gradient = jax.jit(jax.grad(weighted, argnums=(0, 1, 2), has_aux=True))
    lowered = gradient.lower(q, k, v)
    text = lowered.as_text()
    if text not in known:
        gradients, out = lowered.compile()(q, k, v)
        known[text] = [np.asarray(x, np.float64) for x in (out, *gradients)]
    return known[text]


def cells(shape: tuple[int, int, int, bool], known: dict[str, list]):
    """Yields (backend, errors of output, dq, dk and dv, remark, whether it holds). With lengths,
    they run from 1 to all keys."""
    batch, queries, keys, some = shape
    parts = jax.random.split(jax.random.key(0), 4)
    lengths = jnp.asarray(np.linspace(1, keys, batch).round(), jnp.int32) if some else None
    q, k, v, weights = (
        jax.random.normal(key, (batch, tokens, HEADS, HEAD_DIM))
        for key, tokens in zip(parts, (queries, keys, keys, queries), strict=True)
    )
    narrow = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    for backend in BACKENDS:
        errors, remark, holds = [""] * 4, "", True
        try:
            mine = results(known, *narrow, weights, lengths, backend)
            with jax.default_matmul_precision("highest"):
                wide = [x.astype(jnp.float32) for x in narrow]
                theirs = results(known, *wide, weights, lengths, "xla")
            relative = [
                np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(mine, theirs, strict=True)
            ]
            errors, holds = (
                [f"{error:.1e}" for error in relative],
                all(error < BOUND for error in relative),
            )
            remark = "" if holds else "over"
        except UserError as error:
            remark = f"left out: {error}"
        except Exception as error:
            remark, holds = f"failed: {str(error).splitlines()[0]}", False
        yield backend, errors, remark, holds


def main(argv: list[str]) -> int:
    parser = flag_parser(__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see it work")
    flags = parser.parse_args(argv)
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))
    record = Record(flags.json, argv, columns=COLUMNS, title=TITLE, cells=[])
    record.run["machine"] |= ours.described()
    held, known = True, {}
    for name, shape in (TINY if flags.tiny else SHAPES).items():
        for backend, errors, remark, holds in cells(shape, known):
            at = ", ".join(map(str, shape[:3]))
            record.run["cells"].append([name, at, backend, *errors, remark])
            record.write()
            held &= bool(holds)
    dtype = "float32" if flags.tiny else "bfloat16"
    record.run["limits"] = {dtype: {"ours": ours.limits(dtype)}}
    record.write()
    print(render(COLUMNS, record.run["cells"], TITLE))
    print(limits_line([record.run]))
    return int(not held)


if __name__ == "__main__":
    sys.exit(cli.run(main))
