"""What is encoded does not depend on how many devices encode it; on which mirrored pictures are
what they should be."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from pixart_jax.data import images, records
from pixart_jax.data.buckets import assign
from pixart_jax.data.encoded import EncodedSamples, is_flipped
from pixart_jax.encoding import command as encode_command
from pixart_jax.encoding import encode
from pixart_jax.encoding.shards import ShardEncoder
from pixart_jax.errors import UserError
from pixart_jax.images import to_model
from pixart_jax.text import tokenize
from tests.encoding import tiny_encoders as tiny
from tests.encoding.encode_on_devices import OPTIONS, Texts, encoders, made, simple_encoders
from tests.training import tiny_run

ROOT = pathlib.Path(__file__).parents[2]
SIMPLE = "data=4!"  # encoders of a few lines
MESHES = ("data=2", "data=2+", "data=4", "data=4+", "data=2,fsdp=2")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_run.parts(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    return made(encoders(model), tmp_path_factory.mktemp("alone") / "set")


def every_record(folder):
    stored = records.Records(folder)
    return [stored.bytes(index) for index in range(len(stored))]


def encode_on_devices(model, out, names) -> dict:
    """Encode where there are four devices; return name → folder."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    module = "tests.encoding.encode_on_devices"
    program = [sys.executable, "-m", module, str(model), str(out), *names]
    done = subprocess.run(
        program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: out / name for name in names}


@pytest.fixture(scope="module")
def on_devices(model, tmp_path_factory):
    return encode_on_devices(model, tmp_path_factory.mktemp("devices"), MESHES)


def test_a_record_is_the_same_to_the_byte_on_any_number_of_devices(model, tmp_path):
    alone = made(simple_encoders(model), tmp_path / "set")
    folder = encode_on_devices(model, tmp_path, [SIMPLE])[SIMPLE]
    assert every_record(folder) == every_record(alone)
    assert records.Manifest.read(folder).identity == records.Manifest.read(alone).identity


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_the_model_s_own_encoders_give_the_same_records_to_rounding(alone, on_devices, name):
    """More devices are more threads, and a convolution of few channels adds in another order at a
    thread's last rows."""
    assert records.Manifest.read(on_devices[name]).identity == records.Manifest.read(alone).identity
    one, other = records.Records(alone), records.Records(on_devices[name])
    for index in range(len(one)):
        (before, said), (after, said_too) = one[index], other[index]
        assert said == said_too and set(before) == set(after)
        for part in before:
            wanted, found = before[part].astype(np.float64), after[part].astype(np.float64)
            if "fsdp" in name:
                np.testing.assert_allclose(wanted, found, rtol=1e-2, atol=1e-5)
            elif part.startswith(("mean", "std")):
                np.testing.assert_allclose(wanted, found, rtol=1e-5, atol=3e-6)
            else:
                np.testing.assert_array_equal(wanted, found)


def test_states_and_posteriors_read_back_equal_a_direct_encoding_to_the_bit(model, alone):
    parts, source = encoders(model), Texts(22)
    samples = EncodedSamples(alone, (("dense", 1.0),), 24)
    numbers = {
        records.decode_record(record, ())[1]["key"]: index
        for index, record in enumerate(every_record(alone))
    }
    for number in (0, 5, 10, 14, 21):
        sample = source[number]
        index = numbers[sample.key]
        bucket = int(samples.bucket_of[index])
        # in the batch it was encoded in
        place = (index - np.flatnonzero(samples.bucket_of == bucket)[0]) % OPTIONS.batch_size
        pixels, fit = images.to_bucket(sample.pixels(), samples.buckets[bucket])
        stored, metadata = samples._records[index]
        assert stored["label"] == sample.label
        for kind, texts in sample.captions.items():
            assert json.loads(metadata[f"captions.{kind}"]) == list(texts)
        assert samples.buckets[bucket] == assign(*source.shape(number), OPTIONS.buckets)
        height, width, top, left = stored["fit"]
        # the very crop can be made again from what is stored
        assert (height, width, top, left) == dataclasses.astuple(fit)
        resized = Image.fromarray(sample.pixels()).resize((width, height), Image.BICUBIC)
        rows, columns = samples.buckets[bucket]
        again = np.asarray(resized)[top : top + rows, left : left + columns]
        if (height, width) != tuple(stored["size"]):
            np.testing.assert_array_equal(again, pixels)
        draws = np.array([0.1, 0.7])  # its first caption, and its second
        batch = samples.read(np.array([index, index]), bucket, draws)
        for row, draw in enumerate(draws):
            seen = pixels[:, ::-1] if is_flipped(draw) else pixels
            mean, std = parts["vae"].encode(to_model(np.stack([seen] * 4)))
            np.testing.assert_array_equal(batch["mean"][row], mean[place])
            np.testing.assert_array_equal(batch["std"][row], std[place])
            ids, (length,) = tokenize(parts["tokenizer"], [sample.captions["dense"][row]], 24)
            padded = np.zeros((4, 16 if length <= 16 else 24), np.int32)
            padded[0, :length] = ids[0, :length]
            lengths = np.array([length, 1, 1, 1], np.int32)
            direct = np.asarray(parts["text_encoder"].apply(padded, lengths))[0, :length]
            assert batch["text_lengths"][row] == length
            found = batch["text_states"][row, :length].view(np.uint16)
            wanted = direct.astype(ml_dtypes.bfloat16).view(np.uint16)
            np.testing.assert_array_equal(found, wanted)


def test_mirrored_pictures_are_drawn_half_of_the_time_whatever_the_caption(alone):
    draws = np.random.default_rng(0).random(4000)
    found = np.array([is_flipped(draw) for draw in draws])
    assert abs(found.mean() - 0.5) < 0.03 and abs(found[draws < 0.3].mean() - 0.5) < 0.05
    samples = EncodedSamples(alone, (), 24)
    batch = samples.read(np.zeros(64, int), int(samples.bucket_of[0]), draws[:64])
    # one picture, as it is and mirrored
    assert len(np.unique(batch["mean"].reshape(64, -1), axis=0)) == 2
    assert records.Manifest.read(alone).identity["flip"] == "yes"


class Bad(tiny.Noise):
    """Of each kind of bad sample one."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        change = {
            2: {"image": b""},
            3: {"image": sample.image[: len(sample.image) // 2]},
            4: {"captions": {"short": ("a circle",)}},
            5: {"captions": {}},
            6: {"captions": {"short": ("a",), "dense": ("a circle " * 1_200_000,)}},
            7: {"captions": {"short": ("",), "dense": ("a \x00\x07 red\x1b[2J circle\n",)}},
        }
        return dataclasses.replace(sample, **change.get(index, {}))


def test_bad_samples_are_named_and_counted_and_the_rest_goes_on(model, tmp_path, capsys):
    bad, options = Bad(12), dataclasses.replace(OPTIONS, flip=False)
    folder = encode.encode_dataset(bad, options, **encoders(model), folder=tmp_path / "set")
    manifest = records.Manifest.read(folder)
    assert manifest.samples == 8
    listed = [json.loads(line) for line in (folder / encode.FAULTS).read_text().splitlines()]
    assert {fault["place"]: fault["kind"] for fault in listed} == {
        "noise-00002": "unreadable image",
        "noise-00003": "unreadable image",
        "noise-00005": "missing caption",
        "noise-00006": "caption too long",
        "noise-00007": "caption empty after cleaning",
    }
    (place,) = (shard.lacking["dense"] for shard in manifest.shards if shard.lacking)
    assert len(place) == 1  # what lacks a kind stays, and shows its others
    told = capsys.readouterr().err
    assert "4 left out: 2 unreadable image, 1 missing caption, 1 caption too long" in told
    assert "faults.jsonl names them" in told
    assert "4 left out" in encode_command.summary(folder)
    assert (folder / "buckets.png").read_bytes()[:4] == b"\x89PNG"
    strict = dataclasses.replace(options, strict=True)
    for index, kind in ((2, "unreadable image"), (5, "missing caption"), (6, "caption too long")):
        encoder = ShardEncoder(bad, strict, **encoders(model))
        with pytest.raises(UserError, match=f"noise-{index:05d}: {kind}"):
            list(encoder.records([index], (32, 32), pytest.fail))


def test_check_names_a_key_that_stands_twice(model, tmp_path, capsys):
    class Twice(tiny.Noise):
        def __getitem__(self, index):
            return dataclasses.replace(super().__getitem__(index), key=f"picture-{index % 5}")

    folder = encode.encode_dataset(
        Twice(6), OPTIONS, **encoders(model), folder=tmp_path / "set", progress=False
    )
    with pytest.raises(UserError, match="1 of the records in .* have a key that another one has"):
        encode_command.check(folder)
    assert "record 4: key twice (picture-0)" in capsys.readouterr().err
