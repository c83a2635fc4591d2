"""Opening full-size weights: time and peak memory, beside diffusers and transformers on the same
files.

    python benchmarks/load.py --out docs/load.json            (XL/2 and T5-XXL; about 40 GB of disk,
    16 GB of memory)
    python benchmarks/load.py --only xl2                      (6 GB of disk)

Files of the released form are written with random numbers: XL/2 as one fp32 safetensors file,
T5-XXL as the two fp32 shards that PixArt's folders hold. Every opening is a process of its own. Of
each: seconds until the call returns; seconds until one number of every page of every parameter has
been read, which makes a lazily mapped file show what it costs; the peak of resident memory over
what the process held before, by Linux's account (VmHWM, pages of mapped files counted in); and, of
XL/2 in a process of its own, seconds until the first forward pass at 256 px, batch 1, has given its
output: tracing is counted in, and so is fetching the program from the compilation cache, which one
opening before has filled. "plain" opens the files; "keeping" also writes the converted weights
(cache=), once; "kept" opens those. cold: the files are put out of the page cache before each
opening; warm: they lie in it, as kept weights always do here. T5-XXL's files are larger than many a
machine's memory, so they are opened cold alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SUBJECTS = {
    "xl2": ("transformer", "diffusers", "PixArtTransformer2DModel"),
    "t5xxl": ("text_encoder", "transformers", "T5EncoderModel"),
}
CASES = {
    "xl2": (("float32", "warm"), ("bfloat16", "warm"), ("float32", "cold"), ("bfloat16", "cold")),
    "t5xxl": (("bfloat16", "cold"),),
}  # (dtype, page cache)
SHARD = 9_990_000_000  # bytes, as released

MEASURE = """
import json, sys, time
def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
def measured(open_it, leaves, touch, forward):
    if forward:
        start = time.perf_counter()
        forward(open_it())
        print(json.dumps({"seconds_first": time.perf_counter() - start}))
        return
    before = status("VmRSS:")
    open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
    start = time.perf_counter()
    part = open_it()
    opened = time.perf_counter() - start
    for leaf in leaves(part):
        touch(leaf)
    read = time.perf_counter() - start
    held = sum(leaf.nbytes for leaf in leaves(part))
    print(json.dumps({"seconds": opened, "seconds_read": read, "peak": status("VmHWM:") - before, "held": held}))
"""  # noqa: E501
OURS = (
    MEASURE
    + """
import jax, jax.numpy as jnp, numpy as np
from pixart_jax import load_component
folder, dtype, first, cache = sys.argv[1:]
jnp.zeros(1).block_until_ready()
def forward(part):
    latents, states = np.ones((1, 32, 32, 4), np.float32), np.full((1, 120, 4096), 0.01, np.float32)
    np.asarray(part.apply(latents, np.full(1, 500, np.float32), states, np.full(1, 100, np.int32)))
def touch(leaf):
    np.asarray(leaf).reshape(-1).view(np.uint8)[::4096].sum()
opening = lambda: load_component(folder, dtype=dtype, cache=cache or None)
measured(opening, lambda part: jax.tree.leaves(part.params), touch, first and forward)
"""
)
PEER = (
    MEASURE
    + """
import importlib, torch
folder, dtype, first, library, name = sys.argv[1:]
model, dtype = getattr(importlib.import_module(library), name), getattr(torch, dtype)
def forward(part):
    latents, states = torch.ones(1, 4, 32, 32, dtype=dtype), torch.full((1, 120, 4096), 0.01, dtype=dtype)
    mask = torch.cat([torch.ones(1, 100), torch.zeros(1, 20)], 1).to(dtype)
    sizes = {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        part(latents, states, torch.full((1,), 500), added_cond_kwargs=sizes, encoder_attention_mask=mask).sample.float().numpy()
def touch(leaf):
    leaf.detach().view(-1).view(torch.uint8)[::4096].sum()
measured(lambda: model.from_pretrained(folder, torch_dtype=dtype), lambda part: list(part.parameters()), touch, first and forward)
"""  # noqa: E501
)


def write_random(subject: str, folder: Path) -> None:
    """A folder of the released form, its numbers random; a tensor is in memory at a time."""
    import flax.linen as nn
    import jax

    from pixart_jax.models.t5 import T5Config
    from pixart_jax.models.transformer import TransformerConfig
    from pixart_jax.weights import t5, transformer
    from pixart_jax.weights.component import TextEncoder, Transformer
    from pixart_jax.weights.files import write_json, write_safetensors
    from pixart_jax.weights.table import LazyTensor, write

    kind, config = (
        (Transformer, TransformerConfig.preset("XL/2"))
        if subject == "xl2"
        else (TextEncoder, T5Config())
    )
    names = transformer if subject == "xl2" else t5
    shapes = nn.unbox(
        jax.eval_shape(kind(config, {}).module.init, jax.random.key(0), *kind._example(config))[
            "params"
        ]
    )
    shapes.pop("null_caption", None)
    block = np.random.default_rng(0).standard_normal(1 << 22, np.float32) * np.float32(0.02)

    def pending(tensor: LazyTensor) -> LazyTensor:
        def make():
            return np.resize(block, tensor.shape)

        return LazyTensor(tensor.shape, np.dtype(np.float32), make)

    tensors = {
        key: pending(tensor)
        for key, tensor in write(
            transformer.DIFFUSERS if subject == "xl2" else t5.TRANSFORMERS, shapes
        ).items()
    }
    folder.mkdir(parents=True)
    if subject == "xl2":
        write_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors)
    else:
        shards: list[dict] = [{}]
        for key, tensor in tensors.items():
            if (
                sum(math.prod(t.shape) * 4 for t in shards[-1].values())
                + math.prod(tensor.shape) * 4
                > SHARD
            ):
                shards.append({})
            shards[-1][key] = tensor
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(folder / name, shard)
            weight_map |= dict.fromkeys(shard, name)
        total = sum(math.prod(tensor.shape) * 4 for tensor in tensors.values())
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
    write_json(folder / "config.json", names.config_to_json(config))


def forget(folder: Path) -> None:
    """Put a folder's files out of the page cache."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remember(folder: Path) -> None:
    """Have a folder's files in the page cache."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            while file.read(1 << 24):
                pass


def run(code: str, *arguments: str, programs: Path) -> dict:
    root = Path(__file__).resolve().parent.parent
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    env = {
        **os.environ,
        **compiled,
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=root, env=env, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=SUBJECTS, nargs="+", default=list(SUBJECTS))
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the files go, and stay; by default a temporary folder that is deleted",
    )
    parser.add_argument(
        "--repeat",
        type=int,
        default=1,
        help="openings of each kind; the fastest counts, and the highest peak",
    )
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    flags = parser.parse_args()
    root = flags.folder or Path(tempfile.mkdtemp(prefix="load."))
    rows = []
    try:
        for subject in flags.only:
            kind, library, name = SUBJECTS[subject]
            folder = root / subject / kind
            if not folder.is_dir():
                print(f"writing {subject}: {folder}", file=sys.stderr)
                write_random(subject, folder)
            for dtype, page_cache in CASES[subject]:
                found: dict[str, list[dict]] = {library: [], "plain": [], "keeping": [], "kept": []}
                if subject == "xl2":
                    run(OURS, str(folder), dtype, "first", "", programs=root / "programs")
                for _ in range(flags.repeat):
                    kept = root / f"{subject}-kept"
                    shutil.rmtree(kept, ignore_errors=True)
                    for how in found:
                        code, last = (
                            (PEER, [library, name])
                            if how == library
                            else (OURS, ["" if how == "plain" else str(kept)])
                        )
                        first_as_well = subject == "xl2" and how != "keeping"
                        for first in ["", "first"] if first_as_well else [""]:
                            if how != "kept":
                                forget(folder) if page_cache == "cold" else remember(folder)
                            figures = run(
                                code, str(folder), dtype, first, *last, programs=root / "programs"
                            )
                            found[how].append(figures) if not first else found[how][-1].update(
                                figures
                            )
                    shutil.rmtree(kept, ignore_errors=True)
                for how, runs in found.items():
                    best = {
                        key: min(one[key] for one in runs)
                        for key in ("seconds", "seconds_read", "seconds_first")
                        if key in runs[0]
                    }
                    row = {
                        "model": subject,
                        "dtype": dtype,
                        "opened_by": how,
                        **best,
                        "peak": max(one["peak"] for one in runs),
                    }
                    rows.append({**row, "held": runs[0]["held"], "page_cache": page_cache})
                    print(line(rows[-1]), flush=True)
    finally:
        if flags.folder is None:
            shutil.rmtree(root, ignore_errors=True)
    if flags.out:
        import diffusers
        import jax
        import torch
        import transformers

        versions = {
            module.__name__: module.__version__ for module in (jax, torch, diffusers, transformers)
        }
        machine = {
            "cores": os.cpu_count(),
            "architecture": platform.machine(),
            "python": platform.python_version(),
            **versions,
        }
        flags.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


def line(row: dict) -> str:
    """A row of the table in docs/benchmarks.md."""
    first = f"{row['seconds_first']:.2f}" if "seconds_first" in row else ""
    return (
        f"| {row['model']} | {row['dtype']} | {row['page_cache']} | {row['opened_by']} | "
        f"{row['seconds']:.2f} | {row['seconds_read']:.2f} "
        f"| {first} | {row['peak'] / 1e9:.2f} | {row['peak'] / row['held']:.2f} |"
    )


if __name__ == "__main__":
    main()
