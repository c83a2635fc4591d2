import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from pixart_jax.data.sources import Source, indexed, open_source
from pixart_jax.errors import UserError
from tests.data.tiny_sets import captions, encoded, picture, write

PHOTO = encoded(picture(), "JPEG")
ROWS = [
    {"file_name": "a.jpg", "short": "a", "dense": ["a one", "a two"], "label": 2, "score": 0.5},
    {"file_name": "deep/b.jpg", "short": "b", "dense": ["b one"], "label": 0, "score": 0.1},
]
for row in ROWS:
    row["url"] = "https://x"


def jsonl(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_pictures_below_a_folder_with_texts_beside_them(tmp_path):
    files = {
        "b/2.PNG": encoded(picture(2, 30, 20)),
        "b/2.txt": "two\n",
        "b/2.dense.txt": "two, at length",
        "a.v1.webp": encoded(picture(1), "WEBP"),
        "a.v1.txt": "\ufeffone",
        ".hidden/3.jpg": PHOTO,
        "c.jpeg": PHOTO,
    }
    write(tmp_path / "set", files)
    for text in (f"folder:{tmp_path / 'set'}", str(tmp_path / "set")):
        source = open_source(text)
        assert isinstance(source, Source) and source.name == "folder:set" and not len(source.faults)
        assert captions(source) == {
            "a.v1": {"caption": ("one",)},
            "b/2": {"caption": ("two",), "dense": ("two, at length",)},
            "c": {},
        }
        assert set(source.caption_kinds) == {"caption", "dense"}
        np.testing.assert_array_equal(source[1].pixels(), picture(2, 30, 20))
        assert source.sizes().tolist() == [[24, 40], [30, 20], [24, 40]]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv", "tsv"])
def test_a_table_of_captions_is_read_in_each_form(tmp_path, suffix):
    write(tmp_path, {"a.jpg": PHOTO, "deep/b.jpg": PHOTO})
    file = tmp_path / f"metadata.{suffix}"
    expected = {"a": {"short": ("a",)}, "deep/b": {"short": ("b",)}}
    if suffix in ("jsonl", "parquet"):
        expected["a"]["dense"], expected["deep/b"]["dense"] = ("a one", "a two"), ("b one",)
    if suffix == "jsonl":
        file.write_text(jsonl(ROWS))
    elif suffix == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), file)
    else:
        text = 'file_name,short,label,score\na.jpg,"a",2,0.5\ndeep/b.jpg,b,0,0.1\n'
        file.write_text(text.replace(",", "," if suffix == "csv" else "\t"))
    source = open_source(str(tmp_path))
    assert captions(source) == expected and [sample.label for sample in source] == [2, 0]
    assert not len(source.faults)


def test_hugging_faces_imagefolder_names_pictures_from_the_metadata_file_s_own_folder(tmp_path):
    row = '{"file_name": "0001.png", "text": "a gradient"}\n'
    write(tmp_path, {"train/0001.png": encoded(picture(1)), "train/metadata.jsonl": row})
    assert captions(open_source(str(tmp_path))) == {"train/0001": {"text": ("a gradient",)}}


def test_a_given_caption_file_goes_before_what_lies_there(tmp_path):
    files = {"set/a.jpg": PHOTO, "set/captions.jsonl": '{"key": "a", "caption": "old"}'}
    write(tmp_path, files | {"new.csv": "key,caption\na,new\n"})
    source = open_source(f"folder:{tmp_path / 'set'}?captions={tmp_path / 'new.csv'}")
    assert captions(source) == {"a": {"caption": ("new",)}}
    with pytest.raises(UserError, match="no caption file 'nowhere.csv'"):
        open_source(f"folder:{tmp_path / 'set'}?captions=nowhere.csv")


def test_captions_that_the_command_caption_wrote_are_of_the_kind_that_it_gave_them(tmp_path):
    write(tmp_path / "set", {"a.jpg": PHOTO, "a.txt": "raw", "b.v2.jpg": PHOTO})
    made = {"model": "a/vlm", "prompt": "Describe this image", "tokens": 9, "finish": "stop"}
    for kind in ("dense", "short"):
        rows = [{"key": key, "caption": f"{kind} of {key}", "kind": kind} for key in ("a", "b.v2")]
        write(tmp_path, {f"{kind}.jsonl": jsonl(row | made for row in rows)})
    tables = ",".join(str(tmp_path / f"{kind}.jsonl") for kind in ("dense", "short"))
    source = open_source(f"folder:{tmp_path / 'set'}?captions={tables}")
    assert captions(source) == {
        "a": {"dense": ("dense of a",), "short": ("short of a",), "caption": ("raw",)},
        "b.v2": {"dense": ("dense of b.v2",), "short": ("short of b.v2",)},
    }
    assert set(source.caption_kinds) == {"caption", "dense", "short"} and not len(source.faults)


def test_img2dataset_s_files_form_has_its_texts_in_json(tmp_path):
    said = {"caption": "from the json", "url": "https://example.org", "width": 40, "sha256": "ab"}
    files = {".jpg": PHOTO, ".json": json.dumps(said), ".txt": "from the text"}
    write(tmp_path, {f"00000/1{suffix}": data for suffix, data in files.items()})
    source = open_source(str(tmp_path))
    assert captions(source) == {"00000/1": {"caption": ("from the text", "from the json")}}
    assert source.caption_kinds == ("caption",)


def test_bad_input_is_named_and_counted_and_the_rest_goes_on(tmp_path):
    pairs = [("a", "good"), ("a", "again"), ("nobody", "x")]
    pairs += [("huge", "w " * 5_000_000), ("odd", "bell\x07 and\x00 nul")]
    table = [json.dumps({"key": key, "caption": caption}) for key, caption in pairs]
    table[3:3] = ["{broken", json.dumps(["a"]), json.dumps({"caption": "of nothing"})]
    table.append('{"key": "c", "caption": "cut he')
    files = {f"{name}.jpg": PHOTO for name in ("a", "huge", "odd", "long", "bytes")}
    files |= {"a.png": encoded(picture(3)), "empty.jpg": b"", "cut.jpg": PHOTO[:-40]}
    files |= {"long.txt": "x" * 10_000_000, "lonely.txt": "none", "bytes.txt": b"caf\xe9 noir"}
    write(tmp_path, files | {"captions.jsonl": "\n".join(table)})
    source = open_source(str(tmp_path))
    said = captions(source)
    counts = {"caption without picture": 2, "key twice": 1, "unreadable row": 4}
    assert dict(source.faults.counts) == counts
    assert dict(source.faults.repaired) == {
        "control characters": 1,
        "not UTF-8": 1,
        "caption too long": 2,
    }
    assert len(said) == len(source) == 7 and said["huge"] == said["long"] == {}
    assert said["a"] == {"caption": ("good", "again")}
    for key, text in (("odd", "bell and nul"), ("bytes", "caf\ufffd noir")):
        assert said[key] == {"caption": (text,)}
    summary = source.faults.summary()
    assert summary.startswith("7 left out: 4 unreadable row") and "4 mended" in summary
    places = {fault.place for fault in source.faults}
    assert {"captions.jsonl, line 4", "captions.jsonl, line 9", "a.png", "lonely.txt"} <= places
    sizes = dict(zip(said, source.sizes().tolist()))
    assert sizes["empty"] == [0, 0] and sizes["cut"] == [24, 40]  # its header is whole
    for key, message in (("empty", "the image is empty"), ("cut", "the image cannot be decoded")):
        with pytest.raises(UserError, match=f"{key}: {message}"):
            source[list(said).index(key)].pixels()


@pytest.mark.parametrize(
    ("files", "captions_of_a", "left_out"),
    [
        ({"a.TXT": "x"}, {"caption": ("x",)}, {}),
        ({"a.Dense.Txt": "x", "a.JSON": '{"short": "y"}'}, {"dense": ("x",), "short": ("y",)}, {}),
        ({"a.caption": "x", "a.foo": "y", "b.FOO": "z"}, {"caption": ("x",)}, {".foo": 2}),
        ({"Metadata.CSV": "File_Name;Text\na.jpg;x\n"}, {"Text": ("x",)}, {}),
        (
            {"captions.csv": "key,caption\na,x\na,y\na,x\n"},
            {"caption": ("x", "y")},
            {"key twice": 1},
        ),
        ({"metadata.json": '[{"file_name": "a.jpg", "text": ["x", null]}]'}, {"text": ("x",)}, {}),
        (
            {
                "captions_val2017.json": '{"images": [{"id": 1, "file_name": "a.jpg"}], '
                '"annotations": [{"image_id": 1, "caption": "x"}, {"image_id": 1, "caption": "y"}]}'
            },
            {"caption": ("x", "y")},
            {},
        ),
        ({"meta_cap.json": '{"a.jpg": {"caption": "x"}}'}, {"caption": ("x",)}, {}),
        ({"captions.csv": "name,caption\na,x\nb,y\n"}, {}, {"unreadable table": 1}),
        ({"a.txt": "x".encode("utf-16")}, {"caption": ("x",)}, {}),
        ({"lonely.json": "{}", "README": "x"}, {}, {".json": 1, "no suffix": 1}),
    ],
)
def test_every_file_is_used_or_named(tmp_path, files, captions_of_a, left_out):
    write(tmp_path, {"a.jpg": PHOTO} | files)
    source = open_source(str(tmp_path))
    assert captions(source) == {"a": captions_of_a}
    assert dict(source.faults.counts + source.faults.unread) == left_out


def test_images_embedded_in_parquet(tmp_path):
    rows = [
        {"image": {"bytes": encoded(picture(n)), "path": None}, "text": f"t{n}"} for n in range(5)
    ]
    rows[3]["image"]["bytes"] = None
    for name, some in (("train-0", rows[:2]), ("train-1", rows[2:])):
        (tmp_path / "data").mkdir(exist_ok=True)
        file = tmp_path / "data" / f"{name}.parquet"
        image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        table = pa.Table.from_pylist(some, pa.schema({"image": image, "text": pa.string()}))
        pyarrow.parquet.write_table(table, file, row_group_size=2)
    for text in (str(tmp_path), f"parquet:{tmp_path / 'data' / 'train-*.parquet'}"):
        source = open_source(text)
        keys = ["train-0-000000", "train-0-000001"] + [f"train-1-{n:06d}" for n in range(3)]
        assert captions(source) == {key: {"text": (f"t{n}",)} for n, key in enumerate(keys)}
        assert source.sizes().tolist() == [[24, 40]] * 3 + [[0, 0], [24, 40]]
        np.testing.assert_array_equal(source[4].pixels(), picture(4))
    with pytest.raises(UserError, match="train-1-000001: the image is empty"):
        source[3].pixels()
    beside = {"a.jpg": PHOTO, "metadata.parquet": (tmp_path / "data/train-0.parquet").read_bytes()}
    write(tmp_path / "mixed", beside)
    assert open_source(str(tmp_path / "mixed")).faults.counts == {"embedded picture": 2}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": PHOTO}, "a.png: key twice"),
        ({"b.txt": "x"}, "b.txt: caption without picture"),
        ({"a.txt": "x" * 200_000}, "a.txt: caption too long"),
        ({"captions.jsonl": "{"}, "captions.jsonl, line 1: unreadable row"),
        ({"captions.csv": "key,caption\na\n"}, "captions.csv, line 2: unreadable row"),
        ({"a.txt": "bell\x07"}, "a.txt: control characters"),
    ],
)
def test_strict_stops_at_the_first(tmp_path, files, message):
    write(tmp_path, {"a.jpg": PHOTO} | files)
    assert len(open_source(str(tmp_path))) == 1
    with pytest.raises(UserError, match=message) as caught:
        open_source(str(tmp_path), strict=True)[0]
    assert "\n" not in str(caught.value)


def test_a_cut_parquet_file_is_one_line(tmp_path):
    write(tmp_path, {"a.jpg": PHOTO})
    file = tmp_path / "captions.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist([{"key": "a", "caption": "x"}] * 50), file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="captions.parquet is not a complete Parquet file"):
        open_source(str(tmp_path))


def test_the_fingerprint_changes_with_the_data_and_with_the_choice_alone(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    write(one, {"a.jpg": PHOTO, "a.txt": "x", "b.jpg": PHOTO})
    first = open_source(str(one)).fingerprint
    assert open_source(str(one)).fingerprint == first
    one.rename(two)  # where it lies is not what it is
    assert open_source(str(two)).fingerprint == first
    assert open_source(str(two), limit=1).fingerprint != first
    (two / "a.txt").write_text("other")
    assert open_source(str(two)).fingerprint != first


def wide(fields):
    return fields["width"] > fields["height"]


def good(fields):
    return fields["score"] > 0.3 and "a" in fields["short"]


def scored(fields):
    return fields["scor"] > 0.3


def clumsy(fields):
    return 1 / fields["label"]


def test_an_own_filter_sees_sizes_captions_and_the_table_s_other_fields(tmp_path):
    tall = encoded(picture(1, 40, 24), "JPEG")
    write(tmp_path, {"a.jpg": PHOTO, "deep/b.jpg": tall, "c.jpg": PHOTO})
    write(tmp_path, {"captions.jsonl": jsonl(ROWS)})

    def chosen(where, **options):
        return open_source(str(tmp_path), where=where, **options)

    assert [s.key for s in chosen(f"{__name__}:wide")] == ["a", "c"]
    source = chosen(f"{__name__}:good")
    # c has no row
    assert [s.key for s in source] == ["a"] and source.faults.counts == {"missing field": 1}
    assert [s.key for s in chosen("labelled", limit=1)] == ["a"]
    for where, message in (
        ("scored", "needs the field 'scor', which folder:"),
        ("clumsy", "clumsy' fails on deep/b: ZeroDivisionError"),
    ):
        with pytest.raises(UserError, match=message):
            chosen(f"{__name__}:{where}")


def test_sizes_of_a_large_set_are_kept_for_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "_CACHED_FROM", 2)
    monkeypatch.setenv("PIXART_JAX_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "set", {"a.jpg": PHOTO, "b.jpg": PHOTO, "c.jpg": b""})
    sizes = open_source(str(tmp_path / "set")).sizes()
    monkeypatch.setattr(indexed.images, "size", None)  # nothing is read anew
    np.testing.assert_array_equal(open_source(str(tmp_path / "set")).sizes(), sizes)
    assert sizes.tolist() == [[24, 40], [24, 40], [0, 0]]


@pytest.mark.parametrize(
    ("text", "split", "message"),
    [
        ("folder:nowhere", "train", "no such folder"),
        ("nowhere", "train", "unknown source 'nowhere'"),
        ("foldr:x", "train", "did you mean 'folder'"),
        ("a/b:c", "train", "unknown source"),
        ("{}", "train", "holds no picture"),
        ("{}", "test", "has no split 'test'"),
    ],
)
def test_mistakes_are_named(tmp_path, text, split, message):
    with pytest.raises(UserError, match=message) as caught:
        open_source(text.format(tmp_path), split)
    assert "\n" not in str(caught.value)
