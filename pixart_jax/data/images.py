"""Bytes of a picture → upright RGB pixels → the pixels of its bucket.

Every picture that Pillow reads is brought to RGB of 8 bits: EXIF rotation applied, what is
transparent laid on white, gray and palettes and CMYK as RGB, 16 bits scaled to 8, of an animation
the first frame. Colour profiles are not applied. A picture of more than PIXELS pixels (Pillow's own
limit against decompression bombs), one that holds floating-point numbers, and whatever is cut short
or damaged is refused by name.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageChops

from pixart_jax.data.buckets import Fit, fit
from pixart_jax.errors import UserError

PIXELS = 2 * Image.MAX_IMAGE_PIXELS
"""178,956,970: a picture of more pixels is refused (13,377 px square)."""
# From half of that on Pillow warns; here the limit is the limit.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# which is as none
warnings.filterwarnings("ignore", message="Corrupt EXIF data", category=UserWarning)

_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_EXIF_ORIENTATION = 0x0112
# What Pillow's codecs raise at bytes that lie.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
)


class UnreadableImage(UserError):
    """The bytes are no picture, or only the beginning of one."""


def _open(data: bytes | BinaryIO) -> Image.Image:
    if isinstance(data, bytes):
        if len(data) == 0:
            raise UnreadableImage("the image is empty (0 bytes)")
        data = io.BytesIO(data)
    try:
        image = Image.open(data)
    except Image.DecompressionBombError:
        raise UnreadableImage(f"the image has more than {PIXELS:,} pixels") from None
    except _DAMAGE as fault:
        raise UnreadableImage(f"not a readable image: {_brief(fault)}") from None
    if 0 in image.size:
        raise UnreadableImage(f"the image has no pixels: {image.size[1]}×{image.size[0]}")
    return image


def _brief(fault: BaseException) -> str:
    text = " ".join(str(fault).split())
    return (
        "the format is none that is known"
        if "cannot identify image file" in text
        else text or type(fault).__name__
    )


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none or the EXIF data are damaged; a TIFF's is
    Pillow's own affair."""
    if image.format == "TIFF":
        return 1
    try:
        if image.format == "PNG" and "exif" not in image.info and not _late_exif(image):
            return 1  # getexif() would decode the whole picture to look behind it
        found = image.getexif().get(_EXIF_ORIENTATION)
    except _DAMAGE:
        return 1
    return found if found in range(1, 9) else 1


def _late_exif(image: Image.Image) -> bool:
    """Whether a PNG has its EXIF chunk behind the pixels."""
    file = image.fp
    place = file.tell()
    try:
        at = 8
        while True:
            file.seek(at)
            head = file.read(8)
            if len(head) < 8 or head[4:] == b"IEND":
                return False
            if head[4:] == b"eXIf":
                return True
            at += 12 + int.from_bytes(head[:4], "big")
    finally:
        file.seek(place)


def size(data: bytes | BinaryIO) -> tuple[int, int]:
    """(height, width) in px as the picture is meant to be seen (EXIF rotation applied), from its
    header alone.

    data: the bytes, or a file opened for reading, of which little more than the header is read.
    """
    image = _open(data)
    width, height = image.size
    return (width, height) if _orientation(image) in _SIDEWAYS else (height, width)


def decode(data: bytes) -> np.ndarray:
    """uint8 [height, width, 3]: upright (EXIF), transparent parts on white, gray, palette, 16-bit
    and CMYK as RGB.

    Raises UnreadableImage for what is no image and for one that is cut short.
    """
    return _pixels(_open(data))


def _pixels(image: Image.Image) -> np.ndarray:
    try:
        orientation = _orientation(image)
        image.load()
        rgb = _rgb(image)
    except UnreadableImage:
        raise
    except (*_DAMAGE, Image.DecompressionBombError, MemoryError) as fault:
        raise UnreadableImage(f"the image cannot be decoded: {_brief(fault)}") from None
    return np.asarray(rgb if orientation == 1 else rgb.transpose(_UPRIGHT[orientation]))


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def fitted(data: bytes, bucket: tuple[int, int]) -> tuple[np.ndarray, Fit, tuple[int, int]]:
    """(uint8 [bucket height, bucket width, 3], how it was resized and cropped, (height, width) of
    the original).

    A JPEG that is to be shrunk to less than a half is decoded at a half, quarter or eighth of its
    size, by the codec's own averaging, yet never below twice what it is shrunk to: several times
    faster, and not the very pixels of ``to_bucket(decode(data))``: tests hold the mean difference
    on a photograph under one level of 255. Anything else is the same.
    """
    image = _open(data)
    width, height = image.size
    turned = _orientation(image) in _SIDEWAYS
    original = (width, height) if turned else (height, width)
    how = fit(*original, bucket)
    if image.format == "JPEG":
        enough = (2 * how.height, 2 * how.width) if turned else (2 * how.width, 2 * how.height)
        image.draft(None, enough)
    return _cut(_pixels(image), how, bucket), how, original


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """uint8 [h, w], [h, w, 1] or [h, w, 3] → uint8 [h, w, 3]."""
    pixels = np.asarray(pixels)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if (
        pixels.dtype != np.uint8
        or pixels.ndim != 3
        or pixels.shape[-1] not in (1, 3)
        or 0 in pixels.shape
    ):
        raise UnreadableImage(
            f"not an image: {pixels.dtype} {pixels.shape}, expected uint8 [height, width, 1 or 3]"
        )
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow would clip them to 8
        pixels = np.asarray(image).astype(np.float32)
        return Image.fromarray(np.clip(np.rint(pixels / 257), 0, 255).astype(np.uint8)).convert(
            "RGB"
        )
    if image.mode == "F":
        raise UnreadableImage(
            "the image holds floating-point numbers, of which nothing says what is white"
        )
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        # Adobe's are stored inverted, and Pillow takes every one for Adobe's
        image = ImageChops.invert(image)
    return image.convert("RGB")


def to_bucket(pixels: np.ndarray, bucket: tuple[int, int]) -> tuple[np.ndarray, Fit]:
    """uint8 [h, w, 3] → (uint8 [bucket height, bucket width, 3], how it was resized and
    cropped)."""
    how = fit(*pixels.shape[:2], bucket)
    return _cut(pixels, how, bucket), how


def _cut(pixels: np.ndarray, how: Fit, bucket: tuple[int, int]) -> np.ndarray:
    if (how.height, how.width) != pixels.shape[:2]:
        pixels = np.asarray(
            Image.fromarray(pixels).resize((how.width, how.height), Image.Resampling.BICUBIC)
        )
    return pixels[how.top : how.top + bucket[0], how.left : how.left + bucket[1]]
