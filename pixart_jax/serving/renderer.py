"""What makes a server's images: the pipeline, called with batches of one size."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from pixart_jax import finite
from pixart_jax.pipeline import Pipeline
from pixart_jax.pipeline.text_states import TextStates, texts_to_encode
from pixart_jax.serving.engine import OnStep
from pixart_jax.serving.offer import Generation, Offer
from pixart_jax.text import caption_cleaner

CACHED_TEXTS = 1000  # whose states stay on the host
CACHED_MERGES = 2  # combinations of adapters that stay on the device


class PipelineRenderer:
    """pipe: with all adapters loaded. batch_size: every batch is filled up to it, so that one
    program serves a size and an image does not depend on how many were asked for."""

    def __init__(self, pipe: Pipeline, offer: Offer, batch_size: int):
        self._offer, self._batch = offer, batch_size
        if pipe.adapters.loaded:
            pipe.set_adapters([])
        self._plain = pipe
        self._merged: collections.OrderedDict[tuple, Pipeline] = collections.OrderedDict()
        # one object for good: the cache of negative prompts goes by it
        self._states = TextStates({}, {})
        self._rough = _rough_colors(pipe)
        limit = pipe.transformer.config.text_tokens  # a text encoder's program for each width
        pipe.prompt_encoder.states(["a " * n for n in (1, 30, 60, 100, 200, 280) if n < limit])

    def __call__(
        self, images: Sequence[tuple[Generation, int]], on_step: OnStep, every: int
    ) -> list[np.ndarray | None]:
        """As ``engine.Renderer``."""
        first = images[0][0]
        config = self._offer.config(first)
        self._encode([generation for generation, _ in images], config)
        options: dict[str, Any] = {}
        for name in ("image", "mask", "control"):
            if getattr(first, name) is not None:
                options[name] = [getattr(generation, name) for generation, _ in images]
        steps = 0

        def callback(step: int, latents: np.ndarray) -> None:
            nonlocal steps
            steps += every
            on_step(steps, latents)

        found: list[np.ndarray | None] = [None] * len(images)
        batches = self._adapted(first.lora).generate(
            [generation.prompt for generation, _ in images],
            config,
            negative_prompt=[generation.negative_prompt for generation, _ in images],
            height=first.height,
            width=first.width,
            seed=[(generation.seed + index) % 2**64 for generation, index in images],
            guidance=[generation.guidance for generation, _ in images],
            batch_size=self._batch,
            indices=[0] * len(images),
            text_states=self._states,
            callback=callback,
            callback_every=every,
            strength=first.strength,
            **options,
        )
        try:
            for positions, pixels in batches:
                for position, one in zip(positions, pixels):
                    found[position] = one
        except finite.NotFinite:
            pass
        return found

    def preview(self, latents: np.ndarray) -> np.ndarray:
        """Latents [h, w, c] → uint8 [h, w, 3], a pixel a latent: right in place and mostly in
        color."""
        colors = latents @ self._rough[:-1] + self._rough[-1]
        return np.clip(np.rint(colors), 0, 255).astype(np.uint8)

    def _adapted(self, lora: tuple[tuple[str, float], ...]) -> Pipeline:
        if not lora:
            return self._plain
        if lora not in self._merged:
            while len(self._merged) >= CACHED_MERGES:
                self._merged.popitem(last=False)
            self._merged[lora] = self._plain.with_adapters(dict(lora))
        self._merged.move_to_end(lora)
        return self._merged[lora]

    def _encode(self, generations: Sequence[Generation], config) -> None:
        """Have the states of all texts of a batch."""
        clean = caption_cleaner(config.clean_caption)
        prompts = [generation.prompt for generation in generations]
        negatives = [one.negative_prompt for one in generations if one.guidance != 1]
        texts = texts_to_encode(prompts, negatives, str(config.null), clean)
        cleaned = {clean(text) for text in texts}
        missing = [text for text in cleaned if text not in self._states]
        encoder = self._plain.prompt_encoder
        fresh = encoder.states(missing, encoder.text_encoder.dtype.name, str)
        for text in cleaned & self._states.keys():  # the last used stay longest
            self._states[text] = self._states.pop(text)
        self._states.update(fresh)
        while len(self._states) > max(CACHED_TEXTS, len(cleaned)):
            self._states.pop(next(iter(self._states)))


def _rough_colors(pipe: Pipeline) -> np.ndarray:
    """[c + 1, 3]: latents with a 1 at their end → RGB, fitted by least squares to what the VAE
    makes of flat latents of normal random colors."""
    probes, side, channels = 64, 4, pipe.transformer.config.in_channels
    flat = np.random.default_rng(0).standard_normal((probes, 1, 1, channels)).astype(np.float32)
    images = np.asarray(pipe.decode(jnp.asarray(np.tile(flat, (1, side, side, 1)))), np.float32)
    inputs = np.pad(flat[:, 0, 0], ((0, 0), (0, 1)), constant_values=1)
    return np.linalg.lstsq(inputs, images.mean((1, 2)), rcond=None)[0]
