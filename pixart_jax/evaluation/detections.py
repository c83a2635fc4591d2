"""What networks see in images, as JSON lines: detections and answers, computed by one step and read
by the rules of another."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from pixart_jax import tables
from pixart_jax.errors import UserError, one_line
from pixart_jax.evaluation import torch_models
from pixart_jax.evaluation.features import Network

Value = TypeVar("Value")
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Object:
    """One detection. box: x0, y0, x1, y1 in px. depth: mean over the box, larger is nearer."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    colour: str | None = None
    depth: float | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Object:
        """Of a line's {"class", "score", "box", "color"?, "depth"?}. Raises ValueError, KeyError or
        TypeError for another form."""
        x0, y0, x1, y1 = box = tuple(float(value) for value in row["box"])
        depth = None if row.get("depth") is None else float(row["depth"])
        score = float(row["score"])
        if not all(map(math.isfinite, (*box, score, depth or 0))) or x0 > x1 or y0 > y1:
            raise ValueError(f"box {list(box)}, score {score}, depth {depth}")
        if not isinstance(name := row["class"], str):
            raise TypeError(f"class {name!r}")
        return cls(name, score, (x0, y0, x1, y1), row.get("color"), depth)


def objects_of(row: Row) -> list[Object]:
    """The objects of a line, the surest first."""
    return sorted((Object.of(one) for one in row["objects"]), key=lambda one: -one.score)


def parsed(path: Path, form: str, parse: Callable[[Row], Value]) -> Iterator[tuple[str, Value]]:
    """(place, parse(row)) of each row of a table. form: of a row, for errors. Raises UserError for
    a bad row."""

    def refuse(place: str, kind: str, detail: str, repaired: bool) -> NoReturn:
        raise UserError(f"{place}: {detail}")

    for place, row in tables.rows(path, refuse):
        try:
            found = parse(row)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise UserError(f"{place}: {form} is needed ({one_line(error)})") from None
        yield place, found


def read(
    path: Path, form: str, parse: Callable[[Row], tuple[Any, Value]], name: Callable[[str], str]
) -> dict[str, dict[Any, Value]]:
    """Image → {key: value} of a file of lines, each parsed to (key, value). form: of a line, for
    errors. name: of an image in the list, by its path. Raises UserError for a bad line, and for a
    line twice."""
    found: dict[str, dict[Any, Value]] = {}
    for place, (image, (key, value)) in parsed(
        path, form, lambda row: (name(row["image"]), parse(row))
    ):
        if key in (held := found.setdefault(image, {})):
            raise UserError(f"{place}: a second line of {image}{f', {key}' if key else ''}")
        held[key] = value
    if not found:
        raise UserError(f"{path} holds no lines")
    return found


def looking(
    look: Callable[[list[np.ndarray], Sequence[int]], Iterable[list[Row]]], key: Sequence[Any]
) -> Network:
    """What networks see. look(images, numbers): the lines of each image, without its name. key: of
    the networks and all that the lines depend on."""

    def prepare(image: np.ndarray) -> np.ndarray:
        """The image itself, as one object: images of a block may differ in size."""
        holder = np.empty((), object)
        holder[()] = image
        return holder

    def compute(pixels: np.ndarray, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        with torch_models.require().inference_mode():
            found = list(look(list(pixels[: len(numbers)]), numbers))
        return {"lines": np.array([json.dumps(rows).encode() for rows in found])}

    return Network(key=key, prepare=prepare, compute=compute, wanted=("lines",))
