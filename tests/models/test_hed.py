"""HED against a torch module of the same weights, its files, and the edges command."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from pixart_jax import load_component
from pixart_jax.__main__ import main
from pixart_jax.errors import UserError
from pixart_jax.images import canny
from pixart_jax.models.configs import HEDConfig
from pixart_jax.weights.component import HED
from tests.models.reference import param_shapes, randomise


class Block(torch.nn.Module):
    def __init__(self, before: int, width: int, layers: int):
        super().__init__()
        sizes = [before, *[width] * layers]
        pairs = zip(sizes, sizes[1:])
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(a, b, 3, padding=1) for a, b in pairs)
        self.projection = torch.nn.Conv2d(width, 1, 1)

    def forward(self, x):
        for conv in self.convs:
            x = torch.relu(conv(x))
        return x, self.projection(x)


class TorchHED(torch.nn.Module):
    """The network of ControlNetHED.pth, by its names."""

    def __init__(self, widths, layers):
        super().__init__()
        self.norm = torch.nn.Parameter(torch.zeros(1, 3, 1, 1))
        for n, (width, count) in enumerate(zip(widths, layers)):
            setattr(self, f"block{n + 1}", Block((3, *widths)[n], width, count))
        self.blocks = len(widths)

    def forward(self, images):  # uint8 [b, h, w, 3]
        x, maps = images.permute(0, 3, 1, 2).float() - self.norm, []
        for n in range(self.blocks):
            x = torch.nn.functional.max_pool2d(x, 2, 2) if n else x
            x, edges = getattr(self, f"block{n + 1}")(x)
            maps.append(torch.nn.functional.interpolate(edges, images.shape[1:3], mode="bilinear"))
        return torch.sigmoid(torch.cat(maps, 1).mean(1))


SIZES = ((6, 8, 10, 12, 12), (2, 2, 3, 3, 3))


@pytest.fixture(scope="module")
def model():
    found = randomise(TorchHED(*SIZES))
    with torch.no_grad():
        found.norm.uniform_(90, 130)
        found.block1.convs[0].weight.mul_(0.02)
    return found


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("hed") / "ControlNetHED.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three images, one of another size, and one that is no image."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    (folder / "below").mkdir()
    for name, side in (("a", 40), ("below/b", 40), ("c", 33)):
        pixels = rng.integers(0, 256, (side, 49, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


def test_edges_equal_torch_on_odd_sizes_from_any_file(model, file, tmp_path):
    """.pth, fp16 .safetensors and the folder that convert writes."""
    images = np.random.default_rng(1).integers(0, 256, (2, 53, 37, 3), np.uint8)
    with torch.no_grad():
        theirs = model(torch.from_numpy(images)).numpy()
    assert theirs.std() > 0.02
    hed = load_component(file)
    assert isinstance(hed, HED) and hed.config.widths == SIZES[0]
    ours = np.asarray(hed.apply(images))
    assert ours.shape == (2, 53, 37) and np.abs(ours - theirs).max() <= 1e-4

    half = {name: value.half() for name, value in model.state_dict().items()}
    safetensors.torch.save_file(half, tmp_path / "half.safetensors")
    ours = load_component(tmp_path / "half.safetensors").apply(images)
    with torch.no_grad():
        rounded = TorchHED(*SIZES)
        rounded.load_state_dict({name: value.float() for name, value in half.items()})
        assert np.abs(np.asarray(ours) - rounded(torch.from_numpy(images)).numpy()).max() <= 1e-4

    assert main(["convert", str(file), str(tmp_path / "folder")]) == 0
    again = load_component(tmp_path / "folder")
    assert np.array_equal(again.apply(images), hed.apply(images))


def test_the_released_sizes_have_14_716_168_parameters():
    shapes = param_shapes(HED, HEDConfig())
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 14_716_168


@pytest.mark.parametrize("method", ["hed", "canny"])
def test_edges_writes_a_map_an_image_and_resumes(method, file, photos, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--method", method, "--batch-size", "2", *(["--weights", str(file)])]
    assert main(["edges", str(photos), str(out), *flags]) == 0
    said = capsys.readouterr()
    assert "3 edge maps" in said.out and "1 could not be read" in said.out
    assert "broken.jpg" in said.err
    maps = {path.relative_to(out).as_posix(): path for path in out.rglob("*.png")}
    assert set(maps) == {"a.png", "below/b.png", "c.png"}
    pixels = np.asarray(Image.open(photos / "a.png"))
    wanted = canny(pixels)
    if method == "hed":
        wanted = np.rint(np.asarray(load_component(file).apply(pixels[None])[0]) * 255)
    # in another batch a value may round to its neighbour
    assert np.abs(np.asarray(Image.open(maps["a.png"])).astype(int) - wanted).max() <= 1

    stamps = {name: path.stat().st_mtime_ns for name, path in maps.items()}
    maps["c.png"].unlink()
    assert main(["edges", str(photos), str(out), *flags]) == 0
    after = {name: path.stat().st_mtime_ns for name, path in maps.items()}
    assert [name for name in maps if after[name] != stamps[name]] == ["c.png"]


def test_bad_input_of_edges_is_one_line(file, photos, tmp_path):
    out = str(tmp_path / "out")
    for arguments, line in (
        ((str(photos), out), "hed needs weights"),
        ((str(photos), out, "--weights", str(tmp_path / "none.pth")), "none.pth"),
        ((str(tmp_path / "nowhere"), out, "--method", "canny"), "no such file"),
    ):
        with pytest.raises(UserError, match=line):
            main(["edges", *arguments])
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "a.bmp")
    with pytest.raises(UserError, match="would both become"):
        main(["edges", str(tmp_path), out, "--method", "canny"])
