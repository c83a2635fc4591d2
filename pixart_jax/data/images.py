"""Bytes of a picture → upright RGB pixels → the pixels of its bucket."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

from pixart_jax.data.buckets import Fit, fit
from pixart_jax.errors import UserError

_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_EXIF_ORIENTATION = 0x0112


class UnreadableImage(UserError):
    """The bytes are no picture, or only the beginning of one."""


def _open(data: bytes) -> Image.Image:
    if len(data) == 0:
        raise UnreadableImage("the image is empty (0 bytes)")
    try:
        return Image.open(io.BytesIO(data))
    except (OSError, Image.DecompressionBombError) as fault:
        raise UnreadableImage(f"not a readable image: {fault}") from None


def size(data: bytes) -> tuple[int, int]:
    """(height, width) in px as the picture is meant to be seen (EXIF rotation applied), from its header alone."""
    image = _open(data)
    width, height = image.size
    return (width, height) if image.getexif().get(_EXIF_ORIENTATION) in _SIDEWAYS else (height, width)


def decode(data: bytes) -> np.ndarray:
    """uint8 [height, width, 3]: upright (EXIF), transparent parts on white, gray, palette, 16-bit and CMYK as RGB.

    Raises UnreadableImage for what is no image and for one that is cut short.
    """
    image = _open(data)
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as fault:
        raise UnreadableImage(f"the image cannot be decoded: {fault}") from None
    return np.asarray(_rgb(image))


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """uint8 [h, w], [h, w, 1] or [h, w, 3] → uint8 [h, w, 3]."""
    pixels = np.asarray(pixels)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] not in (1, 3) or 0 in pixels.shape:
        raise UnreadableImage(f"not an image: {pixels.dtype} {pixels.shape}, expected uint8 [height, width, 1 or 3]")
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow would clip them to 8
        pixels = np.asarray(image).astype(np.float32)
        return Image.fromarray(np.clip(np.rint(pixels / 257), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def to_bucket(pixels: np.ndarray, bucket: tuple[int, int]) -> tuple[np.ndarray, Fit]:
    """uint8 [h, w, 3] → (uint8 [bucket height, bucket width, 3], how it was resized and cropped)."""
    height, width = pixels.shape[:2]
    how = fit(height, width, bucket)
    if (how.height, how.width) != (height, width):
        pixels = np.asarray(Image.fromarray(pixels).resize((how.width, how.height), Image.Resampling.BICUBIC))
    return pixels[how.top : how.top + bucket[0], how.left : how.left + bucket[1]], how


def to_model(pixels: np.ndarray) -> np.ndarray:
    """uint8 of any shape → float32 in [−1, 1], the range of the VAE."""
    return np.asarray(pixels, np.float32) / np.float32(127.5) - np.float32(1)
