"""encode killed at random, again and again: whether what it ends with is what one undisturbed run
makes, to the byte of every record.

    python benchmarks/encode_kills.py --kills 20              (minutes)

The real command encodes pictures cut out of scikit-image's photographs, with captions, some of them
damaged, with the shipped model's VAE and T5. It is killed (SIGKILL) at moments drawn over the whole
of its life, start included, until it has been killed so often, and then runs to its end. Prints one
JSON line; exit status 1 where a record differs, is missing or is there twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pixart_jax.data import records  # noqa: E402

WORDS = (
    "a large small red blue green circle square star left right of above below on white ground"
).split()
DAMAGED = (17, 130)  # pictures that are cut short


def write_pictures(folder: Path, count: int) -> None:
    """PNGs of several shapes, each with a caption beside it."""
    import skimage.data
    from PIL import Image

    rng = np.random.default_rng(0)
    photographs = [
        Image.fromarray(getattr(skimage.data, name)())
        for name in ("astronaut", "coffee", "chelsea", "rocket")
    ]
    folder.mkdir(parents=True)
    for index in range(count):
        size = (96, 96), (144, 96), (96, 150)
        width, height = size[index % 3]
        whole = photographs[index % len(photographs)]
        left, top = rng.integers(0, whole.size[0] - width), rng.integers(0, whole.size[1] - height)
        path = folder / f"{index:04d}.png"
        whole.crop((left, top, left + width, top + height)).save(path)
        if index in DAMAGED:
            path.write_bytes(path.read_bytes()[:1000])
        path.with_suffix(".txt").write_text(
            " ".join(rng.choice(WORDS, int(rng.integers(1, 30)))), encoding="utf-8"
        )


def start(pictures: Path, out: Path, shard_size: int) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "pixart_jax",
        "encode",
        "--source",
        str(pictures),
        "--captions",
        "caption",
        "--out",
        str(out),
    ]
    command += [
        "--buckets",
        "64x64,64x96,96x64",
        "--batch-size",
        "8",
        "--shard-size",
        str(shard_size),
        "--flip",
    ]
    log = open(out.with_name(f"{out.name}.log"), "a")
    return subprocess.Popen(
        [*command, "--model", str(ROOT / "assets" / "shapes")], cwd=ROOT, stdout=log, stderr=log
    )


def held(folder: Path) -> dict[str, bytes]:
    """'shard, place' → the bytes of every record; and the manifest's account of the shards."""
    stored = records.Records(folder)
    found = {
        ", ".join(map(str, stored.shard_of(index))): stored.bytes(index)
        for index in range(len(stored))
    }
    keys = [records.decode_record(record, ())[1]["key"] for record in found.values()]
    if len(set(keys)) != len(keys):
        raise SystemExit(f"{folder}: a sample is there twice")
    manifest = json.loads((folder / records.MANIFEST).read_text())
    return found | {"manifest": json.dumps([manifest["shards"], manifest["identity"]]).encode()}


def ended(process: subprocess.Popen, out: Path) -> None:
    if process.wait(1800):
        raise SystemExit(out.with_name(f"{out.name}.log").read_text()[-3000:])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=900)
    parser.add_argument("--shard-size", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    drawn, begun = random.Random(arguments.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        pictures, whole, killed = (
            Path(folder) / "pictures",
            Path(folder) / "whole",
            Path(folder) / "killed",
        )
        write_pictures(pictures, arguments.pictures)
        ended(start(pictures, whole, arguments.shard_size), whole)
        expected = held(whole)
        kills, moments = 0, {"before the first shard": 0, "between or within shards": 0}
        while kills < arguments.kills:
            process, before = (
                start(pictures, killed, arguments.shard_size),
                len(list(killed.glob("*.array_record"))),
            )
            working = drawn.random() < 0.8  # else wherever in its start it may be
            if working:
                while process.poll() is None and len(list(killed.glob("*.array_record"))) == before:
                    time.sleep(0.01)
            time.sleep(drawn.random() * (0.3 if working else 6))
            if process.poll() is not None:
                break  # it came to its end: there is nothing left to be killed in
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            made = len(list(killed.glob("*.array_record"))) - before
            moments["between or within shards" if made else "before the first shard"] += 1
            print(
                f"kill {kills}: {made} shards made since the one before, {before + made} in all",
                file=sys.stderr,
                flush=True,
            )
        ended(start(pictures, killed, arguments.shard_size), killed)
        found = held(killed)
        left = [
            path.name
            for path in killed.iterdir()
            if path.name not in {p.name for p in whole.iterdir()}
        ]
    same = sum(found.get(name) == value for name, value in expected.items())
    result = {
        "kills": kills,
        **moments,
        "records": len(expected) - 1,
        "left_out": len(DAMAGED),
        "equal": found == expected,
    }
    result |= {
        "equal_entries": same,
        "files_left_over": left,
        "seconds": round(time.monotonic() - begun),
    }
    print(json.dumps(result))
    return 0 if found == expected and kills == arguments.kills and not left else 1


if __name__ == "__main__":
    sys.exit(main())
