"""What a ControlNet is conditioned on: the edge maps of images."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from pixart_jax.data import images
from pixart_jax.errors import UserError
from pixart_jax.images import canny
from pixart_jax.pipeline.editing import check_aspect
from pixart_jax.pipeline.encoder_identity import component_identity
from pixart_jax.weights.component import HED, load_component

METHODS = ("hed", "canny")
WEIGHTS = "a file ControlNetHED.pth, a folder that convert made of it, or the hub's file"
_HUB = "lllyasviel/Annotators/ControlNetHED.pth"


@dataclasses.dataclass(frozen=True, eq=False)
class EdgeDetector:
    """method: of METHODS. network: of 'hed'; .apply(uint8 [b, H, W, 3]) → [b, H, W] of 0 … 1."""

    method: str
    network: Any = None

    @classmethod
    def open(cls, method: str, weights: str | os.PathLike | None = None, mesh=None) -> EdgeDetector:
        """method: of METHODS. Raises UserError for weights that are missing or not HED's."""
        if method == "canny":
            return cls(method)
        if weights is None:
            raise UserError(f"hed needs weights: {WEIGHTS}, {_HUB}")
        network = load_component(weights, mesh=mesh)
        if not isinstance(network, HED):
            raise UserError(f"{weights} is a {type(network).__name__}: hed needs {WEIGHTS}")
        return cls(method, network)

    @functools.cached_property
    def identity(self) -> str:
        """The method, with the hash of its weights. Change it when :func:`canny` changes."""
        return "canny:rgb" if self.network is None else f"hed:{component_identity(self.network)}"

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [b, h, w, 3] → edge maps uint8 [b, h, w]."""
        if self.network is None:
            return np.stack([canny(image) for image in pixels])
        return np.rint(np.asarray(self.network.apply(pixels)) * 255).astype(np.uint8)


class FolderCondition:
    """Maps that lie in a folder, each under the key of its image (the path without the suffix)."""

    def __init__(self, root: str | os.PathLike):
        self._root = Path(root)
        if not self._root.is_dir():
            raise UserError(f"condition folder {str(root)!r}: no such folder")
        seal, self._files = hashlib.sha256(), {}
        for path in sorted(self._root.rglob("*")):
            if path.suffix.lower()[1:] in images.PICTURES and path.is_file():
                name = path.relative_to(self._root)
                seal.update(f"{name.as_posix()} {path.stat().st_size}\n".encode())
                self._files[name.with_suffix("").as_posix()] = path
        self.identity = f"folder:{seal.hexdigest()}"

    def read(self, key: str, shape: tuple[int, ...], bucket: tuple[int, int]) -> np.ndarray:
        """The map of an image of ``shape`` [h, w, …], resized and cropped as the image is: uint8
        [bucket height, bucket width, 3]. Raises UserError without one that fits."""
        path = self._files.get(key)
        if path is None:
            raise UserError(f"no map {key} in {self._root}")
        pixels = images.decode(path.read_bytes())
        check_aspect(str(path), pixels, shape)
        return images.to_bucket(pixels, bucket)[0]


Condition = EdgeDetector | FolderCondition


def open_condition(text: str, weights: str | os.PathLike | None = None, mesh=None) -> Condition:
    """'hed', 'canny' or 'folder:DIR' → what makes conditions; UserError for others."""
    kind, _, folder = text.partition(":")
    if kind == "folder" and folder:
        return FolderCondition(folder)
    if text not in METHODS:
        raise UserError(f"condition {text!r}: hed, canny or folder:DIR is needed")
    return EdgeDetector.open(text, weights, mesh)
