"""Conditions of a ControlNet beside the latents in shards: of the cropped image, named by the
shards' identity, and sampled in training as the image's latents are."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from pixart_jax.config import DataConfig, ObjectiveConfig
from pixart_jax.data import images, records
from pixart_jax.data.encoded import EncodedSamples
from pixart_jax.encoding import encode
from pixart_jax.encoding.options import EncodeOptions
from pixart_jax.errors import UserError
from pixart_jax.images import canny, to_model
from pixart_jax.models.configs import HEDConfig
from pixart_jax.pipeline.conditions import EdgeDetector
from pixart_jax.training.tasks.denoising import DiffusionObjective
from pixart_jax.weights.component import HED
from tests.encoding import tiny_encoders as tiny
from tests.models.reference import random_params

BUCKETS = ((32, 32), (32, 64), (64, 32))
SOURCE = tiny.Noise(9)


def run(folder, condition, weights=None, **changes):
    options = EncodeOptions(
        BUCKETS, batch_size=4, condition=condition, condition_weights=weights, **changes
    )
    made = encode.encode_dataset(
        SOURCE, options, vae=tiny.vae(), folder=folder, progress=False, process_count=1
    )
    return {metadata["key"]: arrays for arrays, metadata in records.Records(made)}


def cropped(key: str, found) -> np.ndarray:
    pixels = images.decode(SOURCE[int(key[-5:])].image)
    return images.to_bucket(pixels, tuple(8 * n for n in found["mean"].shape[:2]))[0]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    config = HEDConfig((4, 6), (1, 1))
    hed = HED(config, random_params(HED, config, 0.02))
    hed.save(folder := tmp_path_factory.mktemp("hed") / "hed")
    return folder, hed


def assert_posterior_of(pixels: np.ndarray, found, side: str = "", atol: float = 1e-5) -> None:
    mean, std = tiny.vae().encode(to_model(pixels[None]))
    for name, value in (("mean", mean), ("std", std)):
        np.testing.assert_allclose(found[f"control_{name}{side}"], value[0], rtol=0, atol=atol)


def test_records_hold_the_posterior_of_the_edges_of_the_cropped_image(network, tmp_path):
    folder, hed = network
    by_canny = run(tmp_path / "canny", "canny", flip=True)
    by_hed = run(tmp_path / "hed", "hed", str(folder))
    assert len(by_canny) == len(by_hed) == 9
    for key in by_canny:
        image = cropped(key, by_canny[key])
        edges = np.repeat(canny(image)[..., None], 3, -1)
        assert_posterior_of(edges, by_canny[key])
        assert_posterior_of(edges[:, ::-1], by_canny[key], "_flip")
        # in another batch a value may round to its neighbour
        edges = np.repeat(EdgeDetector("hed", hed)(image[None])[0][..., None], 3, -1)
        assert_posterior_of(edges, by_hed[key], "", 1e-2)
    manifest = records.Manifest.read(tmp_path / "hed")
    assert manifest.identity["condition"] == EdgeDetector("hed", hed).identity
    with pytest.raises(UserError, match="condition is canny:rgb, expected hed"):
        run(tmp_path / "canny", "hed", str(folder), flip=True)


def test_maps_of_a_folder_are_cropped_as_their_images(tmp_path):
    """One is missing and one has another aspect ratio: both are left out by name."""
    maps = tmp_path / "maps"
    maps.mkdir()
    for index in range(8):
        sample = SOURCE[index]
        edges = canny(images.decode(sample.image))
        if index == 3:
            edges = edges[: len(edges) // 2]
        Image.fromarray(edges).save(maps / f"{sample.key}.png")
    found = run(tmp_path / "set", f"folder:{maps}")
    assert set(found) == {SOURCE[i].key for i in (0, 1, 2, 4, 5, 6, 7)}
    for key, arrays in found.items():
        whole = np.repeat(canny(images.decode(SOURCE[int(key[-5:])].image))[..., None], 3, -1)
        bucket = tuple(8 * n for n in arrays["mean"].shape[:2])
        assert_posterior_of(images.to_bucket(whole, bucket)[0], arrays)
    reasons = dict(records.Manifest.read(tmp_path / "set").skipped)
    assert "another aspect ratio" in reasons["noise-00003"]
    assert "no map noise-00008" in reasons["noise-00008"]


def test_a_stage_that_asks_reads_the_condition_and_samples_it_as_the_latents(tmp_path):
    run(tmp_path / "set", "canny")
    run(tmp_path / "plain", None)
    plain = EncodedSamples(tmp_path / "set", (), 120)
    samples = EncodedSamples(tmp_path / "set", (), 120, condition="canny")
    rows = np.flatnonzero(samples.bucket_of == 0)[:2]
    batch = samples.read(rows, 0, np.full(2, 0.5))
    assert set(batch) - set(plain.read(rows, 0, np.full(2, 0.5))) == {"control_mean", "control_std"}
    for folder, kind, line in (
        (tmp_path / "set", "hed", "holds canny conditions: encode it with --condition hed"),
        (tmp_path / "plain", "canny", "holds no conditions"),
    ):
        with pytest.raises(UserError, match=line):
            EncodedSamples(folder, (), 120, condition=kind)

    objective = DiffusionObjective(ObjectiveConfig(), 0.5)
    many = {name: np.repeat(batch[f"{name}"][:1], 3000, 0) for name in ("mean", "std")}
    keys = jax.random.split(jax.random.key(0), 3000)
    alone = objective.prepare(many, keys)
    control = {f"control_{name}": np.repeat(batch[f"control_{name}"][:1], 3000, 0) for name in many}
    noised = objective.prepare(many | control, keys)
    assert alone.condition is None
    for name in ("x_t", "t", "x0", "noise", "dropped"):  # random numbers as without a condition
        assert np.array_equal(getattr(noised, name), getattr(alone, name))
    sampled = np.asarray(noised.condition)
    near = 5 * 0.5 * batch["control_std"][0].max() / np.sqrt(3000)
    assert np.abs(sampled.mean(0) - 0.5 * batch["control_mean"][0]).max() < near
    assert np.abs(sampled.std(0) - 0.5 * batch["control_std"][0]).max() < near
    own = (sampled - sampled.mean(0)) / sampled.std(0)
    image = np.asarray(noised.x0)
    image = (image - image.mean(0)) / image.std(0)
    assert np.abs((own * image).mean()) < 0.02  # independent of the image's


def test_bad_conditions_are_one_line(tmp_path):
    for condition, line in (
        ("hedd", "hed, canny or folder:DIR"),
        ("folder:nowhere", "no such folder"),
        ("hed", "hed needs weights"),
    ):
        with pytest.raises(UserError, match=line):
            run(tmp_path / "set", condition)
    with pytest.raises(UserError, match="hed, canny or folder:DIR"):
        dataclasses.replace(DataConfig(), condition="edges")
