"""Samples of a source → rows of captions: what a worker process does with a batch."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
from PIL import Image

from pixart_jax.captioning.guards import failed_checks
from pixart_jax.captioning.model import resize, seed_of
from pixart_jax.data.sources import Sample
from pixart_jax.data.sources.sample import faults_of
from pixart_jax.encoding.options import SourceSpec
from pixart_jax.errors import UserError

# name: (without a raw caption, with one)
PROMPTS = {
    "paper": (
        "Describe this image and its style in a very detailed manner",
        "Give the caption of this image '{caption}', describe this image and its style in a very "
        "detailed manner",
    ),
    "script": (  # of the released captioning script
        "Describe this image in a very detailed manner",
        'Given the caption of this image "{caption}", describe this image in a very detailed '
        "manner",
    ),
}
LONGEST_RAW = 8_000
"""Characters of a raw caption; a longer text would push the image out of the context."""


@dataclasses.dataclass(frozen=True)
class CaptionOptions:
    """How captions are generated; part of the identity of a caption file, which holds one kind."""

    model: str
    """A folder, or a hub id, of a model that AutoModelForImageTextToText opens: LLaVA,
    SmolVLM, Qwen-VL, …"""
    prompt: str = "paper"
    """'paper', 'script' (of the official captioning script), or a text of your own; {caption} in it
    is the raw caption."""
    raw_caption: str | None = None
    """The kind of caption that the source has and that goes into the prompt: 'caption', …"""
    temperature: float = 0.2
    """Of the sampling; 0 takes the likeliest token each time."""
    max_new_tokens: int = 1024
    """A caption that has not ended by then is cut (a guard calls it truncated where no sentence
    ends there)."""
    seed: int = 0
    """A picture's sampling depends on this and its key, not on its batch or worker."""
    guard_action: Literal["retry", "drop", "keep"] = "retry"
    """For a caption that is empty, truncated, unfinished, repeating or a refusal. retry: generate
    again, 0.3 warmer, then drop."""
    retries: int = 1
    """How often such a caption is generated again."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the computation; auto is the model file's own on a GPU, float32 on a CPU."""
    variant: str | None = None
    """Of the model's weight files, such as fp16; by default the ones without, or the only ones."""

    def __post_init__(self):
        template(self.prompt, self.raw_caption is not None)
        if not 0 <= self.temperature <= 10:
            raise UserError(f"temperature {self.temperature}: 0 (the likeliest token) to 10")
        if self.max_new_tokens < 1:
            raise UserError(f"max new tokens {self.max_new_tokens}: at least 1")
        if self.retries < 0:
            raise UserError(f"retries {self.retries}: at least 0")


@dataclasses.dataclass
class CaptionWorker:
    """A model and a source. Ray makes one per process and calls it with numbers of samples.

    folder: what relative paths are relative to. fingerprint: of the source that the run was begun
    with. open_model: (model, dtype, threads, variant) → a VisionLanguageModel.

    Model and source are opened at the first call, and a UserError goes back as a row: Ray would
    construct a failing object again and again, and of an exception it keeps only the traceback.
    """

    spec: SourceSpec
    options: CaptionOptions
    folder: str
    fingerprint: str
    open_model: Callable
    threads: int | None = None
    _model: Any = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """{"data": int64 [n]} → {"row": [n] JSON texts} (:func:`caption_samples`), or an error."""
        try:
            if self._model is None:
                self._open()
            rows = self._caption([int(number) for number in batch["data"]])
        except UserError as error:
            rows = [{"error": str(error)}]
        return {"row": np.array([json.dumps(row) for row in rows], object)}

    def _open(self) -> None:
        if os.path.isdir(self.folder):
            os.chdir(self.folder)
        self._source = self.spec.open()
        if self._source.fingerprint != self.fingerprint:
            raise UserError(
                f"{self.spec.source} differs on this worker: all machines must see the same data"
            )
        options = self.options
        self._model = self.open_model(options.model, options.dtype, self.threads, options.variant)
        self._readers = ThreadPoolExecutor(8)
        # what was found at opening the program found too
        self._reported = len(list(faults_of(self._source)))

    def _caption(self, numbers: list[int]) -> list[dict]:
        samples = list(self._readers.map(self._read, numbers))
        rows = caption_samples(self._model, numbers, samples, self.options)
        found = list(faults_of(self._source))
        if len(found) > self._reported:
            rows[0]["noticed"] = [tuple(one) for one in found[self._reported :]]
            self._reported = len(found)
        return rows

    def _read(self, number: int) -> Sample | UserError:
        try:
            return self._source[number]
        except UserError as error:  # an unreadable record does not stop the others
            return error


class _Skip(Exception):
    """(kind, detail): why a sample gets no caption."""


def caption_samples(
    model, numbers: Sequence[int], samples: Sequence[Sample | UserError], options: CaptionOptions
) -> list[dict]:
    """Return one row per sample: index, key, and caption, prompt, tokens, finish, guards (that the
    first caption failed), attempts; or left_out, [kind, detail] in the words of data/faults.py."""
    rows: list[dict] = []
    pending: list[tuple[dict, Image.Image]] = []
    for number, sample in zip(numbers, samples, strict=True):
        rows.append({"index": number, "key": getattr(sample, "key", "")})
        try:
            rows[-1]["prompt"], image = _prepare(sample, options, model.special)
            pending.append((rows[-1], image))
        except _Skip as reason:
            rows[-1]["left_out"] = list(reason.args)
    attempt, temperature = 0, options.temperature
    while pending:
        generations = model.generate(
            [image for _, image in pending],
            [row["prompt"] for row, _ in pending],
            [seed_of(options.seed, row["key"], attempt) for row, _ in pending],
            temperature=temperature,
            max_new_tokens=options.max_new_tokens,
        )
        again = []
        for (row, image), made in zip(pending, generations, strict=True):
            failed = failed_checks(made.text, made.finish)
            row |= {"caption": made.text, "tokens": made.tokens, "finish": made.finish}
            row |= {"attempts": attempt + 1, "guards": row.get("guards", list(failed))}
            if failed and options.guard_action == "retry" and attempt < options.retries:
                again.append((row, image))
            elif failed and options.guard_action != "keep":
                row["left_out"] = [f"{failed[0]} caption", f"{made.text[:80]!r}"]
        pending, attempt, temperature = again, attempt + 1, temperature + 0.3
    return rows


def _prepare(
    sample: Sample | UserError, options: CaptionOptions, special: Sequence[str]
) -> tuple[str, Image.Image]:
    """(prompt, image) of a sample. special: the model's special tokens."""
    if isinstance(sample, UserError):
        raise _Skip("unreadable record", str(sample))
    raw, kind = None, options.raw_caption
    if kind is not None:
        texts = [text for text in sample.captions.get(kind, ()) if text.strip()]
        if not texts:
            raise _Skip("missing caption", f"no caption of kind {kind!r} for the prompt")
        raw = texts[0]
        if len(raw) > (limit := LONGEST_RAW):
            detail = f"{len(raw):,} characters, a prompt takes {limit:,}"
            raise _Skip("caption too long", detail)
    try:
        image = resize(Image.fromarray(sample.pixels()))
    except UserError as error:
        raise _Skip("unreadable image", str(error).removeprefix(f"{sample.key}: ")) from None
    return fill(template(options.prompt, raw is not None), raw, special), image


def template(prompt: str, with_raw: bool) -> str:
    """The text with '{caption}' where a raw caption belongs. prompt: a name of PROMPTS, or the
    text. Raises UserError where they disagree."""
    if prompt in PROMPTS:
        return PROMPTS[prompt][with_raw]
    if not prompt.strip():
        raise UserError("--prompt is empty: 'paper', 'script', or a text of your own")
    if with_raw != ("{caption}" in prompt):
        need = "has {caption}, so --raw-caption KIND is needed"
        if with_raw:
            need = "names --raw-caption KIND, so the prompt needs {caption}"
        raise UserError(f"--prompt {prompt!r} does not fit: the call {need}")
    return prompt


def fill(text: str, raw: str | None, special: Sequence[str] = ()) -> str:
    """The prompt of one image. The raw caption becomes one line, without the model's own special
    tokens ('<image>') and control characters."""
    if raw is None:
        return text
    for mark in special:
        raw = raw.replace(mark, " ")
    line = "".join(c if c.isprintable() else " " for c in raw)
    return text.replace("{caption}", " ".join(line.split()))
