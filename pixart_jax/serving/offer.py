"""What a server offers, and a request that was checked against it.

Every distinct size, number of steps, solver or kind of edit is a compiled program, so the values of
each are a list: no request compiles what is not on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
import secrets
import threading
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from pixart_jax.data import buckets
from pixart_jax.data.images import to_bucket
from pixart_jax.errors import UserError
from pixart_jax.pipeline.editing import check_control, check_image, check_mask, first_step
from pixart_jax.pipeline.folder import ModelFolder
from pixart_jax.pipeline.image_size import check_options
from pixart_jax.pipeline.sampling_config import SamplingConfig, check_seed
from pixart_jax.text import caption_cleaner, check_encodable, count_tokens

STEPS = (4, 8, 14, 20, 28, 40, 50)
FEW_STEPS = (1, 2, 4, 8)  # of distilled models
SOLVERS = ("dpm++", "ddim", "sa")
STRENGTHS = tuple(n / 20 for n in range(1, 21))
MAX_COUNT = 10
_TOKENIZING = threading.Lock()
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


class Refused(UserError):
    """A value that is not offered. param: the request's field."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value"):
        super().__init__(message)
        self.param, self.code = param, code


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """A checked request: ``count`` images of a prompt, from its seed, seed + 1, …

    height, width: px. strength: of an edit. image: uint8 [h, w, 3] to edit; mask: bool [h, w], True
    where it is generated anew. control: uint8 [h, w, 3], an edge map. lora: (name, weight) each.
    """

    prompt: str
    height: int
    width: int
    steps: int
    guidance: float
    solver: str
    seed: int
    negative_prompt: str = ""
    count: int = 1
    strength: float = 1.0
    image: np.ndarray | None = None
    mask: np.ndarray | None = None
    control: np.ndarray | None = None
    control_scale: float = 1.0
    lora: tuple[tuple[str, float], ...] = ()

    @property
    def run_steps(self) -> int:
        """The steps that are taken: an edit leaves out the first ones."""
        start = 0 if self.image is None else first_step(self.steps, self.strength)
        return self.steps - start

    @property
    def program(self) -> Hashable:
        """What the compiled program depends on."""
        parts = (one is not None for one in (self.image, self.mask, self.control))
        edit = (self.run_steps, *parts)
        return self.height, self.width, self.steps, self.solver, self.guidance == 1, edit

    @property
    def key(self) -> Hashable:
        """What the images of one batch have in common."""
        return self.program, self.lora, self.control is not None and self.control_scale


@dataclasses.dataclass(frozen=True)
class Offer:
    """name: the model's. sizes: (height, width) in px, the default first. solvers: {name:
    SamplingConfig with its defaults}, the default first. max_count: images of a request. recorded:
    in the settings of each image."""

    model: ModelFolder
    name: str
    sizes: tuple[tuple[int, int], ...]
    steps: tuple[int, ...]
    solvers: Mapping[str, SamplingConfig]
    max_count: int = MAX_COUNT
    max_prompt_chars: int = 4000
    adapters: tuple[str, ...] = ()
    controlnets: tuple[str, ...] = ()
    recorded: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: ModelFolder,
        *,
        sizes: Sequence[tuple[int, int]] = (),
        steps: Sequence[int] = (),
        solvers: Sequence[str] = (),
        **limits: Any,
    ) -> Offer:
        """sizes, steps, solvers: by default those of the model's kind. limits: the fields from
        max_count on. Raises UserError for what the model cannot be sampled with."""
        own = model.sampling.with_defaults()
        distilled = own.solver in ("lcm", "dmd")
        usual = (own.solver,) if distilled else dict.fromkeys((own.solver, *SOLVERS))
        config = SamplingConfig(text_length=model.transformer.text_tokens)
        configs = {
            str(name): dataclasses.replace(config, solver=name).with_defaults(own)
            for name in solvers or usual
        }
        default = next(iter(configs.values()))

        def possible(count: int) -> bool:
            with contextlib.suppress(UserError):
                return bool(_check(model, dataclasses.replace(default, steps=count)))
            return False

        for height, width in sizes:
            _check(model, default, height, width)
        for count in steps:
            _check(model, dataclasses.replace(default, steps=count))
        known = sorted({*(FEW_STEPS if distilled else STEPS), int(default.steps or 0)})
        steps = tuple(steps) or tuple(filter(possible, known))
        return cls(model, model.name, tuple(sizes) or _sizes(model), steps, configs, **limits)

    @property
    def default(self) -> SamplingConfig:
        return next(iter(self.solvers.values()))

    def describe(self) -> dict[str, Any]:
        """The offer as /v1/models shows it."""
        return {
            "sizes": [_size_text(one) for one in self.sizes],
            "default_size": _size_text(self.sizes[0]),
            "steps": list(self.steps),
            "solvers": [
                {"name": name, "steps": self._near(one), "guidance": one.guidance}
                for name, one in self.solvers.items()
            ],
            "strengths": list(STRENGTHS),
            "max_n": self.max_count,
            "max_prompt_chars": self.max_prompt_chars,
            "max_prompt_tokens": self.model.transformer.text_tokens,
            "adapters": list(self.adapters),
            "controlnets": list(self.controlnets),
        }

    def config(self, generation: Generation) -> SamplingConfig:
        return dataclasses.replace(
            self.solvers[generation.solver],
            steps=generation.steps,
            guidance=generation.guidance,
            control_scale=generation.control_scale,
        )

    def settings(self, generation: Generation, index: int) -> dict[str, Any]:
        """What an image records of how it was made."""
        found = {
            "prompt": generation.prompt,
            "negative_prompt": generation.negative_prompt,
            "index": 0,
            "seed": exact((generation.seed + index) % 2**64),
            "height": generation.height,
            "width": generation.width,
            **self.config(generation).settings(),
            **self.recorded,
        }
        if generation.image is not None:
            found |= {"strength": generation.strength, "edit": "inpaint"}
            if generation.mask is None:
                found["edit"] = "image to image"
        if generation.control is not None:
            found["controlnet"] = self.controlnets[0]
        if generation.lora:
            found["lora"] = [{"name": name, "weight": weight} for name, weight in generation.lora]
        return found

    def generation(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        size: str = "auto",
        n: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        solver: str | None = None,
        seed: int | str | None = None,
        strength: float | None = None,
        image: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        control: np.ndarray | None = None,
        control_scale: float = 1.0,
        lora: Sequence[tuple[str, float]] = (),
    ) -> Generation:
        """Fill in defaults. Raises Refused, which names the field, for what is not offered."""
        self.check_text("prompt", prompt)
        self.check_text("negative_prompt", negative_prompt)
        _within("n", n, 1, self.max_count)
        solver = next(iter(self.solvers)) if solver is None else solver
        _one_of("solver", solver, list(self.solvers))
        config = self.solvers[solver]
        steps = self._near(config) if num_inference_steps is None else num_inference_steps
        _one_of("num_inference_steps", steps, list(self.steps))
        guidance = float(guidance_scale if guidance_scale is not None else config.guidance or 1)
        _within("guidance_scale", guidance, 0, 100)
        picture = image if image is not None else control
        if size == "auto" and picture is not None:
            height, width = self._nearest(picture.shape[0] / picture.shape[1])
        else:
            text = _size_text(self.sizes[0]) if size == "auto" else size
            _one_of("size", text, [_size_text(one) for one in self.sizes])
            width, height = map(int, text.split("x"))
        if strength is None:
            strength = 0.6 if mask is None else 1.0
        if image is not None:
            _one_of("strength", round(strength, 4), list(STRENGTHS))
            _checked("strength", first_step, steps, strength)
            check_image(image)
        if mask is not None:
            if image is None:
                raise Refused("a mask needs the image that stays outside it", "mask")
            mask = _checked("mask", check_mask, mask, image)
        if control is not None:
            if not self.controlnets:
                raise Refused("control: this server has no ControlNet", "control")
            control, _ = to_bucket(check_control(control), (height, width))
        _within("control_scale", control_scale, -10, 10)
        for name, weight in lora:
            _one_of("lora", name, list(self.adapters))
            _within("lora", weight, -10, 10)
        weights = {name: sum(w for other, w in lora if other == name) for name, _ in lora}
        found = Generation(
            _CONTROLS.sub(" ", prompt),
            height,
            width,
            steps,
            guidance,
            solver,
            secrets.randbelow(2**32) if seed is None else _checked("seed", check_seed, seed),
            _CONTROLS.sub(" ", negative_prompt),
            n,
            round(strength, 4),
            image,
            mask,
            control,
            float(control_scale),
            tuple(sorted((name, float(weight)) for name, weight in weights.items())),
        )
        _check(self.model, self.config(found), height, width, steps - found.run_steps)
        return found

    def check_text(self, param: str, text: str) -> None:
        """Raise Refused for a text that cannot be encoded or is too long."""
        _checked(param, check_encodable, param, text)
        if len(text) > self.max_prompt_chars:
            raise Refused(f"{param}: at most {self.max_prompt_chars} characters", param)

    def tokens(self, text: str) -> tuple[int, list[str]]:
        """(tokens of a prompt, its words beyond the model's limit)."""
        cleaned = caption_cleaner(self.default.clean_caption)(text)
        with _TOKENIZING:
            return count_tokens(self._tokenizer, cleaned, self.model.transformer.text_tokens)

    @functools.cached_property
    def _tokenizer(self):  # the pipeline's own belongs to the engine's thread
        return self.model.tokenizer()

    def latent_tokens(self, generation: Generation) -> int:
        """Image tokens of one image in the transformer."""
        side = self.model.vae.factor * self.model.transformer.patch_size
        return (generation.height // side) * (generation.width // side)

    def _near(self, config: SamplingConfig) -> int:
        """The offered number of steps nearest to a config's."""
        return min(self.steps, key=lambda count: abs(count - int(config.steps or 0)))

    def _nearest(self, ratio: float) -> tuple[int, int]:
        """The offered size nearest to a ratio of height to width."""
        return min(self.sizes, key=lambda one: abs(math.log(one[0] / one[1] / ratio)))


def _sizes(model: ModelFolder) -> tuple[tuple[int, int], ...]:
    """The model's bucket table, the square first; of a model without one the side it was trained at
    and one half as long again."""
    side = model.transformer.sample_size * model.vae.factor
    if side in buckets.INFERENCE_TABLES:
        table = buckets.INFERENCE_TABLES[side].values()
        return tuple(dict.fromkeys([(side, side), *table]))
    unit = model.vae.factor * model.transformer.patch_size
    longer = max(unit, round(1.5 * side / unit) * unit)
    return (side, side), (side, longer), (longer, side), (longer, longer)


def exact(seed: int) -> int | str:
    """A seed in JSON: as digits where a reader's floats would round it."""
    return seed if seed < 2**53 else str(seed)


def _size_text(size: tuple[int, int]) -> str:
    """(height, width) → "WIDTHxHEIGHT"."""
    return f"{size[1]}x{size[0]}"


def _check(model: ModelFolder, config: SamplingConfig, height=None, width=None, start=0):
    parts = model.transformer, model.vae, model.scheduler
    return check_options(config, *parts, height, width, start=start)


def _within(param: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:  # NaN is not
        raise Refused(f"{param} {value}: {least} to {most} is possible", param)


def _one_of(param: str, value: Any, known: Sequence[Any]) -> None:
    if value not in known:
        shown = ", ".join(map(str, known)) or "none"
        raise Refused(f"{param} {str(value)[:60]!r} is not offered (one of: {shown})", param)


def _checked(param: str, check, *values):
    try:
        return check(*values)
    except UserError as error:
        raise Refused(str(error), param) from None
