"""Images: uint8 and model values, PNG files with their generation settings, captioned grids.

A PNG carries two text chunks: "parameters", in the format that common web UIs read, and
"pixart_jax", the same settings as JSON, by which a second run skips finished images. PNGs are
written atomically.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pixart_jax.errors import UserError
from pixart_jax.files import atomic_write
from pixart_jax.remote_path import located

JSON_KEY = "pixart_jax"
_COLORS = {True: (20, 150, 50), False: (210, 30, 30)}  # frames of a grid, by its marks
_TITLES = {  # settings' key: the name it goes by in "parameters"
    "steps": "Steps",
    "solver": "Sampler",
    "guidance": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "model_hash": "Model hash",
    "model": "Model",
}


def to_model(images):
    """uint8 → float32 in [−1, 1], for NumPy and JAX arrays of any shape."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(values: np.ndarray) -> np.ndarray:
    """A model's float values, [−1, 1] (clipped) → uint8, rounded to the nearest."""
    return np.clip(np.rint((values + 1) * 127.5), 0, 255).astype(np.uint8)


def png_parameters(settings: Mapping) -> str:
    """The "parameters" chunk: prompt, negative prompt, then 'Name: value' pairs, Size as
    width×height.

    settings: prompt, negative_prompt, steps, solver, guidance, seed, height, width, model …; other
    keys follow under their own names; empty values are left out.
    """
    lines = [str(settings.get("prompt", ""))]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    facts = dict(settings)
    if "height" in facts and "width" in facts:
        facts["size"] = f"{facts.pop('width')}x{facts.pop('height')}"
    known = [(title, facts[key]) for key, title in _TITLES.items() if key in facts]
    named = {*_TITLES, "prompt", "negative_prompt"}
    rest = [(k.replace("_", " ").capitalize(), v) for k, v in facts.items() if k not in named]
    pairs = [f"{title}: {_field(v)}" for title, v in known + rest if v not in (None, "")]
    return "\n".join([*lines, ", ".join(pairs)])


def _field(value) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


def write_png(path: str | os.PathLike, image: np.ndarray, settings: Mapping | None = None) -> None:
    """Write image (uint8 [h, w, 3]) with its settings, atomically."""
    with atomic_write(path) as file:
        file.write(image_bytes(image, settings))


def image_bytes(
    image: np.ndarray, settings: Mapping | None = None, kind: str = "png", quality: int = 100
) -> bytes:
    """An image (uint8 [h, w, 3]) as a file with its settings. kind: png; of jpeg and webp, in the
    ``quality`` 0 to 100, the settings are "parameters" in EXIF's UserComment."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    file, picture = io.BytesIO(), Image.fromarray(np.asarray(image))
    if kind == "png":
        info = PngInfo()
        if settings is not None:
            info.add_text("parameters", png_parameters(settings))
            info.add_text(JSON_KEY, json.dumps(dict(settings), sort_keys=True))
        picture.save(file, format="PNG", pnginfo=info)
        return file.getvalue()
    exif = Image.Exif()
    if settings is not None:
        comment = b"UNICODE\0" + png_parameters(settings).encode("utf-16-be")
        exif.get_ifd(0x8769)[0x9286] = comment
    picture.save(file, format=kind, quality=quality, exif=exif)
    return file.getvalue()


def png_settings(path: str | os.PathLike, whole: bool = True) -> dict | None:
    """The settings in a PNG of :func:`write_png`; None for any other or a damaged file. whole: also
    read the pixels, which shows damage to them."""
    from PIL import Image

    try:
        with located(path).open("rb") as file, Image.open(file) as image:
            if whole:
                image.load()
            return json.loads(image.info[JSON_KEY])
    except (OSError, KeyError, ValueError, SyntaxError):
        return None


def slug(text: str, length: int = 48) -> str:
    """A prompt as part of a file name on any system: lower-case ASCII words without accents, joined
    by '-', cut at a word."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    words = re.findall(r"\w+", plain.lower())
    name = ""
    for word in words:
        if name and len(name) + 1 + len(word) > length:
            break
        name = f"{name}-{word}" if name else word[:length]
    return name or "empty"


def image_grid(
    images: Sequence[np.ndarray],
    captions: Sequence[str] | None = None,
    *,
    marks: Sequence[bool | None] | None = None,
    columns: int | None = None,
    cell: int | None = None,
) -> np.ndarray:
    """A grid of images, uint8 [H, W, 3].

    images: uint8 [h, w, 3] of any sizes. captions: one an image, wrapped below it. marks: a green
    frame for True, a red one for False, none for None. cell: pixels of a cell's longer side, by
    default the images' size but at least 128; small images are enlarged without smoothing.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not len(images):
        raise ValueError("a grid needs at least one image")
    tallest, widest = max(i.shape[0] for i in images), max(i.shape[1] for i in images)
    longest = max(tallest, widest)
    scale = max(1, math.ceil(128 / longest)) if cell is None else cell / longest
    height, width = round(tallest * scale), round(widest * scale)
    across = max(1, math.ceil(math.sqrt(len(images) * height / width)))
    columns = columns or min(len(images), across)
    rows = math.ceil(len(images) / columns)
    font = ImageFont.load_default(size=12)
    wrapped = [_wrap(caption, font, width) for caption in captions or [""] * len(images)]
    line, gap = 15, 6
    text = line * max(len(w) for w in wrapped)
    size = columns * (width + gap) + gap, rows * (height + text + gap) + gap
    sheet = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for n, image in enumerate(images):
        x, y = gap + (n % columns) * (width + gap), gap + (n // columns) * (height + text + gap)
        size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
        resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
        sheet.paste(Image.fromarray(np.asarray(image)).resize(size, resample), (x, y))
        if marks is not None and marks[n] is not None:
            frame, color = (x - 3, y - 3, x + size[0] + 2, y + size[1] + 2), _COLORS[bool(marks[n])]
            draw.rectangle(frame, outline=color, width=3)
        for k, words in enumerate(wrapped[n]):
            draw.text((x, y + height + 2 + k * line), words, fill=(40, 40, 40), font=font)
    return np.asarray(sheet)


def _wrap(caption: str, font, width: int, limit: int = 5) -> list[str]:
    """The caption in at most ``limit`` lines that fit, cut with '…'."""
    lines: list[str] = []
    for word in caption.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(word)
    if len(lines) > limit:
        lines = lines[:limit]
        lines[-1] += " …"
    for n, text in enumerate(lines):
        while len(text) > 1 and font.getlength(text) > width:
            text = text[:-2].rstrip() + "…"
        lines[n] = text
    return lines


# ---- animations ----

_ANIMATIONS = (".webp", ".gif", ".mp4")


def check_animation(path: str | os.PathLike) -> None:
    """Raise UserError for a name of another kind than :func:`write_animation` writes, and where the
    package for it is missing."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in _ANIMATIONS:
        raise UserError(f"{path}: an animation's name ends in {', '.join(_ANIMATIONS)}")
    if suffix == ".mp4" and importlib.util.find_spec("av") is None:
        raise UserError(f'{path} needs an extra: pip install "pixart-jax[video]"')


def write_animation(
    path: str | os.PathLike, frames: Sequence[str | os.PathLike], fps: int = 12
) -> None:
    """Write image files of one size as an endless .webp or .gif, or an .mp4 (H.264), atomically.
    Raises UserError as :func:`check_animation`."""
    from PIL import Image

    check_animation(path)
    pictures = (Image.open(located(frame).open("rb")).convert("RGB") for frame in frames)
    kind = os.path.splitext(path)[1].lower()[1:]
    with atomic_write(path) as file:
        if kind != "mp4":
            how = {"quality": 90, "method": 4} if kind == "webp" else {}
            timing = {"save_all": True, "duration": round(1000 / fps), "loop": 0}
            next(pictures).save(file, kind, append_images=pictures, **timing, **how)
            return
        import av

        with av.open(file, "w", format="mp4") as container:
            stream: Any = container.add_stream("libx264", rate=fps, options={"crf": "18"})
            with (
                located(frames[0]).open("rb") as file1,
                Image.open(file1) as first,
            ):  # the codec wants even sides
                stream.width, stream.height = (side // 2 * 2 for side in first.size)
            for picture in pictures:
                picture = picture.crop((0, 0, stream.width, stream.height))
                container.mux(stream.encode(av.VideoFrame.from_image(picture)))
            container.mux(stream.encode())


# ---- edge maps ----


def canny(image: np.ndarray, sigma: float = 1.0, low: float = 0.1, high: float = 0.2) -> np.ndarray:
    """Edge map by Canny (1986); of a grey image equal to skimage.feature.canny.

    Each pixel takes the gradient of the channel where it is steepest, as OpenCV does, so that
    neighbours of one luma but two colours have an edge.

    image: [h, w, channels], 0 … 255. sigma: of the Gaussian filter, px. low, high: thresholds of
    the gradient's magnitude (Sobel filters, channels as 0 … 1); an edge above ``low`` counts where
    it touches one above ``high``. Returns uint8 [h, w]: 255 on edges, else 0.
    """
    from scipy import ndimage

    inside = ndimage.gaussian_filter(np.ones(image.shape[:2]), sigma, mode="constant")
    gradients = []
    for channel in np.moveaxis(np.asarray(image, np.float64), -1, 0) * (1 / 255):
        smooth = ndimage.gaussian_filter(channel, sigma, mode="constant")
        smooth /= inside + np.finfo(np.float64).eps
        gradients.append([ndimage.sobel(smooth, axis) for axis in (0, 1)])
    steepest = (np.square(gradients).sum(1)).argmax(0)  # [h, w]
    gradient = np.take_along_axis(np.array(gradients), steepest[None, None], axis=0)[0]  # [2, h, w]
    magnitude = np.sqrt((gradient**2).sum(0))
    # maxima along the gradient, against the magnitude between two neighbours on either side
    less, more = np.sort(np.abs(gradient), axis=0)
    share = less / np.maximum(more, 1e-300)
    oblique = np.sign(gradient).astype(int)
    straight = oblique * (np.abs(gradient) == more)
    place, padded = np.indices(magnitude.shape) + 1, np.pad(magnitude, 1)
    thin = magnitude >= low
    for side in (1, -1):
        far, near = (padded[tuple(place + side * step)] for step in (oblique, straight))
        thin &= far * share + near * (1 - share) <= magnitude
    thin[[0, -1]] = thin[:, [0, -1]] = False
    parts, _ = ndimage.label(thin, np.ones((3, 3)))
    strong = np.unique(parts[thin & (magnitude >= high)])
    return np.where(np.isin(parts, strong[strong > 0]), 255, 0).astype(np.uint8)
