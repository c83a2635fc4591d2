"""Uploaded pictures and the multipart form that they come in."""

from __future__ import annotations

import io
import json
import warnings
from typing import Any

import numpy as np
from fastapi import Request
from PIL import Image
from starlette.datastructures import UploadFile

from pixart_jax.data.images import UnreadableImage, decode
from pixart_jax.images import canny
from pixart_jax.serving.offer import Refused

PIXELS = 4096**2
FORMATS = ("PNG", "JPEG", "WEBP")
_FILES = {"image": "image", "image[]": "image", "mask": "mask", "control": "control"}
_NUMBERS = (
    *("n", "output_compression", "partial_images", "num_inference_steps", "guidance_scale"),
    *("strength", "control_scale"),
)
_PARTS: dict[str, Any] = {"prompt": {"type": "string", "minLength": 1}}
_PARTS |= {name: {"type": "string", "format": "binary"} for name in ("image", "mask", "control")}
_FORM = {"type": "object", "required": ["prompt"], "properties": _PARTS}
BODY = {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}


async def read_form(request: Request) -> tuple[dict[str, str], dict[str, bytes]]:
    """({field: text}, {image, mask, control: bytes}). Raises Refused for parts that are neither,
    or twice."""
    texts: dict[str, str] = {}
    files: dict[str, bytes] = {}
    async with request.form(max_files=4, max_fields=40, max_part_size=2**20) as form:
        for name, value in form.multi_items():
            field = _FILES.get(name)
            if isinstance(value, UploadFile) != (field is not None):
                kind = "a file" if field else "text"
                raise Refused(f"{name[:60]}: {kind} is needed", name[:60])
            if (field or name) in (*texts, *files):
                raise Refused(f"{name[:60]}: one is taken", name[:60])
            if isinstance(value, UploadFile):
                files[str(field)] = await value.read()
            else:
                texts[name] = value
    return texts, files


def parsed(texts: dict[str, str]) -> dict[str, Any]:
    """The fields of a form, which are all text, as JSON would have them; what cannot be read is
    left to the check of the request."""
    found: dict[str, Any] = dict(texts)
    for name in {*_NUMBERS, "stream", "progress", "lora"} & found.keys():
        text = found[name].lower() if name in ("stream", "progress") else found[name]
        try:
            found[name] = json.loads(text)
        except (ValueError, RecursionError):
            pass
    return found


def pictures(files: dict[str, bytes], control_from: str | None = None) -> dict[str, np.ndarray]:
    """{image: uint8 [h, w, 3], mask: bool [h, w], True where alpha is 0: what is made anew,
    control: as image, or of control_from "canny" its edges, uint8 [h, w]}. Raises Refused where one
    is not an image of FORMATS, or is too large."""
    found = {}
    for name, data in files.items():
        image = _open(name, data)
        try:
            found[name] = decode(data) if name != "mask" else _mask(image)
        except (UnreadableImage, OSError, ValueError, SyntaxError) as error:
            raise _unusable(name, str(error)) from None
    if "image" not in found and "control" not in found:
        raise Refused("an image to edit is needed, or a control", "image", "invalid_image")
    if control_from == "canny" and "control" in found:
        found["control"] = canny(found["control"])
    return found


def _open(name: str, data: bytes) -> Image.Image:
    """The picture with its header read, of a size that may be decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise _unusable(name, f"not a readable picture ({', '.join(FORMATS)})") from None
    if image.size[0] * image.size[1] > PIXELS:
        size = "{} x {}".format(*image.size)
        raise _unusable(name, f"{size} pixels, more than {PIXELS} pixels")
    return image


def _mask(image: Image.Image) -> np.ndarray:
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        alpha = "the mask has no alpha channel: alpha 0 marks what is made anew"
        raise Refused(alpha, "mask", "invalid_image")
    return np.asarray(image.convert("RGBA"))[..., 3] < 128


def _unusable(name: str, why: str) -> Refused:
    return Refused(f"{name}: {why}", name, "invalid_image")
