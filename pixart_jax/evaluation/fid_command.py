"""``python -m pixart_jax evaluate fid``: how far a set of images lies from another."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from pixart_jax import plots
from pixart_jax.errors import Notice, UserError
from pixart_jax.evaluation import coco, frechet, inception, report, set_scores
from pixart_jax.evaluation.features import Extractor, FeatureNetwork, ImageSet, on_devices
from pixart_jax.evaluation.generated import GeneratedOptions, prompts_of, sampled_with
from pixart_jax.evaluation.inception import Mode
from pixart_jax.evaluation.score_command import ClipOptions, evaluate_clip
from pixart_jax.evaluation.torch_models import embeddings, load

Scores = dict[str, dict[str, Any]]  # by metric: value, interval …
Metric = Literal["fid", "kid", "sfid", "is", "prdc", "fid_infinity", "cmmd"]
_MODELS = {"cmmd": "openai/clip-vit-large-patch14-336", "fd-dinov2": "facebook/dinov2-large"}
_PAIRED = ("kid", "prdc", "cmmd")  # which need the reference's features, not its statistics alone
_ENDS = {"": "pool", "_s": "spatial"}  # of the names in an .npz: the features
_ENOUGH = 2048  # images, under which a covariance of pool features is singular
_MOST = 10_000  # images of a side for precision and recall: as many as ADM's references hold


@dataclasses.dataclass(frozen=True)
class FidOptions(GeneratedOptions):
    """Compare generated images with reference images by features: FID, KID, sFID, precision and
    recall, CMMD; Inception score. `-- FLAGS` generates them first, with these flags of sample.py.
    """

    reference: Path | None = None
    """what to compare with: a folder, or an .npz of statistics (ours, pytorch-fid's, clean-fid's,
    ADM's) or images"""
    inception: Annotated[str | None, tyro.conf.arg(aliases=["--weights"])] = None
    """weights of Inception-v3 of 2015-12-05: .safetensors, .pth (needs the extra torch), or
    OWNER/NAME/FILE.safetensors of a hub"""
    random_inception: int | None = None
    """instead: random weights of this seed. For tests: the numbers compare with no others"""
    features: Literal["inception", "cmmd", "fd-dinov2"] = "inception"
    """cmmd: CLIP's, by the metric of that name; fd-dinov2: DINOv2's, by fid, kid and prdc. Both
    need the extra evaluate"""
    model: str | None = None
    """of cmmd and fd-dinov2: a folder or hub id; by default the customary one"""
    mode: Mode = "clean"
    """how images become 299×299: as clean-fid, pytorch-fid, or torch-fidelity and ADM"""
    size: int | None = None
    """first cut all images of both sides to their centre square and resize it to so many px
    (LANCZOS); 256 is the COCO protocol's"""
    metrics: tuple[Metric, ...] = ("fid",)
    """fid, kid, sfid, is (Inception score), prdc (precision, recall, density, coverage),
    fid_infinity (extrapolated to infinitely many images); the first is the score's value"""
    coco: Path | None = None
    """folder of COCO 2014, with annotations/captions_val2014.json and val2014/: its protocol. The
    reference is val2014, --size 256; captions.jsonl in --out lists a random caption of each of
    30,000 random images, and `-- FLAGS` generates from it"""
    coco_captions: int = 30_000
    """how many"""
    guidance: tuple[float, ...] = ()
    """a sweep: generate and score with each, in folders guidance-1.5 … below the folder of images;
    the score is the lowest, and sweep.png shows all"""
    clip: str | None = None
    """of a sweep: also compute the CLIP score by this model, the axis of sweep.png"""
    prompts: Path | None = None
    """file of prompts that the images must be of"""
    save_statistics: Path | None = None
    """write the statistics of the reference's images as .npz; without reference images, those of
    the generated ones"""

    def __post_init__(self):
        super().__post_init__()
        if self.features == "cmmd":  # has one metric
            object.__setattr__(self, "metrics", ("cmmd",))
        wrong = {"cmmd"} if self.features == "inception" else {"sfid", "is"}
        if bad := sorted(wrong & set(self.metrics)):
            raise UserError(f"--metrics {bad[0]} is not available with --features {self.features}")
        if self.features != "inception":
            if self.inception is not None or self.random_inception is not None:
                raise UserError(f"--features {self.features} uses --model, not --inception")
        elif self.inception is None and self.random_inception is None:
            raise UserError(f"no Inception weights: {inception.WHERE}")
        if self.inception is not None and self.random_inception is not None:
            raise UserError("give --inception or --random-inception, not both")
        if not self.metrics or (self.size is not None and self.size < 1):
            raise UserError("metrics and size: at least 1")
        alone = self.save_statistics is not None or set(self.metrics) == {"is"}
        if self.reference is None and self.coco is None and not alone:
            fix = "give --reference FOLDER or FILE.npz, or --save-statistics"
            raise UserError(f"nothing to compare with: {fix}")

    def network(self) -> FeatureNetwork:
        if self.features != "inception":
            path = self.model or _MODELS[self.features]
            return embeddings(load(path, processor=None), self.features)
        seed = self.random_inception
        net = inception.load(str(self.inception)) if seed is None else inception.random(seed)
        return on_devices(net, self.mode)


@dataclasses.dataclass
class Side:
    """One of the two sets. parts: statistics by _ENDS, computed from the features or read from a
    file, with that file's ``facts``. images: None where statistics are enough."""

    path: Path
    images: ImageSet | None
    parts: dict[str, frechet.Statistics] = dataclasses.field(default_factory=dict)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    features: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    sha256: str | None = None

    @classmethod
    def of_reference(cls, path: Path, options: FidOptions, net: FeatureNetwork) -> Side:
        """Raises UserError for statistics that do not serve the metrics, or of another mode,
        network or size; a Notice where the file does not say."""
        if path.suffix != ".npz":
            return cls(path, ImageSet.open(path, options.size))
        if not path.is_file():
            raise UserError(f"no file {path}")
        parts, facts, holds_images = frechet.read(path)
        ours = {"mode": net.mode, "weights": net.digest, "size": options.size or 0}
        for name, value in ours.items() if parts else ():
            if (theirs := facts.get(name, value)) != value:
                differ = f"was made with {name} {str(theirs)[:16]}, not {str(value)[:16]}"
                raise UserError(f"{path} {differ}: these do not compare")
        for end, statistics in parts.items():
            if (width := len(statistics.mean)) != (own := net.widths.get(_ENDS[end], width)):
                raise UserError(f"{path} holds features of {width} numbers, not {own}")
        if parts and (unsaid := [name for name in ("mode", "weights") if name not in facts]):
            message = f"{path} does not say its {' and '.join(unsaid)}: taken as ours"
            warnings.warn(message, Notice, stacklevel=2)
        lacking = [name for name in _PAIRED if name in options.metrics]
        lacking += ["sfid"] * ("sfid" in options.metrics and "_s" not in parts)
        if lacking and not holds_images:
            fix = f"for {' and '.join(lacking)} give a folder of images as the reference"
            raise UserError(f"{path} holds statistics alone: {fix}")
        needed = lacking or not parts
        return cls(path, ImageSet.open(path, options.size) if needed else None, parts, facts)

    def extract(self, extract: Extractor, what: str) -> bool:
        """Compute the features and the statistics that are not there; whether all are there, as
        they are in process 0 alone."""
        if self.images is not None:
            found = extract(self.images, what)
            if found is None:
                return False
            self.features, self.sha256 = found
            for end, name in _ENDS.items():
                if name in self.features and end not in self.parts:
                    self.parts[end] = frechet.statistics(self.features[name])
        return True

    @property
    def count(self) -> int | None:
        """None where a file does not say it."""
        return self.parts[""].count or None

    def to_dict(self) -> dict[str, Any]:
        sides = list(self.images.sides) if self.images else None
        digest = self.sha256 or self.facts.get("images")
        return {"path": str(self.path), "sha256": digest, "sides": sides}


def evaluate_fid(
    options: FidOptions, flags: Sequence[str] | None = None, facts: Mapping[str, Any] | None = None
) -> Scores | None:
    """Generate if asked, compute the features, print the scores and write them, with ``facts``.
    Returns the scores; None in processes other than the first, and where only statistics were to be
    written."""
    known = dict(facts or {})
    if options.coco is not None:
        if options.out is None:
            raise UserError("--coco needs --out, for the list of captions")
        file, known = coco.write_captions(options.coco, options.out, options.coco_captions)
        how: dict[str, Any] = {"reference": options.coco / coco.IMAGES, "size": coco.SIZE}
        options = dataclasses.replace(options, coco=None, prompts=file, **how)
        flags = None if flags is None else [*flags, "--prompts", str(file)]
    if options.guidance:
        return _sweep(options, flags, known)
    net = options.network()
    given = options.reference
    reference = Side.of_reference(given, options, net) if given else None
    images, share = options.open(flags, options.size)
    if options.prompts is not None:
        prompts_of(images, options.prompts)
    generated = Side(images.source, images)
    if reference and reference.images:
        images.check_sides(reference.images)
    scored = reference is not None or set(options.metrics) == {"is"}
    for folder in (scored and options.out, (options.save_statistics or images.source).parent):
        if folder:  # one that cannot be made is an error before the work
            folder.mkdir(parents=True, exist_ok=True)
    wanted = ("pool",) + ("spatial",) * ("sfid" in options.metrics)
    logits = ("logits",) * ("is" in options.metrics)
    own, extract = (
        Extractor(dataclasses.replace(net, wanted=names), options.batch_size, share)
        for names in (wanted + logits, wanted)
    )
    done = generated.extract(own, "the generated images")
    if reference:
        done &= reference.extract(extract, "the reference")
    if not done:
        print(f"share {share.index}/{share.count} of the features is done")
        return None
    if options.save_statistics:
        of = reference if reference and reference.images else generated
        facts = {"mode": net.mode, "weights": net.digest, "size": options.size or 0}
        facts |= {"n": of.count or 0, "images": of.sha256}
        frechet.write(options.save_statistics, of.parts, facts)
        print(f"written: {options.save_statistics}")
    if not scored:
        return None
    scores: Scores = {}
    for metric in options.metrics:
        scores |= _score(metric, generated, reference or generated)
    sides = {"generated": generated} | ({"reference": reference} if reference else {})
    _report(options, scores, sides, net, known)
    return scores


def _sweep(options: FidOptions, flags: Sequence[str] | None, facts: dict) -> Scores | None:
    """Evaluate each guidance in a folder of its own, print and draw them all; returns the scores of
    the lowest first metric. ``options.clip`` adds CLIP scores, as the axis of the drawing."""
    base, found = Path(str(options.generated)), []
    for guidance in options.guidance:
        name = f"guidance-{guidance:g}"
        own = None if flags is None else [*flags, "--guidance", f"{guidance:g}"]
        out = options.out and options.out / name
        at = dataclasses.replace(options, generated=base / name, guidance=(), out=out)
        scores = evaluate_fid(at, own, facts)
        point: dict[str, Any] = {"guidance": guidance}
        if options.clip is not None:
            names = ("generated", "prompts", "batch_size", "share")
            how: dict[str, Any] = {name: getattr(at, name) for name in names}
            point["clip"] = evaluate_clip(ClipOptions(**how, model=options.clip))
        if scores is None:
            continue
        point |= {metric: score["value"] for metric, score in scores.items()}
        found.append((point, scores))
    if not found:
        return None
    points, first = [point for point, _ in found], next(iter(found[0][1]))
    low, best = min(found, key=lambda pair: pair[0][first])
    print(f"\nlowest {first} at guidance {low['guidance']:g}: {low[first]:.4f}")
    if options.out is not None:
        x = "clip" if options.clip is not None else "guidance"
        series = {first: ([p[x] for p in points], [p[first] for p in points])}
        series |= {f"guidance {p['guidance']:g}": ([p[x]], [p[first]]) for p in points}
        axis = "CLIP score" if x == "clip" else x
        chart = plots.curves(options.out / "sweep.png", series, title=first, axis=axis)
        facts = {**facts, "guidance": low["guidance"], "sweep": points}
        report.finish(options.out, first, best[first], {}, facts, written=[chart])
    return best


def _score(metric: Metric, ours: Side, theirs: Side) -> Scores:
    """Means over subsets or splits with their standard deviation."""
    a, b = (side.features.get("pool", np.zeros((0, 0))) for side in (ours, theirs))
    if metric in ("fid", "sfid"):
        end = "" if metric == "fid" else "_s"
        found = frechet.compare(ours.features[_ENDS[end]], ours.parts[end], theirs.parts[end])
        return {metric: found._asdict()}
    if metric == "fid_infinity":
        value, points = frechet.extrapolate(a, theirs.parts[""])
        return {metric: {"value": value, "points": points}}
    if metric == "cmmd":
        return {metric: {"value": set_scores.cmmd(a, b)}}
    if metric == "prdc":
        rows = (np.linspace(0, len(x) - 1, min(len(x), _MOST)).astype(int) for x in (a, b))
        shares = set_scores.precision_recall(*(x[some] for x, some in zip((a, b), rows)))
        return {name: {"value": value} for name, value in shares.items()}
    if metric == "kid":
        value, deviation = set_scores.kid(a, b)
    else:
        value, deviation = set_scores.inception_score(ours.features["logits"])
    return {metric: {"value": value, "deviation": deviation}}


def _report(
    options: FidOptions, scores: Scores, sides: dict[str, Side], net: FeatureNetwork, known: dict
) -> None:
    """Print the table, write score.json."""
    n, notes = {name: side.count for name, side in sides.items()}, []
    if {"fid", "sfid"} & scores.keys() and (least := min(v for v in n.values() if v)) < _ENOUGH:
        notes.append(f"{least} images are fewer than {_ENOUGH}: compare with the same number only")
        warnings.warn(notes[0], Notice, stacklevel=2)
    counts = ", ".join(f"{count or 'unknown'} {name}" for name, count in n.items())
    print(f"mode {net.mode} · {net.name} · images: {counts}\n")
    named = options.random_inception is not None or options.features == "fd-dinov2"
    suffix = f" ({net.name})" if named else ""
    for name, score in scores.items():
        more = f"   ± {score['deviation']:.4f}" if "deviation" in score else ""
        if "bias" in score and not notes:
            more = f", of equal distributions {score['bias']:.4f}"
        print(report.line(name + suffix, score["value"], score.get("interval")) + more)
    if options.out is None:
        return
    first, main = next(iter(scores.items()))
    facts = {
        "mode": net.mode,
        "size": options.size,
        "weights": {"name": net.name, "sha256": net.digest},
        "images": {name: side.to_dict() for name, side in sides.items()},
        **sampled_with(sides["generated"].images),
        **known,
        "scores": scores,
        "warnings": notes,
    }
    charts = []
    if line := scores.get("fid_infinity"):
        x, y = [1 / count for count, _ in line["points"]], [value for _, value in line["points"]]
        ends = line["value"], line["value"] + np.polyfit(x, y, 1)[0] * max(x)
        series = {"random subsets": (x, y), f"line, {ends[0]:.2f} at 0": ([0, max(x)], ends)}
        path = options.out / "fid_infinity.png"
        charts.append(plots.curves(path, series, title="FID", axis="1 / images"))
    report.finish(options.out, first + suffix, main, n, facts, written=charts)
