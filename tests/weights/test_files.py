"""Tensors in files: what is read equals what was written, and each damaged file is one clear
line."""

from __future__ import annotations

import argparse
import json
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from pixart_jax.errors import UserError
from pixart_jax.weights.files import LazyTensor, find_weights, open_tensors, write_safetensors


def write_index(path, weight_map):
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a": rng.normal(size=(3, 4)).astype(np.float32),
        "b.c": rng.normal(size=5).astype(np.float16),
        "n": np.arange(3),
        "one": np.float32(2.5),
    }


def test_safetensors_round_trip_is_bit_exact_and_lazy(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, arrays())
    tensors = open_tensors(path)
    assert set(tensors) == set(arrays()) and len(tensors) == 4
    for key, array in arrays().items():
        assert tensors.shape(key) == np.shape(array)
        assert tensors[key].dtype == np.asarray(array).dtype
        np.testing.assert_array_equal(tensors[key], array)
    assert np.may_share_memory(tensors["a"], tensors["a"])  # a view of the file, not a copy of it
    assert safetensors.torch.load_file(path)["a"].shape == np.shape(arrays()["a"])


def test_safetensors_begin_where_xla_can_use_them(tmp_path):
    arrays = {"odd": np.ones(3, np.float16), "a": np.ones((4, 16), np.float32)}
    arrays |= {"b": np.ones(64, ml_dtypes.bfloat16), "c": np.ones(1, np.int64)}
    write_safetensors(tmp_path / "x.safetensors", arrays, {"made": "by hand"})
    tensors = open_tensors(tmp_path / "x.safetensors")
    assert [tensors[key].ctypes.data % 64 for key in ("a", "b")] == [0, 0]
    assert tensors.metadata == {"format": "pt", "made": "by hand"}
    with safetensors.safe_open(tmp_path / "x.safetensors", "np") as file:
        found = {key: file.get_tensor(key).shape for key in file.keys()}
    assert found == {key: value.shape for key, value in arrays.items()}


@pytest.mark.parametrize("form", ["safetensors", "pth", "index"])
def test_a_released_tensor_is_read_again_and_right(tmp_path, form):
    big = {"a": torch.randn(300, 100), "b": torch.randn(7), "c": torch.randn(50, 50)}
    if form == "pth":
        torch.save(big, path := tmp_path / "x.pth")
    else:
        safetensors.torch.save_file(big, path := tmp_path / "x.safetensors")
    if form == "index":
        path = write_index(path.with_name(f"{path.name}.index.json"), dict.fromkeys(big, path.name))
    tensors = open_tensors(path)
    for _ in range(2):
        for key, value in big.items():
            np.testing.assert_array_equal(tensors[key], value.numpy())
            tensors.release(key)


def test_bfloat16_is_read_from_both_formats(tmp_path):
    tensor = torch.randn(4, 3).bfloat16()
    want = tensor.float().numpy()
    safetensors.torch.save_file({"w": tensor}, tmp_path / "x.safetensors")
    torch.save({"w": tensor}, tmp_path / "x.pth")
    for name in ("x.safetensors", "x.pth"):
        got = open_tensors(tmp_path / name)["w"]
        assert got.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(got.astype(np.float32), want)


def test_what_we_write_opens_in_pytorch(tmp_path):
    tensors = {"w": np.ones((2, 3), ml_dtypes.bfloat16), "t": np.arange(6.0).reshape(2, 3).T}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    back = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert back["w"].dtype == torch.bfloat16
    np.testing.assert_array_equal(back["t"].numpy(), np.arange(6.0).reshape(2, 3).T)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_read_as_one(tmp_path, suffix):
    items = list(arrays().items())[:3]
    save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
    names = {key: f"model-{i}.{suffix}" for i, (key, _) in enumerate(items)}
    for key, array in items:
        save({key: torch.from_numpy(np.array(array))}, tmp_path / names[key])
    index = write_index(tmp_path / f"model.{suffix}.index.json", names)
    assert find_weights(tmp_path) == index
    tensors = open_tensors(index)
    for key, array in items:
        assert tensors.shape(key) == array.shape
        np.testing.assert_array_equal(tensors[key], array)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_pytorch_files_of_both_formats_and_their_branches(tmp_path, options):
    path = tmp_path / "x.pth"
    content = {"state_dict": {"w": torch.ones(2)}, "state_dict_ema": {"w": torch.zeros(2)}}
    content |= {"epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, path, **options)
    tensors = open_tensors(path)
    assert set(tensors) == {"state_dict/w", "state_dict_ema/w"}
    np.testing.assert_array_equal(tensors["state_dict_ema/w"], [0, 0])
    np.testing.assert_array_equal(tensors["state_dict/w"], [1, 1])
    torch.save({"state_dict": {}, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, path, **options)
    says = "holds no tensors by name .it holds: state_dict, epoch, args"
    refused(open_tensors, path, says)


def test_safetensors_come_before_pytorch_files(tmp_path):
    torch.save({"w": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert find_weights(tmp_path).name == "pytorch_model.bin"
    write_safetensors(tmp_path / "model.safetensors", {"w": np.ones(1)})
    assert find_weights(tmp_path).name == "model.safetensors"


# ---- bad input: one line that names the file ----


def refused(open_it, path, match: str):
    with pytest.raises(UserError, match=match) as error:
        open_it(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


DAMAGED = {  # suffix, the file's bytes from those of a whole one, message
    "nothing left": ("safetensors", lambda data: b"", "damaged or cut short"),
    "cut in the header": ("safetensors", lambda data: data[:40], "damaged or cut short"),
    "cut at the end": ("safetensors", lambda data: data[:-5], "damaged or cut short"),
    "a pointer of git-lfs": ("safetensors", lambda data: b"version https://x\n", "damaged"),
    "an empty .pth": ("pth", lambda data: b"", "cannot be read as a PyTorch file"),
    "a cut .pth": ("pth", lambda data: data[:2000], "cannot be read as a PyTorch file"),
    "a text": ("pth", lambda data: b"no such thing", "cannot be read as a PyTorch file"),
    "another kind": ("npz", lambda data: b"x", "weights are .safetensors"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_named(tmp_path, case):
    suffix, damage, match = DAMAGED[case]
    path = tmp_path / f"x.{suffix}"
    write_safetensors(path, arrays())
    if suffix == "pth":
        torch.save({"w": torch.randn(1000)}, path)
    path.write_bytes(damage(path.read_bytes()))
    refused(open_tensors, path, match)


class _Code:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize(
    "content, match",
    [
        ({"w": torch.ones(1), "trap": _Code()}, "could run code"),
        ([torch.ones(1)], "holds a list, not tensors by name"),
    ],
    ids=["code", "list"],
)
def test_a_pytorch_file_of_something_else_is_refused_and_not_run(tmp_path, capsys, content, match):
    torch.save(content, tmp_path / "x.pth")
    refused(open_tensors, tmp_path / "x.pth", match)
    assert "this must not run" not in capsys.readouterr().out


def test_without_pytorch_its_files_name_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "x.pth").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(open_tensors, tmp_path / "x.pth", r'pip install "pixart-jax\[torch\]"')


def test_missing_files_are_named(tmp_path):
    refused(open_tensors, tmp_path / "absent.safetensors", "no file")
    refused(find_weights, tmp_path, "holds no weights")


def test_damaged_indices_and_missing_shards_are_named(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for text in ("{", "[]", '{"metadata": {}}', '{"weight_map": 3}'):
        index.write_text(text)
        refused(open_tensors, index, "no index of shards")
    write_index(index, {"w": "model-1.safetensors"})
    refused(open_tensors, index, "1 missing shards: model-1.safetensors")
    write_safetensors(tmp_path / "model-1.safetensors", {"v": np.ones(1)})
    refused(lambda path: open_tensors(path)["w"], index, "lacks w, which")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"w": np.ones(3)})
    before = path.read_bytes()

    def parts():
        yield np.ones(2)
        raise OSError(28, "No space left on device")

    tensor = LazyTensor((3,), np.dtype(np.float64), parts)
    with pytest.raises(UserError, match="cannot write .*No space left on device"):
        write_safetensors(path, {"w": tensor})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "x.safetensors"
    refused(lambda path: write_safetensors(path, {"w": np.ones(1)}), path, "cannot write")
