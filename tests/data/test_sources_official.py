"""The official layout, encoded shards and mixtures as sources."""

import json

import numpy as np
import pytest

from pixart_jax.data.sources import Mixture, open_source, parse_mixture
from pixart_jax.errors import UserError
from tests.data import tiny_sets
from tests.data.tiny_sets import captions, encoded, img2dataset, intern, picture, sam, write


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXART_JAX_CACHE", str(tmp_path / "cache"))


def test_a_data_info_names_pictures_in_the_folder_beside(tmp_path):
    root = intern(tmp_path)
    for text in (f"pixart:{root}", str(root), f"pixart:{tmp_path}"):
        source = open_source(text)
        assert source.caption_kinds == ("prompt",) and not len(source.faults)
        assert captions(source) == {
            f"{i:03d}/{i:06d}": {"prompt": (f"prompt of {i}",)} for i in range(3)
        }
        assert source.sizes().tolist() == [[24, 40], [40, 24], [32, 32]]
        np.testing.assert_array_equal(source[2].pixels(), picture(2, 32, 32))
    assert [s.key for s in open_source(str(root), where=f"{__name__}:tall")] == ["001/000001"]


def tall(fields):
    return fields["ratio"] > 1 and fields["height"] == 40


def test_pixart_sigma_s_list_lies_in_the_root_and_has_a_second_text(tmp_path):
    texts = {"prompt": "short", "sharegpt4v": "a long one"}
    item = json.dumps([{"path": "a.png", "height": 24, "width": 40, "ratio": 0.6, **texts}])
    write(tmp_path, {"InternImgs/a.png": encoded(picture()), "InternData/data_info.json": item})
    source = open_source(f"pixart:{tmp_path / 'InternData'}")
    assert source.caption_kinds == tuple(texts)
    assert captions(source) == {"a": {kind: (text,) for kind, text in texts.items()}}


def test_sam_s_partitions_images_and_captions(tmp_path):
    source = open_source(str(sam(tmp_path / "SA1B")))
    assert source.name == "pixart:SA1B" and source.caption_kinds == ("caption",)
    names = [f"sa_{i:06d}" for i in range(3)]
    assert captions(source) == {n: {"caption": (f"a dense caption of {n}",)} for n in names}
    assert source.sizes().tolist() == [[24, 40]] * 3


def test_bad_items_are_named_and_none_is_replaced_by_another(tmp_path):
    root = intern(tmp_path)
    file = root / "partition" / "data_info.json"
    items = json.loads(file.read_text())
    items += [items[0], {"path": "gone.png", "prompt": "x"}, {"prompt": "of nothing"}, "odd"]
    items[1]["prompt"] = "w" * 10_000_000
    items[2]["prompt"] = "bell\x07"
    file.write_text(json.dumps(items))
    source = open_source(str(root))
    expected = {"key twice": 1, "missing file": 1, "unreadable row": 2}
    assert dict(source.faults.counts) == expected
    assert dict(source.faults.repaired) == {"control characters": 1, "caption too long": 1}
    found = [sample.captions for sample in source]
    assert found == [{"prompt": ("prompt of 0",)}, {}, {"prompt": ("bell",)}]
    assert "data_info.json, item 5" in [fault.place for fault in source.faults]
    with pytest.raises(UserError, match="data_info.json, item 2, 001/000001.png: caption too long"):
        open_source(str(root), strict=True)
    file.write_text("[{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        open_source(str(root))
    with pytest.raises(UserError, match="neither partition"):
        open_source(f"pixart:{tmp_path / 'InternImgs'}")


def records_of(folder):
    sizes = [np.array([30 + i, 40], np.int32) for i in range(4)]
    made = [
        tiny_sets.encoded_record(f"k{i}", label=np.int64(i), size=size)
        for i, size in enumerate(sizes)
    ]
    return tiny_sets.shards(
        folder, {(32, 32): made}, {"captions": "dense", "vae": "v"}, {"dense": 3}
    )


def test_encoded_shards_tell_keys_captions_and_sizes_and_have_no_pictures(tmp_path):
    folder = records_of(tmp_path / "set")
    for text in (f"records:{folder}", str(folder)):
        source = open_source(text)
        assert source.name == "records:set" and source.caption_kinds == ("dense",)
        assert source.sizes().tolist() == [[30 + i, 40] for i in range(4)]
        assert [(s.key, s.captions["dense"], s.label) for s in source] == [
            (f"k{i}", (f"dense k{i}",), i) for i in range(4)
        ]
        with pytest.raises(UserError, match="k2: the records of encoded shards hold no picture"):
            source[2].pixels()
    assert [s.key for s in open_source(str(folder), where=f"{__name__}:late", limit=1)] == ["k2"]


def late(fields):
    return fields["label"] >= 2 and fields["height"] > 30


def test_a_record_with_a_flipped_bit_is_named_by_shard_and_place(tmp_path):
    folder = records_of(tmp_path / "set")
    shard = folder / "0.array_record"
    data = bytearray(shard.read_bytes())
    data[data.index(b'"key":"k2"') + 8] ^= 1
    shard.write_bytes(data)
    source = open_source(str(folder))
    assert source[1].key == "k1" and source[3].key == "k3"
    with pytest.raises(UserError, match="0.array_record, record 2, is damaged"):
        source[2]
    assert source.sizes()[2].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.7*folder:A + 0.3*B/{0..9}.tar", [(0.7, "folder:A"), (0.3, "B/{0..9}.tar")]),
        ("3*a + 1*b", [(0.75, "a"), (0.25, "b")]),
        ("1e-1 * data/a+b + 0.9* tfds:x", [(0.1, "data/a+b"), (0.9, "tfds:x")]),
        ("folder:A", [(1.0, "folder:A")]),
        ("2*a", [(1.0, "a")]),
    ],
)
def test_a_mixture_is_written_as_weights_times_sets(text, expected):
    found = parse_mixture(text)
    assert [source for _, source in found] == [source for _, source in expected]
    np.testing.assert_allclose([share for share, _ in found], [share for share, _ in expected])


@pytest.mark.parametrize("text", ["0.5*a + b", "0*a + 1*b", "0.5*", "0.5*a + -1*b"])
def test_a_badly_written_mixture_is_named(text):
    with pytest.raises(UserError, match="is not WEIGHT.SOURCE"):
        parse_mixture(text)


def test_a_mixture_shows_every_sample_once_under_its_set_s_name(tmp_path):
    files = {"a.png": encoded(picture(1, 20, 20)), "a.dense.txt": "x", "b.png": encoded(picture(2))}
    write(tmp_path / "photos", files)
    img2dataset(tmp_path / "web.tar", 0, 3)
    source = open_source(f"0.9*folder:{tmp_path / 'photos'} + 0.1*{tmp_path / 'web.tar'}")
    assert isinstance(source, Mixture) and len(source) == 5 and source.weights == (0.9, 0.1)
    assert source.name == "0.9*folder:photos + 0.1*webdataset:web.tar"
    assert set(source.caption_kinds) == {"dense", "caption"}
    keys = ["photos/a", "photos/b", *(f"web.tar/{i:09d}" for i in range(3))]
    assert [source[i].key for i in range(5)] == keys
    assert source.sizes().tolist() == [[20, 20]] + [[24, 40]] * 4
    other = open_source(f"0.5*folder:{tmp_path / 'photos'} + 0.5*{tmp_path / 'web.tar'}")
    assert other.fingerprint != source.fingerprint
    twice = open_source(f"1*folder:{tmp_path / 'photos'} + 1*folder:{tmp_path / 'photos'}")
    assert len({twice[i].key for i in range(4)}) == 4  # a key is never of two samples


def test_captions_are_read_without_the_pictures(tmp_path):
    files = {"a.png": encoded(picture()), "a.dense.txt": "at length", "b.png": encoded(picture())}
    write(tmp_path / "photos", files)
    img2dataset(tmp_path / "web.tar", 0, 2)
    parts = [f"folder:{tmp_path / 'photos'}", str(tmp_path / "web.tar")]
    parts += [str(intern(tmp_path / "official")), str(sam(tmp_path / "SA1B"))]
    parts.append(str(records_of(tmp_path / "set")))
    for text in [*parts, " + ".join(f"1*{part}" for part in parts)]:
        source = open_source(text)
        for i in range(len(source)):
            assert source.captions_at(i) == (source[i].key, source[i].captions)
    source = open_source(parts[0])
    (tmp_path / "photos" / "a.png").unlink()
    assert source.captions_at(0) == ("a", {"dense": ("at length",)})


def test_the_faults_of_all_parts_are_one_list(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, {"x.png": encoded(picture()), "x.jpg": b"", "lonely.txt": "x"})
    source = open_source(f"1*{tmp_path / 'a'} + 1*{tmp_path / 'b'}")
    assert source.faults.counts["caption without picture"] >= 1
    assert source.faults is source.parts[0].faults
