"""``python -m pixart_jax evaluate clip | preference``: how well images fit their prompts, by
released models."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pixart_jax.errors import UserError
from pixart_jax.evaluation import report, text_scores
from pixart_jax.evaluation.features import Extractor
from pixart_jax.evaluation.generated import (
    GeneratedOptions,
    check_list,
    generate_at,
    prompts_of,
    sampled_with,
)

if TYPE_CHECKING:
    Name = str
    Preference = str
else:  # the choices that --help lists
    Name, Preference = Literal[*text_scores.DEFINITIONS], Literal[*text_scores.PREFERENCES]
STYLES = ("anime", "concept-art", "paintings", "photo")  # of HPSv2's benchmark
_PART = 80  # images; a style's deviation is that of the means of such parts


@dataclasses.dataclass(frozen=True)
class _ScoreOptions(GeneratedOptions):
    prompts: Path | None = None
    """file of the images' prompts; by default as sample.py's PNGs record them"""
    model: str | None = None
    """folder or hub id of the model, or its file; by default the customary one"""


@dataclasses.dataclass(frozen=True)
class ClipOptions(_ScoreOptions):
    """CLIP score: the cosine of an image's and its prompt's embeddings. `-- FLAGS` generates the
    images first, with these flags of sample.py."""

    definition: Name = "torchmetrics"
    """cosine; torchmetrics: 100 times it, at least 0; hessel: 2.5 times it, at least 0, with the
    prefix "A photo depicts " """


@dataclasses.dataclass(frozen=True)
class PreferenceOptions(_ScoreOptions):
    """What a model of people's preferences gives each image under its prompt. `-- FLAGS` generates
    the images first, with these flags of sample.py."""

    score: Preference = "pickscore"
    """which model; aesthetic looks at the image alone"""
    tokenizer: str | None = None
    """of hpsv2 and imagereward: a folder or hub id"""
    head: str | None = None
    """of aesthetic: the file of its linear layers"""
    benchmark: Path | None = None
    """HPSv2's benchmark: your folder with anime.json, concept-art.json, paintings.json and
    photo.json, or some of them; the images are STYLE/00000.png or .jpg. Gives each style's mean"""

    def __post_init__(self):
        super().__post_init__()
        if self.benchmark is not None and self.prompts is not None:
            raise UserError("give --prompts or --benchmark, not both")


def evaluate_clip(options: ClipOptions, flags: Sequence[str] | None = None) -> float | None:
    """The mean CLIP score; None in processes other than the first."""
    scorer = text_scores.clip_score(options.definition, options.model)
    return _evaluate(options, flags, scorer, "clip", {"definition": options.definition})


def evaluate_preference(
    options: PreferenceOptions, flags: Sequence[str] | None = None
) -> float | None:
    """The mean score; None in processes other than the first."""
    listed = read_styles(options.benchmark) if options.benchmark else {}
    open_model = text_scores.PREFERENCES[options.score]
    try:
        scorer = open_model(options.model, options.tokenizer, options.head)
    except KeyError as error:
        raise UserError(f"{options.model} is of another model: it lacks {error}") from None
    return _evaluate(options, flags, scorer, options.score, {}, listed)


def read_styles(folder: Path) -> dict[str, str]:
    """{STYLE/00000: prompt} of those of STYLES that a folder of HPSv2's benchmark holds. Raises
    UserError for none, and for a file of another form."""
    found: dict[str, str] = {}
    for file in (folder / f"{style}.json" for style in STYLES):
        if file.is_file():
            try:
                prompts = json.loads(file.read_text("utf-8"))
                if not (prompts and isinstance(prompts, list)):
                    raise ValueError
                found |= {f"{file.stem}/{n:05d}": str(prompt) for n, prompt in enumerate(prompts)}
            except ValueError:
                raise UserError(f"{file} is no list of prompts") from None
    if not found:
        raise UserError(f"--benchmark {folder} holds none of {', '.join(STYLES)} (.json)")
    return found


def _evaluate(
    options: _ScoreOptions,
    flags: Sequence[str] | None,
    scorer: text_scores.Scorer,
    metric: str,
    facts: dict[str, Any],
    listed: Mapping[str, str] | None = None,
) -> float | None:
    """listed: the prompts of a benchmark's images, by place without suffix, a folder a style."""
    places = list(listed or ())
    if listed and flags is not None:
        generate_at(options, flags, list(listed.values()), 1, lambda i, _: f"{places[i]}.png")
        flags = None
    images, share = options.open(flags, sizes=True)
    if listed:
        held = [name.rpartition(".")[0] for name in images.names]
        check_list(held, places, images.source)
        prompts = [listed[place] for place in held]
    elif options.prompts is not None or metric != "aesthetic":
        prompts = prompts_of(images, options.prompts)
    else:
        prompts = [""] * len(images.names)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    network = scorer.of_prompts(prompts)
    found = Extractor(network, options.batch_size, share)(images, "the generated images")
    if found is None:
        print(f"share {share.index}/{share.count} of the scores is done")
        return None
    scores, digest = found[0]["score"].astype("f8"), found[1]
    value, error = float(scores.mean()), float(scores.std(ddof=1)) / len(scores) ** 0.5
    interval = value - 1.959964 * error, value + 1.959964 * error
    named, styles = " ".join([metric, *facts.values()]), {}
    print(f"{named} · {scorer.model.name} · {len(scores)} images\n")
    if listed:
        of_style = itertools.groupby(range(len(scores)), lambda n: images.names[n].split("/")[0])
        for style, numbers in of_style:
            some = scores[list(numbers)]
            parts = [some[n : n + _PART].mean() for n in range(0, len(some), _PART)]
            styles[style] = {"value": float(some.mean()), "deviation": float(np.std(parts))}
            print(f"{report.line(style, some.mean())}   ± {np.std(parts):.4f}")
        facts = {**facts, "styles": styles}
    print(report.line(named, value, interval))
    if options.out is None:
        return value
    each = zip(images.names, prompts, scores.tolist())
    rows = ({"image": name, "prompt": prompt, "score": score} for name, prompt, score in each)
    weights = {"name": scorer.model.name, "sha256": scorer.model.digest}
    facts |= {**scorer.facts, "weights": weights, "deviation": float(scores.std())}
    facts |= {"images": {"generated": {"sha256": digest}}, **sampled_with(images)}
    facts["prompts"] = sha256("\n".join(prompts).encode()).hexdigest()
    head, n = {"value": value, "interval": interval}, {"generated": len(scores)}
    report.finish(options.out, metric, head, n, facts, rows)
    return value
