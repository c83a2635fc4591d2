import concurrent.futures
import dataclasses
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from pixart_jax.data import records
from pixart_jax.data.encoded import EncodedSamples
from pixart_jax.data.loader import Loader
from pixart_jax.encoding import encode
from pixart_jax.encoding.options import EncodeOptions
from pixart_jax.errors import UserError
from tests.encoding import tiny_encoders as tiny

ROOT = pathlib.Path(__file__).parents[2]
BUCKETS = ((32, 32), (32, 64), (64, 32))


OPTIONS = EncodeOptions(BUCKETS, ("short", "dense"), 24, batch_size=4, shard_size=8)


def run(folder, source=None, vae=None, text_encoder=None, process=(0, 1), **changes):
    return encode.encode_dataset(
        source or tiny.Noise(50),
        dataclasses.replace(OPTIONS, **changes),
        vae=vae or tiny.vae(),
        text_encoder=text_encoder or tiny.text_encoder(),
        tokenizer=tiny.words(),
        folder=folder,
        process_index=process[0],
        process_count=process[1],
        progress=False,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return run(tmp_path_factory.mktemp("made") / "set")


@pytest.fixture
def folder(made, tmp_path):
    """Encoded shards that a test may damage."""
    return shutil.copytree(made, tmp_path / "set")


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_two_runs_at_once_make_every_shard_once(made, tmp_path, capfd):
    """The second waits, and then finds all shards made."""
    tiny.words()  # imports transformers, which two threads at once cannot
    vae, encoded = tiny.vae(delay=0.05), []
    plain = vae.encode

    def counted(pixels):
        encoded.append(len(pixels))
        return plain(pixels)

    vae.encode = counted
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run, tmp_path / "set", vae=vae) for _ in range(2)]
        assert [r.result() for r in runs] == [tmp_path / "set"] * 2
    once = len(encoded)
    run(tmp_path / "alone", vae=vae)
    assert len(encoded) == 2 * once > 0
    assert files(tmp_path / "set") == files(tmp_path / "alone") == files(made)
    assert "another run encodes" in capfd.readouterr().out


def test_a_crash_at_any_shard_ends_with_the_files_of_an_uninterrupted_run(tmp_path, monkeypatch):
    """The write of each shard in turn fails, before and after the shard is on the disk."""
    write, crashes = records.write_shard, []

    def crash_once(path, made):
        if (path.name, "before") not in crashes:
            crashes.append((path.name, "before"))
            path.with_name(f".{path.name}.partial").write_bytes(b"half a shard")
            raise MemoryError
        count = write(path, made)
        if (path.name, "after") not in crashes:
            crashes.append((path.name, "after"))
            raise MemoryError
        return count

    monkeypatch.setattr(records, "write_shard", crash_once)
    source = tiny.Noise(20)
    for number in range(1, 100):
        try:
            run(tmp_path / "crashed", source)
            break
        except MemoryError:
            assert len(crashes) == number and not (tmp_path / "crashed/manifest.json").exists()
    assert len(crashes) == 2 * len(records.Manifest.read(tmp_path / "crashed").shards) > 4
    monkeypatch.undo()
    assert files(tmp_path / "crashed") == files(run(tmp_path / "whole", source))


@pytest.mark.slow
def test_encode_killed_often_ends_with_the_files_of_an_uninterrupted_run(tmp_path):
    def start(folder, delay):
        return subprocess.Popen(
            [sys.executable, "-m", "tests.encoding.encode_until_killed", folder, str(delay)],
            cwd=ROOT,
        )

    assert start(tmp_path / "whole", 0).wait(600) == 0
    whole = files(tmp_path / "whole")
    random.seed(3)
    kills = 0
    for _ in range(5):
        process = start(tmp_path / "killed", 0.03)
        deadline = time.monotonic() + 300
        shards = len(list((tmp_path / "killed").glob("*.array_record")))
        # until it has made something since it began
        while process.poll() is None and time.monotonic() < deadline:
            if len(list((tmp_path / "killed").glob("*.array_record"))) > shards + random.randint(
                0, 1
            ):
                break
            time.sleep(0.005)
        time.sleep(random.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    kept = files(tmp_path / "killed")
    assert kills >= 3 and records.MANIFEST not in kept
    assert start(tmp_path / "killed", 0).wait(600) == 0
    assert files(tmp_path / "killed") == whole
    manifest = records.Manifest.read(tmp_path / "killed")
    assert manifest.samples == 88 and [key for key, _ in manifest.skipped] == [
        "noise-00050",
        "noise-00007",
    ]


def test_present_shards_are_verified_and_not_made_again(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert run(folder, shard_size=16) == folder  # how a finished set is cut does not matter
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"vae": tiny.vae(1.5)}, "vae"),
        ({"text_encoder": tiny.text_encoder(1)}, "text_encoder"),
        ({"max_text_tokens": 16}, "max_text_tokens"),
        ({"source": tiny.Noise(49)}, "samples"),
        ({"buckets": BUCKETS[:2]}, "buckets"),
    ],
)
def test_shards_of_another_encoder_or_set_are_refused_by_name(made, change, name):
    with pytest.raises(UserError, match=f"was encoded with something else: {name} is"):
        run(made, **change)


def test_only_a_deleted_shard_is_made_anew_and_a_short_one_is_named_and_kept(made, folder):
    victim = folder / "00001-32x32.array_record"
    victim.unlink()
    with pytest.raises(UserError, match="00001-32x32.array_record is missing"):
        records.Records(folder)
    run(folder)
    assert files(folder) == files(made)
    victim.write_bytes(victim.read_bytes()[:-100])
    for attempt in (run, records.Records):
        with pytest.raises(UserError, match="00001-32x32.array_record is damaged"):
            attempt(folder)
    assert victim.exists()


def test_two_processes_share_the_work(made, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run, tmp_path / "shared", process=(index, 2)) for index in (0, 1)]
        assert [one.result(60) for one in runs] == [tmp_path / "shared"] * 2
    assert files(tmp_path / "shared") == files(made)


def test_processes_that_do_not_share_the_folder_are_told_so(tmp_path):
    (tmp_path / "progress").mkdir()
    with pytest.raises(UserError, match="not shared by 2 processes"):
        encode.wait_for_processes(tmp_path, 0, 2, timeout=0.1)


def test_a_set_without_captions_needs_no_text_encoder(tmp_path):
    options = dataclasses.replace(OPTIONS, captions=())
    folder = encode.encode_dataset(
        tiny.Noise(20), options, vae=tiny.vae(), folder=tmp_path / "set", progress=False
    )
    batch = Loader(EncodedSamples(folder, (), 120), batch_size=4, seed=0).batch(0)
    assert set(batch) == {"mean", "std", "label", "size", "aspect_ratio", "key"}


def test_unknown_caption_kind_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match="did you mean 'dense'"):
        run(tmp_path / "set", captions=("dence",))


def test_loader_reads_what_was_encoded(made):
    source = tiny.Noise(50)
    samples = EncodedSamples(made, (("dense", 3.0), ("short", 1.0)), 24)
    loader = Loader(samples, batch_size=8, seed=1)
    seen, kinds = {}, []
    for step in range(60):
        batch = loader.batch(step)
        height, width = samples.buckets[loader.plan.batch(step).bucket]
        assert batch["mean"].shape == batch["std"].shape == (8, height // 8, width // 8, 4)
        assert batch["text_states"].shape == (8, samples.length, 16) and samples.length == 16
        padding = np.arange(samples.length)[None] >= batch["text_lengths"][:, None]
        assert not batch["text_states"].astype(np.float32)[padding].any()
        np.testing.assert_allclose(batch["aspect_ratio"], height / width)
        for row, key in enumerate(batch["key"]):
            index = int(key.split("-")[1])
            assert tuple(batch["size"][row]) == source.shape(index)
            assert batch["label"][row] == index % 5
            length = int(batch["text_lengths"][row])
            kinds.append(length == len(source[index].captions["short"][0].split()) + 1)
            if key in seen:
                np.testing.assert_array_equal(seen[key], batch["mean"][row])
            seen[key] = batch["mean"][row]
    assert len(seen) == 50
    assert 0.15 < np.mean(kinds) < 0.35  # the mix asks for a quarter of short captions
    parts = (range(4), range(4, 8))
    halves = [Loader(samples, batch_size=8, seed=1, rows=rows).batch(7) for rows in parts]
    for name, value in loader.batch(7).items():
        np.testing.assert_array_equal(value, np.concatenate([half[name] for half in halves]))


def test_texts_longer_than_the_stage_takes_are_refused(made):
    with pytest.raises(UserError, match="max_text_tokens = 8"):
        EncodedSamples(made, (("dense", 1.0),), 8)
