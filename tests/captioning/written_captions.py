"""A captioner that returns written captions, chosen by the image's colour and the attempt, with
which guards and kills are tested; and captioning in this process, without Ray."""

from __future__ import annotations

import io
import time
from pathlib import Path

from PIL import Image

from pixart_jax.captioning import run
from pixart_jax.captioning.model import Generation, seed_of
from pixart_jax.captioning.worker import CaptionOptions, CaptionWorker
from pixart_jax.data.faults import BadRecords
from pixart_jax.encoding.options import SourceSpec

GOOD = (
    "A large red barn stands on a green hill under a cloudy sky. The light is soft and the "
    "style is that of an oil painting."
)
LOOP = "The image shows a dog and a cat and " + "a dog and a cat and " * 12
# red value of an image's first pixel → the first generation: (text, finish)
CAPTIONS = {
    0: (GOOD, "stop"),
    1: ("", "stop"),
    2: ("A large red barn stands on a green hill under a cloudy sky and the light", "length"),
    3: (LOOP, "length"),
    4: ("I'm sorry, but I cannot see any image here.", "stop"),
    5: ("A large red barn stands on a green hill under a cloudy sky and the", "stop"),
}


class Written:
    """Returns CAPTIONS by colour; above a temperature of 0.3 GOOD, except for 3, which never leaves
    its loop."""

    special = ("<image>",)

    def __init__(self, *model):  # a name, dtype, threads and variant
        self.calls: list[tuple[list[int], float]] = []

    def generate(self, images, prompts, seeds, *, temperature, max_new_tokens):
        colours = [image.getpixel((0, 0))[0] for image in images]
        self.calls.append((colours, temperature))
        warm = [temperature >= 0.3 and colour != 3 for colour in colours]
        found = [CAPTIONS[0] if w else CAPTIONS.get(c, CAPTIONS[0]) for c, w in zip(colours, warm)]
        return [Generation(text, len(text.split()), finish) for text, finish in found]


class Slow(Written):
    """Half a second a batch, and every caption names its seed."""

    def generate(self, images, prompts, seeds, *, temperature, max_new_tokens):
        time.sleep(0.5)
        return [Generation(expected_of(seed), 8, "stop") for seed in seeds]


def expected_of(seed: int) -> str:
    return f"A barn numbered {seed} stands on a hill."


def expected(key: str) -> str:
    """What Slow writes of an image with seed 0."""
    return expected_of(seed_of(0, key))


def use(patch, captioner=Written, ray: bool = False) -> None:
    """Let runs use this captioner, in this process unless ``ray``. patch: a MonkeyPatch."""
    patch.setattr(run, "VisionLanguageModel", captioner)
    patch.setattr(run, "identity", lambda model, variant: model)
    if not ray:
        patch.setattr(run, "ray_batches", in_process)


def in_process(pending, worker, cluster):
    """ray_batches by one worker in this process."""
    one = CaptionWorker(**worker, threads=2)
    for start in range(0, len(pending), cluster.batch_size):
        yield one({"data": pending[start : start + cluster.batch_size]})


def caption(source: str, file: Path, *, strict=False, workers=1, batch_size=4, **options) -> dict:
    """Caption a source with the captioner in use."""
    spec = SourceSpec(source)
    cluster = run.Cluster(batch_size, workers, gpus_per_worker=0)
    options = CaptionOptions("written", **options)
    return run.run(spec.open(), spec, file, options, cluster, faults=BadRecords(strict))


def png(red: int, size: tuple[int, int] = (12, 8)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, (red, 100, 50)).save(data, "PNG")
    return data.getvalue()


def folder(path: Path, reds: list[int]) -> Path:
    """Images p000.png, p001.png, … with captions beside them."""
    path.mkdir(parents=True, exist_ok=True)
    for number, red in enumerate(reds):
        (path / f"p{number:03d}.png").write_bytes(png(red))
        (path / f"p{number:03d}.txt").write_text(f"raw caption {number}\n")
    return path
