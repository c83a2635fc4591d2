"""Find the objects of the embedded world (data/shapes.py) in an image, from pixels alone.

Every ground is nearly grey and all light on it (shade, shadow, check, speckle) runs along grey. So
the detector first works on each pixel's *chroma*, rgb − mean(rgb), where the ground is one point g
and an object of chroma c that covers the share a of a pixel lies at g + a·(c − g), whatever the
light:

1. g is the median chroma of the pixels that are nearly grey;
2. a pixel that is away from g by 0.42 of the way to the nearest of the eight colours is foreground;
   connected foreground is a part; specks (under a third of the smallest object) are dropped. A part
   is one object, unless it has pieces of several colours, or of one colour joined by a neck, and
   the pieces are more like templates than the whole is;
3. an object's colour is the nearest of the eight to its median rgb, under the best-fitting light;
4. its coverage, soft at the border, is computed along the direction that separates its inside from
   the ground around it best (Fisher's discriminant, so that grey counts where it is flat and not
   where a shadow or a texture lies), normalised to one centre and area, and compared with templates
   of every shape, turned and blurred in many ways; the nearest gives shape, centre and radius.

An object like no template has the shape :data:`UNKNOWN`: a blob must not be right by chance.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
from scipy import ndimage

from pixart_jax.data import shapes

UNKNOWN = "unknown"
# a chroma of this norm or less may be ground; grounds have up to 31, objects 66 and more
GREY = 45.0
LIGHT = (0.65, 1.25)  # an object's rgb may be this times its nominal colour
SPECK = 22.0  # px² where the shorter side is 64; the smallest object has 63
# soft intersection over union with the nearest template, under which a shape is unknown
LIKENESS = 0.80

# coverage is steepened this much around one half: inside, textures and noise are covered too
STEEP = 2.0

_NAMES = tuple(shapes.COLOURS)
_RGB = np.array(list(shapes.COLOURS.values()), np.float32)  # [8, 3]
_CHROMA = _RGB - _RGB.mean(-1, keepdims=True)  # [8, 3]
# [3, 8]: chroma @ this is 1 at the colour itself
_DIRECTIONS = (_CHROMA / (_CHROMA**2).sum(-1, keepdims=True)).T
_SIDE = 25  # pixels of a side of a normalised mask
_REACH = 1.45  # half a side, in units of √(area / 2)


@dataclasses.dataclass(frozen=True)
class Detection:
    """One object. x, y: the centre (as shapes.Object has it), radius, all in px; area in px²; shape
    may be ``UNKNOWN``. confidence: soft intersection over union with the nearest template, 0 … 1
    (of an unknown shape too)."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    area: float
    confidence: float

    def size(self, unit: float = 1.0) -> str:
        """'small' or 'large', whichever is nearer; unit is px for each px of shapes.SIZES."""
        radius = max(self.radius, 1e-3)
        return min(shapes.SIZES, key=lambda s: abs(math.log(radius / (unit * shapes.SIZES[s]))))


def find_objects(image: np.ndarray) -> list[Detection]:
    """The objects in an image, uint8 [height, width, 3] of any size, the largest area first."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
        form = f"{image.dtype} {list(image.shape)}"
        raise ValueError(f"expected one image, uint8 [height, width, 3], got {form}")
    rgb = image.astype(np.float32)
    chroma = rgb - rgb.mean(-1, keepdims=True)
    away = chroma - _ground(chroma)
    foreground = (away @ _DIRECTIONS).max(-1) > 0.42
    smallest = SPECK * (min(image.shape[:2]) / 64) ** 2
    picture = _Picture(rgb, away, foreground, _colour_map(rgb, foreground))
    parts = _parts(foreground, smallest)
    found = [one for part in parts for one in _objects(picture, part, smallest)]
    return sorted(found, key=lambda f: -f.area)


def relation(first: Detection, second: Detection) -> str:
    """'left of', 'right of', 'above' or 'below': where the first lies from the second, along the
    longer axis."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


# ---- ground and parts ----


@dataclasses.dataclass(frozen=True)
class _Picture:
    """rgb [h, w, 3]; away: chroma less the ground's [h, w, 3]; foreground bool [h, w]; colours:
    index of the nearest [h, w]."""

    rgb: np.ndarray
    away: np.ndarray
    foreground: np.ndarray
    colours: np.ndarray


def _ground(chroma: np.ndarray) -> np.ndarray:
    """[3]. Where hardly anything is grey the image's frame stands for the ground."""
    grey = chroma[(chroma**2).sum(-1) < GREY**2]
    if len(grey) < 0.08 * chroma.shape[0] * chroma.shape[1]:
        grey = np.concatenate([chroma[0], chroma[-1], chroma[:, 0], chroma[:, -1]])
    return np.median(grey, axis=0)


def _nearest_colour(rgb: np.ndarray) -> np.ndarray:
    """Index [n] of the colour nearest to each rgb [n, 3] under the best-fitting light."""
    light = np.clip(rgb @ _RGB.T / (_RGB**2).sum(-1), *LIGHT)  # [n, 8]
    return np.argmin(((rgb[:, None] - light[..., None] * _RGB) ** 2).sum(-1), axis=-1)


def _colour_map(rgb: np.ndarray, foreground: np.ndarray) -> np.ndarray:
    """The nearest colour of each foreground pixel's 3×3 surroundings within the foreground, [h, w];
    −1 elsewhere."""
    weight = ndimage.uniform_filter(foreground.astype(np.float32), 3)[foreground]
    smooth = ndimage.uniform_filter(rgb * foreground[..., None], (3, 3, 1))[foreground]
    colours = np.full(foreground.shape, -1)
    colours[foreground] = _nearest_colour(smooth / weight[:, None])
    return colours


def _parts(mask: np.ndarray, smallest: float) -> list[np.ndarray]:
    """The connected parts of a mask bool [h, w], of at least ``smallest`` px², as masks."""
    labels, _ = ndimage.label(mask)
    areas = enumerate(np.bincount(labels.ravel()))
    return [labels == label for label, area in areas if label and area >= smallest]


def _objects(picture: _Picture, part: np.ndarray, smallest: float) -> list[Detection]:
    """What a connected part bool [h, w] is: one object, or the pieces it is cut into."""
    whole = _describe(picture, part)
    tally = np.bincount(picture.colours[part], minlength=len(_NAMES))
    # several colours: cut, unless the whole is more like a template
    if tally.max() < 0.85 * tally.sum():
        there = np.flatnonzero(tally >= smallest)
        cores = [ndimage.binary_erosion(part & (picture.colours == c)) for c in there]
        pieces = [_describe(picture, piece) for piece in _cut(part, cores, smallest)]
        likeness = whole.confidence if whole.shape != UNKNOWN else 0
        weighted = sum(p.area * p.confidence for p in pieces)
        if len(pieces) > 1 and weighted > likeness * sum(p.area for p in pieces):
            return pieces
    elif whole.shape == UNKNOWN:  # of one colour and like no template: perhaps two that touch
        core = part
        while (core := ndimage.binary_erosion(core)).any():
            cut = _cut(part, [core], smallest)
            if len(cut) > 1:
                pieces = [_describe(picture, piece) for piece in cut]
                if all(piece.shape != UNKNOWN for piece in pieces):
                    return pieces
    return [whole]


def _cut(part: np.ndarray, cores: list[np.ndarray], smallest: float) -> list[np.ndarray]:
    """The part's pixels, each given to the nearest connected core, as masks; [part] where there is
    one core or none."""
    connected = [one for core in cores for one in _parts(core, 0.3 * smallest)]
    if len(connected) <= 1:
        return [part]
    seeds = np.zeros(part.shape, np.int32)
    for piece, core in enumerate(connected, 1):
        seeds[core] = piece
    _, nearest = ndimage.distance_transform_edt(seeds == 0, return_indices=True)
    owner = np.where(part, seeds[tuple(nearest)], 0)
    masks = [owner == piece for piece in range(1, len(connected) + 1)]
    return [mask for mask in masks if mask.sum() >= smallest]


# ---- one object ----


def _describe(picture: _Picture, region: np.ndarray) -> Detection:
    """region: the object's pixels, bool [h, w]."""
    height, width = region.shape
    ys, xs = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    top, bottom = max(0, ys[0] - 4), min(height, ys[-1] + 5)
    left, right = max(0, xs[0] - 4), min(width, xs[-1] + 5)
    box = np.s_[top:bottom, left:right]
    region, rgb, away = region[box], picture.rgb[box], picture.away[box]

    core = ndimage.binary_erosion(region)  # the inside, without the border's mixtures
    if core.sum() < 12:
        core = region
    name = _NAMES[int(_nearest_colour(np.median(rgb[core], axis=0)[None])[0])]
    around = ~ndimage.binary_dilation(picture.foreground[box], iterations=2)
    if around.sum() >= 12:
        coverage = _fisher(rgb, core, around)
    else:
        own = np.median(away[core], axis=0)
        coverage = away @ own / max(float(own @ own), 1.0)
    coverage = np.clip(0.5 + STEEP * (coverage - 0.5), 0, 1)
    coverage *= ndimage.binary_dilation(region, np.ones((3, 3), bool))
    shape, likeness, x, y, radius = _shape(coverage)
    return Detection(shape, name, left + x, top + y, radius, float(coverage.sum()), likeness)


def _fisher(rgb: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """rgb [h, w, 3] along the direction that separates two sets of pixels (bool [h, w]) best: 0
    outside, 1 inside."""
    a, b = rgb[inside], rgb[outside]
    # the floor, about 6 levels of noise, keeps it steady
    within = np.cov(a.T) + np.cov(b.T) + 40 * np.eye(3)
    step = np.median(a, axis=0) - np.median(b, axis=0)
    direction = np.linalg.solve(within, step)
    return (rgb - np.median(b, axis=0)) @ (direction / max(float(step @ direction), 1e-6))


def _normalise(mask: np.ndarray) -> tuple[np.ndarray, float, float, float]:
    """A soft mask [h, w] at one centre and area, [_SIDE, _SIDE]; and the centre x, y and the scale
    √(area / 2) in px."""
    area = float(mask.sum()) + 1e-6
    y = float(mask.sum(1) @ (np.arange(mask.shape[0]) + 0.5)) / area
    x = float(mask.sum(0) @ (np.arange(mask.shape[1]) + 0.5)) / area
    scale = math.sqrt(area / 2)
    steps = np.linspace(-_REACH, _REACH, _SIDE) * scale - 0.5
    places = np.meshgrid(y + steps, x + steps, indexing="ij")
    return ndimage.map_coordinates(mask, places, order=1, mode="grid-constant"), x, y, scale


@functools.cache
def _templates() -> tuple[np.ndarray, list[str], np.ndarray]:
    """Every shape, turned by up to 24 degrees, sharp and blurred: masks [n, _SIDE²]; names; the
    object's centre less the mask's centre and its radius, in units of the scale, [n, 3]."""
    masks, names, geometry = [], [], []
    radius, side = 10.0, 36
    y, x = np.mgrid[:side, :side] + 0.5 - side / 2
    for name in shapes.SHAPES:
        turns = [0.0] if name in ("circle", "ring") else np.linspace(-0.42, 0.42, 13)
        for turn in turns:
            cos, sin = math.cos(turn), math.sin(turn)
            p = np.stack([x, y], -1) @ np.array([[cos, -sin], [sin, cos]])
            sharp = np.clip(0.5 - shapes.distance(name, p, radius), 0, 1)
            for blur in (0.0, 0.8, 1.5, 2.1):
                soft = ndimage.gaussian_filter(sharp, blur) if blur else sharp
                soft = np.clip(0.5 + STEEP * (soft - 0.5), 0, 1)
                mask, cx, cy, scale = _normalise(soft)
                masks.append(mask.ravel())
                names.append(name)
                geometry.append([(side / 2 - cx) / scale, (side / 2 - cy) / scale, radius / scale])
    return np.array(masks, np.float32), names, np.array(geometry)


def _shape(coverage: np.ndarray) -> tuple[str, float, float, float, float]:
    """(name, likeness, x, y, radius) of a soft mask [h, w]; px from its corner."""
    masks, names, geometry = _templates()
    mask, x, y, scale = _normalise(coverage)
    mask = mask.ravel().astype(np.float32)
    apart = np.abs(masks - mask).sum(-1)
    together = masks.sum(-1) + mask.sum()
    likeness = (together - apart) / (together + apart)  # Σ min / Σ max
    best = int(np.argmax(likeness))
    dx, dy, radius = geometry[best] * scale
    name = names[best] if likeness[best] >= LIKENESS else UNKNOWN
    return name, float(likeness[best]), x + dx, y + dy, float(radius)
