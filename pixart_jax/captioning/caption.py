"""Pictures of a source → rows of captions: what one worker does with a batch, whoever runs the
workers."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from pixart_jax.captioning import caption_prompts
from pixart_jax.captioning.caption_guards import failed_checks
from pixart_jax.captioning.vision_language import Generation, VisionLanguageModel, resize, seed_of
from pixart_jax.data.sources import Sample, open_source
from pixart_jax.data.sources.sample import faults_of
from pixart_jax.errors import UserError

ACTIONS = ("retry", "drop", "keep")


@dataclasses.dataclass(frozen=True)
class CaptionOptions:
    """How captions are written; all of it is part of their identity, so that one file holds
    captions of one kind.

    prompt: a name of caption_prompts.PROMPTS or a text. raw_caption: the kind of caption that goes
    into the prompt, None for none.
    temperature: 0 is greedy. retries: further draws for a caption that a guard speaks against,
    where guard_action is 'retry', each 0.3 warmer than the last, so that a greedy loop is left.
    """

    model: str
    prompt: str = "paper"
    raw_caption: str | None = None
    temperature: float = 0.2
    max_new_tokens: int = 1024
    seed: int = 0
    guard_action: str = "retry"
    retries: int = 1
    dtype: str = "auto"

    def __post_init__(self):
        caption_prompts.template(self.prompt, self.raw_caption is not None)
        if not 0 <= self.temperature <= 10:
            raise UserError(f"temperature {self.temperature}: 0 (the likeliest token) to 10")
        if self.max_new_tokens < 1:
            raise UserError(f"max new tokens {self.max_new_tokens}: at least 1")
        if self.retries < 0:
            raise UserError(f"retries {self.retries}: at least 0")
        if self.guard_action not in ACTIONS:
            raise UserError(f"guard action {self.guard_action!r}: one of {', '.join(ACTIONS)}")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise UserError(f"dtype {self.dtype!r}: one of auto, float32, bfloat16, float16")


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """How a worker, in another process or on another machine, opens the very source; folder: what
    relative paths are relative to."""

    source: str
    split: str = "train"
    where: str | None = None
    limit: int | None = None
    data_dir: str | None = None
    folder: str = "."
    fingerprint: str = ""

    def open(self):
        """The source. UserError where it is not the one that the run began with."""
        if os.path.isdir(self.folder):
            os.chdir(self.folder)
        source = open_source(
            self.source, self.split, where=self.where, limit=self.limit, data_dir=self.data_dir
        )
        if self.fingerprint and source.fingerprint != self.fingerprint:
            raise UserError(
                f"{self.source} is another one for this worker than for the program: all machines "
                "must see the same data"
            )
        return source


class CaptionWorker:
    """A model and a source; Ray makes one a process and calls it with the numbers of samples.

    Both are opened at the first call, and a UserError goes back as a row: an object that cannot be
    made Ray makes again and again, and of an exception it keeps the traceback.
    """

    def __init__(
        self,
        opening: SourceSpec,
        options: CaptionOptions,
        threads: int | None = None,
        open_model: Callable[[str, str, int | None], VisionLanguageModel] = VisionLanguageModel,
    ):
        self._opening, self._options, self._threads, self._open_model = (
            opening,
            options,
            threads,
            open_model,
        )
        self._source = self._model = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """{"data": int64 [n]} → {"row": [n] objects of JSON}: see ``rows``; or one row, the error
        that ends the run."""
        try:
            found = self._rows(batch)
        except UserError as fault:
            found = [{"error": str(fault)}]
        return {"row": np.array([json.dumps(row) for row in found], object)}

    def _rows(self, batch: dict[str, np.ndarray]) -> list[dict]:
        if self._model is None:
            self._source = self._opening.open()
            self._model = self._open_model(self._options.model, self._options.dtype, self._threads)
            self._readers = ThreadPoolExecutor(8)
            # what was found at opening the program found too
            self._noticed = len(list(faults_of(self._source)))
        numbers = [int(number) for number in batch["data"]]
        found = rows(
            self._model, numbers, list(self._readers.map(self._read, numbers)), self._options
        )
        noticed = list(faults_of(self._source))[self._noticed :]
        self._noticed += len(noticed)
        if noticed:
            found[0]["noticed"] = [dataclasses.astuple(fault) for fault in noticed]
        return found

    def _read(self, number: int) -> Sample | UserError:
        try:
            return self._source[number]
        except UserError as fault:  # a record that cannot be read: the others go on
            return fault


def rows(
    model, numbers: Sequence[int], samples: Sequence[Sample | UserError], options: CaptionOptions
) -> list[dict]:
    """One row a sample: index, key, and caption, prompt, tokens, finish, guards (of the first
    draw), attempts; or, where there is no
    caption, left_out: [kind, detail] in the words of data/faults.py. A guard's kind is its name and
    'caption'."""
    asked, found = [], {}
    for number, sample in zip(numbers, samples, strict=True):
        if isinstance(sample, UserError):
            found[number] = {
                "index": number,
                "key": "",
                "left_out": ["unreadable record", str(sample)],
            }
            continue
        row = {"index": number, "key": sample.key}
        found[number] = row
        raw = None
        if options.raw_caption is not None:
            texts = [text for text in sample.captions.get(options.raw_caption, ()) if text.strip()]
            if not texts:
                row["left_out"] = [
                    "missing caption",
                    f"no caption of kind {options.raw_caption!r} for the prompt",
                ]
                continue
            if len(texts[0]) > caption_prompts.MOST_RAW:
                row["left_out"] = [
                    "caption too long",
                    f"{len(texts[0]):,} characters, a prompt takes {caption_prompts.MOST_RAW:,}",
                ]
                continue
            raw = texts[0]
        try:
            picture = resize(Image.fromarray(sample.pixels()))
        except UserError as fault:
            row["left_out"] = ["unreadable image", str(fault).removeprefix(f"{sample.key}: ")]
            continue
        text = caption_prompts.template(options.prompt, raw is not None)
        row["prompt"] = caption_prompts.fill(text, raw, model.special)
        asked.append((row, picture))
    attempt, temperature = 0, options.temperature
    while asked:
        said = model.say(
            [picture for _, picture in asked],
            [row["prompt"] for row, _ in asked],
            [seed_of(options.seed, row["key"], attempt) for row, _ in asked],
            temperature=temperature,
            most=options.max_new_tokens,
        )
        again = []
        for (row, picture), drawn in zip(asked, said, strict=True):
            if _judge(row, drawn, attempt, options):
                again.append((row, picture))
        asked, attempt, temperature = again, attempt + 1, temperature + 0.3
    return list(found.values())


def _judge(row: dict, drawn: Generation, attempt: int, options: CaptionOptions) -> bool:
    """Write a draw into its row; True where another is wanted."""
    against = failed_checks(drawn.text, drawn.finish)
    if attempt == 0:
        row["guards"] = list(against)
    row |= {
        "caption": drawn.text,
        "tokens": drawn.tokens,
        "finish": drawn.finish,
        "attempts": attempt + 1,
    }
    if not against or options.guard_action == "keep":
        return False
    if options.guard_action == "retry" and attempt < options.retries:
        return True
    row["left_out"] = [f"{against[0]} caption", f"{drawn.text[:80]!r}"]
    return False
