import io
import json
import tarfile

import numpy as np
import pytest

from pixart_jax.data import images
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.sources import open_source, webdataset
from pixart_jax.errors import UserError
from tests.data.tiny_sets import captions, encoded, img2dataset, picture, tar

PHOTO = encoded(picture(), "JPEG")
FORMS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXART_JAX_CACHE", str(tmp_path / "cache"))


def keys(source) -> list[str]:
    return [sample.key for sample in source]


@pytest.mark.parametrize(
    "form",
    [
        "{}",
        "webdataset:{}",
        "webdataset:{}/{{00000..00002}}.tar",
        "webdataset:{}/{{00000,00001,00002}}.tar",
        "webdataset:{}/*.tar",
    ],
)
def test_shards_of_img2dataset_are_read_at_random(tmp_path, form):
    for i in range(3):
        img2dataset(tmp_path / f"{i:05d}.tar", 10 * i, 4)
    source = open_source(form.format(tmp_path))
    assert source.caption_kinds == ("caption",) and not len(source.faults)
    numbers = [10 * i + j for i in range(3) for j in range(4)]
    assert keys(source) == [f"{number:09d}" for number in numbers]
    for index in (11, 0, 5):
        # once, though .txt and .json both say it
        assert source[index].captions == {"caption": (f"a photo number {numbers[index]}",)}
        jpeg = encoded(picture(numbers[index]), "JPEG", quality=95)
        np.testing.assert_array_equal(source[index].pixels(), images.decode(jpeg))
    assert source.sizes().tolist() == [[24, 40]] * 12


def test_members_of_other_kinds_are_captions_labels_and_fields(tmp_path):
    members = {
        "deep/a.png": encoded(picture(1)),
        "deep/a.cls": "2",
        "deep/a.dense.txt": "at length",
    }
    members |= {"deep/a.json": json.dumps({"short": "a", "score": 0.9}), "b.v2.jpg": PHOTO}
    members |= {"b.jpg": PHOTO, "b.txt": "b", "b.cls": "0", "b.json": json.dumps({"score": 0.1})}
    members |= {"c.webp": encoded(picture(2), "WEBP"), "notes.md": "read me"}
    members |= {"c.json": json.dumps({"score": 0.2, "label": 4})}
    path = str(tar(tmp_path / "set.tar", members))
    source = open_source(path)
    assert keys(source) == ["deep/a", "b", "c"]
    assert set(source.caption_kinds) == {"caption", "dense", "short"}
    assert source[0].captions == {"dense": ("at length",), "short": ("a",)}
    assert [sample.label for sample in source] == [2, 0, 4]
    assert keys(open_source(path, where=f"{__name__}:scored")) == ["deep/a"]


def scored(fields):
    return fields["score"] > 0.3 and fields["width"] == 40


@pytest.mark.parametrize("form", FORMS)
def test_long_and_foreign_names_are_understood_in_every_form_of_tar(tmp_path, form):
    name = ("n" * 60 + "/") * 2 + "photo" if form == tarfile.USTAR_FORMAT else "länger/" + "n" * 200
    members = {f"{name}.jpg": PHOTO, f"{name}.txt": "x"}
    source = open_source(str(tar(tmp_path / "a.tar", members, form)))
    assert captions(source) == {name: {"caption": ("x",)}}


@pytest.mark.parametrize("form", FORMS)
def test_headers_say_what_tarfile_reads_and_no_cut_is_a_traceback(tmp_path, form):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as out:
        for number in range(12):
            name = f"dir/{'n' * (0 if form == tarfile.USTAR_FORMAT else 30 * number)}{number}.jpg"
            info = tarfile.TarInfo(name)
            info.size = 100 * number
            out.addfile(info, io.BytesIO(bytes(info.size)))
            for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE):
                link = tarfile.TarInfo(f"link{number}.jpg")
                link.type, link.linkname = kind, name
                out.addfile(link)
    with tarfile.open(path) as held:
        places = {m.name: (m.offset_data, m.size) for m in held if m.isreg()}
        expected = [
            (m.name, *places[m.linkname if m.issym() else m.name]) for m in held if not m.isdir()
        ]

    def members():
        faults = BadRecords()
        return list(webdataset._members(path, faults)), dict(faults.counts)

    assert members() == (expected, {})
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for cut in rng.integers(0, len(whole) - 10240, 60):
        path.write_bytes(whole[:cut])
        found, faults = members()
        assert found == expected[: len(found)] and faults == {"cut file": 1}
    for place in rng.integers(0, len(whole) - 10240, 100):
        spoilt = bytearray(whole)
        spoilt[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(spoilt)
        assert len(members()[0]) <= len(expected)


def test_a_key_of_two_tars_is_told_by_its_tar_and_the_first_stays_plain(tmp_path):
    img2dataset(tmp_path / "a.tar", 0, 2)
    first = keys(open_source(str(tmp_path)))
    img2dataset(tmp_path / "b.tar", 1, 2)
    source = open_source(str(tmp_path))
    assert keys(source) == [*first, "b/000000001", "000000002"] and not len(source.faults)


def test_a_tar_cut_in_the_middle_gives_what_is_whole_and_is_named(tmp_path):
    whole = img2dataset(tmp_path / "a.tar", 0, 5).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as held:
        third = held.getmember("000000002.jpg")
    img2dataset(tmp_path / "b.tar", 10, 2)
    for cut, detail in (
        (third.offset_data + 10, "the tar ends"),  # inside a picture
        (third.offset, "without an end mark"),  # between two samples
        (third.offset + 100, "ends at byte"),  # inside a header
    ):
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        source = open_source(str(tmp_path))
        (fault,) = source.faults
        assert fault.kind == "cut file" and fault.place.startswith("a.tar"), cut
        assert detail in fault.detail
        assert [sample.pixels().shape for sample in source] == [(24, 40, 3)] * 4
        with pytest.raises(UserError, match="a.tar.*: cut file"):
            open_source(str(tmp_path), strict=True)
    (tmp_path / "a.tar").write_bytes(b"")
    assert len(open_source(str(tmp_path))) == 2


def test_a_damaged_header_loses_what_lies_behind_it_and_says_so(tmp_path):
    path = img2dataset(tmp_path / "a.tar", 0, 5)
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as held:
        data[held.getmember("000000003.jpg").offset + 150] ^= 0xFF
    path.write_bytes(data)
    source = open_source(str(path))
    assert keys(source) == ["000000000", "000000001", "000000002"]
    assert "what lies behind is lost" in str(next(iter(source.faults)))


def test_bad_members_are_named_and_the_rest_goes_on(tmp_path):
    members = {f"{name}.jpg": PHOTO for name in "acdg"} | {"e.jpg": b"", "f.jpg": PHOTO[:-40]}
    members |= {"a.txt": "bell\x07", "b.txt": "of nothing", "c.txt": "w" * 10_000_000}
    members |= {"d.json": "{cut", "g.json": json.dumps({"caption": "w" * 10_000_000})}
    path = tar(tmp_path / "a.tar", members | {"f.cls": "two"})
    with tarfile.open(path, "a") as more:  # a key twice
        info = tarfile.TarInfo("a.jpg")
        info.size = len(PHOTO)
        more.addfile(info, io.BytesIO(PHOTO))
    for _ in range(2):  # the second time from the cache
        source = open_source(str(path))
        assert captions(source) == {"a": {"caption": ("bell",)}} | {key: {} for key in "cdgef"}
        once = ("caption without picture", "unreadable row", "unreadable label", "key twice")
        assert dict(source.faults.counts) == dict.fromkeys(once, 1)
        assert dict(source.faults.repaired) == {"control characters": 1, "caption too long": 2}
        assert source.sizes().tolist() == [[24, 40]] * 4 + [[0, 0], [24, 40]]
        assert {"a.tar, c.txt", "a.tar, d.json"} <= {fault.place for fault in source.faults}
        with pytest.raises(UserError, match="f: the image cannot be decoded"):
            source[5].pixels()
    with pytest.raises(UserError, match="a.tar, c.txt: caption too long"):
        open_source(str(path), strict=True)


def test_headers_are_read_once_and_again_when_the_tar_has_changed(tmp_path, monkeypatch):
    path = img2dataset(tmp_path / "a.tar", 0, 3)
    first = open_source(str(path))
    with monkeypatch.context() as patch:
        patch.setattr(webdataset, "_read", None)
        again = open_source(str(path))
        assert keys(again) == keys(first) and again.fingerprint == first.fingerprint
    img2dataset(path, 5, 4)
    again = open_source(str(path))
    assert len(again) == 4 and again.fingerprint != first.fingerprint


def test_a_tar_that_shrinks_while_it_is_read_is_named(tmp_path):
    path = img2dataset(tmp_path / "a.tar", 0, 3)
    source = open_source(str(path))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match="a.tar has become shorter"):
        source[2]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nowhere.tar", "no such tar"),
        ("{3..1}.tar", "runs backwards"),
        ("https://x/{0..9}.tar", "begin with gs:// or s3://"),
        ("a.tar.gz", "cannot be read at random"),
        ("{0..2}.tar", "no such tar"),
    ],
)
def test_mistakes_are_named(pattern, message):
    with pytest.raises(UserError, match=message):
        open_source(f"webdataset:{pattern}")


def test_a_tar_missing_from_a_range_is_named(tmp_path):
    img2dataset(tmp_path / "0.tar", 0, 2)
    source = open_source(f"webdataset:{tmp_path}/{{0..1}}.tar")
    assert len(source) == 2 and dict(source.faults.counts) == {"missing file": 1}


@pytest.mark.parametrize(
    ("members", "keys", "left_out"),
    [
        (("a.v1.jpg", "a.v1.txt", "a.v2.jpg"), {"a.v1": 1, "a.v2": 0}, {}),
        (("a.left.jpg", "a.right.jpg", "a.txt"), {"a.left": 1, "a.right": 1}, {}),
        (("a.jpg", "a.mask.png", "a.dense.txt", "a.npy"), {"a": 1}, {".png": 1, ".npy": 1}),
        (("A.JPG", "A.Dense.TXT", "A.Caption"), {"A": 2}, {}),
        (("a.avif", "a.txt", "README"), {"a": 1}, {"no suffix": 1}),
        (("a.jpg", "b.txt", "b.json"), {"a": 0}, {"caption without picture": 1}),
        (
            ("a.jpg", "a.txt", "b.jpg -> a.jpg", "c.jpg -> x.jpg"),
            {"a": 1, "b": 0},
            {"unreadable link": 1},
        ),
        (("d.v1/x.jpg", "d.v1/x.txt", "./e.jpg"), {"d.v1/x": 1, "e": 0}, {}),
    ],
)
def test_every_member_is_used_or_named(tmp_path, members, keys, left_out):
    with tarfile.open(tmp_path / "a.tar", "w") as out:
        for member in members:
            name, _, target = member.partition(" -> ")
            info = tarfile.TarInfo(name)
            data = encoded(picture()) if name.lower().endswith(("jpg", "png", "avif")) else b"words"
            if target:
                info.type, info.linkname = tarfile.SYMTYPE, target
            else:
                info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    for _ in range(2):  # from the tar, then from the cached index
        source = open_source(str(tmp_path))
        kinds = {sample.key: len(sample.captions) for sample in source}
        assert kinds == {key: count for key, count in keys.items()}
        assert dict(source.faults.counts + source.faults.unread) == left_out


def test_compressed_tars_beside_plain_ones_are_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as out:
        data = encoded(picture())
        info = tarfile.TarInfo("a.jpg")
        info.size = len(data)
        out.addfile(info, io.BytesIO(data))
    for name in ("b.tar.gz", "c.TGZ", "notes.md", ".hidden"):
        (tmp_path / name).write_bytes(b"x")
    source = open_source(str(tmp_path))
    assert source.faults.counts == {"compressed tar": 2} and source.faults.unread == {".md": 1}
    assert "1 other files not read: 1 .md" in source.faults.summary()
