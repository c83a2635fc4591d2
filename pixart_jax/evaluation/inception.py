"""Inception-v3 of 2015-12-05, the network of FID, as functions of its parameters.

It is not torchvision's network: the average pools leave the padding out of the mean, the pool of
the last block is a max pool, the classes are 1,008 and the batch norms' epsilon is 1e-3. The names
are those of pytorch-fid's and torch-fidelity's file. Batch norm is folded into the convolutions.

An image becomes 299×299 in one of three modes, which are never mixed within a comparison:

- ``clean`` (clean-fid): Pillow's antialiased bicubic filter, on each channel in floats;
- ``pytorch`` (pytorch-fid): bilinear with half-pixel centres, no antialiasing;
- ``tensorflow`` (torch-fidelity, ADM, the first FID code): bilinear of TensorFlow 1, whose source
  coordinate is i · length / 299.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.errors import UserError
from pixart_jax.finite import check_tensor
from pixart_jax.weights.files import open_tensors
from pixart_jax.weights.hub import model_folder
from pixart_jax.weights.table import ParamMapping, match, unflatten, write

Mode = Literal["clean", "pytorch", "tensorflow"]
SIDE = 299
WIDTHS = {"pool": 2048, "spatial": 2023, "logits": 1008}
"""What the network gives: the mean over the last grid; channels 0–6 of the first branch of
Mixed_6d, [17, 17, 7] in a row; the logits without bias, as the Inception score takes them."""
_EPSILON = 1e-3
_HIGHEST = jax.lax.Precision.HIGHEST  # not the bf16 or TF32 of accelerators
_SPATIAL = "Mixed_6d.branch1x1"
WHERE = (
    "give --inception FILE: pt_inception-2015-12-05-6726825d.pth, which is among the releases of "
    "github.com/mseitzer/pytorch-fid, a .safetensors file of the same names, or "
    "OWNER/NAME/FILE.safetensors of a hub"
)

# A list: one after the other. A tuple: side by side, concatenated. A dict: blocks by name. A text:
# a unit, "name width kernel", of convolution, batch norm and ReLU, or a 3×3 pool. "/1" and "/2" are
# strides, without padding; else the size stays.
Plan = str | list | tuple | dict


def _a(pool: int) -> Plan:
    return (
        "branch1x1 64 1x1",
        ["branch5x5_1 48 1x1", "branch5x5_2 64 5x5"],
        ["branch3x3dbl_1 64 1x1", "branch3x3dbl_2 96 3x3", "branch3x3dbl_3 96 3x3"],
        ["mean", f"branch_pool {pool} 1x1"],
    )


def _c(width: int) -> Plan:
    long = (width, "7x1"), (width, "1x7"), (width, "7x1"), (192, "1x7")
    return (
        "branch1x1 192 1x1",
        [f"branch7x7_1 {width} 1x1", f"branch7x7_2 {width} 1x7", "branch7x7_3 192 7x1"],
        [f"branch7x7dbl_1 {width} 1x1"]
        + [f"branch7x7dbl_{n} {of} {kernel}" for n, (of, kernel) in enumerate(long, 2)],
        ["mean", "branch_pool 192 1x1"],
    )


def _e(pool: str) -> Plan:
    return (
        "branch1x1 320 1x1",
        ["branch3x3_1 384 1x1", ("branch3x3_2a 384 1x3", "branch3x3_2b 384 3x1")],
        ["branch3x3dbl_1 448 1x1", "branch3x3dbl_2 384 3x3"]
        + [("branch3x3dbl_3a 384 1x3", "branch3x3dbl_3b 384 3x1")],
        [pool, "branch_pool 192 1x1"],
    )


_B: Plan = (
    "branch3x3 384 3x3/2",
    ["branch3x3dbl_1 64 1x1", "branch3x3dbl_2 96 3x3", "branch3x3dbl_3 96 3x3/2"],
    "max/2",
)
_D: Plan = (
    ["branch3x3_1 192 1x1", "branch3x3_2 320 3x3/2"],
    ["branch7x7x3_1 192 1x1", "branch7x7x3_2 192 1x7", "branch7x7x3_3 192 7x1"]
    + ["branch7x7x3_4 192 3x3/2"],
    "max/2",
)
PLAN: Plan = [
    *["Conv2d_1a_3x3 32 3x3/2", "Conv2d_2a_3x3 32 3x3/1", "Conv2d_2b_3x3 64 3x3", "max/2"],
    *["Conv2d_3b_1x1 80 1x1", "Conv2d_4a_3x3 192 3x3/1", "max/2"],
    {"Mixed_5b": _a(32), "Mixed_5c": _a(64), "Mixed_5d": _a(64), "Mixed_6a": _B},
    {"Mixed_6b": _c(128), "Mixed_6c": _c(160), "Mixed_6d": _c(160), "Mixed_6e": _c(192)},
    {"Mixed_7a": _D, "Mixed_7b": _e("mean"), "Mixed_7c": _e("max")},
]


def _windows(op: Callable, x: jax.Array, stride: int = 1) -> jax.Array:
    """op over windows of 3×3. Slices, since XLA's window reduction is slow on CPUs."""
    for axis in (1, 2):
        span = x.shape[axis] - 3 + 1
        a, b, c = (jax.lax.slice_in_dim(x, i, i + span, stride, axis) for i in range(3))
        x = op(op(a, b), c)
    return x


def _padded(x: jax.Array, value: float) -> jax.Array:
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=value)


def _mean(x: jax.Array) -> jax.Array:
    sums, counts = (_windows(jnp.add, _padded(of, 0)) for of in (x, jnp.ones_like(x[:1, ..., :1])))
    return sums / counts


_POOLS: dict[str, Callable] = {
    "max/2": lambda x: _windows(jnp.maximum, x, 2),
    "max": lambda x: _windows(jnp.maximum, _padded(x, -jnp.inf)),
    "mean": _mean,
}


def _run(plan: Plan, x: jax.Array, unit: Callable, block: str = "") -> jax.Array:
    """x [b, h, w, c] through a plan. unit(name, x, width, kernel's size, stride) → [b, h', w',
    width]."""
    if isinstance(plan, tuple):
        return jnp.concatenate([_run(branch, x, unit, block) for branch in plan], axis=-1)
    if isinstance(plan, list | dict):
        for step in plan:
            inner, name = (plan[step], f"{step}.") if isinstance(plan, dict) else (step, block)
            x = _run(inner, x, unit, name)
        return x
    if plan in _POOLS:
        return _POOLS[plan](x)
    name, width, kernel = plan.split()
    size, _, stride = kernel.partition("/")
    return unit(block + name, x, int(width), tuple(map(int, size.split("x"))), int(stride or 0))


def _unit(x: jax.Array, kernel: jax.Array, bias: jax.Array, stride: int) -> jax.Array:
    """ReLU of a convolution. stride 0: 1, and padded to the same size."""
    if kernel.shape[:2] == (1, 1):
        x = jnp.matmul(x, kernel[0, 0], precision=_HIGHEST)
    else:
        # Without padding XLA takes twice as long on CPUs: one window more, above and to the left.
        padding = [(stride, 0)] * 2 if stride else "SAME"
        form = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, kernel, [stride or 1] * 2, padding, dimension_numbers=form, precision=_HIGHEST
        )
        x = x[:, 1:, 1:] if stride else x
    return jax.nn.relu(x + bias)


@jax.jit
def apply(params: Mapping, pixels: jax.Array) -> dict[str, jax.Array]:
    """pixels [b, 299, 299, 3] of about [−1, 1] → {name of WIDTHS: [b, width] fp32}."""
    found: dict[str, jax.Array] = {}

    def unit(name: str, x: jax.Array, width: int, size: tuple[int, int], stride: int) -> jax.Array:
        x = _unit(x, params[name]["kernel"], params[name]["bias"], stride)
        if name == _SPATIAL:
            found["spatial"] = x[..., :7].reshape(len(x), -1)
        return x

    found["pool"] = _run(PLAN, pixels, unit).mean((1, 2))
    found["logits"] = jnp.matmul(found["pool"], params["fc"]["kernel"], precision=_HIGHEST)
    return found


@functools.cache
def shapes() -> dict[str, tuple[int, ...]]:
    """{unit: shape of its kernel, [height, width, in, out]}, in the order of the plan; and of
    "fc"."""
    found: dict[str, tuple[int, ...]] = {}

    def unit(name, x, width, size, stride):
        found[name] = (*size, x.shape[-1], width)
        return _unit(x, jnp.zeros(found[name]), jnp.zeros(width), stride)

    jax.eval_shape(lambda x: _run(PLAN, x, unit), jax.ShapeDtypeStruct((1, 99, 99, 3), "f4"))
    return found | {"fc": (WIDTHS["pool"], WIDTHS["logits"])}


# ---- files ----

_PARTS = {"scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}


def _table() -> tuple[list[ParamMapping], dict[str, Any]]:
    """(names in the file, shapes in our tree) of the tensors as they are stored."""
    entries, flat = [], {}
    for name, shape in shapes().items():
        parts = {part: (f"{name}.bn.{of}", "same", shape[-1:]) for part, of in _PARTS.items()}
        parts["kernel"] = (f"{name}.conv.weight", "conv", shape)
        if name == "fc":
            parts = {"kernel": ("fc.weight", "linear", shape)}
            parts["bias"] = ("fc.bias", "same", shape[-1:])
        for part, (key, layout, size) in parts.items():
            entries.append(ParamMapping(f"{name}/{part}", key, layout))
            flat[f"{name}/{part}"] = jax.ShapeDtypeStruct(size, np.float32)
    return entries, flat


def random_tensors(seed: int) -> dict[str, np.ndarray]:
    """A file's tensors with He-normal kernels, for tests: the features separate noise
    from pictures, and hardly more."""
    rng, (entries, flat) = np.random.default_rng(seed), _table()

    def value(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path.endswith("/kernel"):
            return rng.standard_normal(shape, "f4") * math.sqrt(2 / math.prod(shape[:-1]))
        return np.full(shape, path.endswith(("/scale", "/variance")), "f4")

    tree = unflatten({path: value(path, of.shape) for path, of in flat.items()})
    return {key: np.asarray(tensor) for key, tensor in write(entries, tree).items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Inception:
    """params: {unit: {kernel, bias}}, on the host. name and digest (SHA-256 of names and values)
    tell weights apart, whatever the file's format."""

    params: Mapping
    name: str
    digest: str

    def features(self, images: np.ndarray, mode: Mode = "clean", batch: int = 32) -> np.ndarray:
        """uint8 [n, h, w, 3] → float32 [n, 2048]."""
        images, found = np.asarray(images), []
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            form = f"got {images.dtype} {list(images.shape)}"
            raise UserError(f"images are needed as uint8 [n, height, width, 3]: {form}")
        batch = min(batch, len(images))
        for start in range(0, len(images), batch):
            some = [preprocess(image, mode) for image in images[start : start + batch]]
            full = np.stack(some + [some[-1]] * (batch - len(some)))
            found.append(np.asarray(apply(self.params, full)["pool"])[: len(some)])
        return np.concatenate(found) if found else np.zeros((0, WIDTHS["pool"]), np.float32)


def load(path: str | os.PathLike) -> Inception:
    """The network of a .pth (which needs the extra torch) or .safetensors file, or of
    OWNER/NAME/FILE.safetensors on a hub. Raises UserError for a file of another network."""
    file = model_folder(path)
    if not file.is_file():
        raise UserError(f"no Inception weights {path}: {WHERE}")
    return from_tensors(open_tensors(file), file.name)


def random(seed: int) -> Inception:
    """A network of random weights, for tests."""
    return from_tensors(random_tensors(seed), f"random Inception, seed {seed}")


def from_tensors(tensors: Mapping[str, np.ndarray], name: str) -> Inception:
    """A file's tensors → the network, with batch norm folded in."""
    entries, flat = _table()
    source = getattr(tensors, "source", name)
    counters = [key for key in tensors if key.endswith(".num_batches_tracked")]
    held = {key: tensors[key].shape for key in tensors}
    match(entries, unflatten(flat), held, source=source, ignore=counters)
    digest, values = hashlib.sha256(), {}
    for entry in sorted(entries, key=lambda entry: entry.key):
        tensor = np.ascontiguousarray(check_tensor(entry.key, np.asarray(tensors[entry.key], "f4")))
        digest.update(entry.key.encode() + tensor.tobytes())
        values[entry.path] = entry.view(tensor)
    params = unflatten(values)
    for unit in params.values():
        if "scale" in unit:
            factor = unit.pop("scale") / np.sqrt(unit.pop("variance").astype("f8") + _EPSILON)
            unit["bias"] = (unit["bias"] - unit.pop("mean") * factor).astype("f4")
            unit["kernel"] = unit["kernel"] * factor.astype("f4")
        unit["kernel"] = np.ascontiguousarray(unit["kernel"])
    return Inception(params, name, digest.hexdigest())


# ---- images ----


def preprocess(image: np.ndarray, mode: Mode) -> np.ndarray:
    """uint8 [h, w, 3] → float32 [299, 299, 3], as the mode's reference resizes and scales it."""
    if mode == "pytorch":
        return _bilinear(image.astype("f4") / np.float32(255), 0.5) * 2 - 1
    if mode == "tensorflow":
        return (_bilinear(image.astype("f4"), 0.0) - 128) / 128
    from PIL import Image

    channels = (Image.fromarray(np.ascontiguousarray(image[..., c], "f4")) for c in range(3))
    resized = [c.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for c in channels]
    return (np.stack(resized, -1).clip(0, 255) - np.float32(128)) / 128


def _bilinear(image: np.ndarray, centre: float) -> np.ndarray:
    """Float32 [h, w, 3] → [299, 299, 3] without antialiasing. centre: where in a pixel its value
    lies."""

    def taps(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        scale = float(np.float32(length / SIDE))  # fp32, as in both sources
        at = np.maximum((np.arange(SIDE) + centre) * scale - centre, 0).astype("f4")
        low = np.minimum(at.astype(int), length - 1)
        return low, np.minimum(low + 1, length - 1), (at - low).astype("f4")

    top, bottom, down = taps(image.shape[0])
    left, right, across = taps(image.shape[1])
    rows = (image[top], image[bottom])
    first, last = (r[:, left] + (r[:, right] - r[:, left]) * across[:, None] for r in rows)
    return first + (last - first) * down[:, None, None]
