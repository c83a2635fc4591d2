"""A captioner that says written captions, chosen by the picture's colour and the attempt; what
guards and kills are tested with."""

from __future__ import annotations

import io
import time
from pathlib import Path

from PIL import Image

from pixart_jax.captioning.vision_language import Generation, seed_of

GOOD = (
    "A large red barn stands on a green hill under a cloudy sky. The light is soft and the "
    "style is that of an oil painting."
)
LOOP = "The image shows a dog and a cat and " + "a dog and a cat and " * 12
# red value of a picture's first pixel → what is said at the first draw: (text, finish)
SAID = {
    0: (GOOD, "stop"),
    1: ("", "stop"),
    2: ("A large red barn stands on a green hill under a cloudy sky and the light", "length"),
    3: (LOOP, "length"),
    4: ("I'm sorry, but I cannot see any image here.", "stop"),
    5: ("A large red barn stands on a green hill under a cloudy sky and the", "stop"),
}


class Written:
    """Says SAID by colour; where it is warmer than 0.3, GOOD, but for what is 3, which never leaves
    its loop. delay: seconds a batch."""

    special = ("<image>",)

    def __init__(
        self,
        model: str = "written",
        dtype: str = "auto",
        threads: int | None = None,
        delay: float = 0.0,
    ):
        self.calls: list[tuple[list[int], float]] = []
        self._delay = delay

    def say(self, images, prompts, seeds, *, temperature, most):
        time.sleep(self._delay)
        colours = [image.getpixel((0, 0))[0] for image in images]
        self.calls.append((colours, temperature))
        said = [
            SAID.get(colour, SAID[0]) if temperature < 0.3 or colour == 3 else SAID[0]
            for colour in colours
        ]
        return [Generation(text, len(text.split()), finish) for text, finish in said]


class Slow(Written):
    """Half a second a batch, and every caption names its seed."""

    def say(self, images, prompts, seeds, *, temperature, most):
        time.sleep(0.5)
        return [
            Generation(f"A barn numbered {seed} stands on a hill.", 8, "stop") for seed in seeds
        ]


def expected(key: str) -> str:
    """What Slow says of a picture with seed 0."""
    return f"A barn numbered {seed_of(0, key)} stands on a hill."


def png(red: int, size: tuple[int, int] = (12, 8)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, (red, 100, 50)).save(data, "PNG")
    return data.getvalue()


def folder(path: Path, reds: list[int]) -> Path:
    """Pictures p000.png, p001.png, … with captions beside them."""
    path.mkdir(parents=True, exist_ok=True)
    for number, red in enumerate(reds):
        (path / f"p{number:03d}.png").write_bytes(png(red))
        (path / f"p{number:03d}.txt").write_text(f"raw caption {number}\n")
    return path
