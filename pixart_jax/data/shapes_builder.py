"""The embedded world (data/shapes.py) as a tensorflow-datasets builder:
``tfds.data_source("shapes/plain")``. Images are PNG bytes, so TensorFlow is not needed."""

from __future__ import annotations

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from pixart_jax.data import shapes

_TEXTS = ("brief", "short", "shapeless", "dense", "task", "scene", "key")
_NUMBERS = ("label", "count", "height", "width")


class ShapesConfig(tfds.core.BuilderConfig):
    """One level of the world as a builder config."""

    def __init__(self, level: shapes.Level, **kwargs):
        sizes = ", ".join(f"{h}×{w}" for h, w, _ in level.canvases)
        super().__init__(
            name=level.name,
            description=f"Captioned shapes, level {level.name}: {sizes} px.",
            **kwargs,
        )
        self.level = level


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Features: image (PNG), the captions, label (stage-1 class, −1 for several kinds), count,
    height, width, task, scene (the ground truth as JSON), key."""

    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS = [ShapesConfig(level) for level in shapes.LEVELS.values()]

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            **{name: tfds.features.Text() for name in _TEXTS},
            **{name: tfds.features.Scalar(np.int64) for name in _NUMBERS},
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            description="Captioned scenes of coloured shapes.",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        level = self.builder_config.level
        return {
            "train": self._generate_examples("train", level.train),
            "test": self._generate_examples("test", level.test),
        }

    def _generate_examples(self, split: str, count: int):
        level = self.builder_config.level
        for index in range(count):
            scene = shapes.scene_at(level.name, split, index)
            png = io.BytesIO()
            Image.fromarray(shapes.render(scene)).save(png, "PNG", compress_level=1)
            facts = {
                "label": shapes.label(scene),
                "count": len(scene.objects),
                "height": scene.height,
                "width": scene.width,
                "task": scene.task,
                "scene": scene.to_json(),
                "key": f"{level.name}-{split}-{index:06d}",
            }
            yield index, {"image": png.getvalue(), **shapes.captions(scene), **facts}
