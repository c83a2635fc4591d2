"""The flags of sample.py that edit an image, and the images that they name."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from pixart_jax.commands.sample_walk import toward_of
from pixart_jax.errors import UserError
from pixart_jax.remote_path import Location, local

ROW_FIELDS = ("image", "mask", "strength", "control")  # what a prompt's row may set for itself
_FILES = ("image", "mask", "reference", "control")
_SHARED = (
    "strength",
    "mask_padding",
    "outpaint",
    "upscale",
    "variation",
)  # settings of a whole batch


@dataclasses.dataclass(frozen=True)
class EditFlags:
    """What to start from instead of noise."""

    image: Location | None = None
    """An image to edit, for all prompts; its size is the default size."""
    strength: float | None = None
    """How much of the sampling an edit does, up to 1: so large a share of the steps. By default
    0.6, with --upscale 0.3."""
    mask: Location | None = None
    """An image of the same size: white is generated anew, black stays as it is."""
    mask_padding: int | None = None
    """Generate only the mask's box and so many pixels around it, at full resolution."""
    outpaint: tuple[int, int, int, int] | None = None
    """Extend the image by so many pixels on the left, top, right and bottom (with --strength 1)."""
    upscale: float | None = None
    """Enlarge the image by this factor and refine it in windows (docs/canvas.md)."""
    reference: Location | None = None
    """Generate in the style of this image."""
    variation: tuple[int, float] | None = None
    """SEED SHARE: take noise that far, from 0 to 1, on the way to that of another seed."""
    controlnet: Location | None = None
    """A ControlNet's folder, hub id or file, of this model."""
    control: Location | None = None
    """What it follows, for all prompts: an edge map, of the picture's aspect ratio."""
    control_from: Literal["hed", "canny"] | None = None
    """Of --control, which is then a picture: compute its edge map first."""
    control_weights: Location | None = None
    """Of hed: ControlNetHED.pth, its folder, or lllyasviel/Annotators/ControlNetHED.pth on the
    hub."""

    def __post_init__(self):
        if self.outpaint is not None and self.mask is not None:
            raise UserError("outpaint makes a mask itself: give no mask")
        if self.upscale is not None:
            if not 1 < self.upscale <= 16:
                raise UserError(f"upscale {self.upscale:g}: a factor above 1, up to 16, is needed")
            if self.mask is not None or self.outpaint is not None:
                raise UserError("upscale refines the whole image: give no mask")
        for name in ("mask", "outpaint", "upscale"):
            if getattr(self, name) is not None and self.image is None:
                raise UserError(f"--{name} needs --image, what is to be edited")

    def sampling(self, config, transformer):
        """The SamplingConfig under these flags: --upscale samples in windows and decodes in tiles
        of the model's own size, where the config names no others."""
        if self.upscale is None:
            return config
        side = transformer.sample_size
        window, tile = config.tile_window or side, config.vae_tile or max(32, side)
        return dataclasses.replace(config, tile_window=window, vae_tile=tile)

    def settings(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What an image records of how it was edited; row: its ROW_FIELDS, None where it has none.
        Files go by their names and the hashes of their bytes."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        given |= {name: value for name, value in row.items() if value is not None}
        if given["strength"] is None:
            given["strength"] = 0.6 if self.upscale is None else 0.3
        if given["image"] is None:
            given["strength"] = None
            if given["mask"] is not None:
                raise UserError(f"mask {given['mask']} without the image that it belongs to")
        found: dict[str, Any] = {}
        if given["control"] is not None:
            if self.controlnet is None:
                raise UserError(f"control {given['control']} needs --controlnet, which follows it")
            found |= _controlnet(self.controlnet)
            if self.control_from is not None:
                found["control_from"] = self.control_from
                if self.control_weights is not None:
                    found["control_weights"] = str(self.control_weights)
        for name in _FILES:
            if given[name] is not None:
                found |= {name: str(given[name]), f"{name}_hash": _read(str(given[name]))[1]}
        shared = {name: given[name] for name in _SHARED if given[name] is not None}
        pairs = shared.items()
        return found | {n: " ".join(map(str, v)) if isinstance(v, tuple) else v for n, v in pairs}


@functools.cache
def _controlnet(path: Location) -> dict[str, str]:
    from pixart_jax.files import folder_fingerprint
    from pixart_jax.weights.hub import model_folder

    return {"controlnet": str(path), "controlnet_hash": folder_fingerprint(model_folder(path))}


@functools.cache
def _detector(method: str, weights: str | None):
    from pixart_jax.pipeline.conditions import EdgeDetector

    return EdgeDetector.open(method, weights)


def edits_of(settings: Mapping[str, Any]):
    """The ``Edits`` of one image's settings. Raises UserError for options and images that do not go
    together."""
    from pixart_jax.pipeline.editing import Edits

    return Edits.read(1, **edit_options([settings]))


def edit_options(images: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Arguments of ``Pipeline.generate`` for images of one batch shape."""
    first = images[0]
    found = {name: first[name] for name in ("strength", "mask_padding") if name in first}
    if "variation" in first:
        seed, share = first["variation"].split()
        found["variation"] = int(seed), float(share)
    if "toward" in first:
        found["toward"] = toward_of(images)
    for name in _FILES:
        if name in first:
            found[name] = [_read(image[name])[0] for image in images]
    if "control_from" in first:
        edges = _detector(first["control_from"], first.get("control_weights"))
        found["control"] = [edges(picture[None])[0] for picture in found["control"]]
    if "mask" in found:
        found["mask"] = [pixels[..., 0] for pixels in found["mask"]]
    if "upscale" in first:
        found["image"] = [_enlarged(image, first["upscale"]) for image in found["image"]]
    if "outpaint" in first:
        from pixart_jax.pipeline.editing import outpaint

        sides = [int(side) for side in first["outpaint"].split()]
        pairs = [outpaint(image, *sides) for image in found["image"]]
        found["image"], found["mask"] = (list(column) for column in zip(*pairs))
    return found


def _enlarged(image: np.ndarray, factor: float) -> np.ndarray:
    from PIL import Image

    height, width = (round(side * factor) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def _read(path: str) -> tuple[np.ndarray, str]:
    """(uint8 [h, w, 3] of an image file, ten hex digits of a hash of its bytes)."""
    try:
        return _decoded(path, local(path).stat().st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


@functools.lru_cache(maxsize=64)
def _decoded(path: str, changed: int) -> tuple[np.ndarray, str]:
    from pixart_jax.data.images import UnreadableImage, decode

    data = local(path).read_bytes()
    try:
        return decode(data), hashlib.sha256(data).hexdigest()[:10]
    except UnreadableImage as error:
        raise UserError(f"{path}: {error}") from None
