import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from pixart_jax.data.faults import BadRecords
from pixart_jax.data.sources import Source, open_source
from pixart_jax.errors import UserError
from tests.data.tiny_sets import encoded, picture, write

PHOTO = encoded(picture(), "JPEG")


def kinds(faults: BadRecords) -> dict[str, int]:
    return dict(faults.counts)


def captions(source) -> dict[str, dict[str, tuple[str, ...]]]:
    return {sample.key: dict(sample.captions) for sample in (source[i] for i in range(len(source)))}


def test_pictures_below_a_folder_with_texts_beside_them(tmp_path):
    files = {
        "b/2.PNG": encoded(picture(2, 30, 20)),
        "b/2.txt": "two\n",
        "b/2.dense.txt": "two, at length",
        "a.v1.webp": encoded(picture(1), "WEBP"),
    }
    write(
        tmp_path / "set", files | {"a.v1.txt": "\ufeffone", ".hidden/3.jpg": PHOTO, "c.jpeg": PHOTO}
    )
    for text in (f"folder:{tmp_path / 'set'}", str(tmp_path / "set")):
        source = open_source(text)
        assert isinstance(source, Source) and source.name == "folder:set" and not len(source.faults)
        assert captions(source) == {
            "a.v1": {"caption": ("one",)},
            "b/2": {"caption": ("two",), "dense": ("two, at length",)},
            "c": {},
        }
        assert set(source.caption_kinds) == {"caption", "dense"} and source.num_classes is None
        np.testing.assert_array_equal(source[1].pixels(), picture(2, 30, 20))
        assert source.sizes().tolist() == [[24, 40], [30, 20], [24, 40]]


def rows():
    return [
        {
            "file_name": "a.jpg",
            "short": "a",
            "dense": ["a one", "a two"],
            "label": 2,
            "score": 0.5,
            "url": "https://x",
        },
        {
            "file_name": "deep/b.jpg",
            "short": "b",
            "dense": ["b one"],
            "label": 0,
            "score": 0.1,
            "url": "https://y",
        },
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv", "tsv"])
def test_a_table_of_captions_is_read_in_each_form(tmp_path, suffix):
    write(tmp_path, {"a.jpg": PHOTO, "deep/b.jpg": PHOTO})
    file = tmp_path / f"metadata.{suffix}"
    if suffix == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    elif suffix == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows()), file)
    else:
        mark = "," if suffix == "csv" else "\t"
        file.write_text(
            mark.join(["file_name", "short", "label", "score"])
            + "\n"
            + f'a.jpg{mark}"a"{mark}2{mark}0.5\ndeep/b.jpg{mark}b{mark}0{mark}0.1\n'
        )
    source = open_source(str(tmp_path))
    assert (
        [source[i].label for i in range(2)] == [2, 0]
        and source.num_classes == 3
        and not len(source.faults)
    )
    if suffix in ("jsonl", "parquet"):
        assert captions(source) == {
            "a": {"short": ("a",), "dense": ("a one", "a two")},
            "deep/b": {"short": ("b",), "dense": ("b one",)},
        }
    else:
        assert captions(source) == {"a": {"short": ("a",)}, "deep/b": {"short": ("b",)}}


def test_hugging_faces_imagefolder_names_pictures_from_the_metadata_file_s_own_folder(tmp_path):
    write(
        tmp_path,
        {
            "train/0001.png": encoded(picture(1)),
            "train/metadata.jsonl": '{"file_name": "0001.png", "text": "a gradient"}\n',
        },
    )
    assert captions(open_source(str(tmp_path))) == {"train/0001": {"text": ("a gradient",)}}


def test_a_given_caption_file_goes_before_what_lies_there(tmp_path):
    write(
        tmp_path,
        {
            "set/a.jpg": PHOTO,
            "set/captions.jsonl": '{"key": "a", "caption": "old"}',
            "new.csv": "key,caption\na,new\n",
        },
    )
    assert captions(open_source(f"folder:{tmp_path / 'set'}?captions={tmp_path / 'new.csv'}")) == {
        "a": {"caption": ("new",)}
    }
    with pytest.raises(UserError, match="no caption file 'nowhere.csv'"):
        open_source(f"folder:{tmp_path / 'set'}?captions=nowhere.csv")


def test_captions_that_the_command_caption_wrote_are_of_the_kind_that_it_gave_them(tmp_path):
    write(tmp_path / "set", {"a.jpg": PHOTO, "a.txt": "raw", "b.v2.jpg": PHOTO})
    for kind in ("dense", "short"):
        made = {
            "kind": kind,
            "model": "a/vlm",
            "prompt": "Describe this image",
            "tokens": 9,
            "finish": "stop",
        }
        lines = [
            json.dumps({"key": key, "caption": f"{kind} of {key}", **made}) for key in ("a", "b.v2")
        ]
        (tmp_path / f"{kind}.jsonl").write_text("\n".join(lines) + "\n")
    source = open_source(
        f"folder:{tmp_path / 'set'}?captions={tmp_path / 'dense.jsonl'},{tmp_path / 'short.jsonl'}"
    )
    assert captions(source) == {
        "a": {"dense": ("dense of a",), "short": ("short of a",), "caption": ("raw",)},
        "b.v2": {"dense": ("dense of b.v2",), "short": ("short of b.v2",)},
    }
    assert set(source.caption_kinds) == {"caption", "dense", "short"} and not len(source.faults)


def test_bad_input_is_named_and_counted_and_the_rest_goes_on(tmp_path):
    table = [
        json.dumps({"key": "a", "caption": "good"}),
        json.dumps({"key": "a", "caption": "again"}),
        json.dumps({"key": "nobody", "caption": "x"}),
        "{broken",
        json.dumps(["a"]),
        json.dumps({"caption": "of nothing"}),
        json.dumps({"key": "huge", "caption": "w " * 5_000_000}),
        json.dumps({"key": "odd", "caption": "bell\x07 and\x00 nul"}),
        '{"key": "c", "caption": "cut he',
    ]
    write(
        tmp_path,
        {
            "a.jpg": PHOTO,
            "a.png": encoded(picture(3)),
            "huge.jpg": PHOTO,
            "odd.jpg": PHOTO,
            "empty.jpg": b"",
            "cut.jpg": PHOTO[:-40],
            "long.jpg": PHOTO,
            "long.txt": "x" * 10_000_000,
            "lonely.txt": "no picture",
            "bytes.jpg": PHOTO,
            "bytes.txt": b"caf\xe9 noir",
            "captions.jsonl": "\n".join(table),
        },
    )
    source = open_source(str(tmp_path))
    said = captions(source)
    expected = {
        "key twice": 2,
        "caption without picture": 2,
        "unreadable row": 4,
        "caption too long": 2,
    }
    assert kinds(source.faults) == expected and dict(source.faults.repaired) == {
        "control characters": 1,
        "not UTF-8": 1,
    }
    assert (
        said["a"] == {"caption": ("good",)}
        and said["odd"] == {"caption": ("bell and nul",)}
        and said["bytes"] == {"caption": ("caf\ufffd noir",)}
    )
    assert said["huge"] == said["long"] == {}
    assert (
        source.faults.summary().startswith("10 left out: 4 unreadable row")
        and "2 mended" in source.faults.summary()
    )
    places = [fault.place for fault in source.faults]
    assert (
        "captions.jsonl, row 4" in places
        and "captions.jsonl, row 9" in places
        and "a.png" in places
        and "lonely.txt" in places
    )
    sizes = dict(zip(said, source.sizes().tolist()))
    assert sizes["empty"] == [0, 0] and sizes["cut"] == [24, 40]  # its header is whole
    for key, message in (
        ("empty", "empty: the image is empty"),
        ("cut", "cut: the image cannot be decoded"),
    ):
        with pytest.raises(UserError, match=message):
            source[list(said).index(key)].pixels()
    assert len({source[list(said).index(key)].key for key in said}) == len(source) == 7


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": PHOTO}, "a.png: key twice"),
        ({"b.txt": "x"}, "b.txt: caption without picture"),
        ({"a.txt": "x" * 200_000}, "a.txt: caption too long"),
        ({"captions.jsonl": "{"}, "captions.jsonl, row 1: unreadable row"),
        ({"captions.csv": "key,caption\na\n"}, "captions.csv, row 1: unreadable row"),
    ],
)
def test_strict_stops_at_the_first(tmp_path, files, message):
    write(tmp_path, {"a.jpg": PHOTO} | files)
    assert len(open_source(str(tmp_path))) == 1
    with pytest.raises(UserError, match=message) as caught:
        open_source(str(tmp_path), strict=True)
    assert "\n" not in str(caught.value)


def test_strict_stops_where_a_caption_beside_its_picture_holds_control_characters(tmp_path):
    write(tmp_path, {"a.jpg": PHOTO, "a.txt": "bell\x07"})
    with pytest.raises(UserError, match="a.txt: control characters"):
        open_source(str(tmp_path), strict=True)[0]


def test_a_cut_parquet_file_is_one_line(tmp_path):
    write(tmp_path, {"a.jpg": PHOTO})
    pyarrow.parquet.write_table(
        pa.Table.from_pylist([{"key": "a", "caption": "x"}] * 50), tmp_path / "captions.parquet"
    )
    whole = (tmp_path / "captions.parquet").read_bytes()
    (tmp_path / "captions.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="captions.parquet is no whole Parquet file"):
        open_source(str(tmp_path))


def test_the_fingerprint_changes_with_the_data_and_with_the_choice_alone(tmp_path):
    write(tmp_path / "one", {"a.jpg": PHOTO, "a.txt": "x", "b.jpg": PHOTO})
    first = open_source(str(tmp_path / "one")).fingerprint
    assert open_source(str(tmp_path / "one")).fingerprint == first
    (tmp_path / "one").rename(tmp_path / "two")
    # where it lies is not what it is
    assert open_source(str(tmp_path / "two")).fingerprint == first
    assert open_source(str(tmp_path / "two"), limit=1).fingerprint != first
    (tmp_path / "two" / "a.txt").write_text("other")
    assert open_source(str(tmp_path / "two")).fingerprint != first


def wide(fields):
    return fields["width"] > fields["height"]


def good(fields):
    return fields["score"] > 0.3 and "a" in fields["short"]


def scored(fields):
    return fields["scor"] > 0.3


def test_an_own_filter_sees_sizes_captions_and_the_table_s_other_fields(tmp_path):
    write(
        tmp_path,
        {"a.jpg": PHOTO, "deep/b.jpg": encoded(picture(1, 40, 24), "JPEG"), "c.jpg": PHOTO},
    )
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    assert [s.key for s in open_source(str(tmp_path), where=f"{__name__}:wide")] == ["a", "c"]
    source = open_source(str(tmp_path), where=f"{__name__}:good")
    # c has no row
    assert [s.key for s in source] == ["a"] and kinds(source.faults) == {"missing field": 1}
    assert [s.key for s in open_source(str(tmp_path), where="labelled", limit=1)] == ["a"]
    with pytest.raises(UserError, match="needs the field 'scor', which folder:"):
        open_source(str(tmp_path), where=f"{__name__}:scored")


def clumsy(fields):
    return 1 / fields["label"]


def test_an_own_filter_that_fails_is_named_with_its_record(tmp_path):
    write(tmp_path, {"a.jpg": PHOTO, "captions.jsonl": '{"key": "a", "caption": "x", "label": 0}'})
    with pytest.raises(UserError, match="clumsy' fails on a: ZeroDivisionError"):
        open_source(str(tmp_path), where=f"{__name__}:clumsy")


def test_sizes_of_a_large_set_are_kept_for_the_next_start(tmp_path, monkeypatch):
    from pixart_jax.data.sources import indexed as listed

    monkeypatch.setattr(listed, "_CACHED_FROM", 2)
    monkeypatch.setenv("PIXART_JAX_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "set", {"a.jpg": PHOTO, "b.jpg": PHOTO, "c.jpg": b""})
    sizes = open_source(str(tmp_path / "set")).sizes()
    monkeypatch.setattr(listed.images, "size", None)  # nothing is read anew
    np.testing.assert_array_equal(open_source(str(tmp_path / "set")).sizes(), sizes)
    assert sizes.tolist() == [[24, 40], [24, 40], [0, 0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("folder:nowhere", "no such folder"),
        ("nowhere", "unknown source 'nowhere'"),
        ("foldr:x", "did you mean 'folder'"),
        ("a/b:c", "unknown source"),
    ],
)
def test_mistakes_are_named(text, message):
    with pytest.raises(UserError, match=message) as caught:
        open_source(text)
    assert "\n" not in str(caught.value)


def test_a_folder_without_pictures_and_a_split_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no picture"):
        open_source(str(tmp_path))
    write(tmp_path, {"a.jpg": PHOTO})
    with pytest.raises(UserError, match="has no split 'test'"):
        open_source(str(tmp_path), "test")


def test_img2dataset_s_files_form_has_its_texts_in_json(tmp_path):
    said = {
        "caption": "from the json",
        "url": "https://example.org",
        "width": 40,
        "sha256": "ab",
        "punsafe": 0.1,
    }
    write(
        tmp_path,
        {
            "00000/000000001.jpg": PHOTO,
            "00000/000000001.json": json.dumps(said),
            "00000/000000001.txt": "from the text",
        },
    )
    source = open_source(str(tmp_path))
    assert captions(source) == {
        "00000/000000001": {"caption": ("from the text", "from the json")}
    } and source.caption_kinds == ("caption",)
