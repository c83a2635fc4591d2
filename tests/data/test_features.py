"""The features of the official repositories train as they are; what is missing is named, and
nothing takes its place."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest

from pixart_jax.data import features as reading
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.features import FeatureSamples
from pixart_jax.data.loader import Loader
from pixart_jax.data.sources import indexed
from pixart_jax.errors import UserError
from tests.data.tiny_sets import features, intern, sam, write

SIZES = ((24, 40), (40, 24), (32, 32))
NAMES = {"000_000000": (32, 32), "001_000001": (32, 32), "002_000002": (32, 32)}
LATENTS = "img_vae_features_32resolution/noflip"
MIX = (("prompt", 1.0),)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXART_JAX_CACHE", str(tmp_path / "cache"))
    root = intern(tmp_path, SIZES)
    features(root, NAMES, LATENTS)
    return root


def test_rows_are_the_files_numbers_with_lengths_from_the_mask(root):
    samples = FeatureSamples(str(root), MIX, 16)
    assert samples.buckets == ((32, 32),) and samples.bucket_of.tolist() == [0, 0, 0]
    assert samples.length == 8 and not len(samples.faults)
    batch = samples.read(np.array([2, 0]), 0, np.zeros(2))
    assert batch["mean"].shape == batch["std"].shape == (2, 4, 4, 4)
    assert batch["mean"].dtype == np.float32
    posterior = np.load(root / LATENTS / "002_000002.npy")
    np.testing.assert_array_equal(batch["mean"][0], posterior[:4].transpose(1, 2, 0))
    np.testing.assert_array_equal(batch["std"][0], posterior[4:].transpose(1, 2, 0))
    held = np.load(root / "caption_feature_wmask" / "002_000002.npz")
    assert batch["text_lengths"].tolist() == [3, 1] == [int(held["attention_mask"].sum()), 1]
    np.testing.assert_array_equal(
        batch["text_states"][0, :3], held["caption_feature"][0, :3].astype(ml_dtypes.bfloat16)
    )
    assert not batch["text_states"][0, 3:].astype(np.float32).any()
    rest = {"size": [[32, 32], [24, 40]], "key": ["002/000002", "000/000000"]}
    rest |= {"aspect_ratio": [1, 1], "label": [-1, -1]}
    assert {name: batch[name].tolist() for name in rest} == rest
    assert set(batch) == {"mean", "std", "text_states", "text_lengths", *rest}


def test_the_official_hed_features_are_conditions(root):
    """As the official script writes them: under the picture's own path, compressed."""
    rng = np.random.default_rng(0)
    for n in range(3):
        file = root / "hed_feature_32" / f"{n:03d}" / f"{n:06d}.npz"
        file.parent.mkdir(parents=True)
        np.savez_compressed(file, rng.normal(size=(8, 4, 4)).astype(np.float32))
    (root / "hed_feature_64").mkdir()
    samples = FeatureSamples(str(root), MIX, 16, control=True)
    assert samples.fingerprint != FeatureSamples(str(root), MIX, 16).fingerprint
    batch = samples.read(np.array([0, 2]), 0, np.zeros(2))
    held = np.load(file)["arr_0"].transpose(1, 2, 0)
    np.testing.assert_array_equal(batch["control_mean"][1], held[..., :4])
    np.testing.assert_array_equal(batch["control_std"][1], held[..., 4:])
    np.savez_compressed(file, np.zeros((8, 8, 8), np.float32))
    with pytest.raises(
        UserError, match="000002.npz is of .8, 8, 8., its picture's latents of .4, 4."
    ):
        samples.read(np.array([2]), 0, np.zeros(1))
    file.unlink()
    cut = file.parents[1] / "001" / "000001.npz"
    cut.write_bytes(cut.read_bytes()[:-30])
    samples = FeatureSamples(str(root), MIX, 16, control=True)
    assert samples.bucket_of.tolist() == [0, -1, -1]
    assert dict(samples.faults.counts) == {"missing features": 1, "unreadable features": 1}
    (root / "hed_feature_32").rename(root / "hed_feature_128")
    with pytest.raises(UserError, match="no hed_feature_… for the latents in .*32resolution"):
        FeatureSamples(str(root), MIX, 16, control=True)


@pytest.mark.parametrize(
    ("names", "folder"),
    [
        # what the extractor writes and its loader never finds
        (["000000", "000001", "000002"], "img_vae_features/32resolution/noflip"),
        (["000_000000", "001_000001", "002_000002"], "img_vae_fatures_32_multiscale/ms"),
        (["000_000000", "001_000001", "002_000002"], "img_sdxl_vae_features_32resolution_ms_new"),
    ],
)
def test_every_name_that_the_official_tools_give_is_found(tmp_path, names, folder):
    root = intern(tmp_path, SIZES)
    features(root, dict(zip(names, SIZES)), folder)
    samples = FeatureSamples(str(root), MIX, 16)
    assert (samples.bucket_of >= 0).all() and set(samples.buckets) == set(SIZES)
    for index, size in enumerate(SIZES):
        batch = samples.read(np.array([index]), int(samples.bucket_of[index]), np.zeros(1))
        assert batch["mean"].shape == (1, size[0] // 8, size[1] // 8, 4)


@pytest.mark.parametrize("path", ["000/000000.png", "a.png", "x/y/z.png", "sub/na.me.png"])
def test_the_names_are_those_of_the_official_expressions(path):
    names = reading._names(path)
    assert "_".join(path.rsplit("/", 1)).replace(".png", ".npz")[:-4] == names[0]  # both loaders
    # the extractor of several aspect ratios
    assert "_".join(f"InternImgs/{path}".rsplit("/", 2)[-2:]).split(".")[0] in names
    # the extractors of texts and of single sizes, and PixArt-Σ's
    assert pathlib.Path(path).stem in names


def test_sam_s_features_bear_the_pictures_names(tmp_path):
    root = sam(tmp_path / "SA1B")
    names = {f"sa_{i:06d}": (32, 32) for i in range(3)}
    features(root, names, "img_vae_feature/train_vae_256/noflip")
    samples = FeatureSamples(str(root), (("caption", 1.0),), 16)
    assert samples.read(np.array([1]), 0, np.zeros(1))["key"].tolist() == ["sa_000001"]
    assert not len(samples.faults)


def test_what_is_missing_or_damaged_is_named_and_never_replaced(root):
    texts, latents = root / "caption_feature_wmask", root / LATENTS
    (texts / "000_000000.npz").unlink()
    whole = (latents / "001_000001.npy").read_bytes()
    (latents / "001_000001.npy").write_bytes(whole[:-8])
    samples = FeatureSamples(str(root), MIX, 16)
    assert samples.bucket_of.tolist() == [-1, -1, 0]
    assert dict(samples.faults.counts) == {"missing features": 1, "unreadable features": 1}
    missing = "data_info.json, item 1, 000/000000.png: missing features (no 000_000000.npz"
    assert any(missing in str(fault) for fault in samples.faults)
    loader = Loader(samples, batch_size=1, seed=0)
    assert {str(loader.batch(step)["key"][0]) for step in range(5)} == {"002/000002"}
    with pytest.raises(UserError, match="missing features"):
        FeatureSamples(str(root), MIX, 16, faults=BadRecords(strict=True))
    (latents / "001_000001.npy").unlink()
    data = (texts / "002_000002.npz").read_bytes()
    (texts / "002_000002.npz").write_bytes(data[:-30])  # a zip without its end
    message = "no picture has all its features .3 left out: 2 missing features, 1 unreadable"
    with pytest.raises(UserError, match=message):
        FeatureSamples(str(root), MIX, 16)


def test_a_mask_with_holes_and_a_file_that_is_no_posterior_are_unreadable(root):
    np.savez(
        root / "caption_feature_wmask" / "000_000000.npz",
        caption_feature=np.zeros((1, 4, 16), np.float32),
        attention_mask=np.array([[1, 0, 1, 0]]),
    )
    np.save(root / LATENTS / "001_000001.npy", np.zeros((8, 16), np.float32))
    samples = FeatureSamples(str(root), MIX, 16)
    assert samples.bucket_of.tolist() == [-1, -1, 0]
    assert samples.faults.counts["unreadable features"] == 2


def test_a_file_belongs_to_one_picture(tmp_path):
    """000/1.png and 001/1.png: the extractor writes one 1.npz for both."""
    items = [
        {"path": f"{i:03d}/1.png", "height": 32, "width": 32, "ratio": 1.0, "prompt": "x"}
        for i in range(2)
    ]
    write(tmp_path, {"partition/data_info.json": json.dumps(items)})
    features(tmp_path, {"1": (32, 32)}, LATENTS)
    samples = FeatureSamples(str(tmp_path), MIX, 16)
    assert samples.bucket_of.tolist() == [0, -1] and dict(samples.faults.counts) == {"key twice": 1}


def test_a_damaged_file_that_shows_only_when_read_is_named(root):
    samples = FeatureSamples(str(root), MIX, 16)
    file = root / "caption_feature_wmask" / "001_000001.npz"
    data = bytearray(file.read_bytes())
    data[120] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(UserError, match="001_000001.npz is damaged"):
        samples.read(np.array([1]), 0, np.zeros(1))


def test_mistakes_are_named(root):
    for mix, cap, buckets, message in (
        ((("dense", 1.0),), 16, None, "has no captions of kind 'dense'"),
        (MIX, 2, None, "texts of 3 tokens, more than max_text_tokens = 2"),
        (MIX, 16, ((64, 64),), "encoded at 32×32, which the stage's buckets .64×64. do not hold"),
    ):
        with pytest.raises(UserError, match=message):
            FeatureSamples(str(root), mix, cap, buckets=buckets)
    features(root, NAMES, "img_vae_features_64resolution/noflip")
    with pytest.raises(UserError, match="several folders of latents: .*latents=DIR"):
        FeatureSamples(str(root), MIX, 16)
    assert len(FeatureSamples(str(root), MIX, 16, latents=LATENTS)) == 3


def test_what_a_large_set_holds_is_kept_for_the_next_start(root, monkeypatch):
    (root / "caption_feature_wmask" / "000_000000.npz").unlink()
    monkeypatch.setattr(indexed, "_CACHED_FROM", 2)
    first = FeatureSamples(str(root), MIX, 16)
    monkeypatch.setattr(reading, "_features_of", None)
    again = FeatureSamples(str(root), MIX, 16)
    assert again.bucket_of.tolist() == first.bucket_of.tolist() == [-1, 0, 0]
    assert again.faults.counts == first.faults.counts
    rows = np.array([1, 2]), 0, np.zeros(2)
    for name, values in first.read(*rows).items():
        np.testing.assert_array_equal(values, again.read(*rows)[name])


def test_an_error_of_pythons_parser_in_threads_is_no_end(root, monkeypatch):
    """SystemError: AST constructor recursion depth mismatch."""
    load, calls = np.load, []

    def flaky(*arguments, **options):
        calls.append(1)
        if len(calls) % 2:
            raise SystemError("AST constructor recursion depth mismatch")
        return load(*arguments, **options)

    monkeypatch.setattr(np, "load", flaky)
    latents = next(root.rglob("*.npy"))
    np.testing.assert_array_equal(reading._load(str(latents)), load(latents))
    monkeypatch.setattr(np, "load", lambda *_, **__: (_ for _ in ()).throw(SystemError("ever")))
    with pytest.raises(SystemError, match="ever"):
        reading._load(str(latents))
