"""Weights go from the file to the devices a parameter at a time: right to the bit, in the asked
dtype, and in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pixart_jax.weights import streaming
from pixart_jax.weights.files import open_tensors, write_safetensors
from pixart_jax.weights.streaming import map_params, read
from pixart_jax.weights.table import ParamMapping, flatten, unflatten

TABLE = (
    ParamMapping("blocks/k/kernel", "b.{i}.kv", "linear", (0, 2)),
    ParamMapping("blocks/v/kernel", "b.{i}.kv", "linear", (1, 2)),
    ParamMapping("conv", "conv", "conv"),
    ParamMapping("embedding", "embedding"),
    ParamMapping("scale", "scale"),
)


def model(width: int, inner: int, depth: int = 2):
    """(our tree of shapes, {their key: array})."""
    rng = np.random.default_rng(0)
    kernel = np.broadcast_to(np.float32(0), (depth, width, inner))
    shapes = {
        "blocks/k/kernel": kernel,
        "blocks/v/kernel": kernel,
        "conv": np.empty((3, 3, 5, 7)),
        "embedding": np.empty((inner, width)),
    }
    sizes = {f"b.{i}.kv": (2 * inner, width) for i in range(depth)}
    sizes |= {"conv": (7, 5, 3, 3), "embedding": (inner, width), "scale": (9,)}
    theirs = {key: rng.normal(size=size).astype(np.float32) for key, size in sizes.items()}
    return unflatten({**shapes, "scale": np.empty(9)}), theirs


@pytest.mark.parametrize(("width", "inner"), [(3, 5), (64, 256), (130, 517), (1152, 4608)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_every_value_is_cast_and_lies_where_it_should(width, inner, dtype):
    """Sizes under, at and over a tile's, and one that several threads share."""
    shapes, theirs = model(width, inner)
    params = flatten(read(TABLE, shapes, theirs, dtype=dtype))
    for row in range(2):
        fused = theirs[f"b.{row}.kv"].astype(dtype)
        np.testing.assert_array_equal(params["blocks/k/kernel"][row], fused[:inner].T)
        np.testing.assert_array_equal(params["blocks/v/kernel"][row], fused[inner:].T)
    conv = theirs["conv"].astype(dtype).transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(params["conv"], conv)
    np.testing.assert_array_equal(params["embedding"], theirs["embedding"].astype(dtype))


def test_a_dtype_may_depend_on_the_parameter():
    def dtype(path):
        return np.dtype(np.float16 if path.endswith("kernel") else np.float32)

    params = read(TABLE, *model(8, 12), dtype=dtype)
    assert params["blocks"]["k"]["kernel"].dtype == jnp.float16
    assert params["conv"].dtype == jnp.float32


def test_a_file_in_our_own_layout_is_used_where_it_lies(tmp_path):
    shapes, theirs = model(16, 32)
    params = read(TABLE, shapes, theirs, dtype=ml_dtypes.bfloat16)
    write_safetensors(tmp_path / "x.safetensors", flatten(params))
    file = open_tensors(tmp_path / "x.safetensors")
    again = flatten(map_params(file))
    for path, array in flatten(params).items():
        np.testing.assert_array_equal(again[path], array)
        assert again[path].dtype == array.dtype
    assert again["embedding"].unsafe_buffer_pointer() == file["embedding"].ctypes.data
    # Giving such an array to be overwritten leaves the file, which is mapped, alone.
    jax.jit(lambda x: x + 1, donate_argnums=0)(again["embedding"])
    np.testing.assert_array_equal(file["embedding"], params["embedding"])


def on_a_mesh(path: str) -> None:
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    shapes, theirs = model(64, 96, depth=4)
    specs = {
        "blocks/k/kernel": P(None, "fsdp", "tensor"),
        "blocks/v/kernel": P("fsdp", None, "tensor"),
        "conv": P(),
        "embedding": P("tensor", "fsdp"),
        "scale": P(),
    }
    shardings = unflatten({path: NamedSharding(mesh, spec) for path, spec in specs.items()})
    one = flatten(read(TABLE, shapes, theirs))
    many = flatten(read(TABLE, shapes, theirs, shardings=shardings))
    write_safetensors(path, one)
    cached = flatten(map_params(open_tensors(path), shardings))
    for name, array in one.items():
        for other in (many[name], cached[name]):
            assert other.sharding.spec == specs[name], name
            np.testing.assert_array_equal(other, array)
            for shard in other.addressable_shards:
                np.testing.assert_array_equal(shard.data, np.asarray(array)[shard.index])


def test_each_of_eight_devices_gets_its_own_part(tmp_path, root):
    path = tmp_path / "x.safetensors"
    if jax.device_count() >= 8:
        on_a_mesh(path)
        return
    code = f"from {__name__} import on_a_mesh; on_a_mesh({str(path)!r})"
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    subprocess.run([sys.executable, "-c", code], cwd=root, env=env, check=True)


PEAK = """
import json, sys, time
import jax, jax.numpy as jnp, torch
from pixart_jax import load_component

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

folder, dtype, cache = sys.argv[1:]
jnp.zeros(1).block_until_ready()
before = status("VmRSS:")
open("/proc/self/clear_refs", "w").write("5")
part = load_component(folder, dtype=dtype, cache=cache or None)
held = sum(leaf.nbytes for leaf in jax.tree.leaves(part.params))
peak = status("VmHWM:") - before
total = float(sum(jnp.sum(leaf, dtype=jnp.float32) for leaf in jax.tree.leaves(part.params)))
print(json.dumps({"held": held, "peak": peak, "sum": total}))
"""  # noqa: E501


def peak(folder, dtype: str, cache="") -> dict:
    command = [sys.executable, "-c", PEAK, str(folder), dtype, str(cache)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc"
)
@pytest.mark.parametrize("form", ["safetensors", "shards", "bin shards"])
def test_opening_takes_little_more_memory_than_the_parameters(tmp_path, form):
    """T5 of 230M parameters, 0.9 GB on disk in fp32: under 1.25 times the parameters in the asked
    dtype, whatever it is."""
    import torch
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 3, "num_heads": 32}
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))
    model.save_pretrained(tmp_path, max_shard_size="200MB" if form == "shards" else "5GB")
    if form == "bin shards":  # transformers no longer writes them; released files are of this form
        (tmp_path / "model.safetensors").unlink()
        state = dict(model.state_dict())
        state.pop("encoder.embed_tokens.weight", None)
        weight_map = {}
        for number in (0, 1):
            part = dict(list(state.items())[number::2])
            torch.save(part, tmp_path / f"pytorch_model-{number}.bin")
            weight_map |= dict.fromkeys(part, f"pytorch_model-{number}.bin")
        index = {"weight_map": weight_map}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    sums = []
    for dtype in ("float32", "bfloat16"):
        found = peak(tmp_path, dtype)
        print(form, dtype, found)
        assert found["peak"] < 1.25 * found["held"]
        sums.append(found["sum"])
    assert abs(sums[0] - sums[1]) < 1e-2 * max(map(abs, sums))


@pytest.mark.parametrize("shape", [(700,), (3, 5, 7), (300, 700), (1, 1)])
@pytest.mark.parametrize("kind", ["numbers", "not_a_number"])
def test_bfloat16_is_rounded_as_everywhere_whatever_the_layout(shape, kind):
    rng = np.random.default_rng(0)
    # every kind of float
    values = rng.integers(0, 1 << 32, shape, dtype=np.uint32).view(np.float32)
    if kind == "numbers":
        values = np.where(np.isnan(values), np.float32(np.inf), values)
        values.reshape(-1)[0] = np.float32(1 + 2**-8)  # half way between two bfloat16s
    for view in (values, values.T, values[..., ::2], np.asfortranarray(values)):
        want = view.astype(ml_dtypes.bfloat16)
        out = np.empty(view.shape, ml_dtypes.bfloat16)
        streaming._copy(out, view)
        np.testing.assert_array_equal(np.isnan(out), np.isnan(view))
        counted = ~np.isnan(view)
        np.testing.assert_array_equal(out.view(np.uint16)[counted], want.view(np.uint16)[counted])
