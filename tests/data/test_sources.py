import itertools
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from pixart_jax.data import images, shapes, sources
from pixart_jax.errors import UserError
from tests.data.tiny_sets import encoded, picture


def photo(index: int) -> bytes:
    return encoded(picture(index, 20 + index, 30), "JPEG")


class TinyPhotos(tfds.core.GeneratorBasedBuilder):
    """A labelled set in ImageNet's form, with nested captions in COCO's."""

    VERSION = tfds.core.Version("1.0.0")
    MODULE_PATH = __file__

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "file_name": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["tench", "hen", "koala"]),
                "captions": tfds.features.Sequence({"text": tfds.features.Text(), "id": np.int64}),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(9), "validation": self._generate_examples(4)}

    def _generate_examples(self, count):
        for i in range(count):
            texts = [{"text": f"caption {j} of {i}", "id": j} for j in range(1 + i % 3)]
            facts = {"file_name": f"{i}.jpg", "label": i % 3, "captions": texts}
            yield i, {"image": photo(i) if i != 5 else photo(i)[:10], **facts}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture
def small_world(monkeypatch, tmp_path):
    """The embedded world's plain level with few scenes, built through tfds into a fresh folder."""
    from pixart_jax.data import shapes_builder

    level = shapes.Level("plain", train=40, test=6)
    monkeypatch.setitem(shapes.LEVELS, "plain", level)
    monkeypatch.setitem(
        shapes_builder.Shapes.builder_configs, "plain", shapes_builder.ShapesConfig(level)
    )
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))


def test_a_tfds_set_is_built_and_read_without_tensorflow(prepared):
    source = sources.open_source("tfds:tiny_photos", "train", data_dir=prepared)
    assert isinstance(source, sources.Source) and len(source) == 9
    assert source.caption_kinds == ("captions/text", "class")
    with pytest.raises(
        UserError, match="00000000: no caption of kind 'clas' .did you mean 'class'"
    ):
        source[0].texts("clas")
    sample = source[4]
    assert sample.label == 1 and sample.texts("class") == ("hen",)
    assert sample.texts("captions/text") == ("caption 0 of 4", "caption 1 of 4")
    assert sample.key == "tiny_photos/1.0.0/train/00000004"
    np.testing.assert_array_equal(sample.pixels(), images.decode(photo(4)))
    assert source.sizes().tolist() == [[20 + i, 30] if i != 5 else [0, 0] for i in range(9)]
    assert "tensorflow" not in sys.modules
    with pytest.raises(images.UnreadableImage, match="tiny_photos/1.0.0/train/00000005: "):
        source[5].pixels()


def test_a_released_set_s_features_are_understood():
    def photos(self, *args, **kwargs):
        return [{"file_name": b"a.jpg", "image": photo(i), "label": i} for i in range(5)]

    with tfds.testing.mock_data(as_data_source_fn=photos):
        source = sources.open_source("tfds:oxford_flowers102", "train")
        assert len(source) == 5 and source[3].label == 3
        assert source[3].texts("class")[0] and source.sizes()[3].tolist() == [23, 30]


def test_limit_split_and_own_filters(prepared):
    source = sources.open_source(
        "tfds:tiny_photos", "train", where=f"{__name__}:is_hen", limit=2, data_dir=prepared
    )
    assert [source[i].key[-2:] for i in range(len(source))] == ["01", "04"]
    assert len(sources.open_source("tfds:tiny_photos", "train[:4]", data_dir=prepared)) == 4
    fingerprints = {
        sources.open_source("tfds:tiny_photos", split, limit=limit, data_dir=prepared).fingerprint
        for split, limit in itertools.product(("train", "validation"), (None, 3))
    }
    assert len(fingerprints) == 4


def is_hen(fields):
    return fields["label"] == 1


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("tfds:tiny_photo", {}, "set is called 'tiny_photo' .did you mean 'tiny_photos'"),
        ("tfds:tiny_photos", {"split": "trian"}, "no split 'trian'"),
        ("tfds:tiny_photos", {"where": "singel"}, "unknown filter 'singel' .did you mean 'single'"),
        ("tfds:tiny_photos", {"where": "single"}, "needs the field 'count'"),
        ("tfds:tiny_photos", {"where": "nowhere:f"}, "cannot be imported"),
        ("tfds:shapes/plane", {}, "did you mean 'shapes/plain'"),
        ("folder/x", {}, "unknown source 'folder/x'"),
        ("tfds:", {}, "unknown source 'tfds:'"),
    ],
)
def test_mistakes_are_named(prepared, source, options, message):
    with pytest.raises(UserError, match=message) as caught:
        sources.open_source(source, **{"split": "train", "data_dir": prepared, **options})
    assert "\n" not in str(caught.value)


def test_the_embedded_world_takes_the_same_path(small_world):
    source = sources.open_source("tfds:shapes/plain", "train")
    assert len(source) == 40 and {"brief", "short", "shapeless", "dense"} <= set(
        source.caption_kinds
    )
    for index in (0, 17, 39):  # test_shapes.py compares each field
        scene, sample = shapes.scene_at("plain", "train", index), source[index]
        np.testing.assert_array_equal(sample.pixels(), shapes.render(scene))
        assert sample.key == f"plain-train-{index:06d}" and sample.label == shapes.label(scene)
    single = sources.open_source("tfds:shapes/plain", "train", where="single")
    assert 0 < len(single) < 40 and all(single[i].label >= 0 for i in range(len(single)))
    assert len(sources.open_source("tfds:shapes/plain", "test")) == 6
