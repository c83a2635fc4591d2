"""Metrics of images that a stage's model generates while it trains (config.EvaluateConfig)."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

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

_PROMPTS = 32  # generated at once
_RECORDS = 8  # as many as a preview shows


def open_metric(
    name: str, config: Config, stage: StageConfig, frozen: Frozen, held_out: Callable[[], Loader]
) -> Callable[[Generate], dict[str, float]]:
    """The measure 'shapes', 'clip' or 'fid' of the images of a stage
    (training.evaluation.OpenMetric). Raises UserError where the stage has no images for it."""
    options = stage.evaluate
    if name == "fid":
        if stage.task in ("autoencoder", "text_to_text"):
            raise UserError(f"stage {stage.name}: fid needs a stage that generates images")
        weights = str(options.inception)
        kind, _, seed = weights.partition(":")
        random = kind == "random" and seed.isdecimal()
        net = inception.random(int(seed)) if random else inception.load(weights)
        return Fid(config, options.count, frozen, held_out, net)
    if stage.task not in TEXT_TO_IMAGE:
        raise UserError(f"stage {stage.name}: {name} needs task text_to_image, not {stage.task}")
    if name == "clip":
        return _clip(config, stage, frozen)
    return _shapes(config, stage, frozen)


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


def _clip(
    config: Config, stage: StageConfig, frozen: Frozen
) -> Callable[[Generate], dict[str, float]]:
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


def _shapes(
    config: Config, stage: StageConfig, frozen: Frozen
) -> Callable[[Generate], dict[str, float]]:
    level = stage.data.source.rpartition("/")[2]
    if level not in shapes.COLOURED:
        raise UserError(
            f"stage {stage.name}: shapes needs a source of the embedded world such as "
            f"tfds:shapes/plain, not {stage.data.source}"
        )
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


@dataclasses.dataclass(eq=False)
class Fid:
    """The Fréchet distance of images under held-out records' own captions or classes from what the
    VAE decodes of these records."""

    config: Config
    count: int
    frozen: Frozen
    held_out: Callable[[], Loader]
    net: inception.Inception

    def _batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Batches of _RECORDS records: the first of each step's."""
        rows = min(_RECORDS, self.held_out().plan.batch_size)
        for step in range(-(-self.count // rows)):
            yield self.held_out().global_batch(step, rows)

    @functools.cached_property
    def _reference(self) -> frechet.Statistics:
        decoded = (np.asarray(self.frozen.vae.decode(b["mean"]), "f4") for b in self._batches())
        return self._statistics(to_uint8(check_images(images)) for images in decoded)

    def _statistics(self, batches) -> frechet.Statistics:
        found = [self.net.features(np.stack(list(images))) for images in batches]
        return frechet.statistics(np.concatenate(found))

    def __call__(self, generate: Generate) -> dict[str, float]:
        preview = self.config.preview

        def images() -> Iterator[Sequence[np.ndarray]]:
            for n, batch in enumerate(self._batches()):
                settings = dataclasses.replace(preview, prompts=(), seed=preview.seed + n)
                yield generate(batch, settings)

        return {"fid": frechet.distance(self._statistics(images()), self._reference)}
