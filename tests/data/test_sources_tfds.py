"""Sets of tensorflow-datasets that ask for TensorFlow, built and read without it."""

from __future__ import annotations

import importlib.util
import io
import sys

import pytest
import tensorflow_datasets as tfds

from pixart_jax.data.sources import open_source
from pixart_jax.data.sources.tfds import stand_in
from pixart_jax.errors import UserError
from tests.data.tiny_sets import encoded, picture, tar

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow is installed"
)


def jpeg(seed: int) -> bytes:
    return encoded(picture(seed, 30, 40), "JPEG")


@pytest.fixture
def imagenet(tmp_path):
    """A data_dir with ImageNet's archives, of six pictures in two classes, where a person would put
    them."""
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    classes = ("n02123045", "n04266014")
    inner = [
        tar(tmp_path / f"{word}.tar", {f"{word}_{i}.JPEG": jpeg(i) for i in range(3)})
        for word in classes
    ]
    tar(manual / "ILSVRC2012_img_train.tar", {file.name: file.read_bytes() for file in inner})
    tar(manual / "ILSVRC2012_img_val.tar", {"ILSVRC2012_val_00000001.JPEG": jpeg(9)})
    return tmp_path


def test_imagenet_builds_from_its_archives_with_labels_for_stage_1(imagenet):
    source = open_source("tfds:imagenet2012", data_dir=imagenet)
    assert (len(source), source.caption_kinds) == (6, ("class",))
    assert {sample.captions["class"][0] for sample in source} == {"n02123045", "n04266014"}
    cats = [sample.label for sample in source if sample.captions["class"] == ("n02123045",)]
    assert set(cats) == {281}  # tabby, as everywhere
    assert source[0].pixels().shape == (30, 40, 3)
    assert "tensorflow" not in sys.modules


def test_coco_captions_has_every_caption_of_a_picture(tmp_path):
    """Its builder names dtypes of TensorFlow's; the pictures are written by the builder itself,
    without the download."""
    with stand_in():
        builder = tfds.builder("coco_captions", data_dir=str(tmp_path), file_format="array_record")
        pictures = (
            {
                "image": io.BytesIO(jpeg(i)),
                "image/filename": f"{i:012d}.jpg",
                "image/id": i,
                "objects": [],
                "captions": [{"text": f"caption {k} of {i}", "id": k} for k in range(5)],
            }
            for i in range(4)
        )
        builder._split_generators = lambda _: {"val": enumerate(pictures)}
        builder.download_and_prepare()
    source = open_source("tfds:coco_captions", "val", data_dir=tmp_path)
    assert source.caption_kinds == ("captions/text",) and len(source) == 4
    said = source[2].texts("captions/text")
    number = said[0].split()[-1]
    assert said == tuple(f"caption {k} of {number}" for k in range(5))
    assert "tensorflow" not in sys.modules


def test_a_set_whose_files_a_person_must_fetch_says_where_they_go(tmp_path):
    message = "downloads/manual does not exist or is empty.*ILSVRC2012_img_train.tar"
    with pytest.raises(UserError, match=message):
        open_source("tfds:imagenet2012", data_dir=tmp_path)


def test_the_stand_in_refuses_what_only_tensorflow_does():
    with stand_in():
        import tensorflow as tf

        with pytest.raises(ModuleNotFoundError, match="needs TensorFlow itself"):
            tf.image  # noqa: B018
