"""``python -m pixart_jax evaluate clip | preference``: how well images fit their prompts, by
released models."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pixart_jax.errors import UserError
from pixart_jax.evaluation import report, text_scores
from pixart_jax.evaluation.features import Extractor
from pixart_jax.evaluation.generated import GeneratedOptions, prompts_of, sampled_with
from pixart_jax.evaluation.set_scores import mean_interval
from pixart_jax.files import write_text

if TYPE_CHECKING:
    Name = str
    Preference = str
else:  # the choices that --help lists
    Name, Preference = Literal[*text_scores.DEFINITIONS], Literal[*text_scores.PREFERENCES]


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


def evaluate_clip(options: ClipOptions, flags: Sequence[str] | None = None) -> float | None:
    """The mean CLIP score; None in processes other than the first."""
    scorer = text_scores.clip_score(options.definition, options.model)
    return _evaluate(options, flags, scorer, "clip", {"definition": options.definition})


def evaluate_preference(
    options: PreferenceOptions, flags: Sequence[str] | None = None
) -> float | None:
    """The mean score; None in processes other than the first."""
    open_model = text_scores.PREFERENCES[options.score]
    try:
        scorer = open_model(options.model, options.tokenizer, options.head)
    except KeyError as error:
        raise UserError(f"{options.model} is of another model: it lacks {error}") from None
    return _evaluate(options, flags, scorer, options.score, {})


def _evaluate(
    options: _ScoreOptions,
    flags: Sequence[str] | None,
    scorer: text_scores.Similarity,
    metric: str,
    facts: dict[str, Any],
) -> float | None:
    images, share = options.open(flags, sizes=True)
    asked = options.prompts is not None or metric != "aesthetic"
    prompts = prompts_of(images, options.prompts) if asked else [""] * len(images.names)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    network = text_scores.Scored(scorer, prompts)
    found = Extractor(network, options.batch_size, share)(images, "the generated images")
    if found is None:
        print(f"share {share.index}/{share.count} of the scores is done")
        return None
    scores, digest = found[0]["score"].astype("f8"), found[1]
    value, interval = mean_interval(scores)
    count, model = len(scores), scorer.model
    named = " ".join([metric, *facts.values()])
    print(f"{named} · {model.name} · {count} images\n")
    print(f"{named} {value:.4f}   95% {interval[0]:.4f} – {interval[1]:.4f}")
    if options.out is None:
        return value
    lines = (
        json.dumps({"image": n, "prompt": p, "score": float(s)}, ensure_ascii=False) + "\n"
        for n, p, s in zip(images.names, prompts, scores)
    )
    write_text(options.out / "results.jsonl", "".join(lines))
    facts |= {**scorer.facts, "weights": {"name": model.name, "sha256": model.digest}}
    facts |= {"deviation": float(scores.std()), "images": {"generated": {"sha256": digest}}}
    facts |= sampled_with(images)
    facts["prompts"] = sha256("\n".join(prompts).encode()).hexdigest()
    score = {"value": value, "interval": interval}
    path = report.write_score(options.out, metric, score, {"generated": count}, facts)
    print(f"\nwritten: {path}, {options.out / 'results.jsonl'}")
    return value
