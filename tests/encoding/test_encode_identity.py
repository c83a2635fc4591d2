"""A folder of records knows who made it, and a reader with other encoders, or for other sizes, is
refused."""

import shutil

import jax
import numpy as np
import pytest

from pixart_jax.data import records
from pixart_jax.data.encoded import EncodedSamples
from pixart_jax.encoding import encode
from pixart_jax.encoding.options import EncodeOptions
from pixart_jax.errors import UserError
from pixart_jax.pipeline import encoder_identity
from pixart_jax.pipeline.encoder_identity import expected_identity
from pixart_jax.text import load_tokenizer, save_tokenizer, word_tokenizer
from pixart_jax.weights.component import load_component
from tests.encoding import tiny_encoders as tiny
from tests.training import tiny_run

PARTS = ("vae", "text_encoder", "tokenizer")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_run.parts(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def encoded(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("set") / "set"
    vae, text = load_component(model / "vae"), load_component(model / "text_encoder")
    options = EncodeOptions(((32, 32),), ("dense",), 24, batch_size=4)
    words, folders = load_tokenizer(model / "tokenizer"), {part: model / part for part in PARTS}
    return encode.encode_dataset(
        tiny.Noise(8),
        options,
        vae=vae,
        text_encoder=text,
        tokenizer=words,
        folder=folder,
        folders=folders,
        progress=False,
    )


def expected(encoded, folders):
    manifest = records.Manifest.read(encoded)
    return expected_identity(manifest.identity, manifest.made_from, folders)


def changed(model, part, folder):
    """A copy of a part with one number of its weights changed."""
    component = load_component(model / part)
    params = jax.tree.map(np.array, dict(component.params))
    jax.tree.leaves(params)[-1].reshape(-1)[0] += 1
    component.replace(params=params).save(folder)
    return folder


def test_the_folders_that_made_the_records_are_known_by_their_files_alone(
    model, encoded, monkeypatch
):
    monkeypatch.setattr(encoder_identity, "load_component", None)  # nothing is opened
    found = expected(encoded, {part: model / part for part in PARTS})
    assert set(found) == set(PARTS)
    assert len(EncodedSamples(encoded, (("dense", 1.0),), 24, found)) == 8


def test_a_copy_of_the_encoders_in_other_files_is_still_who_made_them(model, encoded, tmp_path):
    for part in ("vae", "text_encoder"):
        load_component(model / part).save(tmp_path / part)
        (tmp_path / part / "README.md").write_text("a copy\n")
    found = expected(encoded, {part: tmp_path / part for part in ("vae", "text_encoder")})
    assert set(found) == {"vae", "text_encoder"}
    EncodedSamples(encoded, (("dense", 1.0),), 24, found)


@pytest.mark.parametrize("part", PARTS)
def test_records_of_another_encoder_are_refused_by_its_name(model, encoded, tmp_path, part):
    if part == "tokenizer":
        save_tokenizer(word_tokenizer(["quite", "other", "words"]), tmp_path / part)
    else:
        changed(model, part, tmp_path / part)
    found = expected(encoded, {part: tmp_path / part})
    with pytest.raises(UserError, match=f"was encoded with something else: {part} is "):
        EncodedSamples(encoded, (("dense", 1.0),), 24, found)


def test_a_manifest_that_says_nothing_of_files_is_compared_by_the_weights(model, encoded, tmp_path):
    shutil.copytree(encoded, tmp_path / "old")
    manifest = records.Manifest.read(encoded)
    records.Manifest(manifest.identity, manifest.shards).write(tmp_path / "old")
    EncodedSamples(tmp_path / "old", (), 24, expected(tmp_path / "old", {"vae": model / "vae"}))
    other = expected(tmp_path / "old", {"vae": changed(model, "vae", tmp_path / "vae")})
    with pytest.raises(UserError, match="vae is "):
        EncodedSamples(tmp_path / "old", (), 24, other)


def test_records_of_a_size_that_the_stage_does_not_take_are_refused(encoded):
    EncodedSamples(encoded, (), 24, buckets=[(32, 32), (32, 64)])
    message = "was encoded at 32×32, which the stage's buckets .64×64, 64×96. do not hold"
    with pytest.raises(UserError, match=message):
        EncodedSamples(encoded, (), 24, buckets=[(64, 64), (64, 96)])
