"""The protocol of zero-shot FID on COCO: its list of captions, and the sweep over guidance."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pixart_jax import plots
from pixart_jax.errors import UserError, one_line
from pixart_jax.evaluation import report
from pixart_jax.evaluation.score_command import ClipOptions, evaluate_clip
from pixart_jax.files import write_text

if TYPE_CHECKING:
    from pixart_jax.evaluation.fid_command import FidOptions

ANNOTATIONS, IMAGES = Path("annotations", "captions_val2014.json"), "val2014"
SIZE = 256  # px, of both sides
LIST = "captions.jsonl"


def caption_list(annotations: Path, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """``count`` distinct images, each with one of its captions, both at random: rows {prompt,
    annotation, file}, by image id. Raises UserError for a file of another form and for too few
    images."""
    try:
        held = json.loads(annotations.read_text("utf-8"))
        files = {image["id"]: image["file_name"] for image in held["images"]}
        captions: dict[int, list[tuple[int, str]]] = {}
        for one in held["annotations"]:
            words = " ".join(one["caption"].split())
            captions.setdefault(one["image_id"], []).append((one["id"], words))
    except FileNotFoundError:
        raise UserError(f"no file {annotations}: give COCO's folder of 2014") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{annotations} holds no COCO captions: {one_line(error)}") from None
    known = sorted(captions.keys() & files)
    if len(known) < count:
        raise UserError(f"{annotations} has captions of {len(known)} images, not {count}")
    rng, rows = np.random.default_rng(seed), []
    for place in np.sort(rng.choice(len(known), count, replace=False)):
        image = known[place]
        number, words = sorted(captions[image])[rng.integers(len(captions[image]))]
        rows.append({"prompt": words, "annotation": number, "file": files[image]})
    return rows


def coco(
    options: FidOptions, flags: Sequence[str] | None
) -> tuple[FidOptions, list[str] | None, dict[str, Any]]:
    """(the options of the protocol, flags of sample.py with its list, facts for score.json). Writes
    the list into the folder of results."""
    if options.out is None or options.coco is None:
        raise UserError("--coco needs --out, for the list of captions")
    rows = caption_list(options.coco / ANNOTATIONS, options.coco_captions)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / LIST
    write_text(file, text)
    digest = sha256(text.encode()).hexdigest()
    print(f"captions: {file}, {len(rows)} of distinct images, SHA-256 {digest}")
    facts = {"protocol": "coco 2014 val", "captions": {"sha256": digest, "n": len(rows)}}
    reference = options.coco / IMAGES
    options = dataclasses.replace(options, coco=None, reference=reference, size=SIZE, prompts=file)
    return options, None if flags is None else [*flags, "--prompts", str(file)], facts


def sweep(
    options: FidOptions,
    flags: Sequence[str] | None,
    facts: dict[str, Any],
    evaluate: Callable[..., dict[str, dict[str, Any]] | None],
) -> dict[str, dict[str, Any]] | None:
    """Evaluate each guidance in a folder of its own, print and draw them all; returns the scores of
    the lowest first metric. ``options.clip`` adds CLIP scores, as the axis of the drawing."""
    base, points, best = Path(str(options.generated)), [], None
    for guidance in options.guidance:
        name = f"guidance-{guidance:g}"
        own = None if flags is None else [*flags, "--guidance", f"{guidance:g}"]
        out = options.out and options.out / name
        at = dataclasses.replace(options, generated=base / name, guidance=(), out=out)
        scores = evaluate(at, own, facts)
        point: dict[str, Any] = {"guidance": guidance}
        if options.clip is not None:
            names = ("generated", "prompts", "batch_size", "share")
            how: dict[str, Any] = {name: getattr(at, name) for name in names}
            point["clip"] = evaluate_clip(ClipOptions(**how, model=options.clip))
        if scores is None:
            continue
        point |= {metric: score["value"] for metric, score in scores.items()}
        points.append(point)
        first = next(iter(scores))
        if best is None or scores[first]["value"] < best[1][first]["value"]:
            best = guidance, scores
    if best is None:
        return None
    first, low = next(iter(best[1])), best[0]
    print(f"\nlowest {first} at guidance {low:g}: {best[1][first]['value']:.4f}")
    if options.out is not None:
        x = "clip" if options.clip is not None else "guidance"
        series = {first: ([p[x] for p in points], [p[first] for p in points])}
        series |= {f"guidance {p['guidance']:g}": ([p[x]], [p[first]]) for p in points}
        axis = "CLIP score" if x == "clip" else x
        chart = plots.curves(options.out / "sweep.png", series, title=first, axis=axis)
        facts = {**facts, "guidance": low, "sweep": points}
        report.finish(options.out, first, best[1][first], {}, facts, written=[chart])
    return best[1]
