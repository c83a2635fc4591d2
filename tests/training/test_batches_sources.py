"""What each kind of source is to a stage: encoded on the way, read as it is, mixed, or refused in
one line."""

import dataclasses

import numpy as np
import pytest

from pixart_jax.commands import train
from pixart_jax.config import Config, DataConfig, StageConfig
from pixart_jax.data.encoded import EncodedSamples
from pixart_jax.data.features import FeatureSamples
from pixart_jax.data.mixed import MixedSamples
from pixart_jax.data.samples import ImageSamples, TokenSamples
from pixart_jax.errors import UserError
from pixart_jax.training import batches
from pixart_jax.training.frozen import Frozen
from pixart_jax.training.metrics import read
from tests.data.tiny_sets import (
    encoded,
    encoded_record,
    features,
    img2dataset,
    intern,
    picture,
    shards,
    write,
)
from tests.training import tiny_run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_run.parts(tmp_path_factory.mktemp("model"))


@pytest.fixture
def world(model, tmp_path, monkeypatch):
    """Pictures in a folder and in a tar, and a config that takes a source."""
    monkeypatch.setenv("PIXART_JAX_CACHE", str(tmp_path / "cache"))
    files = {f"{i}.png": encoded(picture(i, 32, 32)) for i in range(6)}
    write(tmp_path / "photos", files | {f"{i}.txt": "a red circle" for i in range(6)})
    img2dataset(tmp_path / "web.tar", 0, 6)

    def config(source: str, task: str = "text_to_image", **data) -> Config:
        plain = {"captions": (("caption", 1.0),), "buckets": ((32, 32),), "max_text_tokens": 16}
        data = DataConfig(source=source, **(plain | data))
        stage = StageConfig("only", task, steps=2, batch_size=4, data=data, start="fresh")
        parts = {"vae": str(model), "text_encoder": str(model), "compute_dtype": "float32"}
        return Config("tiny", stages=(stage,), model=tiny_run.MODEL, num_classes=5, **parts)

    config.folder = tmp_path
    return config


def opened(config, encode=train.encode):
    return batches.open_loader(config, 0, Frozen(config, None), encode)


def with_target(config, target: str, **changes):
    """The config with text_to_text.target set."""
    (stage,) = config.stages
    options = dataclasses.replace(stage.text_to_text, target=target)
    stage = dataclasses.replace(stage, text_to_text=options, **changes)
    return dataclasses.replace(config, stages=(stage,))


@pytest.mark.parametrize("where", ["photos", "web.tar"])
def test_pictures_of_a_folder_or_a_tar_are_encoded_once_and_then_trained_on(world, where):
    loader = opened(world(str(world.folder / where)))
    assert isinstance(loader.samples, EncodedSamples) and len(loader.samples) == 6
    batch = loader.batch(0)
    assert batch["mean"].shape == (4, 4, 4, 4) and len(batch["text_states"]) == 4
    assert (batch["text_lengths"] > 0).all()
    again = opened(world(str(world.folder / where)))
    np.testing.assert_array_equal(again.batch(3)["mean"], loader.batch(3)["mean"])


def test_a_mixture_s_parts_are_encoded_each_and_drawn_by_their_share(world):
    photos, tar = world.folder / "photos", world.folder / "web.tar"
    loader = opened(world(f"0.75*folder:{photos} + 0.25*webdataset:{tar}"))
    assert isinstance(loader.samples, MixedSamples) and len(loader.samples) == 12
    keys = [key for step in range(60) for key in loader.batch(step)["key"]]
    # '3' of the folder, '000000003' of the tar
    assert abs(np.mean([len(key) == 1 for key in keys]) - 0.75) < 0.03
    assert len(set(keys)) == 12


def test_official_features_train_a_step(world, tmp_path):
    root = intern(tmp_path / "official", ((32, 32),) * 8)
    names = {f"{i:03d}_{i:06d}": (32, 32) for i in range(8)}
    features(root, names, "img_vae_features_32resolution/noflip")
    config = world(f"pixart-features:{root}", captions=(("prompt", 1.0),))
    assert isinstance(opened(config, None).samples, FeatureSamples)
    train.train(config, tmp_path / "run", None)
    logged = read(tmp_path / "run" / "metrics.jsonl")
    assert np.isfinite(logged[-1]["loss"]) and (tmp_path / "run" / "model").is_dir()
    with pytest.raises(UserError, match="stage only: pixart-features:.* has no labels"):
        opened(world(f"pixart-features:{root}", "class_conditional"), None)


def test_a_run_s_own_tokenizer_holds_its_spare_words_beside_those_of_the_captions(world):
    config = with_target(world(str(world.folder / "photos"), "text_to_text"), "caption")
    config = dataclasses.replace(config, text_encoder=None)
    (stage,) = config.stages
    options = dataclasses.replace(stage.text_to_text, spare_words=("sks", "vqp"))
    stages = (dataclasses.replace(stage, text_to_text=options),)
    made = Frozen(dataclasses.replace(config, stages=stages), world.folder / "run").tokenizer
    words = "a red sks circle vqp".split()
    assert [made.decode([i]) for i in made(" ".join(words))["input_ids"][:-1]] == words
    assert len(made("zwx")["input_ids"]) > 2


def test_pictures_and_captions_are_read_as_they_are_by_the_frozen_parts_own_tasks(world):
    mixture = f"1*{world.folder / 'photos'} + 1*{world.folder / 'web.tar'}"
    images = opened(world(mixture, "autoencoder"))
    assert images.batch(0)["images"].shape == (4, 32, 32, 3)
    assert isinstance(images.samples.parts[0], ImageSamples)
    words = opened(with_target(world(str(world.folder / "photos"), "text_to_text"), "caption"))
    assert isinstance(words.samples, TokenSamples) and (words.batch(0)["lengths"] > 1).all()


def test_what_is_left_out_is_said_and_strict_stops(world, capsys):
    bad = {"cut.png": encoded(picture(9, 32, 32))[:-30], "empty.png": b"", "lonely.txt": "nothing"}
    write(world.folder / "photos", bad)
    loader = opened(world(str(world.folder / "photos"), "autoencoder"))
    assert {str(key) for step in range(9) for key in loader.batch(step)["key"]} == set("012345")
    said = capsys.readouterr().out
    assert "stage only: cut: unreadable image (" in said
    assert "stage only: empty: unreadable image (the image is empty" in said
    assert "3 left out: 2 unreadable image, 1 caption without picture" in said
    with pytest.raises(UserError, match="lonely.txt: caption without picture"):
        opened(world(str(world.folder / "photos"), "autoencoder", strict=True))
    (world.folder / "photos" / "lonely.txt").unlink()
    for task, message in (
        ("autoencoder", "cut: unreadable image"),
        ("text_to_image", "cut: missing caption"),
    ):
        with pytest.raises(UserError, match=message):
            opened(world(str(world.folder / "photos"), task, strict=True))


def test_a_sample_that_lacks_a_caption_is_left_out_and_one_that_lacks_a_kind_takes_the_other(
    world, capsys
):
    files = {f"{i}.png": encoded(picture(i, 32, 32)) for i in range(4)}
    texts = {"0.txt": "a red circle", "0.dense.txt": "a red circle left of a blue square"}
    texts |= {"1.txt": "a square", "2.dense.txt": "a circle"}
    folder = write(world.folder / "mixed", files | texts)
    config = world(str(folder), "text_to_text", captions=(("caption", 1.0), ("dense", 3.0)))
    samples = opened(with_target(config, "caption", batch_size=2)).samples
    assert samples.bucket_of.tolist() == [0, 0, -1, -1]  # 2 has no target, 3 no text at all
    assert "2 left out: 2 missing caption" in capsys.readouterr().out
    draws = np.linspace(0, 1, 20, endpoint=False)
    read_at = [samples.read(np.array([1]), 0, np.array([draw])) for draw in draws]
    assert len({int(batch["lengths"][0]) for batch in read_at}) == 1


def test_records_that_lack_a_kind_take_the_other_and_those_without_any_are_left_out(world, capsys):
    files = {f"{i}.png": encoded(picture(i, 32, 32)) for i in range(6)}
    files |= {f"{i}.txt": "a circle" for i in (0, 1, 3)}
    long = "a red circle left of a blue square right of a green circle"
    folder = write(world.folder / "mixed", files | {f"{i}.dense.txt": long for i in (0, 2, 4)})
    mix = (("caption", 1.0), ("dense", 1.0))
    loader = opened(world(str(folder), captions=mix))
    samples = loader.samples
    assert len(samples) == 5  # 5.png has no text of any kind, and is named by the encoder
    lengths: dict[str, set[int]] = {}
    for step in range(60):
        batch = loader.batch(step)
        for key, length in zip(batch["key"], batch["text_lengths"]):
            lengths.setdefault(str(key), set()).add(int(length))
    short, wordy = min(map(min, lengths.values())), max(map(max, lengths.values()))
    assert short < wordy
    alone = {key: {short} for key in "13"} | {key: {wordy} for key in "24"}
    assert lengths == {"0": {short, wordy}} | alone
    capsys.readouterr()
    only = opened(world(str(samples._records.folder), captions=(("dense", 1.0),)), None)
    assert {str(key) for step in range(9) for key in only.batch(step)["key"]} == {"0", "2", "4"}
    said = capsys.readouterr().out
    assert "record 1: missing caption (none of the mix: dense)" in said
    assert "2 left out: 2 missing caption" in said


def test_records_of_another_encoder_or_size_are_refused_by_name(world, model, tmp_path):
    folder = opened(world(str(world.folder / "photos"))).samples._records.folder
    assert len(opened(world(str(folder)), None).samples) == 6  # who made them may read them
    with pytest.raises(UserError, match="encoded at 32×32"):
        opened(world(str(folder), buckets=((64, 64),)), None)
    other = tiny_run.parts(tmp_path / "other")
    spoilt = next((other / "vae").glob("*.safetensors"))
    data = bytearray(spoilt.read_bytes())
    data[-3] ^= 0x10
    spoilt.write_bytes(data)
    config = dataclasses.replace(world(str(folder)), vae=str(other))
    with pytest.raises(UserError, match="was encoded with something else: vae is"):
        opened(config, None)


def kind(name: str) -> dict:
    return {"captions": ((name, 1.0),)}


@pytest.mark.parametrize(
    ("source", "task", "data", "message"),
    [
        ("{0}/photos", "text_to_image", {}, "is not encoded, and this run was given nothing"),
        ("{0}/shards", "autoencoder", {}, "learns from pictures"),
        ("{0}/shards", "text_to_image", {"limit": 3}, "data.limit chooses among pictures"),
        ("{0}/shards", "text_to_image", kind("dens"), "no captions of kind 'dens'"),
        ("0.5*{0}/shards + 0.5*{0}/others", "text_to_image", kind("dense"), "mixed: vae is one"),
        ("0.5*{0}/shards + {0}/others", "text_to_image", {}, "is not WEIGHT"),
    ],
)
def test_mistakes_are_one_line(world, source, task, data, message):
    for name, vae in (("shards", "one"), ("others", "two")):
        made = [encoded_record(f"k{i}", label=np.int64(i % 5)) for i in range(6)]
        shards(world.folder / name, {(32, 32): made}, {"vae": vae}, {"dense": 3})
    config = dataclasses.replace(world(source.format(world.folder), task, **data), vae=None)
    with pytest.raises(UserError, match=message) as caught:
        opened(config, None)
    assert "\n" not in str(caught.value)


def test_a_source_that_is_not_there_is_said_before_anything_is_opened(world, tmp_path):
    for number, source in enumerate(("nowhere", "0.5*nowhere + 0.5*tfds:shapes/plain")):
        with pytest.raises(UserError, match="stage only: unknown source 'nowhere'"):
            train.train(world(source), tmp_path / f"run{number}", None)
