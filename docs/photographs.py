"""Write real photographs in the three layouts of the recipes' data: python docs/photographs.py OUT.

The photographs are in the packages scikit-image and scikit-learn (pip install scikit-image
scikit-learn). Each image is a random crop with two captions written for this page: a short one, as
on the web, and a dense one, as from a vision-language model.

    OUT/tfds/downloads/manual    stage 1: ImageNet's two archives (TFDS_DATA_DIR=OUT/tfds)
    OUT/sam                      stage 2: partition/*.txt and images/*.jpg, without captions
    OUT/web/{00000..00002}.tar   stage 3: webdataset tars of many aspect ratios
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CAPTIONS = {  # name: (the nearest ImageNet class, short caption, dense caption)
    "astronaut": (
        "n04266014",
        "portrait of an astronaut",
        "A smiling woman with short dark hair sits in an orange space suit in front of an "
        "American flag and a model of a space shuttle; a bright studio portrait.",
    ),
    "chelsea": (
        "n02123045",
        "a ginger cat",
        "A close view of a ginger tabby cat with green eyes and white whiskers that looks past "
        "the camera, its fur sharp in soft light; a photograph.",
    ),
    "coffee": (
        "n07920052",
        "cup of coffee on a table",
        "A white cup of dark coffee stands on a saucer with a spoon on a brown wooden table, seen "
        "from above in warm light; a photograph.",
    ),
    "rocket": (
        "n04008634",
        "a rocket on its launch pad",
        "A tall white rocket stands upright on its launch pad beside a steel tower under a wide "
        "evening sky with thin clouds; a photograph.",
    ),
    "hubble_deep_field": (
        "n04044716",
        "galaxies in the deep field",
        "Hundreds of small galaxies and a few bright stars, yellow, blue and red, lie scattered "
        "over a black sky; an image of a space telescope.",
    ),
    "retina": (
        "n03249569",
        "retina of an eye",
        "A round orange retina with a bright spot and a tree of dark red vessels lies on a black "
        "ground; a medical photograph.",
    ),
    "motorcycle_left": (
        "n03791053",
        "motorcycle in a garage",
        "A red motorcycle stands on the floor of a workshop among tools, boxes and a shelf, lit "
        "by daylight from the side; a photograph.",
    ),
    "ihc": (
        "n03733281",
        "stained tissue",
        "Pale tissue with round blue nuclei and brown stains in a lace of thin walls fills the "
        "frame; an image of a microscope.",
    ),
    "moon": (
        "n09193705",
        "surface of the moon",
        "Craters of many sizes cover a gray plain, each with a bright rim and a dark shadow on "
        "one side; a black and white photograph.",
    ),
    "camera": (
        "n04485082",
        "man with a camera",
        "A man in a dark coat looks into a camera on a tripod on a meadow, tall buildings in the "
        "haze behind him; a black and white photograph.",
    ),
    "coins": (
        "n03908714",
        "ancient coins",
        "Rows of worn ancient coins with faces and figures on them lie on a gray cloth; a black "
        "and white photograph from above.",
    ),
    "brick": (
        "n04326547",
        "a brick wall",
        "A wall of rough bricks in even rows with pale mortar between them fills the whole frame; "
        "a gray texture.",
    ),
    "grass": (
        "n12144580",
        "grass",
        "Thin blades of grass cross each other in every direction and fill the whole frame "
        "without a horizon; a gray texture.",
    ),
    "gravel": (
        "n09428293",
        "gravel",
        "Small round pebbles of many sizes lie close together and cast short shadows; a gray "
        "texture of gravel.",
    ),
    "china": (
        "n03781244",
        "chinese palace",
        "A Chinese palace with a curved roof, red columns and carved stone stairs stands behind "
        "green trees under a pale sky; a photograph.",
    ),
    "flower": (
        "n11939491",
        "a red flower",
        "A large orange and red flower with pointed petals opens in front of dark green leaves; a "
        "close photograph with a soft ground.",
    ),
}


def photographs() -> dict[str, np.ndarray]:
    """Return the photographs by name, uint8 [h, w, 3] or [h, w]."""
    import skimage
    import sklearn.datasets

    folders = [
        Path(skimage.__file__).parent / "data",
        Path(sklearn.datasets.__file__).parent / "images",
    ]
    files = {
        path.stem: path
        for folder in folders
        for path in folder.iterdir()
        if path.suffix in (".png", ".jpg")
    }
    return {name: np.asarray(Image.open(files[name])) for name in CAPTIONS}


def crops(
    pictures: dict[str, np.ndarray],
    count: int,
    seed: int,
    ratios: tuple[float, float],
    longest: int = 384,
):
    """Yield ``count`` crops: (name, JPEG, (height, width)), with height / width in ``ratios``."""
    random, names = np.random.default_rng(seed), list(pictures)
    for number in range(count):
        name = names[number % len(names)]
        picture = pictures[name]
        ratio = np.exp(random.uniform(*np.log(ratios)))
        height, width = picture.shape[:2]
        tallest = min(height, width * ratio)  # of a crop with this ratio
        tall = tallest * random.uniform(0.6, 1.0)
        tall, wide = max(1, round(tall)), max(1, round(tall / ratio))
        top, left = random.integers(0, height - tall + 1), random.integers(0, width - wide + 1)
        crop = Image.fromarray(picture[top : top + tall, left : left + wide])
        if random.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if max(crop.size) > longest:
            crop.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        data = io.BytesIO()
        crop.save(data, "JPEG", quality=92)
        yield name, data.getvalue(), crop.size[::-1]


def write_imagenet(pictures, count: int, folder: Path) -> None:
    """Write ImageNet's two archives: a tar of one tar per class, and a tar of validation images."""
    folder.mkdir(parents=True)
    classes: dict[str, list[tuple[str, bytes]]] = {}
    for number, (name, data, _) in enumerate(crops(pictures, count, 0, (0.6, 1.6))):
        wordnet = CAPTIONS[name][0]
        classes.setdefault(wordnet, []).append((f"{wordnet}_{number}.JPEG", data))
    inner = {f"{wordnet}.tar": _tar(files) for wordnet, files in classes.items()}
    (folder / "ILSVRC2012_img_train.tar").write_bytes(_tar(inner.items()))
    held = crops(pictures, 10, 1, (0.6, 1.6))
    (folder / "ILSVRC2012_img_val.tar").write_bytes(
        _tar((f"ILSVRC2012_val_{n:08d}.JPEG", data) for n, (_, data, _) in enumerate(held, 1))
    )


def _tar(files) -> bytes:
    """Return a tar of the (name, content) pairs."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def write_sam(pictures, count: int, folder: Path) -> None:
    """Write images/ and partition/part0.txt, which lists them; SAM has no captions."""
    for name in ("partition", "images"):
        (folder / name).mkdir(parents=True)
    stems = []
    for number, (_, data, _) in enumerate(crops(pictures, count, 2, (0.7, 1.5))):
        stems.append(f"sa_{number:06d}")
        (folder / "images" / f"{stems[-1]}.jpg").write_bytes(data)
    (folder / "partition" / "part0.txt").write_text("".join(f"{stem}\n" for stem in stems))


def write_web(pictures, count: int, folder: Path, shard: int = 100) -> None:
    """Write tars of KEY.jpg, KEY.txt, KEY.dense.txt and KEY.json."""
    folder.mkdir(parents=True)
    made = list(crops(pictures, count, 3, (0.3, 3.3)))
    for first in range(0, count, shard):
        files = []
        for number, (name, data, (height, width)) in enumerate(made[first : first + shard]):
            key, (_, short, dense) = f"{first // shard:05d}{number:04d}", CAPTIONS[name]
            about = {
                "caption": short,
                "url": f"photographs/{name}",
                "key": key,
                "status": "success",
                "width": width,
                "height": height,
            }
            members = {
                "jpg": data,
                "txt": short.encode(),
                "dense.txt": dense.encode(),
                "json": json.dumps(about).encode(),
            }
            files += [(f"{key}.{kind}", content) for kind, content in members.items()]
        (folder / f"{first // shard:05d}.tar").write_bytes(_tar(files))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--pictures", type=int, default=240, help="images in each layout")
    arguments = parser.parse_args()
    if arguments.out.exists():
        raise SystemExit(f"error: {arguments.out} exists; choose a new folder")
    pictures = photographs()
    write_imagenet(pictures, arguments.pictures, arguments.out / "tfds" / "downloads" / "manual")
    write_sam(pictures, arguments.pictures, arguments.out / "sam")
    write_web(pictures, arguments.pictures, arguments.out / "web")
    print(
        f"{arguments.pictures} crops of {len(pictures)} photographs in each of "
        f"{arguments.out}/tfds, /sam and /web"
    )


if __name__ == "__main__":
    main()
