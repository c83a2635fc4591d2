"""Tensors in files: what is read equals what was written, and each damaged file is one clear
line."""

from __future__ import annotations

import argparse
import builtins
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from pixart_jax.errors import UserError
from pixart_jax.weights.files import find_weights, open_tensors, write_atomically, write_safetensors


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
    arrays = {
        "odd": np.ones(3, np.float16),
        "a": np.ones((4, 16), np.float32),
        "b": np.ones(64, ml_dtypes.bfloat16),
        "c": np.ones(1, np.int64),
    }
    write_safetensors(tmp_path / "x.safetensors", arrays, {"made": "by hand"})
    tensors = open_tensors(tmp_path / "x.safetensors")
    assert [tensors[key].ctypes.data % 64 for key in ("a", "b")] == [0, 0]
    assert tensors.metadata == {"format": "pt", "made": "by hand"}
    with safetensors.safe_open(tmp_path / "x.safetensors", "np") as file:
        assert {key: file.get_tensor(key).shape for key in file.keys()} == {
            key: value.shape for key, value in arrays.items()
        }


@pytest.mark.parametrize("form", ["safetensors", "pth", "index"])
def test_a_released_tensor_is_read_again_and_right(tmp_path, form):
    big = {"a": torch.randn(300, 100), "b": torch.randn(7), "c": torch.randn(50, 50)}
    if form == "pth":
        torch.save(big, path := tmp_path / "x.pth")
    else:
        safetensors.torch.save_file(big, path := tmp_path / "x.safetensors")
    if form == "index":
        (path := tmp_path / "x.safetensors.index.json").write_text(
            json.dumps({"weight_map": dict.fromkeys(big, "x.safetensors")})
        )
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
    write_safetensors(
        tmp_path / "x.safetensors",
        {"w": np.ones((2, 3), ml_dtypes.bfloat16), "t": np.arange(6.0).reshape(2, 3).T},
    )
    back = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert back["w"].dtype == torch.bfloat16
    np.testing.assert_array_equal(back["t"].numpy(), np.arange(6.0).reshape(2, 3).T)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_read_as_one(tmp_path, suffix):
    items = list(arrays().items())[:3]
    for i, (key, array) in enumerate(items):
        tensor = {key: torch.from_numpy(np.array(array))}
        path = tmp_path / f"model-{i}.{suffix}"
        safetensors.torch.save_file(tensor, path) if suffix == "safetensors" else torch.save(
            tensor, path
        )
    index = tmp_path / f"model.{suffix}.index.json"
    index.write_text(
        json.dumps(
            {
                "metadata": {},
                "weight_map": {key: f"model-{i}.{suffix}" for i, (key, _) in enumerate(items)},
            }
        )
    )
    assert find_weights(tmp_path) == index
    tensors = open_tensors(index)
    for key, array in items:
        assert tensors.shape(key) == array.shape
        np.testing.assert_array_equal(tensors[key], array)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_pytorch_files_of_both_formats_and_their_branches(tmp_path, options):
    path = tmp_path / "x.pth"
    content = {
        "state_dict": {"w": torch.ones(2)},
        "state_dict_ema": {"w": torch.zeros(2)},
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1),
    }
    torch.save(content, path, **options)
    tensors = open_tensors(path, branches=("state_dict_ema", "state_dict"))
    assert tensors.branch == "state_dict_ema"
    np.testing.assert_array_equal(tensors["w"], [0, 0])
    np.testing.assert_array_equal(open_tensors(path, branches=("model", "state_dict"))["w"], [1, 1])
    with pytest.raises(
        UserError,
        match="holds no tensors by name .it holds: state_dict, state_dict_ema, epoch, args",
    ):
        open_tensors(path)


def test_safetensors_come_before_pytorch_files(tmp_path):
    torch.save({"w": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert find_weights(tmp_path).name == "pytorch_model.bin"
    write_safetensors(tmp_path / "model.safetensors", {"w": np.ones(1)})
    assert find_weights(tmp_path).name == "model.safetensors"


# ---- bad input: one line that names the file ----


def one_line(error, path) -> str:
    message = str(error.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.mark.parametrize("kept", [0, 7, 40, -5])
def test_a_safetensors_file_cut_short_is_named(tmp_path, kept):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, arrays())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="damaged or cut short") as error:
        open_tensors(path)
    one_line(error, path)


def test_a_pointer_instead_of_a_file_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(UserError, match="damaged or cut short") as error:
        open_tensors(path)
    one_line(error, path)


@pytest.mark.parametrize("content", [b"", b"no such thing", None])
def test_a_damaged_pytorch_file_is_named(tmp_path, content):
    path = tmp_path / "x.pth"
    torch.save({"w": torch.randn(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(UserError, match="cannot be read as a PyTorch file") as error:
        open_tensors(path)
    one_line(error, path)


class _Code:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_pytorch_file_with_code_in_it_is_refused_and_not_run(tmp_path, capsys):
    path = tmp_path / "x.pth"
    torch.save({"w": torch.ones(1), "trap": _Code()}, path)
    with pytest.raises(UserError, match="could run code") as error:
        open_tensors(path)
    one_line(error, path)
    assert "this must not run" not in capsys.readouterr().out


def test_a_pytorch_file_of_something_else_is_named(tmp_path):
    path = tmp_path / "x.pth"
    torch.save([torch.ones(1)], path)
    with pytest.raises(UserError, match="holds a list, not tensors by name") as error:
        open_tensors(path)
    one_line(error, path)


def test_without_pytorch_its_files_say_what_would_do(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    path.write_bytes(b"x")
    real = builtins.__import__

    def without_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(UserError, match="pip install torch") as error:
        open_tensors(path)
    one_line(error, path)


def test_missing_files_and_unknown_kinds_are_named(tmp_path):
    with pytest.raises(UserError, match="no file"):
        open_tensors(tmp_path / "absent.safetensors")
    (tmp_path / "x.npz").write_bytes(b"x")
    with pytest.raises(UserError, match="weights are read from .safetensors") as error:
        open_tensors(tmp_path / "x.npz")
    one_line(error, tmp_path / "x.npz")
    with pytest.raises(UserError, match="holds no weights") as error:
        find_weights(tmp_path)
    one_line(error, tmp_path)


def test_damaged_indices_and_missing_shards_are_named(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for text in ("{", "[]", '{"metadata": {}}', '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(UserError, match="no index of shards") as error:
            open_tensors(index)
        one_line(error, index)
    index.write_text(json.dumps({"weight_map": {"w": "model-1.safetensors"}}))
    with pytest.raises(UserError, match="1 missing shards: model-1.safetensors"):
        open_tensors(index)
    write_safetensors(tmp_path / "model-1.safetensors", {"v": np.ones(1)})
    with pytest.raises(UserError, match="lacks w, which"):
        open_tensors(index)["w"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"w": np.ones(3)})
    before = path.read_bytes()

    def full(staged):
        staged.write_bytes(b"half of i")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="cannot write .*No space left on device"):
        write_atomically(path, full)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_safetensors(tmp_path / "file" / "x.safetensors", {"w": np.ones(1)})
