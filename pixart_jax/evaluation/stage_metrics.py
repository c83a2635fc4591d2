"""Metrics of images that a stage's model generates while it trains (config.EvaluateConfig)."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from pixart_jax.config import TEXT_TO_IMAGE, Config, StageConfig
from pixart_jax.data import shapes
from pixart_jax.data.loader import Loader
from pixart_jax.errors import UserError
from pixart_jax.evaluation import frechet, inception, text_scores
from pixart_jax.evaluation.shapes_score import score
from pixart_jax.evaluation.tasks import SETS, Batches, by_size, eval_prompts
from pixart_jax.finite import check_images
from pixart_jax.images import to_uint8
from pixart_jax.text import read_prompts
from pixart_jax.training.evaluation import Generate
from pixart_jax.training.frozen import Frozen

Measure = Callable[[Generate], dict[str, float]]
_PROMPTS = 32  # generated at once
_RECORDS = 8  # as many as a preview shows


def open_metric(
    name: str, config: Config, stage: StageConfig, frozen: Frozen, held_out: Callable[[], Loader]
) -> Measure:
    """The measure 'shapes', 'clip' or 'fid' of the images of a stage
    (training.evaluation.OpenMetric). Raises UserError where the stage has no images for it."""
    if name == "fid":
        return _fid(config, stage, frozen, held_out)
    if stage.task not in TEXT_TO_IMAGE:
        raise UserError(f"stage {stage.name}: {name} needs task text_to_image, not {stage.task}")
    return (_clip if name == "clip" else _shapes)(config, stage, frozen)


def _generated(
    generate: Generate,
    config: Config,
    frozen: Frozen,
    prompts: Sequence[str],
    size: tuple[int, int],
) -> Iterator[np.ndarray]:
    """An image a prompt, each chunk under a seed of its own."""
    frozen.text_states([*prompts, ""], config.model.text_tokens)  # with the encoder loaded once
    like = {"mean": np.zeros((1, *(side // frozen.vae.config.factor for side in size), 1))}
    for n in range(0, len(prompts), _PROMPTS):
        some = tuple(prompts[n : n + _PROMPTS])
        full = some + some[-1:] * (_PROMPTS - len(some)) if n else some
        settings = dataclasses.replace(config.preview, prompts=full, seed=config.preview.seed + n)
        yield from list(generate(like, settings))[-len(full) :][: len(some)]


def _clip(config: Config, stage: StageConfig, frozen: Frozen) -> Measure:
    options, listed = stage.evaluate, config.preview.prompts
    if options.prompts is not None:
        listed = tuple(row.prompt for row in read_prompts(options.prompts))
    if not listed:
        raise UserError(f"stage {stage.name}: clip needs evaluate.prompts or preview.prompts")
    prompts = list(itertools.islice(itertools.cycle(listed), options.count))
    scorer = text_scores.clip_score("torchmetrics", options.clip)
    network = scorer.of_prompts(prompts)

    def measure(generate: Generate) -> dict[str, float]:
        images = _generated(generate, config, frozen, prompts, stage.data.buckets[0])
        pixels = np.stack([network.prepare(image) for image in images])
        parts = np.array_split(np.arange(len(pixels)), -(-len(pixels) // _PROMPTS))
        scores = [network.compute(pixels[some], some)["score"] for some in parts]
        return {"clip": float(np.concatenate(scores).mean(dtype="f8"))}

    return measure


def _shapes(config: Config, stage: StageConfig, frozen: Frozen) -> Measure:
    level = stage.data.source.rpartition("/")[2]
    if level not in shapes.COLOURED:
        needed = "a source of the embedded world such as tfds:shapes/plain"
        raise UserError(f"stage {stage.name}: shapes needs {needed}, not {stage.data.source}")
    prompts = eval_prompts(level, max(1, stage.evaluate.count // len(SETS)))

    def measure(generate: Generate) -> dict[str, float]:
        def make(rows: list[int], height: int, width: int) -> Batches:
            captions = [prompts[n].caption for n in rows]
            images = _generated(generate, config, frozen, captions, (height, width))
            yield range(len(rows)), images

        found = score(prompts, by_size(prompts, make))
        whole = found.mean or found.all_correct
        tasks = {f"shapes/{name}": task.score for name, task in found.tasks.items()}
        return ({"shapes": whole.score} if whole else {}) | tasks

    return measure


def _fid(
    config: Config, stage: StageConfig, frozen: Frozen, held_out: Callable[[], Loader]
) -> Measure:
    """The Fréchet distance of images under held-out records' own captions or classes from what the
    VAE decodes of these records."""
    if stage.task in ("autoencoder", "text_to_text"):
        raise UserError(f"stage {stage.name}: fid needs a stage that generates images")
    weights = str(stage.evaluate.inception)
    kind, _, seed = weights.partition(":")
    random = kind == "random" and seed.isdecimal()
    net = inception.random(int(seed)) if random else inception.load(weights)

    def batches() -> Iterator[dict[str, np.ndarray]]:
        """The first _RECORDS records of each step's batch."""
        rows = min(_RECORDS, held_out().plan.batch_size)
        for step in range(-(-stage.evaluate.count // rows)):
            yield held_out().global_batch(step, rows)

    def statistics(images: Iterable[Sequence[np.ndarray]]) -> frechet.Statistics:
        found = [net.features(np.stack(list(some))) for some in images]
        return frechet.statistics(np.concatenate(found))

    @functools.cache
    def reference() -> frechet.Statistics:
        decoded = (np.asarray(frozen.vae.decode(batch["mean"]), "f4") for batch in batches())
        return statistics(to_uint8(check_images(images)) for images in decoded)

    def measure(generate: Generate) -> dict[str, float]:
        preview = dataclasses.replace(config.preview, prompts=())
        seeded = (dataclasses.replace(preview, seed=preview.seed + n) for n in itertools.count())
        generated = statistics(map(generate, batches(), seeded))
        return {"fid": frechet.distance(generated, reference())}

    return measure
