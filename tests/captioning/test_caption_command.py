"""``python -m pixart_jax caption`` as it is run: real sources, a real if tiny model, Ray Data with
workers of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")
ray = pytest.importorskip("ray")

from pixart_jax.captioning import caption_command, caption_run  # noqa: E402
from pixart_jax.captioning.caption import CaptionOptions, SourceSpec  # noqa: E402
from pixart_jax.captioning.vision_language import VisionLanguageModel, seed_of  # noqa: E402
from pixart_jax.data.faults import BadRecords  # noqa: E402
from pixart_jax.data.sources import open_source  # noqa: E402
from pixart_jax.errors import UserError  # noqa: E402
from tests.captioning import tiny_vlms, written_captions  # noqa: E402

pytestmark = pytest.mark.slow
FEW = ["--max-new-tokens", "8", "--guard-action", "keep", "--batch-size", "4"]


@pytest.fixture(scope="module")
def cluster():
    """One Ray for all tests of this file; the command uses the one that runs already."""
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=128 * 2**20,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_vlms.llava(tmp_path_factory.mktemp("vlm") / "llava")


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_pictures_are_captioned_by_the_model_and_bad_ones_named(cluster, model, tmp_path, capsys):
    folder = written_captions.folder(tmp_path / "photos", [10, 20, 30, 40, 50, 60])
    (folder / "p001.png").write_bytes(written_captions.png(20, (400, 300))[:-100])
    (folder / "p004.png").write_bytes(b"")
    (folder / "p002.txt").write_text("raw cap\x07tion 2")
    file = tmp_path / "out" / "captions.jsonl"
    arguments = [
        f"folder:{folder}",
        "--model",
        str(model),
        "--out",
        str(file),
        "--raw-caption",
        "caption",
        *FEW,
    ]
    assert caption_command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert (
        "4 captions of 6 pictures" in printed
        and "2 unreadable image; 1 mended: 1 control characters" in printed
        and f"captions: {file}" in printed
    )
    found = lines(file)
    assert [row["key"] for row in found] == ["p000", "p002", "p003", "p005"]
    # the very caption that the model gives when it is asked directly, for one picture alone
    alone, source = VisionLanguageModel(str(model)), open_source(f"folder:{folder}")
    from PIL import Image

    for row in found:
        sample = next(source[i] for i in range(len(source)) if source[i].key == row["key"])
        raw = f"raw caption {int(row['key'][1:])}"
        prompt = (
            f"Give the caption of this image '{raw}', describe this image and its style in a "
            "very detailed manner"
        )
        (said,) = alone.say(
            [Image.fromarray(sample.pixels())],
            [prompt],
            [seed_of(0, row["key"])],
            temperature=0.2,
            most=8,
        )
        assert (row["prompt"], row["caption"], row["tokens"], row["finish"]) == (
            prompt,
            said.text,
            said.tokens,
            said.finish,
        )
        assert (row["kind"], row["model"]) == ("dense", str(model))
    assert {
        row["key"]: row["kind"] for row in lines(tmp_path / "out" / "captions.faults.jsonl")
    } == {"p001": "unreadable image", "p004": "unreadable image"}
    read = open_source(f"folder:{folder}?captions={file}")
    assert read.caption_kinds == ("caption", "dense") and not len(read.faults)
    assert read[0].captions == {"caption": ("raw caption 0",), "dense": (found[0]["caption"],)}
    before = file.read_bytes()
    assert caption_command.main(arguments) == 0  # nothing is left to do
    assert file.read_bytes() == before
    with pytest.raises(UserError, match="written with another .*temperature '0.2', now '0.5'"):
        caption_command.main([*arguments, "--temperature", "0.5"])


def test_strict_stops_at_the_first_bad_picture_and_keeps_what_was_captioned(cluster, tmp_path):
    folder = written_captions.folder(tmp_path / "photos", [0] * 8)
    (folder / "p006.png").write_bytes(b"")
    source = open_source(f"folder:{folder}")
    opening = SourceSpec(f"folder:{folder}", fingerprint=source.fingerprint)

    def run(strict: bool):
        return caption_run.run(
            source,
            opening,
            tmp_path / "c.jsonl",
            CaptionOptions("written"),
            caption_run.Cluster(batch_size=4, gpus_per_worker=0),
            faults=BadRecords(strict),
            open_model=written_captions.Written,
        )

    with pytest.raises(UserError, match="p006: unreadable image.*without --strict"):
        run(strict=True)
    assert len(lines(tmp_path / "c.jsonl.partial")) == 1 + 7
    assert run(strict=False)["left out"] == {"unreadable image": 1}
    assert len(lines(tmp_path / "c.jsonl")) == 7


def test_two_workers_write_what_one_writes_and_guards_are_counted(cluster, tmp_path):
    folder = written_captions.folder(tmp_path / "photos", [0, 1, 2, 3, 4, 5] * 3)
    made = {}
    for workers in (1, 2):
        source = open_source(f"folder:{folder}")
        opening = SourceSpec(f"folder:{folder}", fingerprint=source.fingerprint)
        made[workers] = caption_run.run(
            source,
            opening,
            tmp_path / f"{workers}.jsonl",
            CaptionOptions("written", guard_action="drop"),
            caption_run.Cluster(workers=workers, batch_size=18 // workers, gpus_per_worker=0),
            open_model=written_captions.Written,
        )
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
    assert made[1]["captions"] == 3 and made[1]["guards"] == made[2]["guards"]
    assert made[1]["guards"] == {
        "truncated": 6,
        "empty": 3,
        "repeating": 3,
        "refusal": 3,
        "unfinished": 3,
    }
    assert made[1]["left out"] == {
        "truncated caption": 6,
        "empty caption": 3,
        "refusal caption": 3,
        "unfinished caption": 3,
    }


def test_tars_as_img2dataset_writes_them_get_the_captions_inside(cluster, model, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "00000.tar", "w") as out:
        pictures = written_captions.folder(tmp_path / "photos", [10, 20, 30])
        for file in sorted(pictures.iterdir()):
            out.add(file, file.name)
    arguments = [
        f"webdataset:{tmp_path / 'in'}",
        "--model",
        str(model),
        "--format",
        "webdataset",
        "--out",
        str(tmp_path / "out"),
        *FEW,
    ]
    assert caption_command.main(arguments) == 0
    assert "3 members *.dense.txt in 1 tars" in capsys.readouterr().out
    source = open_source(f"webdataset:{tmp_path / 'out'}")
    assert {"caption", "dense"} <= set(source.caption_kinds) and len(source) == 3
    told = {row["key"]: row["caption"] for row in lines(tmp_path / "out" / "captions.jsonl")}
    for index in range(3):
        sample = source[index]
        assert sample.captions["caption"] == (f"raw caption {index}",)
        assert sample.captions["dense"] == (told[sample.key],)


def test_texts_lie_beside_the_pictures_where_that_is_asked_for(cluster, model, tmp_path):
    folder = written_captions.folder(tmp_path / "photos", [10, 20, 30])
    arguments = [
        f"folder:{folder}",
        "--model",
        str(model),
        "--format",
        "txt",
        "--in-place",
        "--out",
        str(tmp_path / "work"),
        *FEW,
    ]
    assert caption_command.main(arguments) == 0
    source = open_source(f"folder:{folder}")
    assert {"caption", "dense"} <= set(source.caption_kinds)
    told = {row["key"]: row["caption"] for row in lines(tmp_path / "work" / "captions.jsonl")}
    assert [source[i].captions["dense"] for i in range(3)] == [
        (told[source[i].key],) for i in range(3)
    ]
    # the folder has changed by our own files: keys say that all is done
    assert caption_command.main(arguments) == 0
    assert {
        row["key"]: row["caption"] for row in lines(tmp_path / "work" / "captions.jsonl")
    } == told


def test_a_worker_s_complaint_is_one_line(cluster, tmp_path):
    folder = written_captions.folder(tmp_path / "photos", [0])
    source = open_source(f"folder:{folder}")
    opening = SourceSpec(f"folder:{folder}", fingerprint="another")
    with pytest.raises(UserError, match="all machines must see the same data") as caught:
        caption_run.run(
            source,
            opening,
            tmp_path / "c.jsonl",
            CaptionOptions("written"),
            caption_run.Cluster(gpus_per_worker=0),
            open_model=written_captions.Written,
        )
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["folder:x", "--model", "m"], "--out is missing"),
        (["folder:x", "--model", "m", "--out", "x"], "NAME.jsonl is needed"),
        (["folder:x", "--model", "m", "--out", "x.jsonl", "--in-place"], "--in-place goes with"),
        (
            ["folder:x", "--model", "m", "--out", "x", "--format", "webdataset"],
            "folder:x is a folder",
        ),
        (["folder:x", "--model", "m", "--out", "x.jsonl", "--format", "txt"], "it is a folder"),
        (
            ["folder:x", "--model", "nowhere/at-all", "--out", "x.jsonl"],
            "no model folder nowhere/at-all here",
        ),
        (["folder:x", "--model", "m", "--out", "x.jsonl", "--batch-size", "0"], "batch size 0"),
        (["folder:x", "--model", "m", "--out", "x.jsonl", "--temprature", "0"], "--temperature"),
        (["folder:x", "--model", "m", "--out", "x.jsonl", "--kind", "a/b"], "--kind 'a/b'"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        caption_command.main(arguments)
    assert "\n" not in str(caught.value)


def test_killed_at_any_moment_the_same_command_goes_on_and_no_key_is_lost_or_twice(tmp_path, root):
    """Each process starts a Ray of its own, as the command does on a laptop."""
    folder, file = (
        written_captions.folder(tmp_path / "photos", [0] * 24),
        tmp_path / "out" / "c.jsonl",
    )
    command = [
        sys.executable,
        "-m",
        "tests.captioning.caption_until_killed",
        str(folder),
        str(file),
    ]
    environment = {**os.environ, "PYTHONPATH": str(root), "RAY_worker_niceness": "0"}
    partial = file.with_name("c.jsonl.partial")

    def written() -> int:
        return partial.read_bytes().count(b"\n") - 1 if partial.exists() else 0

    before = 0
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log)
        limit = time.monotonic() + 240
        while written() < 8 and time.monotonic() < limit and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = written()
        assert 8 <= before < 24, (tmp_path / "log").read_text()[-2000:]
        with open(partial, "ab") as cut:
            cut.write(b'{"index": 23, "key": "p0')  # the line that a kill leaves
        done = subprocess.run(
            command, cwd=root, env=environment, stdout=log, stderr=log, timeout=300
        )
    assert done.returncode == 0, (tmp_path / "log").read_text()[-2000:]
    assert f"{before}/24" in (tmp_path / "log").read_text()  # it went on where it was
    found = lines(file)
    assert [row["key"] for row in found] == [f"p{n:03d}" for n in range(24)]
    assert all(row["caption"] == written_captions.expected(row["key"]) for row in found)
