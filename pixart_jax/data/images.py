"""Image bytes → upright RGB pixels → the pixels of a bucket.

Whatever Pillow reads becomes 8-bit RGB: EXIF rotation applied, transparency on white, 16 bits
scaled to 8, the first frame of an animation; colour profiles are ignored. UnreadableImage is raised
for more than PIXELS pixels (Pillow's limit against decompression bombs), 32-bit pixels, and damage.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageOps, UnidentifiedImageError

from pixart_jax.data.buckets import Fit, fit
from pixart_jax.errors import UserError, one_line

# fmt: off
PICTURES = frozenset({
    "jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif",
    "avifs", "jp2", "j2k", "jpx", "ppm", "pgm", "pbm", "pnm", "tga",
})
# fmt: on
"""Suffixes of images, lower case, without the dot."""
PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""178,956,970: an image of more pixels is refused (13,377 px square)."""
# Pillow warns from half of that on.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", message="Corrupt EXIF data", category=UserWarning)

_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width
# What Pillow's codecs raise for damaged bytes.
_DAMAGE = (
    *(OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, OverflowError),
    *(struct.error, zlib.error),
)


class UnreadableImage(UserError):
    """The bytes are not an image, or only the beginning of one."""


def _open(data: bytes | BinaryIO) -> Image.Image:
    if isinstance(data, bytes):
        if not data:
            raise UnreadableImage("the image is empty (0 bytes)")
        data = io.BytesIO(data)
    try:
        image = Image.open(data)
    except Image.DecompressionBombError:
        raise UnreadableImage(f"the image has more than {PIXELS:,} pixels") from None
    except _DAMAGE as error:
        raise UnreadableImage(f"not a readable image: {_reason(error)}") from None
    if 0 in image.size:
        raise UnreadableImage(f"the image has no pixels: {image.size[1]}×{image.size[0]}")
    return image


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "the format is none that is known"
    return one_line(error)


def _is_sideways(image: Image.Image) -> bool:
    """Whether EXIF rotation swaps height and width; damaged EXIF data count as none."""
    try:
        if image.format == "TIFF":
            return False
        if image.format == "PNG" and "exif" not in image.info and not _has_late_exif(image):
            return False  # getexif() would decode the image to look behind its pixels
        return image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS
    except _DAMAGE:
        return False


def _has_late_exif(image: Image.Image) -> bool:
    """Whether the end of a PNG may hold an EXIF chunk, behind the pixels."""
    file = vars(image)["fp"]
    place, end = file.tell(), file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 2**16))
    found = b"eXIf" in file.read()
    file.seek(place)
    return found


def size(data: bytes | BinaryIO) -> tuple[int, int]:
    """(height, width) in px with EXIF rotation applied, from the header."""
    image = _open(data)
    width, height = image.size
    return (width, height) if _is_sideways(image) else (height, width)


def decode(data: bytes) -> np.ndarray:
    """Decode to uint8 [height, width, 3]. Raises UnreadableImage for anything but a whole image."""
    return _pixels(_open(data))


def _pixels(image: Image.Image) -> np.ndarray:
    try:
        image.load()
        return np.asarray(_rgb(_upright(image), image.format))
    except UnreadableImage:
        raise
    except (*_DAMAGE, Image.DecompressionBombError, MemoryError) as error:
        raise UnreadableImage(f"the image cannot be decoded: {_reason(error)}") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned and image.format != "TIFF" else image
    except _DAMAGE:  # damaged EXIF data
        return image


def fitted(data: bytes, bucket: tuple[int, int]) -> tuple[np.ndarray, Fit, tuple[int, int]]:
    """Decode, resize and crop to (uint8 [bucket height, bucket width, 3], the Fit used, (height,
    width) of the original).

    A JPEG that is shrunk to less than a half is decoded at a half, quarter or eighth of its size,
    never below twice its final size: several times faster, and within one level of 255 in the mean
    of ``to_bucket(decode(data))``. All other images are equal to it.
    """
    image = _open(data)
    width, height = image.size
    sideways = _is_sideways(image)
    original = (width, height) if sideways else (height, width)
    how = fit(*original, bucket)
    if image.format == "JPEG":
        enough = 2 * how.width, 2 * how.height
        image.draft(None, enough[::-1] if sideways else enough)
    return _cut(_pixels(image), how, bucket), how, original


def _rgb(image: Image.Image, codec: str | None) -> Image.Image:
    transparent = "transparency" in image.info
    if image.mode == "RGB" and not transparent:
        return image
    if image.mode.startswith("I;16"):  # which Pillow would clip to 8 bits
        values = np.asarray(image)
        pixels = np.rint(values.astype(np.float32) / 257)
        if isinstance(transparent_value := image.info.get("transparency"), int):
            pixels[values == transparent_value] = 255
        return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        held = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise UnreadableImage(f"the image holds {held}, of which nothing says what is white")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or transparent:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode == "CMYK" and codec == "JPEG" and "adobe" not in image.info:
        # Adobe's are stored inverted, and Pillow takes every one for Adobe's
        image = ImageChops.invert(image)
    return image.convert("RGB")


def to_bucket(pixels: np.ndarray, bucket: tuple[int, int]) -> tuple[np.ndarray, Fit]:
    """uint8 [h, w, 3] → (uint8 [bucket height, bucket width, 3], the Fit used)."""
    how = fit(pixels.shape[0], pixels.shape[1], bucket)
    return _cut(pixels, how, bucket), how


def _cut(pixels: np.ndarray, how: Fit, bucket: tuple[int, int]) -> np.ndarray:
    if (how.height, how.width) != pixels.shape[:2]:
        image = Image.fromarray(pixels)
        resized = image.resize((how.width, how.height), Image.Resampling.BICUBIC)
        pixels = np.asarray(resized)
    return pixels[how.top : how.top + bucket[0], how.left : how.left + bucket[1]]
