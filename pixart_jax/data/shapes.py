"""The embedded world: captioned scenes of coloured shapes, with full ground truth.

One to three objects on a ground, with a brief, a short and a dense caption, and a class label for
single objects (stage 1). Five colour–shape pairs (:data:`WITHHELD`) never occur in training, so
composition can be tested. A :class:`Level` is the difficulty; every score names it:

- ``plain``: 64 px, objects in slots with a little jitter, flat grounds, five shapes, 1 or 2 kinds;
- ``free``: the same objects anywhere, turned and of continuous size;
- ``rich``: 128 px, eight shapes, three kinds of object, textures on objects and grounds;
- ``lit``: plain's content, lit and shaded on graded grounds (the demo's stage 3);
- ``aesthetic``: the same at several sizes and aspect ratios (stage 3);
- ``edges``: edge maps of free's scenes, of all eight shapes, as a ControlNet's condition;
- ``gallery``: all of these together, for the autoencoder and the text encoder.

Scenes are rendered with signed distances in numpy and depend on (level, split, index) alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from pixart_jax.images import canny

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (218, 36, 36),
    "orange": (250, 138, 20),
    "yellow": (246, 224, 48),
    "green": (40, 165, 60),
    "cyan": (50, 205, 220),
    "blue": (36, 76, 220),
    "purple": (130, 44, 180),
    "pink": (250, 120, 190),
}
# all of low saturation, so that no object can vanish in them
GROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (232, 232, 228),
    "gray": (140, 140, 142),
    "black": (38, 38, 42),
    "sand": (205, 190, 162),
    "slate": (92, 104, 120),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
PLURALS = {"cross": "crosses"}
SIZES = {"small": 9.5, "large": 13.0}  # radius in px where the shorter side of the image is 64
NUMBERS = ("zero", "one", "two", "three")
TEXTURES = ("solid", "striped", "dotted")
# and their inverse
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUM_CLASSES = len(SHAPES) * len(COLOURS)
WITHHELD = tuple(
    tuple(pair.split())
    for pair in ("blue star", "green triangle", "yellow cross", "purple square", "orange circle")
)


@dataclasses.dataclass(frozen=True)
class Object:
    """x, y: centre in px; radius in px; turn in radians."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    turn: float = 0.0
    texture: str = "solid"

    @property
    def name(self) -> str:
        return f"{self.size} {self.brief_name}"

    @property
    def brief_name(self) -> str:
        """The name without the size."""
        texture = "" if self.texture == "solid" else f"{self.texture} "
        return f"{texture}{self.colour} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """task: single, pair, count or three. relation: between the first two objects of a pair."""

    height: int
    width: int
    ground: str
    objects: tuple[Object, ...]
    task: str
    relation: str | None = None
    style: str = "flat"  # flat | lit | edges
    ground_texture: str = "solid"  # solid | checked | speckled
    seed: int = 0  # of the ground's jitter and texture

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Scene:
        fields = json.loads(text)
        return cls(**{**fields, "objects": tuple(Object(**o) for o in fields["objects"])})


@dataclasses.dataclass(frozen=True)
class Level:
    """One difficulty. canvases: (height, width, weight) in px. tasks: (kind, weight)."""

    name: str
    canvases: tuple[tuple[int, int, float], ...] = ((64, 64, 1.0),)
    shapes: tuple[str, ...] = SHAPES[:5]
    tasks: tuple[tuple[str, float], ...] = (("single", 0.3), ("pair", 0.45), ("count", 0.25))
    placement: str = "slots"  # slots | free
    max_turn: float = 0.0  # radians
    size_jitter: float = 0.0  # share of the radius
    textures: tuple[str, ...] = ("solid",)
    ground_textures: tuple[str, ...] = ("solid",)
    style: str = "flat"
    # of a mixture: (level, height, width, weight)
    members: tuple[tuple[str, int, int, float], ...] = ()
    train: int = 16_000
    test: int = 1_000


_FREE: dict[str, Any] = {"placement": "free", "max_turn": 0.35, "size_jitter": 0.08}
LEVELS = {
    level.name: level
    for level in (
        Level("plain"),
        Level("free", **_FREE),
        Level(
            "rich",
            canvases=((128, 128, 0.5), (96, 160, 0.25), (160, 96, 0.25)),
            shapes=SHAPES,
            tasks=(("single", 0.2), ("pair", 0.3), ("count", 0.2), ("three", 0.3)),
            textures=TEXTURES,
            ground_textures=("solid", "checked", "speckled"),
            **_FREE,
        ),
        Level("lit", style="lit", train=6_000),
        Level(
            "aesthetic",
            canvases=((64, 64, 0.55), (96, 96, 0.15), (64, 96, 0.15), (96, 64, 0.15)),
            style="lit",
        ),
        Level("edges", shapes=SHAPES, style="edges", **_FREE),
        Level(
            "gallery",
            members=(
                *(("plain", 64, 64, 0.35), ("free", 64, 64, 0.15), ("aesthetic", 64, 64, 0.15)),
                *(("aesthetic", 96, 96, 0.15), ("rich", 64, 64, 0.1)),
                *(("edges", 64, 64, 0.05), ("edges", 96, 96, 0.05)),
            ),
        ),
    )
}
# what a score can judge; of the gallery without its edge maps
COLOURED = tuple(name for name, level in LEVELS.items() if level.style != "edges")


def _polygon(p: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    """Signed distance of points p [h, w, 2] to a polygon [n, 2]; negative inside."""
    best = np.full(p.shape[:2], np.inf)
    inside = np.zeros(p.shape[:2], bool)
    for a, b in zip(vertices, np.roll(vertices, -1, axis=0)):
        edge, to = b - a, p - a
        along = np.clip((to @ edge) / (edge @ edge), 0, 1)
        away = to - along[..., None] * edge
        best = np.minimum(best, (away**2).sum(-1))
        crosses = (a[1] > p[..., 1]) != (b[1] > p[..., 1])
        if edge[1] != 0:
            inside ^= crosses & (p[..., 0] < a[0] + (p[..., 1] - a[1]) / edge[1] * edge[0])
    return np.where(inside, -1, 1) * np.sqrt(best)


def _box(p: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    q = np.abs(p) - np.array([half_width, half_height])
    return np.sqrt((np.maximum(q, 0) ** 2).sum(-1)) + np.minimum(q.max(-1), 0)


def _outline(shape: str) -> np.ndarray:
    """Vertices of the polygonal shapes for radius 1, y downwards."""
    if shape == "triangle":
        return np.array([(0, -1.05), (1.0, 0.8), (-1.0, 0.8)])
    if shape == "diamond":
        return np.array([(0, -1.1), (0.72, 0), (0, 1.1), (-0.72, 0)])
    if shape == "star":
        angle = np.arange(10) * math.pi / 5 - math.pi / 2
        radius = np.where(np.arange(10) % 2, 0.46, 1.2)
        return np.stack([radius * np.cos(angle), radius * np.sin(angle) + 0.06], -1)
    if shape == "heart":
        t = np.linspace(0, 2 * math.pi, 32, endpoint=False)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([16 * np.sin(t) ** 3 / 16, (-y - 2.5) / 14.5], -1)
    raise ValueError(shape)


def distance(shape: str, p: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in px of points p [h, w, 2] (from the centre) to the shape's border."""
    if shape == "circle":
        return np.sqrt((p**2).sum(-1)) - radius
    if shape == "ring":
        return np.abs(np.sqrt((p**2).sum(-1)) - 0.74 * radius) - 0.26 * radius
    if shape == "square":
        return _box(p, 0.86 * radius, 0.86 * radius)
    if shape == "cross":
        return np.minimum(
            _box(p, 0.34 * radius, 1.02 * radius), _box(p, 1.02 * radius, 0.34 * radius)
        )
    return _polygon(p, radius * _outline(shape))


def _ground(scene: Scene, rng: np.random.Generator, grid: np.ndarray) -> np.ndarray:
    unit = min(scene.height, scene.width) / 64
    colour = np.array(GROUNDS[scene.ground], float) + rng.uniform(-6, 6)
    image = np.broadcast_to(colour, (scene.height, scene.width, 3)).copy()
    if scene.style == "lit":  # a soft light from above
        image += (18 * (0.5 - grid[..., 1] / scene.height))[..., None]
    if scene.ground_texture == "checked":
        image += 7 * (((grid // (8 * unit)).sum(-1) % 2) * 2 - 1)[..., None]
    elif scene.ground_texture == "speckled":
        cells = rng.uniform(-9, 9, (scene.height // 4 + 1, scene.width // 4 + 1))
        image += np.kron(cells, np.ones((4, 4)))[: scene.height, : scene.width, None]
    return image


def _fill(obj: Object, p: np.ndarray, unit: float, style: str) -> np.ndarray:
    """The object's own colour at each point, [h, w, 3]."""
    colour = np.array(COLOURS[obj.colour], float)
    image = np.broadcast_to(colour, (*p.shape[:2], 3)).copy()
    if obj.texture == "striped":
        image[np.mod(p[..., 1], 6 * unit) < 2.4 * unit] = 0.72 * colour
    elif obj.texture == "dotted":
        cell = np.mod(p, 6 * unit) - 3 * unit
        image[(cell**2).sum(-1) < (1.7 * unit) ** 2] = 0.72 * colour
    if style == "lit":
        image *= (1 - 0.13 * p[..., 1] / obj.radius)[..., None]
    return image


def render(scene: Scene) -> np.ndarray:
    """uint8 [height, width, 3], anti-aliased. Style edges: white lines, thin or soft, on black."""
    if scene.style == "edges":
        flat = render(dataclasses.replace(scene, style="flat"))
        lines = canny((flat @ np.array([0.2125, 0.7154, 0.0721]))[..., None])  # of the luma
        if scene.seed % 2:
            lines = np.minimum(gaussian_filter(lines.astype(float), 0.8) * 1.6, 255).astype(
                np.uint8
            )
        return np.repeat(lines[..., None], 3, -1)
    rng = np.random.default_rng(scene.seed)
    grid = np.stack(np.meshgrid(np.arange(scene.width), np.arange(scene.height)), -1) + 0.5
    unit = min(scene.height, scene.width) / 64
    image = _ground(scene, rng, grid)
    for obj in scene.objects:
        # all pixels that the object and its shade can touch
        reach = 1.3 * obj.radius + (6 * unit if scene.style == "lit" else 2)
        rows = slice(max(0, int(obj.y - reach)), math.ceil(obj.y + reach))
        near = rows, slice(max(0, int(obj.x - reach)), math.ceil(obj.x + reach))
        p = grid[near] - np.array([obj.x, obj.y])
        cos, sin = math.cos(obj.turn), math.sin(obj.turn)
        p = p @ np.array([[cos, -sin], [sin, cos]])
        if scene.style == "lit":
            shade = distance(obj.shape, p - np.array([1.2, 2.2]) * unit, obj.radius)
            image[near] *= 1 - 0.30 * np.clip(0.5 - shade / (3 * unit), 0, 1)[..., None]
        cover = np.clip(0.5 - distance(obj.shape, p, obj.radius), 0, 1)[..., None]
        image[near] = image[near] * (1 - cover) + _fill(obj, p, unit, scene.style) * cover
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _kind(rng: np.random.Generator, level: Level, withheld: str) -> tuple[str, str, str, str]:
    """(shape, colour, size, texture) of one object. withheld: 'never', 'only' or 'any'."""
    while True:
        shape = level.shapes[rng.integers(len(level.shapes))]
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        if withheld == "any" or ((colour, shape) in WITHHELD) == (withheld == "only"):
            break
    size = list(SIZES)[rng.integers(2)]
    return shape, colour, size, level.textures[rng.integers(len(level.textures))]


_SLOTS: dict[str | int, list[tuple[float, float]]] = {
    1: [(0.5, 0.5)],
    2: [(0.25, 0.25), (0.75, 0.75)],
    3: [(0.5, 0.25), (0.25, 0.75), (0.75, 0.75)],
    "left of": [(0.25, 0.5), (0.75, 0.5)],
    "right of": [(0.75, 0.5), (0.25, 0.5)],
    "above": [(0.5, 0.25), (0.5, 0.75)],
    "below": [(0.5, 0.75), (0.5, 0.25)],
}
"""Centres as shares of (width, height), in the order of the objects; without a relation like the
pips of a die, one way for each number (three in a row would touch)."""


def _place_free(
    rng: np.random.Generator, radii: list[float], height: int, width: int, relation: str | None
) -> list[tuple[float, float]]:
    """Centres in px, apart from each other and the border, obeying the relation; else []."""
    places: list[tuple[float, float]] = []
    for radius in radii:
        for _ in range(40):
            margin = 1.28 * radius + 1
            x, y = rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)
            placed = zip(places, radii)
            if all(math.hypot(x - a, y - b) > 1.28 * (radius + r) + 2 for (a, b), r in placed):
                places.append((x, y))
                break
        else:
            return []
    if relation:
        (ax, ay), (bx, by) = places[:2]
        dx, dy = bx - ax, by - ay
        along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
        if abs(along) < 1.5 * abs(across) or (along > 0) != (relation in ("left of", "above")):
            return []
    return places


def _weighted(rng: np.random.Generator, choices: Sequence[tuple]) -> tuple:
    """One of the tuples, whose last entries are weights."""
    weights = np.array([choice[-1] for choice in choices])
    return choices[rng.choice(len(choices), p=weights)]


def draw_scene(
    rng: np.random.Generator,
    level: Level | str = "plain",
    *,
    task: str | None = None,
    withheld: str = "never",
    canvas: tuple[int, int] | None = None,
) -> Scene:
    """Draw a scene of the level. task: by default any, by weight. withheld: as of :func:`_kind`."""
    level = LEVELS[level] if isinstance(level, str) else level
    if level.members:
        member, high, wide, _ = _weighted(rng, level.members)
        return draw_scene(rng, member, task=task, withheld=withheld, canvas=canvas or (high, wide))
    if task is None:
        task = _weighted(rng, level.tasks)[0]
    height, width = canvas or _weighted(rng, level.canvases)[:2]
    unit = min(height, width) / 64 * (0.8 if task == "three" or level.name == "rich" else 1.0)
    places: list[tuple[float, float]] = []
    while not places:
        relation = None
        if task == "single":
            kinds = [_kind(rng, level, withheld)]
        elif task == "count":
            kinds = [_kind(rng, level, withheld)] * int(rng.integers(1, 4))
        else:
            kinds = []
            # objects of one scene differ in colour and in shape, so that words can tell them apart
            while len(kinds) < (2 if task == "pair" else 3):
                kind = _kind(rng, level, withheld)
                if all(kind[0] != k[0] and kind[1] != k[1] for k in kinds):
                    kinds.append(kind)
            relation = list(RELATIONS)[rng.integers(4)]
        radii = [SIZES[k[2]] * unit * (1 + rng.uniform(-1, 1) * level.size_jitter) for k in kinds]
        if level.placement == "slots":
            # no more jitter: the tips of two large stars stay apart
            jitter = rng.uniform(-1, 1, (len(kinds), 2)) * unit
            slots = zip(_SLOTS[relation or len(kinds)], jitter)
            places = [(x * width + jx, y * height + jy) for (x, y), (jx, jy) in slots]
        else:
            places = _place_free(rng, radii, height, width, relation)
    objects = []
    for (shape, colour, size, texture), (x, y), r in zip(kinds, places, radii):
        turn = round(rng.uniform(-1, 1) * level.max_turn, 4)
        where = round(x, 3), round(y, 3), round(r, 3)
        objects.append(Object(shape, colour, size, *where, turn, texture))
    ground = list(GROUNDS)[rng.integers(len(GROUNDS))]
    ground_texture = level.ground_textures[rng.integers(len(level.ground_textures))]
    return Scene(
        *(height, width, ground, tuple(objects), task, relation, level.style, ground_texture),
        seed=int(rng.integers(2**31)),
    )


def scene_at(level: str, split: str, index: int) -> Scene:
    """Scene ``index`` of a split, whatever else was drawn."""
    seed = [zlib.crc32(f"{level}/{split}".encode()), index]
    return draw_scene(np.random.default_rng(seed), level)


def label(scene: Scene) -> int:
    """Class of a scene with one kind of object (stage 1): shape · 8 + colour; −1 for others."""
    kinds = {(o.shape, o.colour) for o in scene.objects}
    if len(kinds) != 1:
        return -1
    ((shape, colour),) = kinds
    return SHAPES.index(shape) * len(COLOURS) + list(COLOURS).index(colour)


def _where(obj: Object, scene: Scene) -> str:
    """'at the top left', 'in the middle', …"""
    column = ("left", "", "right")[min(2, int(3 * obj.x / scene.width))]
    row = ("top", "", "bottom")[min(2, int(3 * obj.y / scene.height))]
    place = " ".join(w for w in (row, column) if w)
    return f"at the {place}" if place else "in the middle"


def captions(scene: Scene) -> dict[str, str]:
    """{"brief", "short", "shapeless", "dense"}: the subject in few words (no sizes, often no
    articles), the subject, the subject with "object" for the shape, and each object in full."""
    first, count = scene.objects[0], len(scene.objects)
    plural = PLURALS.get(first.shape, first.shape + "s")
    places = [_where(o, scene) for o in scene.objects]
    several = scene.task == "count" and count > 1
    said = {}
    for kind in ("brief", "short", "shapeless"):
        names = [o.brief_name if kind == "brief" else o.name for o in scene.objects]
        many = plural
        if kind == "shapeless":
            names = [n.removesuffix(o.shape) + "object" for n, o in zip(names, scene.objects)]
            many = "objects"
        if several:
            said[kind] = f"{NUMBERS[count]} {names[0].rpartition(' ')[0]} {many}"
            continue
        if scene.task == "count":
            names = [f"one {name}" for name in names]
        elif kind != "brief" or scene.seed % 2 == 0:
            names = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
        said[kind] = ", and ".join([f" {scene.relation} ".join(names[:2]), *names[2:]])
    if several:
        details = f"the {plural} are {first.colour} and {first.size}, {', '.join(places)}"
    else:
        details = ". ".join(
            f"the {o.shape} is {o.colour} and {o.size}, {place}"
            for o, place in zip(scene.objects, places)
        )
    texture = "" if scene.ground_texture == "solid" else f"{scene.ground_texture} "
    ground = f"on a {texture}{scene.ground} ground"
    return {**said, "dense": f"{said['short']} {ground}. {details}."}
