"""Opening full-size weights: time and peak memory, beside diffusers and transformers on the same
files.

    python benchmarks/load.py --repeat 2 --out load.json      (XL/2 and T5-XXL: 40 GB of disk)
    python benchmarks/load.py --only xl2                      (6 GB of disk)

The files have the released form, fp32 safetensors, and random parameters. Every opening is a
process of its own. Measured are: seconds until the call returns; seconds until one byte of every
page of every parameter has been read, which shows what a lazily mapped file costs; the peak of
resident memory over what the process held before, mapped files included; and, of XL/2 in another
process, seconds until the first forward pass at 256 px, batch 1, has given its output, with the
program from the compilation cache. "plain" opens the files; "keeping" also writes the converted
weights (cache=), once; "kept" opens those. cold: the files are dropped from the page cache before
each opening. T5-XXL's files are larger than many a machine's memory, so they are opened cold only.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.speed import machine  # noqa: E402
from benchmarks.speed.contest import tell  # noqa: E402
from benchmarks.speed.table import table  # noqa: E402
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
COLUMNS = (
    "model",
    "asked dtype",
    "files",
    "opened by",
    "seconds",
    "… and read",
    "first output",
    "peak GB",
    "× parameters",
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


def open_ours(folder: str, dtype: str, first: bool, cache: str | None) -> dict:
    import jax
    import jax.numpy as jnp

    from pixart_jax import load_component

    jnp.zeros(1).block_until_ready()

    def forward(part) -> None:
        latents, states = np.ones((1, 32, 32, 4), "f"), np.full((1, 120, 4096), 0.01, "f")
        np.asarray(part.apply(latents, np.full(1, 500, "f"), states, np.full(1, 100, np.int32)))

    return measured(
        lambda: load_component(folder, dtype=dtype, cache=cache),
        lambda part: [np.asarray(leaf) for leaf in jax.tree.leaves(part.params)],
        forward if first else None,
    )


def open_peer(folder: str, dtype: str, first: bool, library: str, name: str) -> dict:
    import torch

    kind, torch_dtype = getattr(importlib.import_module(library), name), getattr(torch, dtype)

    def forward(part) -> None:
        latents = torch.ones(1, 4, 32, 32, dtype=torch_dtype)
        states = torch.full((1, 120, 4096), 0.01, dtype=torch_dtype)
        mask = torch.cat([torch.ones(1, 100), torch.zeros(1, 20)], 1).to(torch_dtype)
        more = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        with torch.no_grad():
            out = part(latents, states, torch.full((1,), 500), encoder_attention_mask=mask, **more)
            out.sample.float().numpy()

    return measured(
        lambda: kind.from_pretrained(folder, torch_dtype=torch_dtype),
        lambda part: [p.detach().view(-1).view(torch.uint8).numpy() for p in part.parameters()],
        forward if first else None,
    )


def measured(open_it: Callable, arrays: Callable, forward: Callable | None) -> dict:
    """{'first'}, or {'opened', 'read', 'peak', 'held'}: seconds and bytes."""
    machine.reset_peak()
    before, begun = machine.resident_bytes(), time.perf_counter()
    part = open_it()
    if forward:
        forward(part)
        return {"first": time.perf_counter() - begun}
    opened, held = time.perf_counter() - begun, 0
    for array in arrays(part):
        array.reshape(-1).view(np.uint8)[::4096].sum()
        held += array.nbytes
    read = time.perf_counter() - begun
    return {"opened": opened, "read": read, "peak": machine.peak_bytes() - before, "held": held}


# ---- the run ----


def run(function: Callable, *arguments) -> dict:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(model: str, dtype: str, warm: bool, root: Path, repeat: int) -> list[dict]:
    """A row a way of opening: the fastest of the repeats, and the highest peak."""
    library, name = PEERS[model]
    folder, kept = root / model, root / f"{model}-kept"
    if not folder.is_dir():
        tell(f"writing {folder}")
        write_random(model, folder)
    ways = {
        library: (open_peer, library, name),
        "plain": (open_ours, None),
        "keeping": (open_ours, str(kept)),
        "kept": (open_ours, str(kept)),
    }
    found: dict[str, list[dict]] = {way: [] for way in ways}
    if model == "xl2":
        run(open_ours, str(folder), dtype, True, None)  # fills the compilation cache
    for _ in range(repeat):
        shutil.rmtree(kept, ignore_errors=True)
        for way, (function, *more) in ways.items():
            firsts = [False, True] if model == "xl2" and way != "keeping" else [False]
            figures: dict[str, float] = {}
            for first in firsts:
                if way != "kept":
                    machine.set_cached(folder, warm)
                figures |= run(function, str(folder), dtype, first, *more)
            found[way].append(figures)
    shutil.rmtree(kept, ignore_errors=True)
    rows = []
    for way, runs in found.items():
        row = {key: min(each[key] for each in runs) for key in runs[0]}
        row |= {"peak": max(each["peak"] for each in runs)}
        cache = "warm" if warm else "cold"
        rows.append({"model": model, "dtype": dtype, "page_cache": cache, "opened_by": way, **row})
        tell(" | ".join(cells(rows[-1])))
    return rows


def cells(row: dict) -> list[str]:
    names = [row[name] for name in ("model", "dtype", "page_cache", "opened_by")]
    first = f"{row['first']:.2f}" if "first" in row else ""
    size = [f"{row['peak'] / 1e9:.2f}", f"{row['peak'] / row['held']:.2f}"]
    return [*names, f"{row['opened']:.2f}", f"{row['read']:.2f}", first, *size]


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--only", choices=PEERS, nargs="+", default=list(PEERS))
    parser.add_argument(
        "--folder", type=Path, help="for the files, which stay; else a temporary one"
    )
    parser.add_argument("--repeat", type=int, default=1, help="openings of each kind")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="load.") as temporary:
        root = flags.folder or Path(temporary)
        os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(temporary) / "programs")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
        rows = []
        for model, dtype, warm in CASES:
            if model in flags.only:
                rows += measure(model, dtype, warm, root, flags.repeat)
    print(table(COLUMNS, [cells(row) for row in rows]))
    if flags.out:
        write_json(flags.out, {"machine": machine.described(), "rows": rows})


if __name__ == "__main__":
    main()
