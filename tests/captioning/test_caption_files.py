"""The log of a captioning run, and the export of its captions."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from pixart_jax.captioning import export
from pixart_jax.captioning.log import open_log
from pixart_jax.data.faults import BadRecords
from pixart_jax.errors import Notice, UserError

IDENTITY = {"model": "a", "prompt": "paper"}


def row(index: int, **more) -> dict:
    return {"index": index, "key": f"k{index}", "caption": f"caption {index}", **more}


class Keys(list):
    """A source of which only keys matter."""

    fingerprint = "f"

    def captions_at(self, index):
        return self[index], {}


def log(path, count=5, identity=IDENTITY, keys=None):
    source = Keys(keys or [f"k{i}" for i in range(count)])
    source.fingerprint = "g" if keys else "f"
    return open_log(path / "c.jsonl", identity, source)


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_captions_come_in_the_sources_order_each_once(tmp_path):
    with log(tmp_path) as made:
        made.append(
            [row(3), row(1), {"index": 2, "key": "k2", "left_out": ["unreadable image", "cut"]}]
        )
        made.append([row(1, caption="again"), row(0), row(4)])
        assert made.done.all()
        made.finalize(lambda r: {"key": r["key"], "caption": r["caption"]}, {"captions": 4})
    rows = [{"key": f"k{i}", "caption": f"caption {i}"} for i in (0, 1, 3, 4)]
    assert lines(tmp_path / "c.jsonl") == rows
    assert json.loads((tmp_path / "c.manifest.json").read_text())["captions"] == 4
    assert not (tmp_path / "c.jsonl.partial").exists()
    with log(tmp_path) as again:
        assert again.manifest["captions"] == 4
    for damaged in ("", "{", "[]", "{}"):
        (tmp_path / "c.manifest.json").write_text(damaged)
        with pytest.raises(UserError, match="c.manifest.json is damaged"), log(tmp_path):
            pass


@pytest.mark.parametrize("cut", [1, 5, 30, 80, 10_000])
def test_a_journal_cut_at_any_byte_goes_on_with_what_was_whole(tmp_path, cut):
    with log(tmp_path) as made:
        made.append([row(i) for i in range(3)])
    data = made.partial.read_bytes()
    made.partial.write_bytes(data[: max(0, len(data) - cut)])
    with log(tmp_path) as again:
        assert again.done.sum() == max(0, data[: max(0, len(data) - cut)].count(b"\n") - 1)
        again.append([row(i) for i in range(5)])
        again.finalize(lambda r: r, {})
    assert [r["key"] for r in lines(tmp_path / "c.jsonl")] == [f"k{i}" for i in range(5)]


def test_a_damaged_line_is_named_and_nothing_is_changed(tmp_path):
    with log(tmp_path) as made:
        made.append([row(i) for i in range(3)])
    damaged = made.partial.read_bytes().replace(b'"index": 1', bytes(10))
    made.partial.write_bytes(damaged)
    with pytest.raises(UserError, match="line 3, is damaged"), log(tmp_path):
        pass
    assert made.partial.read_bytes() == damaged


@pytest.mark.parametrize("finished", [False, True])
def test_captions_of_another_model_are_refused(tmp_path, finished):
    with log(tmp_path) as made:
        made.append([row(i) for i in range(5)])
        if finished:
            made.finalize(lambda r: r, {})
    other = {"model": "b", "prompt": "paper"}
    with pytest.raises(UserError, match="written with another model 'a', now 'b'"):
        log(tmp_path, identity=other).__enter__()


def test_a_foreign_file_is_not_overwritten_and_two_runs_do_not_write_one(tmp_path):
    (tmp_path / "c.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match="was not written by this command"):
        log(tmp_path).__enter__()
    assert (tmp_path / "c.jsonl").read_text() == "mine\n"
    (tmp_path / "c.jsonl").unlink()
    with log(tmp_path), pytest.raises(UserError, match="another run is writing it"):
        log(tmp_path).__enter__()


@pytest.mark.parametrize("finished", [True, False])
def test_a_source_that_changed_keeps_its_captions_by_key(tmp_path, finished):
    with log(tmp_path) as made:
        made.append([row(i) for i in range(5)])
        if finished:
            made.finalize(lambda r: r, {})
    # two pictures went, one came, the order is another
    keys = ["new", "k1", "k0", "k4"]
    notice = "3 captions are kept, 2 captions belong to pictures that are gone"
    with pytest.warns(Notice, match=notice), log(tmp_path, keys=keys) as again:
        assert again.done.tolist() == [False, True, True, True]
        again.append([{"index": 0, "key": "new", "caption": "new"}])
        again.finalize(lambda r: {"key": r["key"], "caption": r["caption"]}, {})
    found = [r["caption"] for r in lines(tmp_path / "c.jsonl")]
    assert found == ["new", "caption 1", "caption 0", "caption 4"]


@pytest.mark.parametrize("step", ["c.jsonl", "c.manifest.json", "end"])
def test_a_crash_while_the_files_are_written_loses_nothing(tmp_path, monkeypatch, step):
    replace = os.replace

    def crash_at(name, step_taken):
        if Path(name).name == step:
            raise MemoryError
        return step_taken()

    skipped = {"index": 1, "key": "k1", "left_out": ["unreadable image", "cut"]}
    with log(tmp_path, 2) as made:
        made.append([row(0), skipped])
        monkeypatch.setattr(os, "replace", lambda a, b: crash_at(b, lambda: replace(a, b)))
        if step == "end":
            monkeypatch.setattr(Path, "unlink", lambda path, **how: crash_at("end", None))
        with pytest.raises(MemoryError):
            made.finalize(lambda r: r, {"captions": 1})
    monkeypatch.undo()
    with log(tmp_path, 2) as again:
        assert again.manifest is None and again.done.all()
        again.finalize(lambda r: r, {"captions": 1})
    assert [r["key"] for r in lines(tmp_path / "c.jsonl")] == ["k0"]


# ---- export ----


def captions(tmp_path, texts: dict[str, str]):
    file = tmp_path / "captions.jsonl"
    rows = [{"key": key, "caption": text} for key, text in texts.items()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def to_tars(tmp_path, texts, tars, out="out", faults=None):
    faults = BadRecords() if faults is None else faults
    return export.to_tars(captions(tmp_path, texts), tars, tmp_path / out, "dense", faults)


def tar(path, names, sizes=None, form=tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as out:
        for number, name in enumerate(names):
            data = bytes([number + 1]) * ((sizes or {}).get(name, 700 + number))
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_700_000_000.5 + number
            info.uid, info.uname = 1234, "somebody"
            out.addfile(info, io.BytesIO(data))
    return path


def members(file) -> dict[str, bytes]:
    with tarfile.open(file) as found:
        return {member.name: found.extractfile(member).read() for member in found}


LONG = "a" * 150
NAMES = ["000.jpg", "000.txt", "000.json", "001.jpg", f"{LONG}.jpg", f"{LONG}.txt", "b/002.png"]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tars_get_a_member_a_sample_and_keep_theirs(tmp_path, form):
    old, copy = tar(tmp_path / "in" / "00000.tar", NAMES, form=form), tmp_path / "out" / "00000.tar"
    before = old.read_bytes()
    texts = {"000": "A dog.", "001": "Ünicode — 猫.", LONG: "Long. " * 300, "b/002": "A cat."}
    faults = BadRecords()
    assert to_tars(tmp_path, texts, [old], faults=faults) == (4, 4)
    assert not len(faults) and old.read_bytes() == before
    samples = zip(texts, (NAMES[:3], NAMES[3:4], NAMES[4:6], NAMES[6:]))
    wanted = [name for key, sample in samples for name in (*sample, f"{key}.dense.txt")]
    found, was = members(copy), members(old)
    assert list(found) == wanted and {name: found[name] for name in was} == was
    with tarfile.open(old) as one, tarfile.open(copy) as two:
        facts = ("name", "size", "mode", "mtime", "uid", "uname", "type")
        for member in one:
            other = two.getmember(member.name)
            assert [getattr(other, fact) for fact in facts] == [getattr(member, f) for f in facts]
    assert {key: found[f"{key}.dense.txt"].decode() for key in texts} == texts


def test_a_copy_is_complete_or_made_again_and_no_text_is_replaced(tmp_path):
    old, out = tar(tmp_path / "in" / "00000.tar", NAMES), tmp_path / "out"
    file = captions(tmp_path, {"000": "A dog.", "001": "A cat."})
    times = set()
    for _ in range(2):
        assert export.to_tars(file, [old], out, "dense", BadRecords()) == (2, 2)
        times.add((out / "00000.tar").stat().st_mtime_ns)
    assert len(times) == 1
    assert [copy.name for copy in out.iterdir()] == ["00000.tar"]
    with pytest.raises(UserError, match="000.dense.txt that says something else"):
        to_tars(tmp_path, {"000": "A cow."}, [out / "00000.tar"], "twice")


def test_a_tar_that_is_cut_is_named_and_keeps_what_is_before_the_cut(tmp_path):
    old = tar(tmp_path / "in" / "00000.tar", NAMES, {"001.jpg": 5000})
    with tarfile.open(old) as whole:
        inside = whole.getmember("001.jpg").offset_data + 100
    old.write_bytes(old.read_bytes()[:inside])
    faults = BadRecords()
    assert to_tars(tmp_path, {"000": "A dog.", "001": "A cat."}, [old], faults=faults) == (1, 2)
    assert faults.counts == {"cut file": 1} and "001.jpg" in str(list(faults)[0])
    assert list(members(tmp_path / "out" / "00000.tar")) == [*NAMES[:3], "000.dense.txt"]


def test_a_compressed_tar_and_the_originals_folder_are_refused(tmp_path):
    old = tar(tmp_path / "in" / "00000.tar", NAMES)
    with pytest.raises(UserError, match="the folder of the tars themselves"):
        to_tars(tmp_path, {"000": "A dog."}, [old], "in")
    with tarfile.open(tmp_path / "in" / "z.tar", "w:gz") as out:
        out.addfile(tarfile.TarInfo("x.jpg"))
    with pytest.raises(UserError, match="not an uncompressed tar"):
        to_tars(tmp_path, {"000": "A dog."}, [tmp_path / "in" / "z.tar"])


def test_a_key_that_two_tars_have_gets_its_own_caption_or_none(tmp_path):
    names = ("a.tar", "b.tar", "c.tar")
    old = [tar(tmp_path / "in" / name, ["000.jpg", "000.txt"]) for name in names]
    # the picture in b could not be read
    assert to_tars(tmp_path, {"000": "In a.", "c/000": "In c."}, old) == (2, 2)
    found = [members(tmp_path / "out" / name).get("000.dense.txt") for name in names]
    assert found == [b"In a.", None, b"In c."]


def test_texts_are_written_below_the_folder_alone_and_never_over_another_text(tmp_path):
    found = captions(tmp_path, {"a/b": "A dog.", "../out": "no", "c": "A cat."})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "c.txt").write_text("mine\n")
    faults = BadRecords()
    assert export.to_texts(found, tmp_path / "out", ".txt", faults, replace=False) == 1
    assert (tmp_path / "out" / "a" / "b.txt").read_text() == "A dog.\n"
    assert (tmp_path / "out" / "c.txt").read_text() == "mine\n"
    assert faults.counts == {"unusable key": 1, "file in the way": 1}
    assert sorted(f.name for f in tmp_path.iterdir()) == ["captions.jsonl", "out"]
