"""The Inception network of FID beside PyTorch with the same weights, and its three ways to resize
beside their sources."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.numpy import save_file

from pixart_jax.errors import UserError
from pixart_jax.evaluation import inception
from tests.evaluation.torch_inception import in_torch


@pytest.fixture(scope="module")
def tensors():
    """He-normal kernels; batch norms that do something."""
    rng = np.random.default_rng(1)
    found = inception.random_tensors(0)
    for name, value in found.items():
        if ".bn." in name:
            low, high = (-0.3, 0.3) if name.endswith(("bias", "mean")) else (0.5, 1.5)
            found[name] = rng.uniform(low, high, value.shape).astype(np.float32)
    return found


def off(ours, theirs):
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def test_the_network_equals_pytorchs_and_its_known_porting_faults_show(tensors):
    net = inception.from_tensors(tensors, "random")
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 31, 3), dtype=np.uint8)
    pixels = np.stack([inception.preprocess(image, "tensorflow") for image in images[:2]])
    ours = jax.device_get(inception.apply(net.params, pixels))
    x = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    theirs = in_torch(tensors, x)
    assert {name: values.shape[1] for name, values in ours.items()} == inception.WIDTHS
    differences = {name: off(ours[name], theirs[name]) for name in inception.WIDTHS}
    print(differences)
    assert max(differences.values()) <= 1e-5
    features = net.features(images, mode="tensorflow", batch=2)
    assert features.shape == (3, 2048) and features.dtype == np.float32
    assert np.array_equal(features[:2], ours["pool"])
    small = x[:1, :, :139, :139]
    right = in_torch(tensors, small)["pool"]
    for fault in ({"padding_counts": True}, {"eps": 1e-5}, {"last_pool": F.avg_pool2d}):
        assert off(in_torch(tensors, small, **fault)["pool"], right) > 3e-4, fault


def test_the_table_is_that_of_the_released_file(tensors):
    """566 tensors with the 94 counters of batches, 23,850,960 parameters."""
    units = [name for name in inception.shapes() if name != "fc"]
    assert len(units) == 94 and len(tensors) + len(units) == 566
    statistics = ("running_mean", "running_var")
    held = [v.size for name, v in tensors.items() if not name.endswith(statistics)]
    assert sum(held) == 23_850_960
    assert tensors["fc.weight"].shape == (1008, 2048)
    assert tensors["Mixed_6c.branch7x7dbl_2.conv.weight"].shape == (160, 160, 7, 1)


def test_files_of_both_formats_hold_the_same_network(tensors, tmp_path):
    save_file(tensors, tmp_path / "net.safetensors")
    counters = {f"{n}.bn.num_batches_tracked": np.int64(0) for n in inception.shapes() if n != "fc"}
    state = {name: torch.from_numpy(np.array(v)) for name, v in (tensors | counters).items()}
    torch.save(state, tmp_path / "net.pth")
    first, second = (inception.load(tmp_path / f"net.{kind}") for kind in ("safetensors", "pth"))
    assert first.digest == second.digest != inception.random(0).digest
    assert np.array_equal(
        first.params["Mixed_7c.branch_pool"]["kernel"],
        second.params["Mixed_7c.branch_pool"]["kernel"],
    )
    del tensors["Mixed_5b.branch_pool.bn.weight"]
    with pytest.raises(UserError, match=r"1 missing: Mixed_5b\.branch_pool\.bn\.weight"):
        inception.from_tensors(tensors, "cut")
    with pytest.raises(UserError, match="pytorch-fid"):
        inception.load(tmp_path / "none.pth")


def tf1_bilinear(image):
    """Written out pixel by pixel from TensorFlow 1's kernel."""
    height, width, _ = image.shape
    out = np.zeros((299, 299, 3))
    for i in range(0, 299, 7):
        y = np.float32(i) * np.float32(height / 299)
        top, down = int(y), y - int(y)
        for j in range(0, 299, 7):
            x = np.float32(j) * np.float32(width / 299)
            left, across = int(x), x - int(x)
            corners = image[[top, min(top + 1, height - 1)]][:, [left, min(left + 1, width - 1)]]
            rows = corners[:, 0] + (corners[:, 1] - corners[:, 0]) * across
            out[i, j] = rows[0] + (rows[1] - rows[0]) * down
    return out


@pytest.mark.parametrize("size", [(97, 131), (256, 256), (512, 320)])
def test_each_mode_resizes_as_its_source(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    wide = image.astype(np.float32)
    channels = [Image.fromarray(wide[..., c]).resize((299, 299), Image.BICUBIC) for c in range(3)]
    clean = (np.clip(np.stack(channels, -1), 0, 255) - 128) / 128
    assert np.array_equal(inception.preprocess(image, "clean"), clean)
    x = torch.from_numpy(wide.transpose(2, 0, 1)[None] / 255)
    theirs = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)[0]
    pytorch = 2 * theirs.permute(1, 2, 0).numpy() - 1
    assert np.abs(inception.preprocess(image, "pytorch") - pytorch).max() < 1e-5
    tensorflow = (tf1_bilinear(wide) - 128) / 128
    tensorflow, ours = tensorflow[::7, ::7], inception.preprocess(image, "tensorflow")[::7, ::7]
    assert np.abs(ours - tensorflow).max() < 1e-5
    assert np.abs(pytorch[::7, ::7] - tensorflow).mean() > 0.01 < np.abs(clean - pytorch).mean()


@pytest.mark.parametrize(
    ("mode", "value"), [("clean", -0.5), ("pytorch", -0.498039), ("tensorflow", -0.5)]
)
def test_a_flat_image_stays_flat(mode, value):
    flat = inception.preprocess(np.full((50, 70, 3), 64, np.uint8), mode)
    assert flat.shape == (299, 299, 3) and flat.dtype == np.float32
    assert np.abs(flat - value).max() < 1e-5
