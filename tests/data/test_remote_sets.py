"""Sources and encoded shards in gs:// and s3:// buckets, against emulators on loopback: the same
samples as from a disk, in the same order, and few requests."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from pixart_jax import files
from pixart_jax.data import records
from pixart_jax.data.encoded import EncodedSamples
from pixart_jax.data.loader import Loader
from pixart_jax.data.sources import open_source
from pixart_jax.encoding import command, encode
from pixart_jax.encoding.options import EncodeOptions
from pixart_jax.errors import Notice, UserError
from pixart_jax.remote_path import RemotePath, located
from tests.data.tiny_sets import encoded, img2dataset, picture, write
from tests.encoding import tiny_encoders as tiny

OPTIONS = EncodeOptions(((32, 32), (32, 64)), ("short",), 24, batch_size=4, shard_size=4)
MIX = (("short", 1.0),)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXART_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made(folder, **changes):
    models = {"vae": tiny.vae(), "text_encoder": tiny.text_encoder(), "tokenizer": tiny.words()}
    how = {**models, **changes, "folder": folder, "progress": False}
    return encode.encode_dataset(tiny.Noise(40), OPTIONS, **how)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    return made(tmp_path_factory.mktemp("shards") / "set")


def contents(folder) -> dict[str, bytes]:
    found = files.list_files(str(folder))
    return {e.address[len(str(folder)) + 1 :]: files.read_bytes(e.address) for e in found}


def test_a_path_of_a_bucket_has_pathlib_s_names(store):
    root = located(f"{store.root}/a")
    assert isinstance(root, RemotePath) and not root.is_dir()
    files.put(str(root / "x" / "b.txt"), bytes(range(100)) * 2_000)
    files.put(str(root / "c.txt"), b"c")
    assert str(located(str(root).replace("://", ":/"))) == str(root)  # as a pathlib.Path shows it
    assert root.parent.name == store.bucket and (root / "c.txt").stem == "c"
    root = located(str(root))
    assert [str(p) for p in root.glob("*")] == [f"{root}/c.txt"]
    assert [p.name for p in root.rglob("*.txt")] == ["c.txt", "b.txt"]
    with (root / "x/b.txt").open(start=10, stop=150_000) as file:
        assert file.read(3) == bytes([10, 11, 12])
        file.seek(139_990)
        assert file.read() == (bytes(range(100)) * 2_000)[140_000:150_000]
    (root / "c.txt").unlink()
    assert not (root / "c.txt").exists() and (root / "x/b.txt").is_file()


def test_encoding_into_a_bucket_writes_the_same_files_and_resumes(gs, on_disk):
    folder, calls = f"{gs.root}/set", []

    class Stop(Exception):
        pass

    def vae(stop_after):
        one = tiny.vae()
        plain = one.encode

        def encode_some(pixels):
            calls.append(len(pixels))
            if len(calls) > stop_after:
                raise Stop
            return plain(pixels)

        one.encode = encode_some
        return one

    with pytest.raises(Stop):
        made(folder, vae=vae(4))
    left = set(contents(folder))
    assert "progress/identity.json" in left and "manifest.json" not in left
    held = [name for name in left if name.endswith(".array_record")]
    assert 0 < len(held) < 10 and {f"progress/{name}.json" for name in held} <= left
    first, calls[:] = len(calls) - 1, []
    assert str(made(folder, vae=vae(10**6))) == folder
    assert contents(folder) == contents(on_disk)  # the notes are gone
    whole = len(records.Manifest.read(folder).shards)
    assert len(calls) < first + whole  # what was there was not made again
    calls.clear()
    made(folder, vae=vae(0))  # nothing to do
    assert not calls and "40 records" in command.summary(located(folder))
    command.check(located(folder))


@pytest.fixture(scope="module")
def in_bucket(s3, on_disk):
    files.upload(on_disk, f"{s3.root}/set", last="manifest.json")
    return f"{s3.root}/set"


def keys(loader: Loader, steps: int) -> list[list[str]]:
    batches = loader.iterator()
    try:
        return [next(batches)["key"].tolist() for _ in range(steps)]
    finally:
        batches.close()


@pytest.mark.parametrize("window", [0, 2])
def test_shards_of_a_bucket_give_the_batches_of_a_disk(s3, in_bucket, on_disk, window):
    def loader(folder):
        samples = EncodedSamples(folder, MIX, 24, window=window)
        return Loader(samples, batch_size=4, seed=1, window=window)

    before = s3.proxy.requests["GET"]
    local, remote = loader(on_disk), loader(in_bucket)
    assert keys(remote, 20) == keys(local, 20)
    shards = len(remote.samples._records.manifest.shards)
    assert s3.proxy.requests["GET"] - before <= 3 * shards + 6  # a listing or status and one read
    np.testing.assert_array_equal(local.batch(7)["mean"], remote.batch(7)["mean"])


def test_a_window_bounds_the_shards_of_a_moment_and_serves_all_equally(on_disk):
    samples = EncodedSamples(on_disk, MIX, 24)
    loader = Loader(samples, batch_size=4, seed=5, window=2)
    held = samples._records
    epoch = range(loader.plan.first_step(1))
    batches = [loader.plan.batch(step) for step in epoch]
    counts = np.bincount(np.concatenate([b.indices for b in batches]), minlength=len(samples))
    assert counts.max() - counts.min() <= 1
    assert max(len(held.shards_of(b.indices)) for b in batches) <= 4  # two windows where they meet
    whole = Loader(samples, batch_size=4, seed=5).plan
    assert max(len(held.shards_of(whole.batch(step).indices)) for step in epoch) == 4
    orders = [np.concatenate([loader.plan._pass(0, n)]) for n in (0, 1)]
    assert (orders[0] != orders[1]).any() and (np.sort(orders[0]) == np.sort(orders[1])).all()


def test_the_cache_keeps_its_size_and_refuses_what_it_cannot_hold(s3, in_bucket, cache):
    manifest = records.Manifest.read(in_bucket)
    largest = max(shard.bytes for shard in manifest.shards)
    samples = EncodedSamples(in_bucket, MIX, 24, cache_gb=8.5 * largest / 1e9, window=2)
    loader = Loader(samples, batch_size=4, seed=1, window=2)
    keys(loader, 30)
    held = list(cache.glob("staged/*/*.array_record"))
    assert 0 < sum(path.stat().st_size for path in held) <= 10.5 * largest  # two are in flight
    with pytest.raises(UserError, match=r"data.cache_gb is .*data.shuffle_shards"):
        EncodedSamples(in_bucket, MIX, 24, cache_gb=2 * largest / 1e9)


def test_a_damaged_shard_of_a_bucket_is_named(s3, on_disk, tmp_path):
    folder = shutil.copytree(on_disk, tmp_path / "bad")
    victim = next(folder.glob("00001*"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    files.upload(folder, f"{s3.root}/bad")
    stored = records.Records(f"{s3.root}/bad")
    with pytest.raises(UserError, match="bad/00001-32x32.array_record is damaged: its checksum"):
        stored[5]
    files.delete(f"{s3.root}/bad/{victim.name}")
    with pytest.raises(UserError, match="00001-32x32.array_record is missing"):
        records.Records(f"{s3.root}/bad")


def same_samples(ours, theirs) -> None:
    assert ours.caption_kinds == theirs.caption_kinds and len(ours) == len(theirs) > 0
    assert ours.sizes().tolist() == theirs.sizes().tolist()
    assert [(s.key, s.image, s.captions, s.label) for s in ours] == [
        (s.key, s.image, s.captions, s.label) for s in theirs
    ]


def test_folders_tars_and_parquet_of_a_bucket_are_read_as_of_a_disk(store, tmp_path):
    sets = {"folder": tmp_path / "folder", "tars": tmp_path / "tars", "rows": tmp_path / "rows"}
    photos = {f"{i % 2}/{i}.png": encoded(picture(i, 20 + i)) for i in range(5)}
    table = "\n".join(
        json.dumps({"file": f"{i % 2}/{i}.png", "long": f"row {i}"}) for i in range(5)
    )
    write(sets["folder"], {**photos, "0/2.txt": "two", "captions.jsonl": table, ".hidden.png": ""})
    sets["tars"].mkdir()
    for n in range(2):
        img2dataset(sets["tars"] / f"{n:05d}.tar", 10 * n, 3)
    sets["rows"].mkdir()
    images = [{"bytes": encoded(picture(i)), "path": None} for i in range(3)]
    rows = pa.table({"image": images, "text": ["a", "b", "c"], "label": [1, 2, 3]})
    pa.parquet.write_table(rows, sets["rows"] / "train.parquet", row_group_size=2)
    for name, folder in sets.items():
        files.upload(folder, f"{store.root}/{name}")
    with pytest.warns(Notice, match="`encode` makes shards"):
        same_samples(open_source(f"{store.root}/folder"), open_source(str(sets["folder"])))
    for form in ("{}/tars", "webdataset:{}/tars/{{00000..00001}}.tar", "webdataset:{}/tars/*.tar"):
        same_samples(open_source(form.format(store.root)), open_source(form.format(tmp_path)))
    same_samples(open_source(f"{store.root}/rows"), open_source(str(sets["rows"])))
    mixed = open_source(f"0.5*{store.root}/rows + 0.5*webdataset:{store.root}/tars/00000.tar")
    assert len(mixed) == 6

    # a tar that was replaced since it was indexed
    source = open_source(f"{store.root}/tars/00001.tar")
    img2dataset(sets["tars"] / "other.tar", 30, 3)
    files.upload(sets["tars"] / "other.tar", f"{store.root}/tars/00001.tar")
    with pytest.raises(UserError, match="was replaced"):
        source[0]
    assert open_source(f"{store.root}/tars/00001.tar")[0].key == "000000030"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s3://no-such-bucket-here/x", "there is no bucket no-such-bucket-here"),
        ("{}/nothing", "nothing lies there"),
        ("folder:{}/nothing", "no such folder"),
        ("webdataset:{}/nothing.tar", "no such tar"),
        ("pixart:{}/x", "read from a disk: copy it to one"),
        ("az://bucket/x", "begin with gs:// or s3://"),
        ("s3:///x", "write s3://BUCKET/NAME"),
    ],
)
def test_bad_addresses_are_one_line(s3, source, message):
    with pytest.raises(UserError, match=message):
        open_source(source.format(s3.root))
