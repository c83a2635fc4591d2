"""Samples a second that reach the training loop, beside torch's DataLoader on the same files.

    python benchmarks/loader.py --out loader.json             (4 GB of disk and of memory; minutes)
    python benchmarks/loader.py --records 400 --repeat 1      (a rehearsal)
    python benchmarks/loader.py --s3 --records 1000           (local files beside an s3:// bucket)

*encoded*: records as `encode` writes them at 256 px with T5-XXL: a posterior of 32×32×4 (mean and
std, fp32) and 120 tokens of 4096 bfloat16 values, 1.05 MB each. *jpeg*: photographs of scikit-image
with a short side of 512 px, decoded, resized and cropped to 256 px, as the autoencoder's stage
reads them. The peer is a torch Dataset over the same bytes, read, decoded and resized by the same
functions, behind DataLoader with 0, 1 and 2 worker processes, of which the best counts. Both load
the same samples in the same batches and read ahead by the same number of batches; the first batches
are compared. With --s3 the peer is the same loader on the same shards in an emulated bucket on
loopback (moto), in the same order (--window): "staged" once all are on the disk, "fetched" from the
first, while they come. Every measurement is a process of its own, in turn; the clock starts when
the first batch has come, so that the start of workers is not counted. The figures are medians of
the repeats; exit status 1 where the peer is faster, or "staged" below 0.9 of local files.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.speed import machine  # noqa: E402
from benchmarks.speed.table import flag_parser, table, tell  # noqa: E402
from pixart_jax.data import records  # noqa: E402
from pixart_jax.data.encoded import EncodedSamples  # noqa: E402
from pixart_jax.data.loader import Loader  # noqa: E402
from pixart_jax.data.samples import ImageSamples  # noqa: E402
from pixart_jax.data.sources import open_source  # noqa: E402
from pixart_jax.files import write_json  # noqa: E402
from pixart_jax.images import to_model  # noqa: E402

BUCKET, TOKENS, WIDTH = (256, 256), 120, 4096
H200 = 550  # samples/s that one trains on at 256 px
AHEAD = 4  # batches
LOADERS = ("ours", "torch 0", "torch 1", "torch 2")
CASES = (("encoded", "warm"), ("jpeg", "warm"), ("encoded", "cold"))
COLUMNS = (
    "input,files,ours 2 threads,DataLoader 0,1,2 workers,ours / best of them,"
    "ours / 550 a second,processor ms ours,best of them"
).split(",")


# ---- the data ----


def write_records(folder: Path, count: int) -> None:
    """Shards of 250 records of random values."""
    rng, shards = np.random.default_rng(0), []
    block = rng.standard_normal((TOKENS, WIDTH), np.float32).astype(ml_dtypes.bfloat16)
    caption = json.dumps(["a photograph of " + "words " * 90])

    def record(index: int) -> bytes:
        latents = rng.standard_normal((2, 32, 32, 4), np.float32)
        arrays = {
            "mean": latents[0],
            "std": abs(latents[1]),
            "label": np.int64(-1),
            "size": np.array([512, 512], np.int32),
            "fit": np.array([256, 256, 0, 0], np.int32),
            "text.dense.0": np.roll(block, index, 1),
        }
        metadata = {"key": f"r{index:06d}", "captions.dense": caption}
        return records.encode_record(arrays, metadata)

    folder.mkdir()
    for first in range(0, count, 250):
        path = folder / f"{first // 250:05d}-256x256.array_record"
        made = records.write_shard(path, map(record, range(first, min(first + 250, count))))
        about = (BUCKET, made, path.stat().st_size, records.sha256(path), {"dense": TOKENS})
        shards.append(records.Shard(path.name, *about))
    records.Manifest({"vae": "random"}, tuple(shards)).write(folder)


def write_pictures(folder: Path, count: int) -> None:
    """JPEGs cut out of photographs, their short side 512 px."""
    import skimage.data
    from PIL import Image

    rng, names = np.random.default_rng(0), ("astronaut", "coffee", "chelsea", "rocket")
    photographs = [Image.fromarray(getattr(skimage.data, name)()) for name in names]
    folder.mkdir()
    for index in range(count):
        whole = photographs[index % len(photographs)]
        height = rng.uniform(0.6, 1.0) * min(whole.size)
        width = min(height * rng.uniform(1, 1.4), whole.size[0])
        left, top = rng.uniform(0, whole.size[0] - width), rng.uniform(0, whole.size[1] - height)
        size, box = (round(512 * width / height), 512), (left, top, left + width, top + height)
        picture = whole.resize(size, Image.Resampling.BICUBIC, box)
        picture.save(folder / f"{index:05d}.jpg", quality=92)


# ---- the two loaders, each in a process of its own ----


def samples_of(case: str, folder: Path | str, window: int = 0):
    if case == "encoded":
        return EncodedSamples(folder, (("dense", 1.0),), TOKENS, window=window)
    return ImageSamples(open_source(str(folder)), [BUCKET], cache_bytes=0)


def theirs(case: str, folder: Path, order: list, workers: int) -> Iterator[dict]:
    import torch
    from torch.utils.data import DataLoader, Dataset

    class Encoded(Dataset):
        stored = None

        def __getitem__(self, index):
            if self.stored is None:  # readers are not carried into worker processes
                self.stored = records.Records(folder)
            arrays, metadata = self.stored[index]
            mean, std = (torch.from_numpy(arrays[name]) for name in ("mean", "std"))
            states = torch.from_numpy(arrays["text.dense.0"].view(np.int16)).view(torch.bfloat16)
            return {
                "mean": mean,
                "std": std,
                "text_states": torch.nn.functional.pad(states, (0, 0, 0, TOKENS - len(states))),
                "text_lengths": len(states),
                "label": int(arrays["label"]),
                "size": torch.tensor(arrays["size"].tolist(), dtype=torch.float32),
                "key": metadata["key"],
            }

    class Decoded(Dataset):
        source = open_source(str(folder))

        def __getitem__(self, index):
            sample = self.source[index]
            pixels = torch.from_numpy(to_model(sample.fitted(BUCKET)))
            return {"images": pixels, "key": sample.key}

    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    data = Encoded() if case == "encoded" else Decoded()
    how: dict = {"batch_sampler": order, "num_workers": workers}
    if workers:
        how |= {"prefetch_factor": max(1, AHEAD // workers), "multiprocessing_context": "fork"}
    return iter(DataLoader(data, **how))


def measure(
    case: str, loader: str, folder: Path | str, batch: int, batches: int, window: int = 0
) -> dict:
    """Samples a second of a loader, processor seconds a sample, and a digest of its first batch."""
    begun = time.perf_counter()
    samples, how = samples_of(case, folder, window), {"workers": 2}
    made = Loader(samples, batch_size=batch, seed=0, window=window, **how)
    if loader == "ours":
        found = itertools.islice(made.iterator(), batches)
    else:
        order = [made.plan.batch(step).indices.tolist() for step in range(batches)]
        found = theirs(case, folder, order, int(loader.split()[1]))
    one = next(found)
    start = time.perf_counter()
    array = one["text_states" if case == "encoded" else "images"]
    if loader != "ours":
        import torch

        array = (array.view(torch.int16) if case == "encoded" else array).numpy()
    digest = hashlib.sha256(np.ascontiguousarray(array).view(np.uint8)).hexdigest()
    first = [list(map(str, one["key"])), digest, list(array.shape)]
    del one, array
    before = processor_seconds()
    count = sum(len(each["key"]) for each in found)
    seconds = time.perf_counter() - start
    del found  # worker processes count when they have ended
    cpu = (processor_seconds() - before) / count
    return {"rate": count / seconds, "cpu": cpu, "first_batch": start - begun, "first": first}


def processor_seconds() -> float:
    """Of this process and its ended children."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(each)[:2]) for each in who)


# ---- the run ----


def compare(case: str, cache: str, folder: Path, flags) -> dict:
    """A row: the loaders in turn, each time in the other order."""
    found: dict[str, list[dict]] = {loader: [] for loader in LOADERS}
    for number in range(flags.repeat if cache == "warm" else max(1, flags.repeat // 2)):
        for loader in LOADERS if number % 2 == 0 else LOADERS[::-1]:
            machine.set_cached(folder, cache == "warm")
            asked = (case, loader, folder, flags.batch, flags.batches)
            found[loader].append(machine.in_process(measure, *asked))
            tell(f"{case}, {cache}, {loader}: {found[loader][-1]['rate']:.0f}/s")
    if len({json.dumps(each["first"]) for runs in found.values() for each in runs}) != 1:
        raise SystemExit(f"{case}: the loaders did not give the same batch")

    def medians(name: str) -> dict[str, float]:
        return {one: statistics.median(each[name] for each in runs) for one, runs in found.items()}

    rates = medians("rate")
    best = max(LOADERS[1:], key=rates.__getitem__)
    ratios = {"over_peer": rates["ours"] / rates[best], "over_h200": rates["ours"] / H200}
    every = {loader: [each["rate"] for each in runs] for loader, runs in found.items()}
    row = {"case": case, "cache": cache, "per_second": rates, "best_peer": best, **ratios}
    return row | {"cpu_seconds_each": medians("cpu"), "all": every}


def compare_bucket(folder: Path, cache: Path, flags) -> dict:
    """Local shards beside those of a bucket, in turn, each time in the other order."""
    import botocore.session
    from moto.server import ThreadedMotoServer

    from pixart_jax import files

    logging.getLogger("werkzeug").setLevel("ERROR")  # a line a request
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    os.environ |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_REGION": "us-east-1"}
    os.environ["AWS_ENDPOINT_URL"] = "http://{}:{}".format(*server.get_host_and_port())
    botocore.session.get_session().create_client("s3").create_bucket(Bucket="bucket")
    files.upload(folder, address := "s3://bucket/set", last=records.MANIFEST)
    places = {"local": folder, "staged": address, "fetched": address}
    found: dict[str, list[dict]] = {name: [] for name in places}

    def run(name: str, kept: Path, batches: int) -> dict:
        os.environ["PIXART_JAX_CACHE"] = str(kept)
        machine.set_cached(folder, True)
        asked = ("encoded", "ours", places[name], flags.batch, batches, flags.window)
        return machine.in_process(measure, *asked)

    run("staged", cache, flags.records // flags.batch + 1)  # an epoch, which fetches all
    for number in range(flags.repeat):
        for name in places if number % 2 == 0 else [*places][::-1]:
            kept = cache / f"empty-{number}" if name == "fetched" else cache
            found[name].append(run(name, kept, flags.batches))
            tell(f"{name}: {found[name][-1]['rate']:.0f}/s")
        shutil.rmtree(cache / f"empty-{number}", ignore_errors=True)
    server.stop()
    if len({json.dumps(each["first"]) for runs in found.values() for each in runs}) != 1:
        raise SystemExit("the loaders did not give the same batch")
    rates, waits = (
        {name: statistics.median(run[field] for run in runs) for name, runs in found.items()}
        for field in ("rate", "first_batch")
    )
    ratios = {f"{name}_over_local": rates[name] / rates["local"] for name in ("staged", "fetched")}
    every = {name: [run["rate"] for run in runs] for name, runs in found.items()}
    return {"per_second": rates, **ratios, "seconds_to_first_batch": waits, "all": every}


def cells(row: dict) -> list[str]:
    cpu = [row["cpu_seconds_each"][loader] for loader in ("ours", row["best_peer"])]
    return [
        row["case"],
        row["cache"],
        *(f"{row['per_second'][loader]:.0f}" for loader in LOADERS),
        f"{row['over_peer']:.2f}",
        f"{row['over_h200']:.2f}",
        *(f"{1000 * seconds:.2f}" for seconds in cpu),
    ]


def main() -> int:
    parser = flag_parser(__doc__)
    parser.add_argument("--records", type=int, default=3000, help="encoded records, 1.05 MB each")
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=40, help="of one measurement")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--s3", action="store_true", help="local files beside a bucket's")
    parser.add_argument("--window", type=int, default=2, help="of --s3: data.shuffle_shards")
    parser.add_argument("--folder", type=Path, help="for the data, which is deleted afterwards")
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    flags = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory(dir=flags.folder) as temporary:
        folders = {"encoded": Path(temporary, "records"), "jpeg": Path(temporary, "pictures")}
        write_records(folders["encoded"], flags.records)
        if flags.s3:
            row = compare_bucket(folders["encoded"], Path(temporary, "cache"), flags)
            print(json.dumps(row, indent=1))
            if flags.out:
                write_json(flags.out, row | {"machine": machine.described()}, indent=1)
            return int(row["staged_over_local"] < 0.9)
        write_pictures(folders["jpeg"], flags.pictures)
        load = os.getloadavg()[0]
        rows = [compare(case, cache, folders[case], flags) for case, cache in CASES]
    print(table(COLUMNS, [cells(row) for row in rows]))
    if flags.out:
        settings = {k: v for k, v in vars(flags).items() if isinstance(v, int)}
        about = {"machine": machine.described(), "load_before": load}
        write_json(flags.out, {"rows": rows, **settings, **about}, indent=1)
    return int(any(row["over_peer"] < 1 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
