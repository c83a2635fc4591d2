import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch

from pixart_jax.data import records
from pixart_jax.errors import UserError
from tests.data.tiny_sets import shards


def arrays(i=0, rows=5):
    rng = np.random.default_rng(i)
    return {
        "mean": rng.normal(size=(4, 4, 4)).astype(np.float32),
        "text.dense.0": rng.normal(size=(rows, 8)).astype(ml_dtypes.bfloat16),
        "label": np.int64(i),
        "size": np.array([30, 40], np.int32),
        "flag": np.array([True, False, True]),
    }


@pytest.fixture
def folder(tmp_path):
    made = {
        (32, 32 * (1 + n)): [(arrays(10 * n + i), {"key": f"k{n}{i}"}) for i in range(4 + n)]
        for n in range(3)
    }
    return shards(tmp_path, made, {"vae": "abc"}, {"dense": 7})


def test_a_record_comes_back_to_the_bit_whole_or_in_part():
    made, texts = arrays(3), {"key": "ключ", "captions.dense": '["a \\"b\\""]'}
    record = records.encode_record(made, texts)
    found, metadata = records.decode_record(record)
    assert metadata == texts and set(found) == set(made)
    for name, value in made.items():
        assert found[name].dtype == value.dtype and found[name].shape == np.shape(value)
        assert found[name].tobytes() == np.asarray(value).tobytes()
    assert list(records.decode_record(record, ["label"])[0]) == ["label"]


def test_a_record_is_a_safetensors_file_with_aligned_arrays():
    made = arrays(2)
    record = records.encode_record(made, {"key": "x"})
    theirs = safetensors.torch.load(record)
    states = theirs["text.dense.0"].float().numpy()
    np.testing.assert_array_equal(states, made["text.dense.0"].astype(np.float32))
    np.testing.assert_array_equal(theirs["mean"].numpy(), made["mean"])
    header = json.loads(record[8 : 8 + int.from_bytes(record[:8], "little")])
    for name, value in made.items():
        assert header[name]["data_offsets"][0] % np.asarray(value).dtype.itemsize == 0


def test_records_are_numbered_through_the_shards_of_the_expected_encoder(folder):
    with pytest.raises(UserError, match="encoded with something else: vae is abc, expected xyz"):
        records.Records(folder, {"vae": "xyz"})
    found = records.Records(folder, {"vae": "abc"})
    assert len(found) == 15 and found.manifest.longest == {"dense": 7}
    keys = [f"k{n}{i}" for n in range(3) for i in range(4 + n)]
    assert [found[i][1]["key"] for i in range(15)] == keys
    assert found.shard_of(4) == (1, 0) and found.shard_of(14) == (2, 5)


def test_a_flipped_bit_is_named_with_its_shard_and_record(folder):
    path = folder / "1.array_record"
    data = bytearray(path.read_bytes())
    place = data.index(arrays(12)["mean"].tobytes())  # within the third record of the shard
    data[place + 3] ^= 4
    path.write_bytes(data)
    found = records.Records(folder)
    good = [i for i in range(15) if i != 6]
    assert len([found[i] for i in good]) == 14
    with pytest.raises(UserError, match=r"1\.array_record, record 2, is damaged"):
        found[6]
    assert [trouble is None for _, trouble in records.check(folder)] == [True, False, True]


@pytest.mark.parametrize("kept", [0, 1, 1000, -1])
def test_a_shard_cut_short_is_named_when_opened(folder, kept):
    path = folder / "2.array_record"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"2\.array_record is damaged: \d+ bytes, written with"):
        records.Records(folder)


def test_a_folder_without_a_sound_manifest_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no manifest.json"):
        records.Records(tmp_path)
    for text in ("{", "[]", '{"format": 99}', '{"format": 1, "identity": {}}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match="manifest.json"):
            records.Records(tmp_path)


def test_nothing_appears_under_a_shard_s_name_before_it_is_whole(tmp_path):
    def interrupted():
        yield records.encode_record(arrays(), {})
        assert not (tmp_path / "x.array_record").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        records.write_shard(tmp_path / "x.array_record", interrupted())
    assert list(tmp_path.iterdir()) == []


def test_no_more_than_a_few_shards_are_open_at_once(folder, monkeypatch):
    monkeypatch.setattr(records, "_OPEN", 2)
    found = records.Records(folder)
    for index in np.random.default_rng(0).permutation(np.tile(np.arange(15), 4)):
        shard, place = found.shard_of(int(index))
        assert found[int(index)][1]["key"] == f"k{shard}{place}"
        assert found._reader.cache_info().currsize <= 2
