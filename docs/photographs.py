"""Write real photographs in the three layouts of the recipes' data: python docs/photographs.py OUT.

The photographs are in the packages scikit-image and scikit-learn (pip install scikit-image
scikit-learn). Each image is a random crop with the two captions of photographs.jsonl: a short one,
as on the web, and a dense one, as from a vision-language model.

    OUT/tfds/downloads/manual    stage 1: ImageNet's two archives (TFDS_DATA_DIR=OUT/tfds)
    OUT/sam                      stage 2: partition/*.txt and images/*.jpg, without captions
    OUT/web/{00000..00002}.tar   stage 3: webdataset tars of many aspect ratios
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

ABOUT = Path(__file__).with_suffix(".jsonl")  # name, ImageNet's class, short and dense caption


def photographs() -> dict[str, dict]:
    """Name → {'image': uint8 [h, w, 3] or [h, w], 'class', 'short', 'dense'}."""
    import skimage
    import sklearn.datasets

    packages = {Path(skimage.__file__).parent: "data"}
    packages[Path(sklearn.datasets.__file__).parent] = "images"
    files = {
        path.stem: path
        for package, folder in packages.items()
        for path in (package / folder).iterdir()
        if path.suffix in (".png", ".jpg")
    }
    rows = [json.loads(line) for line in ABOUT.read_text(encoding="utf-8").splitlines()]
    return {
        row["name"]: row | {"image": np.asarray(Image.open(files[row["name"]]))} for row in rows
    }


def crops(
    pictures: dict[str, dict], count: int, seed: int, ratios: tuple[float, float]
) -> Iterator[tuple[dict, bytes, tuple[int, int]]]:
    """(photograph, JPEG bytes, (height, width)) of ``count`` crops of at most 384 px; height /
    width between ``ratios``."""
    random, names = np.random.default_rng(seed), list(pictures)
    for number in range(count):
        photograph = pictures[names[number % len(names)]]
        image = photograph["image"]
        ratio = np.exp(random.uniform(*np.log(ratios)))
        height, width = image.shape[:2]
        whole = min(height, width * ratio)  # the tallest crop of this ratio
        tall = whole * random.uniform(0.6, 1.0)
        tall, wide = max(1, round(tall)), max(1, round(tall / ratio))
        top, left = random.integers(0, height - tall + 1), random.integers(0, width - wide + 1)
        crop = Image.fromarray(image[top : top + tall, left : left + wide])
        if random.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if max(crop.size) > 384:
            crop.thumbnail((384, 384), Image.Resampling.LANCZOS)
        data = io.BytesIO()
        crop.save(data, "JPEG", quality=92)
        yield photograph, data.getvalue(), crop.size[::-1]


def write_imagenet(pictures, count: int, folder: Path) -> None:
    """The two archives of ImageNet as downloaded: a tar of a tar each class, and a tar of
    validation images."""
    folder.mkdir(parents=True)
    classes: dict[str, list[tuple[str, bytes]]] = {}
    for number, (photograph, data, _) in enumerate(crops(pictures, count, 0, (0.6, 1.6))):
        name = photograph["class"]
        classes.setdefault(name, []).append((f"{name}_{number}.JPEG", data))
    inner = [(f"{name}.tar", tar(files)) for name, files in classes.items()]
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar(inner))
    held = enumerate(crops(pictures, 10, 1, (0.6, 1.6)), 1)
    files = ((f"ILSVRC2012_val_{n:08d}.JPEG", data) for n, (_, data, _) in held)
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar(files))


def tar(files: Iterable[tuple[str, bytes]]) -> bytes:
    """(name, bytes) … as the bytes of a tar."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def write_sam(pictures, count: int, folder: Path) -> None:
    """partition/part0.txt names the files of images/. SAM has no captions."""
    for name in ("partition", "images"):
        (folder / name).mkdir(parents=True)
    stems = [f"sa_{number:06d}" for number in range(count)]
    for stem, (_, data, _) in zip(stems, crops(pictures, count, 2, (0.7, 1.5))):
        (folder / "images" / f"{stem}.jpg").write_bytes(data)
    (folder / "partition" / "part0.txt").write_text("".join(f"{stem}\n" for stem in stems))


def write_web(pictures, count: int, folder: Path, shard: int = 100) -> None:
    """Tars of KEY.jpg, KEY.txt, KEY.dense.txt and KEY.json."""
    folder.mkdir(parents=True)
    made = list(crops(pictures, count, 3, (0.3, 3.3)))
    for first in range(0, count, shard):
        files = []
        for number, (photograph, data, (height, width)) in enumerate(made[first : first + shard]):
            key, short = f"{first // shard:05d}{number:04d}", photograph["short"]
            about = {"caption": short, "url": f"photographs/{photograph['name']}", "key": key}
            about |= {"status": "success", "width": width, "height": height}
            texts = {"txt": short, "dense.txt": photograph["dense"], "json": json.dumps(about)}
            files.append((f"{key}.jpg", data))
            files += [(f"{key}.{kind}", text.encode()) for kind, text in texts.items()]
        (folder / f"{first // shard:05d}.tar").write_bytes(tar(files))


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pictures", type=int, default=240, help="in each of the three")
    flags = parser.parse_args()
    if flags.out.exists():
        raise SystemExit(f"error: {flags.out} exists already; name a new folder")
    pictures, count = photographs(), flags.pictures
    write_imagenet(pictures, count, flags.out / "tfds" / "downloads" / "manual")
    write_sam(pictures, count, flags.out / "sam")
    write_web(pictures, count, flags.out / "web")
    print(
        f"{count} crops of {len(pictures)} photographs in each of {flags.out}/tfds, /sam and /web"
    )


if __name__ == "__main__":
    main()
