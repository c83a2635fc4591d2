"""``python -m pixart_jax caption``: real sources and a real if tiny model, in this process; and, in
the slow tests, on Ray Data with workers of their own."""

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
from PIL import Image

pytest.importorskip("torch")

from pixart_jax.captioning import caption_command, run  # noqa: E402
from pixart_jax.captioning.model import VisionLanguageModel, seed_of  # noqa: E402
from pixart_jax.data.sources import open_source  # noqa: E402
from pixart_jax.errors import UserError  # noqa: E402
from tests.captioning import tiny_vlms, written_captions  # noqa: E402

FEW = ["--max-new-tokens", "8", "--guard-action", "keep", "--batch-size", "4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_vlms.llava(tmp_path_factory.mktemp("vlm") / "llava")


@pytest.fixture
def here(monkeypatch):
    """The command captions in this process."""
    pytest.importorskip("ray")
    monkeypatch.setattr(run, "ray_batches", written_captions.in_process)


@pytest.fixture
def written(monkeypatch):
    written_captions.use(monkeypatch)


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_images_are_captioned_by_the_model_and_bad_ones_named(here, model, tmp_path, capsys):
    folder = written_captions.folder(tmp_path / "photos", [10, 20, 30, 40, 50, 60])
    (folder / "p001.png").write_bytes(written_captions.png(20, (400, 300))[:-100])
    (folder / "p004.png").write_bytes(b"")
    (folder / "p002.txt").write_text("raw cap\x07tion 2")
    file = tmp_path / "out" / "captions.jsonl"
    arguments = [f"folder:{folder}", "--model", str(model), "--out", str(file)]
    arguments += ["--raw-caption", "caption", *FEW]
    assert caption_command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert (
        "6 read: 4 used, 2 left out: 2 unreadable image" in printed
        and f"captions: {file}" in printed
    )
    assert "2 unreadable image; 1 mended: 1 control characters" in printed
    found = lines(file)
    assert [row["key"] for row in found] == ["p000", "p002", "p003", "p005"]
    # the caption that the model gives when it is asked directly, for one image alone
    alone, source = VisionLanguageModel(str(model)), open_source(f"folder:{folder}")
    for row in found:
        sample = next(source[i] for i in range(len(source)) if source[i].key == row["key"])
        prompt = (
            f"Give the caption of this image 'raw caption {int(row['key'][1:])}', describe this "
            "image and its style in a very detailed manner"
        )
        images, seeds = [Image.fromarray(sample.pixels())], [seed_of(0, row["key"])]
        (made,) = alone.generate(images, [prompt], seeds, temperature=0.2, max_new_tokens=8)
        assert (row["prompt"], row["caption"]) == (prompt, made.text)
        assert (row["tokens"], row["finish"]) == (made.tokens, made.finish)
        assert (row["kind"], row["model"]) == ("dense", str(model))
    faults = lines(tmp_path / "out" / "captions.faults.jsonl")
    assert [(row["place"], row["kind"]) for row in faults if not row["mended"]] == [
        ("p001", "unreadable image"),
        ("p004", "unreadable image"),
    ]
    read = open_source(f"folder:{folder}?captions={file}")
    assert read.caption_kinds == ("caption", "dense") and not len(read.faults)
    assert read[0].captions == {"caption": ("raw caption 0",), "dense": (found[0]["caption"],)}
    before = file.read_bytes()
    assert caption_command.main(arguments) == 0  # nothing is left to do
    assert file.read_bytes() == before
    with pytest.raises(UserError, match="written with another .*temperature '0.2', now '0.5'"):
        caption_command.main([*arguments, "--temperature", "0.5"])


def test_strict_stops_at_the_first_bad_image_and_keeps_what_was_captioned(written, tmp_path):
    folder = written_captions.folder(tmp_path / "photos", [0] * 8)
    (folder / "p006.png").write_bytes(b"")
    file = tmp_path / "c.jsonl"
    with pytest.raises(UserError, match="p006: unreadable image.*without --strict"):
        written_captions.caption(f"folder:{folder}", file, strict=True)
    assert len(lines(tmp_path / "c.jsonl.partial")) == 1 + 7
    made = written_captions.caption(f"folder:{folder}", file)
    assert made["left out"] == {"unreadable image": 1} and len(lines(file)) == 7


def test_captions_made_before_a_crash_are_kept_and_not_made_again(tmp_path, monkeypatch):
    """The crash comes at each batch in turn, and leaves an incomplete last line."""
    calls: list[int] = []

    class Crashing(written_captions.Written):
        def generate(self, images, *arguments, **options):
            calls.append(len(images))
            if len(calls) % 2 == 0:
                raise MemoryError
            return super().generate(images, *arguments, **options)

    written_captions.use(monkeypatch, Crashing)
    folder, file = written_captions.folder(tmp_path / "photos", [0] * 12), tmp_path / "c.jsonl"
    for batch in range(1, 3):
        with pytest.raises(MemoryError):
            written_captions.caption(f"folder:{folder}", file)
        partial = tmp_path / "c.jsonl.partial"
        assert len(lines(partial)) == 1 + 4 * batch and not file.exists()
        with open(partial, "ab") as cut:
            cut.write(b'{"index": 11, "key": "p0')
    assert written_captions.caption(f"folder:{folder}", file)["captions"] == 12
    assert len(calls) == 5  # three batches, and the two that crashed
    assert [row["key"] for row in lines(file)] == [f"p{n:03d}" for n in range(12)]


def test_a_crash_while_the_left_out_are_written_loses_nothing(tmp_path, monkeypatch):
    folder, file = written_captions.folder(tmp_path / "photos", [0] * 3), tmp_path / "c.jsonl"
    (folder / "p001.png").write_bytes(b"")
    replace = os.replace

    def crash(a, b):
        if Path(b).name == "c.faults.jsonl":
            raise MemoryError
        return replace(a, b)

    written_captions.use(monkeypatch, written_captions.Written)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(os, "replace", crash)
        written_captions.caption(f"folder:{folder}", file)
    assert not file.exists() and not (tmp_path / "c.faults.jsonl").exists()
    assert written_captions.caption(f"folder:{folder}", file)["captions"] == 2
    (fault,) = lines(tmp_path / "c.faults.jsonl")
    assert (fault["place"], fault["kind"]) == ("p001", "unreadable image")


def test_tars_as_img2dataset_writes_them_get_the_captions_inside(here, model, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "00000.tar", "w") as out:
        for file in sorted(written_captions.folder(tmp_path / "photos", [10, 20, 30]).iterdir()):
            out.add(file, file.name)
    arguments = [f"webdataset:{tmp_path / 'in'}", "--model", str(model), *FEW]
    arguments += ["--format", "webdataset", "--out", str(tmp_path / "out")]
    assert caption_command.main(arguments) == 0
    assert "3 members *.dense.txt in 1 tars" in capsys.readouterr().out
    source = open_source(f"webdataset:{tmp_path / 'out'}")
    assert {"caption", "dense"} <= set(source.caption_kinds) and len(source) == 3
    made = {row["key"]: row["caption"] for row in lines(tmp_path / "out" / "captions.jsonl")}
    for index in range(3):
        sample = source[index]
        assert sample.captions["caption"] == (f"raw caption {index}",)
        assert sample.captions["dense"] == (made[sample.key],)


def test_texts_lie_beside_the_images_where_that_is_asked_for(here, model, tmp_path):
    folder = written_captions.folder(tmp_path / "photos", [10, 20, 30])
    arguments = [f"folder:{folder}", "--model", str(model), *FEW]
    arguments += ["--format", "txt", "--in-place", "--out", str(tmp_path / "work")]
    assert caption_command.main(arguments) == 0
    source, file = open_source(f"folder:{folder}"), tmp_path / "work" / "captions.jsonl"
    assert {"caption", "dense"} <= set(source.caption_kinds)
    made = {row["key"]: row["caption"] for row in lines(file)}
    for index in range(3):
        assert source[index].captions["dense"] == (made[source[index].key],)
    # the folder has changed by our own files: keys show that all is done
    assert caption_command.main(arguments) == 0
    assert {row["key"]: row["caption"] for row in lines(file)} == made


def test_a_worker_that_sees_another_source_ends_the_run_in_one_line(written, tmp_path, monkeypatch):
    folder = written_captions.folder(tmp_path / "photos", [0])

    def elsewhere(pending, worker, cluster):
        return written_captions.in_process(pending, {**worker, "fingerprint": "another"}, cluster)

    monkeypatch.setattr(run, "ray_batches", elsewhere)
    with pytest.raises(UserError, match="all machines must see the same data") as caught:
        written_captions.caption(f"folder:{folder}", tmp_path / "c.jsonl")
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model m", "--out"),
        ("--model m --out x", "NAME.jsonl is needed"),
        ("--model m --out x.jsonl --in-place", "--in-place goes with"),
        ("--model m --out x --format webdataset", "folder:x is a folder"),
        ("--model m --out x --format webdataset --in-place", "--in-place goes with"),
        ("--model m --out x.jsonl --format txt", "it is a folder"),
        ("--model nowhere/at-all --out x.jsonl", "nowhere/at-all: no such folder"),
        ("--model m --out x.jsonl --batch-size 0", "batch size 0"),
        ("--model m --out x.jsonl --temprature 0", "--temperature"),
        ("--model m --out x.jsonl --kind a/b", "--kind 'a/b'"),
        ("--model m --out x.jsonl --guard-action redo", "guard-action"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        caption_command.main(["folder:x", *arguments.split()])
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_two_ray_workers_write_what_one_process_writes_and_guards_are_counted(
    tmp_path, monkeypatch
):
    pytest.importorskip("ray")
    folder = written_captions.folder(tmp_path / "photos", [0, 1, 2, 3, 4, 5] * 3)
    made = {}
    for workers in (2, 1):
        written_captions.use(monkeypatch, ray=workers == 2)
        made[workers] = written_captions.caption(
            f"folder:{folder}",
            tmp_path / f"{workers}.jsonl",
            workers=workers,
            batch_size=18 // workers,
            guard_action="drop",
        )
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
    kinds = {"truncated": 6, "empty": 3, "repeating": 3, "refusal": 3, "unfinished": 3}
    assert made[1]["captions"] == 3 and made[1]["guards"] == made[2]["guards"] == kinds
    kinds.pop("repeating")
    assert made[1]["left out"] == {f"{name} caption": count for name, count in kinds.items()}


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_goes_on_and_no_key_is_lost_or_twice(tmp_path, root):
    """Each process starts a Ray of its own, as the command does on a laptop."""
    pytest.importorskip("ray")
    folder = written_captions.folder(tmp_path / "photos", [0] * 24)
    file = tmp_path / "out" / "c.jsonl"
    module = "tests.captioning.caption_until_killed"
    command = [sys.executable, "-m", module, str(folder), str(file)]
    environment = {**os.environ, "PYTHONPATH": str(root), "RAY_worker_niceness": "0"}
    partial = file.with_name("c.jsonl.partial")

    def written() -> int:
        return partial.read_bytes().count(b"\n") - 1 if partial.exists() else 0

    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log)
        limit = time.monotonic() + 240
        while written() < 8 and time.monotonic() < limit and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = written()
        assert 8 <= before < 24, (tmp_path / "log").read_text()[-2000:]
        done = subprocess.run(
            command, cwd=root, env=environment, stdout=log, stderr=log, timeout=300
        )
    said = (tmp_path / "log").read_text()
    assert done.returncode == 0, said[-2000:]
    assert f"{before}/24" in said  # it went on where it was
    found = {row["key"]: row["caption"] for row in lines(file)}
    assert list(found) == [f"p{n:03d}" for n in range(24)]
    assert all(caption == written_captions.expected(key) for key, caption in found.items())
