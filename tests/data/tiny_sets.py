"""Small sets of real form, written on the spot: pictures, tars as img2dataset makes them, the
official layout."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import ml_dtypes
import numpy as np
from PIL import Image

from pixart_jax.data import records


def picture(seed: int = 0, height: int = 24, width: int = 40) -> np.ndarray:
    """uint8 [height, width, 3]: a gradient of a colour of its own, which codecs keep well."""
    y, x = np.mgrid[:height, :width]
    tint = np.full_like(x, np.random.default_rng(seed).integers(40, 200))
    return np.stack([x * 255 // width, y * 255 // height, tint], -1).astype(np.uint8)


def encoded(pixels: np.ndarray | Image.Image, kind: str = "PNG", **more) -> bytes:
    out = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(out, kind, **more)
    return out.getvalue()


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def captions(source) -> dict[str, dict[str, tuple[str, ...]]]:
    """Key → captions of every sample."""
    return {sample.key: dict(sample.captions) for sample in source}


def tar(path: Path, members: dict[str, bytes | str], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as out:
        for name, data in members.items():
            data = data if isinstance(data, bytes) else data.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def img2dataset(path: Path, first: int, count: int) -> Path:
    """A shard in the form that img2dataset writes: 000000000.jpg, .json, .txt."""
    members: dict[str, bytes | str] = {}
    for i in range(first, first + count):
        data = encoded(picture(i), "JPEG", quality=95)
        text, name = f"a photo number {i}", f"{i:09d}"
        said = {"caption": text, "url": f"https://example.org/{i}.jpg", "key": name, "exif": "{}"}
        said |= {"status": "success", "error_message": None, "pwatermark": i / 10}
        said |= {"width": 40, "height": 24, "original_width": 400, "original_height": 240}
        said |= {"sha256": hashlib.sha256(data).hexdigest(), "similarity": 0.3}
        members |= {f"{name}.jpg": data, f"{name}.json": json.dumps(said), f"{name}.txt": text}
    return tar(path, members)


def sam(root: Path, count: int = 3) -> Path:
    """partition/part0.txt, images/NAME.jpg, captions/NAME.txt."""
    names = [f"sa_{i:06d}" for i in range(count)]
    files: dict[str, bytes | str] = {"partition/part0.txt": "\n".join(names) + "\n"}
    for i, name in enumerate(names):
        files |= {
            f"images/{name}.jpg": encoded(picture(i), "JPEG"),
            f"captions/{name}.txt": f"a dense caption of {name}\n",
        }
    return write(root, files)


def intern(root: Path, sizes=((24, 40), (40, 24), (32, 32))) -> Path:
    """InternData/partition/data_info.json and InternImgs/, as the official training reads them.
    Returns InternData."""
    items, files = [], {}
    for i, (height, width) in enumerate(sizes):
        path = f"{i:03d}/{i:06d}.png"
        size = {"height": height, "width": width, "ratio": height / width}
        items.append({"path": path, **size, "prompt": f"prompt of {i}"})
        files[f"InternImgs/{path}"] = encoded(picture(i, height, width))
    write(root, files | {"InternData/partition/data_info.json": json.dumps(items)})
    return root / "InternData"


def shards(
    folder: Path,
    made: dict[tuple[int, int], list[tuple[dict, dict]]],
    identity: dict[str, str],
    longest: dict[str, int],
) -> Path:
    """Encoded shards and their manifest: a shard of (arrays, metadata) for each bucket."""
    folder.mkdir(exist_ok=True)
    written = []
    for number, (bucket, some) in enumerate(made.items()):
        path = folder / f"{number}.array_record"
        count = records.write_shard(path, (records.encode_record(*one) for one in some))
        size, checksum = path.stat().st_size, records.sha256(path)
        written.append(records.Shard(path.name, bucket, count, size, checksum, longest))
    records.Manifest(identity, tuple(written)).write(folder)
    return folder


def encoded_record(key: str, side: int = 4, **arrays) -> tuple[dict, dict]:
    """(arrays, metadata) of a record with one dense text of 3 tokens."""
    flat = np.zeros((side, side, 4), np.float32)
    plain = {"mean": flat, "std": flat + 1, "label": np.int64(-1), "size": np.array([32, 32], "i4")}
    text = {"text.dense.0": np.zeros((3, 16), ml_dtypes.bfloat16)}
    captions = json.dumps([f"dense {key}"])
    return plain | text | arrays, {"key": key, "captions.dense": captions}


def features(root: Path, names: dict[str, tuple[int, int]], latents: str, tokens: int = 8) -> None:
    """{name}.npz in caption_feature_wmask and {name}.npy in ``latents``, of (height, width) px."""
    texts, folder = root / "caption_feature_wmask", root / latents
    texts.mkdir(exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    for i, (name, (high, wide)) in enumerate(names.items()):
        rng = np.random.default_rng(i)
        states = rng.normal(size=(1, tokens, 16)).astype(np.float32)
        mask = (np.arange(tokens) < 1 + i % tokens).astype(np.int64)[None]
        np.savez_compressed(texts / f"{name}.npz", caption_feature=states, attention_mask=mask)
        mean, std = rng.normal(size=(2, 4, high // 8, wide // 8)).astype(np.float32)
        np.save(folder / f"{name}.npy", np.concatenate([mean, abs(std)]))
