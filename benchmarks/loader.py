"""Samples a second that reach the training loop, beside torch's DataLoader on the same records and
pictures in the same run.

    python benchmarks/loader.py --out loader.json             (4 GB of disk, 4 GB of memory; minutes
    on two idle cores)
    python benchmarks/loader.py --records 400 --repeat 1      (a look)

*encoded*: records as `encode` writes them at 256 px with T5-XXL: a posterior of 32×32×4 (mean and
std, fp32) and 120 tokens of 4096 bfloat16 values, 1.05 MB each. *jpeg*: photographs of scikit-image
with a short side of 512 px, decoded, resized and cropped to 256 px, as the autoencoder's stage
reads them. The peer is a torch Dataset over the very same bytes, read, unpacked, decoded and
resized by the same functions, behind DataLoader with 0, 1 and 2 worker processes, of which the best
counts. Both are asked for the same samples in the same batches, both read ahead by the same number
of batches; the first batch is checked to be equal. Every measurement is a process of its own, ours
and the peer's in turn; the clock starts when the first batch has come, so that the start of workers
is not counted. warm: the files lie in the page cache; cold: they are put out of it first. The
figures are medians of the repeats.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pixart_jax.data import images, records
from pixart_jax.data.encoded import EncodedSamples
from pixart_jax.data.loader import Loader
from pixart_jax.data.samples import ImageSamples
from pixart_jax.data.sources import Sample

BUCKET, TOKENS, WIDTH = (256, 256), 120, 4096
H200 = 550  # samples/s that one eats at 256 px
AHEAD = 4  # batches
LOADERS = ("ours", "torch 0", "torch 1", "torch 2")
CASES = (("encoded", "warm"), ("jpeg", "warm"), ("encoded", "cold"))


# ---- the data ----


def write_records(folder: Path, count: int) -> None:
    """Shards of 250 records of random numbers."""
    rng, shards = np.random.default_rng(0), []
    block = rng.standard_normal((TOKENS, WIDTH), np.float32).astype(ml_dtypes.bfloat16)
    for first in range(0, count, 250):

        def packed(first=first):
            for index in range(first, min(first + 250, count)):
                latents = rng.standard_normal((2, 32, 32, 4), np.float32)
                arrays = {
                    "mean": latents[0],
                    "std": abs(latents[1]),
                    "label": np.int64(-1),
                    "size": np.array([512, 512], np.int32),
                }
                arrays |= {
                    "fit": np.array([256, 256, 0, 0], np.int32),
                    "text.dense.0": np.roll(block, index, 1),
                }
                yield records.encode_record(
                    arrays,
                    {
                        "key": f"r{index:06d}",
                        "captions.dense": json.dumps(["a photograph of " + "words " * 90]),
                    },
                )

        path = folder / f"{first // 250:05d}-256x256.array_record"
        made = records.write_shard(path, packed())
        shards.append(
            records.Shard(
                path.name,
                BUCKET,
                made,
                path.stat().st_size,
                records.sha256(path),
                {"dense": TOKENS},
            )
        )
    records.Manifest({"vae": "random"}, tuple(shards)).write(folder)


def write_pictures(folder: Path, count: int) -> None:
    """JPEGs cut out of photographs, their short side 512 px."""
    import skimage.data
    from PIL import Image

    rng = np.random.default_rng(0)
    photographs = [
        Image.fromarray(getattr(skimage.data, name)())
        for name in ("astronaut", "coffee", "chelsea", "rocket")
    ]
    folder.mkdir()
    for index in range(count):
        whole = photographs[index % len(photographs)]
        side = rng.uniform(0.6, 1.0) * min(whole.size)
        height, width = side, min(side * rng.uniform(1, 1.4), whole.size[0])
        left, top = rng.uniform(0, whole.size[0] - width), rng.uniform(0, whole.size[1] - height)
        picture = whole.resize(
            (round(512 * width / height), 512),
            Image.Resampling.BICUBIC,
            (left, top, left + width, top + height),
        )
        picture.save(folder / f"{index:05d}.jpg", quality=92)


class Pictures:
    """A folder of JPEGs as a source."""

    name, num_classes, caption_kinds, fingerprint = "pictures", None, (), ""

    def __init__(self, folder: Path):
        self.files = sorted(folder.glob("*.jpg"))

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.files[index].stem, self.files[index].read_bytes(), {})

    def sizes(self) -> np.ndarray:
        return np.array([images.size(file.read_bytes()) for file in self.files], np.int32)


# ---- the two loaders ----


def samples_of(case: str, folder: Path):
    if case == "encoded":
        return EncodedSamples(folder / "records", (("dense", 1.0),), TOKENS)
    return ImageSamples(Pictures(folder / "pictures"), [BUCKET], cache_bytes=0)


def ours(case: str, folder: Path, batch: int, batches: int):
    loader = Loader(samples_of(case, folder), batch_size=batch, seed=0, workers=2, prefetch=AHEAD)
    return itertools.islice(loader.iterator(), batches)


def theirs(case: str, folder: Path, batch: int, batches: int, workers: int):
    import torch
    from torch.utils.data import DataLoader, Dataset

    class Encoded(Dataset):
        def __init__(self):
            self.records = None

        def __len__(self):
            return records.Manifest.read(folder / "records").samples

        def __getitem__(self, index):
            if self.records is None:  # readers are not carried into worker processes
                self.records = records.Records(folder / "records")
            arrays, metadata = self.records[index]
            length = len(arrays["text.dense.0"])
            states = torch.frombuffer(
                arrays["text.dense.0"].view(np.int16), dtype=torch.bfloat16
            ).view(length, WIDTH)
            if length < TOKENS:
                states = torch.nn.functional.pad(states, (0, 0, 0, TOKENS - length))
            return {
                "mean": torch.frombuffer(arrays["mean"], dtype=torch.float32).view(
                    arrays["mean"].shape
                ),
                "std": torch.frombuffer(arrays["std"], dtype=torch.float32).view(
                    arrays["std"].shape
                ),
                "text_states": states,
                "text_lengths": length,
                "label": int(arrays["label"]),
                "size": torch.tensor(arrays["size"].tolist(), dtype=torch.float32),
                "key": metadata["key"],
            }

    class Raw(Dataset):
        def __init__(self):
            self.source = Pictures(folder / "pictures")

        def __len__(self):
            return len(self.source)

        def __getitem__(self, index):
            sample = self.source[index]
            return {
                "images": torch.from_numpy(images.to_model(sample.fitted(BUCKET))),
                "key": sample.key,
            }

    plan = Loader(samples_of(case, folder), batch_size=batch, seed=0).plan
    order = [plan.batch(step).indices.tolist() for step in range(batches)]
    ahead = {"prefetch_factor": max(1, AHEAD // workers)} if workers else {}
    import warnings

    warnings.filterwarnings("ignore", message="The given buffer is not writable")
    return DataLoader(
        Encoded() if case == "encoded" else Raw(), batch_sampler=order, num_workers=workers, **ahead
    )


def measure(case: str, loader: str, folder: Path, batch: int, batches: int) -> dict:
    """Samples a second of one loader, and what its first batch held."""
    if loader == "ours":
        found = iter(ours(case, folder, batch, batches))
    else:
        import torch

        found = iter(theirs(case, folder, batch, batches, int(loader.split()[1])))
    begun = time.perf_counter()
    one = next(found)
    start = time.perf_counter()
    array = one["text_states" if case == "encoded" else "images"]
    if loader != "ours":
        array = array.view(torch.int16).numpy() if case == "encoded" else array.numpy()
    first = [
        list(map(str, one["key"])),
        hashlib.sha256(np.ascontiguousarray(array).view(np.uint8)).hexdigest(),
        list(array.shape),
    ]
    del one, array
    before = _cpu()
    count = sum(len(made["key"]) for made in found)
    seconds = time.perf_counter() - start
    del found  # worker processes count when they have ended
    return {
        "per_second": count / seconds,
        "cpu_seconds_each": (_cpu() - before) / count,
        "first_batch": start - begun,
        "first": first,
    }


def _cpu() -> float:
    """Seconds of processor time that this process and its ended children have used."""
    return sum(
        sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )


# ---- the run ----


def forget(folder: Path) -> None:
    """Put the files out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remember(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                while file.read(1 << 24):
                    pass


def run(arguments: argparse.Namespace, folder: Path) -> list[dict]:
    rows = []
    for case, cache in CASES:
        where = folder / ("records" if case == "encoded" else "pictures")
        figures: dict[str, list[dict]] = {loader: [] for loader in LOADERS}
        for number in range(arguments.repeat if cache == "warm" else max(1, arguments.repeat // 2)):
            for loader in LOADERS if number % 2 == 0 else LOADERS[::-1]:
                (forget if cache == "cold" else remember)(where)
                command = [
                    sys.executable,
                    __file__,
                    "--measure",
                    case,
                    loader,
                    str(folder),
                    str(arguments.batch),
                    str(arguments.batches),
                ]
                done = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    env={**os.environ, "JAX_PLATFORMS": "cpu"},
                )
                if done.returncode:
                    raise SystemExit(f"{case} {loader}: {done.stderr[-2000:]}")
                figures[loader].append(json.loads(done.stdout.splitlines()[-1]))
                print(
                    case,
                    cache,
                    loader,
                    f"{figures[loader][-1]['per_second']:.0f}/s",
                    file=sys.stderr,
                    flush=True,
                )
        if (
            len({json.dumps(figure["first"]) for found in figures.values() for figure in found})
            != 1
        ):
            raise SystemExit(
                f"{case}: the loaders did not give the same batch: "
                f"{[found[0]['first'] for found in figures.values()]}"
            )
        medians = {
            loader: statistics.median(figure["per_second"] for figure in found)
            for loader, found in figures.items()
        }
        best = max(LOADERS[1:], key=medians.__getitem__)
        row = {
            "case": case,
            "cache": cache,
            "per_second": medians,
            "best_peer": best,
            "over_peer": medians["ours"] / medians[best],
        }
        cpu = {
            loader: statistics.median(figure["cpu_seconds_each"] for figure in found)
            for loader, found in figures.items()
        }
        every = {
            loader: [figure["per_second"] for figure in found] for loader, found in figures.items()
        }
        rows.append(
            row | {"over_h200": medians["ours"] / H200, "cpu_seconds_each": cpu, "all": every}
        )
    return rows


def table(rows: list[dict]) -> str:
    heads = (
        "input",
        "files",
        "ours, 2 threads",
        "DataLoader, 0",
        "1",
        "2 workers",
        "ours / best of them",
        "ours / 550 a second",
    )
    heads += ("processor ms, ours", "best of them")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        figures = " | ".join(f"{row['per_second'][loader]:.0f}" for loader in LOADERS)
        cpu = " | ".join(
            f"{1000 * row['cpu_seconds_each'][loader]:.2f}" for loader in ("ours", row["best_peer"])
        )
        lines.append(
            f"| {row['case']} | {row['cache']} | {figures} | {row['over_peer']:.2f} | "
            f"{row['over_h200']:.2f} | {cpu} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=3000, help="encoded records, 1.05 MB each")
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=40, help="of one measurement")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="where the data goes, for a while (a temporary folder)"
    )
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        case, loader, folder, batch, batches = arguments.measure
        print(json.dumps(measure(case, loader, Path(folder), int(batch), int(batches))))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        folder = Path(folder)
        (folder / "records").mkdir()
        write_records(folder / "records", arguments.records)
        write_pictures(folder / "pictures", arguments.pictures)
        load = os.getloadavg()[0]
        rows = run(arguments, folder)
    import torch

    settings = {
        key: getattr(arguments, key)
        for key in ("records", "pictures", "batch", "batches", "repeat")
    }
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.processor(),
        "load_before": load,
    }
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"rows": rows, **settings, **machine, **versions}, indent=1) + "\n",
            encoding="utf-8",
        )
    print(table(rows))
    slower = [row["case"] for row in rows if row["over_peer"] < 1]
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
