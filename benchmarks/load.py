"""Loading full-size weights: time and peak memory, beside diffusers and transformers on the same
files.

    python benchmarks/load.py --repeat 2 --out load.json      (XL/2 and T5-XXL: 40 GB of disk)
    python benchmarks/load.py --only xl2                      (6 GB of disk)

The files have the released form, fp32 safetensors, and random parameters. Every load is a process
of its own. Measured are: seconds until the call returns; seconds until one byte of every page of
every parameter has been read, which shows what a lazily mapped file costs; and the peak of resident
memory over what the process held before, mapped files included. "plain" loads the files, "kept" the
cache of converted weights (cache=). cold: the files are dropped from the page cache before each
load. T5-XXL's files are larger than many a machine's memory, so they are loaded cold only.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.speed import machine  # noqa: E402
from benchmarks.speed.table import flag_parser, table, tell  # noqa: E402
from pixart_jax.files import write_json  # noqa: E402

PEERS = {
    "xl2": ("diffusers", "PixArtTransformer2DModel"),
    "t5xxl": ("transformers", "T5EncoderModel"),
}
CASES = (  # (model, dtype, whether the files are in the page cache)
    *(("xl2", dtype, warm) for warm in (True, False) for dtype in ("float32", "bfloat16")),
    ("t5xxl", "bfloat16", False),
)
SHARD = 4e9  # bytes
COLUMNS = ("model,requested dtype,files,loaded by,seconds,… and read,peak GB,× parameters").split(
    ","
)


def write_random(model: str, folder: Path) -> None:
    """A folder of the released form."""
    if model == "xl2":
        from benchmarks.speed import weights
        from benchmarks.speed.cases import Case

        shutil.copytree(weights.folder_of(Case("forward", "XL/2", 256, 1, "float32")), folder)
        return
    import safetensors.numpy
    import torch
    from transformers import T5Config, T5EncoderModel

    from benchmarks.parity_rows.text_encoder import XXL

    folder.mkdir(parents=True)
    block = np.random.default_rng(0).standard_normal(1 << 22, np.float32) * np.float32(0.02)
    with torch.device("meta"):
        parameters = T5EncoderModel(T5Config(**XXL)).named_parameters()
    where, shard, number = {}, {}, 0
    left = [(name, tuple(parameter.shape)) for name, parameter in parameters]
    while left:
        name, shape = left.pop(0)
        shard[name] = np.resize(block, shape)
        if not left or sum(array.nbytes for array in shard.values()) > SHARD:
            file = f"model-{(number := number + 1):05d}.safetensors"
            safetensors.numpy.save_file(shard, folder / file)
            where |= dict.fromkeys(shard, file)
            shard.clear()
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    write_json(folder / "config.json", {"model_type": "t5", **XXL})


# ---- in a process of its own ----


def load_ours(folder: str, dtype: str, cache: str | None) -> dict:
    import jax
    import jax.numpy as jnp

    from pixart_jax import load_component

    jnp.zeros(1).block_until_ready()
    return measured(
        lambda: load_component(folder, dtype=dtype, cache=cache),
        lambda part: [np.asarray(leaf) for leaf in jax.tree.leaves(part.params)],
    )


def load_peer(folder: str, dtype: str, library: str, name: str) -> dict:
    import torch

    kind = getattr(importlib.import_module(library), name)
    return measured(
        lambda: kind.from_pretrained(folder, torch_dtype=getattr(torch, dtype)),
        lambda part: [p.detach().view(-1).view(torch.uint8).numpy() for p in part.parameters()],
    )


def measured(load: Callable, arrays: Callable) -> dict:
    """{'loaded', 'read', 'peak', 'held'}: seconds and bytes."""
    machine.reset_peak()
    before, begun, held = machine.resident_bytes(), time.perf_counter(), 0
    part = load()
    loaded = time.perf_counter() - begun
    for array in arrays(part):
        array.reshape(-1).view(np.uint8)[::4096].sum()
        held += array.nbytes
    read = time.perf_counter() - begun
    return {"loaded": loaded, "read": read, "peak": machine.peak_bytes() - before, "held": held}


# ---- the run ----


def measure(model: str, dtype: str, warm: bool, root: Path, repeat: int) -> list[dict]:
    """A row a way of loading: the fastest of the repeats, and the highest peak."""
    library, name = PEERS[model]
    folder, kept = root / model, root / f"{model}-kept"
    if not folder.is_dir():
        tell(f"writing {folder}")
        write_random(model, folder)
    ways: dict[str, tuple] = {
        library: (load_peer, library, name),
        "plain": (load_ours, None),
        "kept": (load_ours, str(kept)),
    }
    shutil.rmtree(kept, ignore_errors=True)
    machine.in_process(load_ours, str(folder), dtype, str(kept))  # writes the cache
    rows = []
    for way, (function, *more) in ways.items():
        runs = []
        for _ in range(repeat):
            machine.set_cached(kept if way == "kept" else folder, warm)
            runs.append(machine.in_process(function, str(folder), dtype, *more))
        row = {key: min(each[key] for each in runs) for key in runs[0]}
        row |= {"peak": max(each["peak"] for each in runs)}
        cache = "warm" if warm else "cold"
        rows.append({"model": model, "dtype": dtype, "page_cache": cache, "loaded_by": way, **row})
        tell(" | ".join(cells(rows[-1])))
    shutil.rmtree(kept, ignore_errors=True)
    return rows


def cells(row: dict) -> list[str]:
    names = [row[name] for name in ("model", "dtype", "page_cache", "loaded_by")]
    sizes = (row["peak"] / 1e9, row["peak"] / row["held"])
    return [*names, *(f"{figure:.2f}" for figure in (row["loaded"], row["read"], *sizes))]


def main() -> None:
    parser = flag_parser(__doc__)
    parser.add_argument("--only", choices=PEERS, nargs="+", default=list(PEERS))
    add = parser.add_argument
    add("--folder", type=Path, help="for the files, which stay; else a temporary one")
    add("--repeat", type=int, default=1, help="loads of each kind")
    add("--out", type=Path, help="a JSON file for the figures")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="load.") as temporary:
        root = flags.folder or Path(temporary)
        os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        rows = []
        for model, dtype, warm in CASES:
            if model in flags.only:
                rows += measure(model, dtype, warm, root, flags.repeat)
    print(table(COLUMNS, [cells(row) for row in rows]))
    if flags.out:
        write_json(flags.out, {"machine": machine.described(), "rows": rows})


if __name__ == "__main__":
    main()
