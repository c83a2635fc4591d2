"""What the benchmarks of evaluate share: images → what networks see, a file of JSON lines; rules →
scores of it, with their interval."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from pixart_jax import tables
from pixart_jax.errors import UserError, one_line
from pixart_jax.evaluation import report
from pixart_jax.evaluation.features import Extractor, ImageSet, Network
from pixart_jax.evaluation.generated import GeneratedOptions, check_list, generate_at, sampled_with
from pixart_jax.evaluation.torch_models import Images, load, load_detector, require
from pixart_jax.files import atomic_write, write_json
from pixart_jax.pipeline.output import parse_share

Value = TypeVar("Value")
Row = dict[str, Any]
_RESAMPLES = 1000  # of prompts, for an interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(GeneratedOptions):
    """The images lie as the benchmark's own scripts want them; generated ones (`-- FLAGS`) are put
    there."""

    batch_size: int = 8
    benchmark: Path | None = None
    """your copy of the benchmark: its repository, or the folder of its prompts"""

    def __post_init__(self):
        counts = self.batch_size, getattr(self, "per_prompt", None)
        if any(count is not None and count < 1 for count in counts):
            raise UserError("batch-size and per-prompt: at least 1")
        if self.out is None:
            raise UserError("give --out FOLDER, for score.json and what the networks see")

    def find(self, folder: str, name: str) -> Path:
        """A file of the benchmark, in its folder or in its repository's."""
        if self.benchmark is None:
            raise UserError(f"give --benchmark DIR, your copy of the benchmark, with {name}")
        places = [self.benchmark / name, self.benchmark / folder / name]
        if (found := next((path for path in places if path.is_file()), None)) is None:
            raise UserError(f"--benchmark {self.benchmark} holds no {name}")
        return found


_LOAD: dict[str, Callable[[str], Any]] = {
    "detector": load_detector,
    "depth": lambda path: load(path, "AutoModelForDepthEstimation", "AutoImageProcessor"),
    "vqa": lambda path: load(path, "BlipForQuestionAnswering"),
    "clip": lambda path: load(path, "CLIPModel"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A first step and how its lines are read. flags: of its models, the first the one by which a
    score is named. look(models by flag, names, images) gives the lines of each image, without its
    name; parse the key and value of one; judge(image, {key: value}) an image's score. also: what
    the lines depend on beside models and images."""

    kind: str
    flags: tuple[str, ...]
    look: Callable[[Mapping[str, Any], Sequence[str], Images], Iterable[list[Row]]]
    form: str
    parse: Callable[[Row], tuple[Any, Any]]
    judge: Callable[[str, dict], Any]
    also: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class BenchmarkRun:
    """One call of a benchmark. name: an image's path → its name in the list of images. sources:
    facts of the files that are scored."""

    def __init__(
        self,
        options: Any,
        flags: Sequence[str] | None,
        prompts: Sequence[str],
        place: Callable[[int, int], str],
        name: Callable[[str], str] = lambda image: image.split("/")[-1],
    ):
        """Generate the images first where ``flags`` of sample.py are given, each at
        place(prompt, number)."""
        self.options, self.name = options, name
        self.sources: dict[str, dict[str, Any]] = {}
        self.images: ImageSet | None = None
        if flags is not None:
            generate_at(options, flags, prompts, options.per_prompt or 4, place)
        if folder := options.generated:
            inner = folder / "samples"
            self.images = ImageSet.open(inner if inner.is_dir() else folder, sizes=True)
            try:
                self.names = [name(path) for path in self.images.names]
            except ValueError as error:
                raise UserError(f"{folder}: {error}") from None

    def judge(
        self, source: Source, listed: Callable[[Iterable[str]], Sequence[str]]
    ) -> dict[str, Any] | None:
        """Image → its score, in the order of the list, listed(the images of the file); None in
        processes other than the first."""
        if self.images:
            check_list(self.names, listed(self.names), self.images.source)
        path = getattr(self.options, source.kind) or self._look(source)
        if path is None:
            return None
        found = read(path, source.form, source.parse, self.name)
        wanted = listed(self.names if self.images else found)
        check_list(found, wanted, path)
        facts = {"path": str(path), "sha256": sha256(path.read_bytes()).hexdigest()}
        settings = path.with_suffix(".settings.json")
        facts |= json.loads(settings.read_text("utf-8")) if settings.is_file() else {}
        self.sources[source.kind] = facts
        return {image: source.judge(image, found[image]) for image in wanted}

    def _look(self, source: Source) -> Path | None:
        """Write the lines of all images to OUT, and beside them what they depend on."""
        paths = {flag: getattr(self.options, flag) for flag in source.flags}
        if self.images is None or None in paths.values():
            models = " and ".join(f"--{flag} MODEL" for flag in paths)
            raise UserError(f"give --{source.kind} FILE, or --images DIR with {models}")
        nets = {flag: _LOAD[flag](path) for flag, path in paths.items()}
        facts = {"weights": {flag: net.digest for flag, net in nets.items()}, **source.also}

        def compute(pixels: np.ndarray, numbers: Sequence[int]) -> dict[str, np.ndarray]:
            images, names = list(pixels[: len(numbers)]), [self.names[n] for n in numbers]
            with require().inference_mode():
                found = [json.dumps(rows).encode() for rows in source.look(nets, names, images)]
            return {"lines": np.array(found)}

        key = source.kind, json.dumps(facts)
        network = Network(key=key, prepare=_as_object, compute=compute, wanted=("lines",))
        share = parse_share(self.options.share)
        found = Extractor(network, self.options.batch_size, share)(self.images, "the images")
        if found is None:
            print(f"share {share.index}/{share.count} of the {source.kind} is done")
            return None
        path = self.options.out / f"{source.kind}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path.with_suffix(".settings.json"), {"models": paths, **facts})
        with atomic_write(path, "w", encoding="utf-8") as file:
            for name, rows in zip(self.names, found[0]["lines"]):
                for row in json.loads(rows):
                    file.write(json.dumps({"image": name, **row}, ensure_ascii=False) + "\n")
        print(f"written: {path}")
        return path

    def by(self, source: Source) -> str:
        """The model behind a file; the file where it does not say."""
        facts, flag = self.sources[source.kind], source.flags[0]
        return f"{flag}={facts.get('models', {}).get(flag) or Path(facts['path']).name}"

    def finish(
        self,
        metric: str,
        tasks: Mapping[str, Mapping[str, Sequence[float]]],
        results: Sequence[Row],
        **facts: Any,
    ) -> None:
        """Print and write the score. tasks: task → prompt → its images' scores; the value is the
        mean over tasks of their means over images, the interval resamples prompts."""
        rng, draws, shares = np.random.default_rng(0), [], {}
        for task, prompts in tasks.items():
            sums, counts = (np.array([f(some) for some in prompts.values()]) for f in (sum, len))
            rows = rng.integers(len(sums), size=(_RESAMPLES, len(sums)))
            draws.append(sums[rows].sum(1) / counts[rows].sum(1))
            shares[task] = float(sums.sum() / counts.sum())
        low, high = np.percentile(np.mean(draws, axis=0), [2.5, 97.5]).tolist()
        interval = [low, high] if all(len(some) > 1 for some in tasks.values()) else None
        value = sum(shares.values()) / len(shares)
        images = sum(len(some) for prompts in tasks.values() for some in prompts.values())
        n = {"generated": images, "prompts": sum(map(len, tasks.values()))}
        print(f"{metric} · {n['generated']} images of {n['prompts']} prompts\n")
        for task, share in (shares | facts.get("categories", {})).items():
            print(report.line(task, share))
        print(report.line("score", value, interval))
        if facts.get("absent"):
            print(f"absent, and not in the mean: {', '.join(facts['absent'])}")
        facts = {"tasks": shares, **facts, "sources": self.sources, **sampled_with(self.images)}
        facts["list"] = sha256("\n".join(row["image"] for row in results).encode()).hexdigest()
        score = {"value": value, "interval": interval}
        report.finish(self.options.out, metric, score, n, facts, results)


def _as_object(image: np.ndarray) -> np.ndarray:
    """An array of one object, the image: those of a block may differ in size."""
    holder = np.empty((), object)
    holder[()] = image
    return holder


# ---- files of lines ----


@dataclasses.dataclass(frozen=True)
class Object:
    """One detection. box: x0, y0, x1, y1 in px. depth: mean over the box, larger is nearer."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    colour: str | None = None
    depth: float | None = None


def without_masks(found: Iterable[Row]) -> list[Row]:
    """Detections as lines hold them."""
    return [{name: v for name, v in one.items() if name != "mask"} for one in found]


def objects_of(row: Row) -> list[Object]:
    """The objects {"class", "score", "box", "color"?, "depth"?} of a line, the surest first. Raises
    ValueError, LookupError or TypeError for another form."""
    found = []
    for one in row["objects"]:
        x0, y0, x1, y1 = box = tuple(float(value) for value in one["box"])
        depth = None if one.get("depth") is None else float(one["depth"])
        score = float(one["score"])
        if not all(map(math.isfinite, (*box, score, depth or 0))) or x0 > x1 or y0 > y1:
            raise ValueError(f"box {list(box)}, score {score}, depth {depth}")
        if not isinstance(name := one["class"], str):
            raise TypeError(f"class {name!r}")
        found.append(Object(name, score, (x0, y0, x1, y1), one.get("color"), depth))
    return sorted(found, key=lambda one: -one.score)


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
    lines = parsed(path, form, lambda row: (name(row["image"]), parse(row)))
    for place, (image, (key, value)) in lines:
        if key in (held := found.setdefault(image, {})):
            raise UserError(f"{place}: a second line of {image}{f', {key}' if key else ''}")
        held[key] = value
    if not found:
        raise UserError(f"{path} holds no lines")
    return found
