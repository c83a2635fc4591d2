import dataclasses
import hashlib
import json

import ml_dtypes
import numpy as np
import pytest

from pixart_jax.data import images
from pixart_jax.data.encoded import EncodedSamples, is_flipped
from pixart_jax.data.loader import Loader
from pixart_jax.data.samples import CaptionMix, ImageSamples, TokenSamples
from pixart_jax.data.sources import Sample, indexed
from pixart_jax.errors import UserError
from pixart_jax.images import to_model
from tests.data.tiny_sets import encoded, shards

BUCKETS = ((32, 32), (32, 64), (64, 32))


class Noise:
    """Random pictures in three shapes, a short caption and one or two long ones each."""

    name, caption_kinds = "noise", ("short", "dense")

    def __init__(self, n=60, broken=()):
        self.n, self.broken, self.reads = n, broken, 0
        self.fingerprint = hashlib.sha256(f"{n}{broken}".encode()).hexdigest()

    def __len__(self):
        return self.n

    def sizes(self):
        found = [self.shape(i) if i not in self.broken else (0, 0) for i in range(self.n)]
        return np.array(found, np.int32)

    def shape(self, index):
        return ((32, 32), (40, 90), (70, 33))[index % 3]

    def __getitem__(self, index):
        self.reads += 1
        pixels = np.random.default_rng(index).integers(0, 256, (*self.shape(index), 3), np.uint8)
        captions = {
            "short": (f"s {index}",),
            "dense": tuple("w " * (5 + index % 4 + j) for j in range(1 + index % 2)),
        }
        image = encoded(pixels) if index not in self.broken else b""
        return Sample(f"k{index}", image, captions, index % 5)


class Tokenizer:
    """One id a word, 1 at the end."""

    pad_token_id = 0

    def __call__(self, texts, max_length, truncation, padding):
        ids = ([2 + len(word) for word in text.split()] for text in texts)
        return {"input_ids": [some[: max_length - 1] + [1] for some in ids]}


def encoded_folder(folder, n=60):
    made = {}
    for number, bucket in enumerate(BUCKETS):
        made[bucket] = []
        for i in range(number, n, 3):
            rng = np.random.default_rng(i)
            mean, std = rng.normal(size=(2, bucket[0] // 8, bucket[1] // 8, 4)).astype(np.float32)
            texts = {
                f"text.{kind}.0": rng.normal(size=(tokens, 8)).astype(ml_dtypes.bfloat16)
                for kind, tokens in (("short", 3), ("dense", 4 + i % 7))
            }
            facts = {"label": np.int64(i % 5), "size": np.array([i + 1, i + 2], np.int32)}
            metadata = {"key": f"k{i}", "captions.short": '["s"]', "captions.dense": '["d"]'}
            made[bucket].append(({"mean": mean, "std": abs(std), **facts, **texts}, metadata))
    return shards(folder, made, {"vae": "v"}, {"short": 3, "dense": 10})


@pytest.fixture(params=["images", "tokens", "encoded"])
def samples(request, tmp_path):
    mix = (("short", 1.0), ("dense", 1.0))
    if request.param == "images":
        return ImageSamples(Noise(), BUCKETS)
    if request.param == "tokens":
        return TokenSamples(Noise(), Tokenizer(), mix, 16, "dense")
    return EncodedSamples(encoded_folder(tmp_path), mix, 16)


def bucket_at(loader, step):
    return loader.samples.buckets[loader.plan.batch(step).bucket]


def same(a, b):
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_resume_at_any_step_gives_the_same_remaining_sequence(samples):
    loader = Loader(samples, batch_size=8, seed=3, workers=2)
    whole = loader.iterator()
    expected = [next(whole) for _ in range(25)]
    whole.close()
    for stop in (0, 1, 7, 20):
        first = Loader(samples, batch_size=8, seed=3, workers=2).iterator()
        for _ in range(stop):
            next(first)
        state = json.loads(json.dumps(first.get_state()))  # as a checkpoint keeps it
        first.close()
        assert state == Loader.state_at(stop)
        second = Loader(samples, batch_size=8, seed=3, workers=1).iterator()
        second.set_state(state)
        for step in range(stop, 25):
            same(next(second), expected[step])
        second.close()
    same(next(loader.iterator(start=13)), expected[13])


def test_batches_do_not_depend_on_threads(samples):
    expected = [Loader(samples, batch_size=8, seed=3).batch(step) for step in range(10)]
    for workers in (0, 1, 4):
        batches = Loader(samples, batch_size=8, seed=3, workers=workers).iterator()
        for batch in expected:
            same(next(batches), batch)
        batches.close()


@pytest.mark.parametrize("count", [2, 3, 8])
def test_processes_read_shares_of_one_global_batch_in_one_bucket(samples, count):
    whole = Loader(samples, batch_size=8, seed=3)
    # rows need not be neighbours
    shares = np.array_split(np.random.default_rng(count).permutation(8), count)
    parts = [Loader(samples, batch_size=8, seed=3, rows=rows) for rows in shares]
    for step in range(20):
        for part, rows in zip(parts, shares):
            expected = {name: value[rows] for name, value in whole.batch(step).items()}
            same(part.batch(step), expected)


def test_shapes_are_one_a_bucket_for_the_whole_stage(samples):
    loader = Loader(samples, batch_size=8, seed=3)
    shapes = {}
    for step in range(60):
        found = {name: value.shape for name, value in loader.batch(step).items()}
        assert shapes.setdefault(bucket_at(loader, step), found) == found
    assert set(shapes) == set(samples.buckets)


def test_pictures_are_those_of_the_source_in_the_model_s_range_and_decoded_once():
    source = Noise()
    loader = Loader(ImageSamples(source, BUCKETS), batch_size=8, seed=0)
    for step in range(40):
        batch = loader.batch(step)
        assert batch["images"].dtype == np.float32
        bucket = bucket_at(loader, step)
        assert batch["images"].shape == (8, *bucket, 3)
        for row, key in zip(batch["images"], batch["key"]):
            pixels, _ = images.to_bucket(Noise()[int(key[1:])].pixels(), bucket)
            np.testing.assert_array_equal(row, to_model(pixels))
    assert source.reads == 60
    uncached = ImageSamples(Noise(), BUCKETS, cache_bytes=0)
    same(Loader(uncached, batch_size=8, seed=0).batch(5), loader.batch(5))


def keys_of(samples, steps, batch_size=8):
    loader = Loader(samples, batch_size=batch_size, seed=0)
    return {str(key) for step in range(steps) for key in loader.batch(step)["key"]}


def ids_of(texts):
    return Tokenizer()(texts, 120, True, False)["input_ids"]


def test_an_unreadable_picture_is_left_out_and_named_when_asked_for():
    samples = ImageSamples(Noise(broken=(4,)), BUCKETS)
    assert samples.bucket_of[4] == -1
    assert keys_of(samples, 40) == {f"k{i}" for i in range(60) if i != 4}
    with pytest.raises(UserError, match="k4: the image is empty"):
        samples.read(np.array([4]), 0, np.zeros(1))


def test_a_picture_that_shows_its_damage_only_when_decoded_is_left_out_before_the_first_step():
    class Cut(Noise):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return dataclasses.replace(sample, image=sample.image[:-40]) if index == 7 else sample

    for cache_bytes in (2**30, 0):
        samples = ImageSamples(Cut(), BUCKETS, cache_bytes=cache_bytes)
        assert np.flatnonzero(samples.bucket_of < 0).tolist() == [7]
        (fault,) = samples.faults
        assert (fault.place, fault.kind) == ("k7", "unreadable image")
        assert "cannot be decoded" in fault.detail


def test_the_unreadable_pictures_of_a_large_set_are_kept_for_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "_CACHED_FROM", 2)
    monkeypatch.setenv("PIXART_JAX_CACHE", str(tmp_path))
    for reads in (60, 0):  # the second time none is decoded
        source = Noise(broken=(4,))
        samples = ImageSamples(source, BUCKETS, cache_bytes=0)
        assert np.flatnonzero(samples.bucket_of < 0).tolist() == [4] and source.reads == reads
        assert dict(samples.faults.counts) == {"unreadable image": 1}


def test_tokens_are_those_of_the_chosen_caption_padded_or_cut_to_one_length():
    source = Noise()
    samples = TokenSamples(source, Tokenizer(), (("short", 1.0), ("dense", 3.0)), 120, "dense")
    assert samples.length == 16  # the longest has 9 words and the end
    cut = TokenSamples(source, Tokenizer(), (("dense", 1.0),), 7, "dense")
    batch = Loader(cut, batch_size=30, seed=0).batch(0)
    assert cut.length == 7 and (batch["lengths"] <= 7).all()
    assert (batch["input_ids"][np.arange(30), batch["lengths"] - 1] == 1).all()
    loader, short = Loader(samples, batch_size=20, seed=0), []
    for step in range(50):
        batch = loader.batch(step)
        assert batch["input_ids"].dtype == batch["lengths"].dtype == np.int32
        for ids, length, key in zip(batch["input_ids"], batch["lengths"], batch["key"]):
            sample = source[int(key[1:])]
            short.append(ids[:length].tolist() in ids_of(sample.texts("short")))
            assert short[-1] or ids[:length].tolist() in ids_of(sample.texts("dense"))
            assert not ids[length:].any() and ids[length - 1] == 1
    assert abs(np.mean(short) - 0.25) < 0.05


def test_each_row_brings_the_first_text_of_its_target():
    source, mix = Noise(), (("short", 1.0), ("dense", 1.0))
    samples = TokenSamples(source, Tokenizer(), mix, 120, target="dense")
    batch = Loader(samples, batch_size=40, seed=0).batch(0)
    for row, key in enumerate(batch["key"]):
        target = batch["target_ids"][row, : batch["target_lengths"][row]].tolist()
        ids = batch["input_ids"][row, : batch["lengths"][row]].tolist()
        assert [target] == ids_of(source[int(key[1:])].texts("dense")[:1])
        assert batch["is_target"][row] == (ids == target)
    assert 0 < batch["is_target"].mean() < 1


def test_a_caption_is_chosen_anew_in_each_epoch():
    samples = TokenSamples(Noise(), Tokenizer(), (("short", 1.0), ("dense", 1.0)), 16, "dense")
    loader, lengths = Loader(samples, batch_size=20, seed=0), {}
    for batch in map(loader.batch, range(30)):  # ten epochs
        for key, length in zip(batch["key"], batch["lengths"]):
            lengths.setdefault(key, set()).add(int(length))
    assert np.mean([len(found) > 1 for found in lengths.values()]) > 0.9


def test_text_states_are_real_tokens_then_zeros(tmp_path):
    samples = EncodedSamples(encoded_folder(tmp_path), (("dense", 1.0),), 120)
    batch = Loader(samples, batch_size=8, seed=0).batch(0)
    assert samples.length == 16 and batch["text_states"].dtype == ml_dtypes.bfloat16
    states = batch["text_states"].astype(np.float32)
    for row, key in enumerate(batch["key"]):
        number, length = int(key[1:]), batch["text_lengths"][row]
        assert length == 4 + number % 7 and batch["label"][row] == number % 5
        assert states[row, :length].all() and not states[row, length:].any()
        assert tuple(batch["size"][row]) == (number + 1, number + 2)


def test_damage_stops_the_loader_with_the_shard_s_name(tmp_path):
    folder = encoded_folder(tmp_path)
    path = folder / "1.array_record"
    data = bytearray(path.read_bytes())
    data[data.index(b'"k1"') + 2] ^= 1
    path.write_bytes(data)
    batches = Loader(EncodedSamples(folder, (), 120), batch_size=20, seed=0).iterator()
    with pytest.raises(UserError, match=r"1\.array_record, record 0, is damaged"):
        for _ in range(10):
            next(batches)


def test_flips_are_half_of_all_and_independent_of_the_caption():
    draws = np.random.default_rng(0).random(4000)
    flipped = np.array([is_flipped(draw) for draw in draws])
    for some in (draws >= 0, draws < 0.1, (draws * 1000).astype(int) % 2 == 0):
        assert abs(flipped[some].mean() - 0.5) < 0.06


def test_the_mix_keeps_its_weights_and_its_draw_stays_uniform():
    draws = np.linspace(0, 1, 20_000, endpoint=False)
    kinds = ("long", "short", "none", "tags")
    mix = CaptionMix(zip(kinds, (3.0, 1.0, 0.0, 1.0)), kinds, "set")
    for present, shares in (
        (None, (0.6, 0.2, 0, 0.2)),
        # a sample that lacks a kind takes its others in proportion
        ({"short", "long"}, (0.75, 0.25, 0, 0)),
        ({"tags"}, (0, 0, 0, 1)),
    ):
        chosen = [mix.choose(draw, present) for draw in draws]
        for kind, share in zip(kinds, shares):
            rest = np.array([rest for found, rest in chosen if found == kind])
            assert abs(len(rest) / len(draws) - share) < 5e-3
            if share:
                assert (0 <= rest).all() and (rest < 1).all() and abs(rest.mean() - 0.5) < 2e-2
    for draw in draws[::500]:
        assert mix.choose(draw, {*kinds, "other"}) == mix.choose(draw)


def test_samples_without_a_caption_of_the_mix_are_named_and_left_out():
    class Partly(Noise):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            kind = ("dense", "short")[index % 2]
            return dataclasses.replace(sample, captions={kind: sample.captions[kind]})

    samples = TokenSamples(Partly(), Tokenizer(), (("short", 1.0),), 16, "short")
    assert (samples.bucket_of >= 0).tolist() == [i % 2 == 1 for i in range(60)]
    assert dict(samples.faults.counts) == {"missing caption": 30}
    assert keys_of(samples, 20, 6) == {f"k{i}" for i in range(1, 60, 2)}
    targeted = TokenSamples(Partly(), Tokenizer(), (("short", 1.0), ("dense", 1.0)), 16, "dense")
    assert (targeted.bucket_of >= 0).tolist() == [i % 2 == 0 for i in range(60)]


def test_mistakes_are_named():
    with pytest.raises(UserError, match="no captions of kind 'dens' .did you mean 'dense'"):
        TokenSamples(Noise(), Tokenizer(), (("dens", 1.0),), 16, "dense")
    with pytest.raises(UserError, match="no captions of kind 'dens'"):
        TokenSamples(Noise(), Tokenizer(), (("short", 1.0),), 120, target="dens")
