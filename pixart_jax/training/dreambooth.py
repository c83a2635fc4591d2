"""DreamBooth (arXiv 2208.12242): a model learns a subject from a few pictures.

With prior preservation each picture is trained on beside one of the subject's class, which the
model generated before it was trained: the rows of a batch are such pairs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from pixart_jax.config import Config, DreamBoothConfig, StageConfig
from pixart_jax.data.samples import Samples, second_draw
from pixart_jax.data.sources import open_source
from pixart_jax.data.sources.sample import Sample, Source
from pixart_jax.errors import UserError
from pixart_jax.files import write_text
from pixart_jax.images import png_settings, write_png
from pixart_jax.parallel.liveness import run_on_first_process
from pixart_jax.pipeline import Pipeline
from pixart_jax.text import clean_caption, read_prompts
from pixart_jax.training.frozen import Frozen

KIND = "prompt"  # of the caption that all pictures have
CLASS = "class_"  # begins the names of a batch's arrays of class images
Kinds = tuple[tuple[str, float], ...]  # of captions, with weights, as DataConfig.captions
_FILE = "file:"  # begins a class prompt that is a file of prompts
_CHUNK = 4  # class images that are generated together


def check_identifier(stage: StageConfig) -> None:
    """Raise UserError where cleaning, as sampling will do it, takes the identifier away."""
    if (c := stage.dreambooth) is not None:
        _check_text(stage, c.identifier, c.prompt or c.identifier)


def _check_text(stage: StageConfig, identifier: str, text: str, where: str = "") -> None:
    cleaned = clean_caption(text)
    if re.search(rf"(?<!\w){re.escape(identifier.lower())}(?!\w)", cleaned):
        return
    if identifier not in text:
        raise UserError(f"stage {stage.name}: {where}{text!r} lacks the identifier {identifier!r}")
    raise UserError(
        f"stage {stage.name}: {where}identifier {identifier!r} does not survive the cleaning of "
        f"prompts: {text!r} becomes {cleaned!r}; letters alone would do, as 'sks'"
    )


def describe_identifier(stage: StageConfig, tokenizer) -> str:
    """The pieces of the identifier, in words. Raises UserError where the tokenizer does not know
    it."""
    assert stage.dreambooth is not None
    identifier = stage.dreambooth.identifier.lower()
    (ids,) = tokenizer([identifier], add_special_tokens=False)["input_ids"]
    if not ids or tokenizer.unk_token_id in ids:
        raise UserError(
            f"stage {stage.name}: identifier {identifier!r} is not known to the text encoder's "
            "tokenizer: take a word that it knows and that names nothing else"
        )
    pieces = [tokenizer.backend_tokenizer.id_to_token(token) for token in ids]
    return f"the tokenizer reads identifier {identifier!r} as {len(ids)}: {' '.join(pieces)}"


class Captioned:
    """A source's pictures, all under one prompt; None: each under its own captions."""

    caption_kinds: tuple[str, ...] = (KIND,)

    def __init__(self, source: Source, prompt: str | None):
        self._source, self._prompt, self.name = source, prompt, source.name
        seal = f"{source.fingerprint} {prompt}"
        self.fingerprint = hashlib.sha256(seal.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._source)

    def sizes(self) -> np.ndarray:
        return self._source.sizes()

    def __getitem__(self, index: int) -> Sample:
        sample = self._source[index]
        own = tuple(text for texts in sample.captions.values() for text in texts)
        captions = own if self._prompt is None else (self._prompt,)
        return dataclasses.replace(sample, captions={KIND: captions}, label=-1)


class PairedSamples(Samples):
    """Each sample of a set with a random one of a second set; the arrays of the second have
    names that begin with ``CLASS``."""

    def __init__(self, samples: Samples, others: Samples):
        self._samples, self._others = samples, others
        self.identity, self.buckets = samples.identity, samples.buckets
        self.bucket_of = samples.bucket_of
        self.fingerprint = f"{samples.fingerprint} {others.fingerprint}"
        self.length = max(samples.length, others.length)
        samples.length = others.length = self.length
        self._members = np.flatnonzero(others.bucket_of >= 0)

    def read(self, indices: np.ndarray, bucket: int, draws: np.ndarray) -> dict[str, np.ndarray]:
        rows = self._samples.read(indices, bucket, draws)
        rest = np.array([second_draw(draw) for draw in draws])
        chosen = self._members[(rest * len(self._members)).astype(int)]
        again = np.array([second_draw(draw) for draw in rest])
        others = self._others.read(chosen, 0, again)
        return rows | {f"{CLASS}{name}": array for name, array in others.items()}


def open_samples(
    config: Config,
    stage: StageConfig,
    source: Source,
    frozen: Frozen,
    encoded: Callable[[Source, Kinds], Samples],
) -> Samples:
    """The pictures, with prior preservation beside class images, which are generated where they are
    missing. encoded: encodes a source with these kinds of captions."""
    c = stage.dreambooth
    assert c is not None
    if c.prompt is not None:
        samples = encoded(Captioned(source, c.prompt), ((KIND, 1.0),))
    else:
        for sample in (source[index] for index in range(len(source))):
            found = sample.captions_of_kinds(kind for kind, _ in stage.data.captions)
            for text in (text for texts in found.values() for text in texts):
                _check_text(stage, c.identifier, text, f"{sample.key}: ")
        samples = encoded(source, stage.data.captions)
    if c.class_prompt is None:
        return samples
    folder = Path(c.class_folder) if c.class_folder else frozen.workdir / "class_images"
    run_on_first_process(
        f"class images of {stage.name}", lambda: generate_class_images(config, stage, folder)
    )
    if not c.class_folder:
        frozen.share("class_images")
    generated = open_source(f"folder:{folder}", "train")
    prompt = None if c.class_prompt.startswith(_FILE) else c.class_prompt
    return PairedSamples(samples, encoded(Captioned(generated, prompt), ((KIND, 1.0),)))


def generate_class_images(config: Config, stage: StageConfig, folder: Path) -> None:
    """Generate those of the folder's 00000.png … that are missing; each depends on seed and number
    alone.

    Other pictures in the folder count. Raises UserError where one is of another prompt or
    model.
    """
    c = stage.dreambooth
    assert c is not None and c.class_prompt is not None
    height, width = stage.data.buckets[0]
    settings = {"model": stage.start, "height": height, "width": width}
    texts = _class_prompts(c.class_prompt, c.class_images)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number:05d}.png" for number in range(c.class_images)]
    own = [path for path in _pictures(folder) if path.name not in names]
    names = names[: max(0, c.class_images - len(own))]
    missing = []
    for number, name in enumerate(names):
        if not (folder / name).exists():
            missing.append(number)
            continue
        found = png_settings(folder / name) or {}
        for field, value in {"prompt": texts[number], **settings}.items():
            if found.get(field, value) != value:
                raise UserError(
                    f"{folder / name} was generated with {field} {found[field]!r}, not {value!r}: "
                    "name another class_folder, or delete this one"
                )
    print(f"class images: {c.class_images - len(missing)} are there, {len(missing)} to generate")
    if not missing:
        return
    pipe = Pipeline.from_pretrained(stage.start, dtype=config.compute_dtype)
    chunks = sorted({number // _CHUNK for number in missing})
    for chunk in tqdm(chunks, desc="class images", unit="batch", disable=jax.process_index() > 0):
        seed = (config.seed * 1_000_003 + chunk) % 2**32
        given = [texts[n % len(texts)] for n in range(_CHUNK * chunk, _CHUNK * (chunk + 1))]
        images = pipe(given, height=height, width=width, seed=seed)
        for number, image in enumerate(images, _CHUNK * chunk):
            if number in missing:
                if c.class_prompt.startswith(_FILE):
                    write_text(folder / f"{number:05d}.txt", texts[number])
                how = {"prompt": texts[number], **settings, "seed": seed}
                write_png(folder / f"{number:05d}.png", image, how)


def _pictures(folder: Path) -> list[Path]:
    kinds = (".png", ".jpg", ".jpeg", ".webp")
    return [path for path in folder.iterdir() if path.suffix.lower() in kinds]


def _class_prompts(text: str, count: int) -> list[str]:
    """``count`` prompts: one for all, or those of a file in turn."""
    given = [text]
    if text.startswith(_FILE):
        given = [row.prompt for row in read_prompts(text.removeprefix(_FILE))]
    return list(itertools.islice(itertools.cycle(given), count))


def prompts(config: DreamBoothConfig | None) -> list[str]:
    """Of a preview: four times the pictures' one prompt and the class's, where there are such."""
    if config is None:
        return []
    found = [] if config.prompt is None else [config.prompt] * 4
    return found + ([] if config.class_prompt is None else _class_prompts(config.class_prompt, 4))
