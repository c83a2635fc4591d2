"""SamplingConfig: every option of sampling, with its default.

A model folder may name its own options in ``sampling_config.json``, which diffusers ignores; one
whose scheduler is diffusers' LCMScheduler holds a distilled model, sampled in 4 steps without
guidance. What "no prompt" means may also stand beside the transformer's weights, where ``convert``
writes it for an official checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pixart_jax.errors import UserError, nearest
from pixart_jax.files import write_json

FILE = "sampling_config.json"
NULLS = ("text", "embedding")
# PixArt's values of the options for which a model may name its own
DEFAULTS: dict[str, Any] = {"guidance": 4.5, "steps": 20, "solver": "dpm++", "null": "text"}
STEPS = {"lcm": 4, "tdm": 4, "dmd": 1}  # of solvers of distilled models
_LCM: dict[str, Any] = {"guidance": 1.0, "steps": 4, "solver": "lcm"}
# diffusers' scheduler of a folder: the solver that it selects
OF_SCHEDULERS = {
    "DPMSolverMultistepScheduler": "dpm++",
    "UniPCMultistepScheduler": "unipc",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
}


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How to sample. Where no value is given the model's own counts, else PixArt's."""

    steps: int | None = None
    """Evaluations of the model an image. By default the model's own, 20 where it names none."""
    guidance: float | None = None
    """Strength of the prompt; 1 does no second pass. By default the model's own, 4.5 where it names
    none."""
    solver: str | None = None
    """dpm++, unipc, euler, euler_ancestral, heun (two evaluations a step), ddim, ddpm, sa, lcm
    or tdm (distilled models, 4 steps) or dmd (1 step). By default the model's own."""
    times: Literal["fractional", "integer"] = "fractional"
    """The time grid of dpm++ and unipc: the official code's, or diffusers'."""
    spacing: str | None = None
    """Of the times of dpm++, unipc, ddim and the Euler and Heun solvers: linspace, leading,
    trailing, karras or exponential. By default the model's own."""
    timesteps: tuple[float, ...] | None = None
    """The times themselves of these solvers, falling from 999 or below, instead of --steps."""
    null: str = "auto"
    """What an empty negative prompt means: text, the text encoder's states of "", or embedding, the
    model's null caption (the official code); auto: as the model says, text where it says
    nothing."""
    vae_tile: int | None = None
    """Decode large images in blended tiles of so many latents a side (64 is 512 pixels)."""
    tile_window: int | None = None
    """Denoise a large canvas in overlapping windows of so many latents a side
    (docs/canvas.md)."""
    tile_overlap: int | None = None
    """Latents that neighbouring windows share at least; by default half a window."""
    seamless: bool = False
    """Generate a texture that tiles: windows and the VAE wrap around the edges."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only between these two times (0 … 999); a step outside costs half. This and the next
    three change the image: docs/speed.md."""
    cross_attention_steps: int | None = None
    """After so many steps reuse the last output of cross-attention and end guidance."""
    blocks_every: int = 1
    """Compute the blocks at every N-th step only, and reuse their outputs in between."""
    block_schedule: str | None = None
    """A JSON file that says for each step, block and part (attention, cross-attention, MLP) whether
    it is computed, 1 or 0."""
    clean_caption: bool = True
    """Clean prompts as PixArt's training captions were: addresses, markup, file names and the like
    go."""
    binning: bool = True
    """Generate at the nearest size that the model was trained at, then resize and crop to what was
    asked for."""
    order: int | None = None
    """Order of dpm++ and unipc, 1 to 3. By default the model's own, 2 where it names none."""
    pag_scale: Annotated[float, tyro.conf.arg(aliases=["--pag"])] = 0.0
    """Strength of perturbed-attention guidance, 0 for none; 3 is usual. It costs a further pass."""
    pag_layers: tuple[int, ...] | None = None
    """Blocks whose self-attention it perturbs, counted from 0; by default the middle one."""
    pag_adaptive_scale: float = 0.0
    """Lower the scale by so much for each of the 1000 times that a step is after the first."""
    control_scale: float = 1.0
    """How strongly a ControlNet acts."""
    control_start: float = 0.0
    """Its first step, as a share of all steps."""
    control_end: float = 1.0
    """Its last step, as a share of all steps; without it a step costs two thirds."""
    text_length: int | None = None
    """Pad all prompts to so many tokens, so that every batch runs the same compiled program. By
    default as many as the longest prompt needs."""

    def __post_init__(self):
        _integer("steps", self.steps, 1)
        if self.guidance is not None:
            check_guidance(self.guidance)
        if self.solver is not None:
            from pixart_jax.diffusion import solvers  # imports jax: not for a --help

            check_choice("solver", self.solver, solvers.NAMES)
        if self.spacing is not None:
            from pixart_jax.diffusion import solvers

            check_choice("spacing", self.spacing, solvers.SPACINGS)
        check_choice("times", self.times, ("fractional", "integer"))
        if self.timesteps is not None:
            object.__setattr__(self, "timesteps", tuple(float(t) for t in self.timesteps))
            if self.steps not in (None, len(self.timesteps)):
                raise UserError(f"steps {self.steps}: {len(self.timesteps)} timesteps are given")
        check_choice("null", self.null, ("auto", *NULLS))
        blends = "so that tiles blend over 16 latents"
        _integer("vae tile", self.vae_tile, 32, blends)
        _integer("tile window", self.tile_window, 1)
        _integer("tile overlap", self.tile_overlap, 0)
        if self.guidance_interval is not None:
            low, high = (float(t) for t in self.guidance_interval)
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise UserError(
                    f"guidance interval {low:g} {high:g}: two times of 0 … 999, the lower one first"
                )
            object.__setattr__(self, "guidance_interval", (low, high))
        _integer("cross-attention steps", self.cross_attention_steps, 1, "whose output is reused")
        _integer("blocks every", self.blocks_every, 1, "which computes them at every step")
        if self.block_schedule is not None and self.blocks_every > 1:
            raise UserError("blocks every and block schedule exclude each other: give one of them")
        _integer("text length", self.text_length, 1)
        for name in ("pag_scale", "pag_adaptive_scale"):
            value = getattr(self, name)
            if not isinstance(value, float | int) or not 0 <= value < 3e38:
                raise UserError(f"{name} {value!r}: a finite number of at least 0 is needed")
        scale, start, end = self.control_scale, self.control_start, self.control_end
        if not abs(scale) < 3e38:
            raise UserError(f"control scale {scale}: a finite number is needed")
        if not 0 <= start < end <= 1:
            raise UserError(
                f"control start {start:g}, end {end:g}: two ascending shares of the steps"
            )
        if self.pag_layers is not None:
            object.__setattr__(self, "pag_layers", tuple(self.pag_layers))
        if self.pag_scale and self.cross_attention_steps is not None:
            raise UserError("pag and cross-attention steps exclude each other: give one of them")

    @property
    def windowed(self) -> bool:
        """Whether a canvas is denoised in windows, of any size."""
        return self.tile_window is not None or self.seamless

    def with_defaults(self, own: SamplingConfig | None = None) -> SamplingConfig:
        """The config with ``own`` (a model's), else PixArt's values where it has none. A solver
        other than the model's comes with its own number of steps."""
        base = DEFAULTS if own is None else {**DEFAULTS, **own.given()}
        found = {**base, **self.given()}
        if found["solver"] != base["solver"] and self.steps is None:
            found["steps"] = STEPS.get(found["solver"], DEFAULTS["steps"])
        if self.timesteps is not None:
            found["steps"] = len(self.timesteps)
        return dataclasses.replace(self, **found)

    def perturbed_layers(self, depth: int) -> tuple[int, ...]:
        """The blocks that PAG perturbs in a model of ``depth``; () without it. Raises UserError for
        others."""
        if not self.pag_scale:
            return ()
        layers = (depth // 2,) if self.pag_layers is None else self.pag_layers
        if not layers or any(not 0 <= layer < depth for layer in layers):
            wanted = f"numbers from 0 to {depth - 1} are needed"
            raise UserError(f"pag layers {' '.join(map(str, layers))}: {wanted}")
        return tuple(sorted(set(layers)))

    def given(self) -> dict[str, Any]:
        """Those of DEFAULTS' fields that this config sets."""
        values = {name: getattr(self, name) for name in DEFAULTS}
        return {name: value for name, value in values.items() if value not in (None, "auto")}

    def settings(self) -> dict[str, Any]:
        """What an image records of how it was made: steps, guidance, solver, times and null, and of
        the others those that are not the default; a block schedule by a hash of its file."""
        found = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            always = field.name in (*DEFAULTS, "times")
            if field.name != "text_length" and (always or value != field.default):
                found[field.name] = list(value) if isinstance(value, tuple) else value
        if self.block_schedule is not None:
            from pixart_jax.pipeline.block_cache import schedule_hash

            found.pop("block_schedule")
            found["schedule"] = schedule_hash(self.block_schedule)
        return found


def read(folder: str | os.PathLike, scheduler: str = "") -> SamplingConfig:
    """A model folder's options, with defaults filled in. scheduler: its class in diffusers, for a
    folder without a ``sampling_config.json``. Raises UserError for a file that cannot be used."""
    folder = Path(folder)
    part, own = _read(folder / "transformer" / FILE), _read(folder / FILE)
    if own is None:
        own = SamplingConfig(solver=OF_SCHEDULERS.get(scheduler))
        own = SamplingConfig(**_LCM) if scheduler == "LCMScheduler" else own
    null = {} if part is None else {"null": part.null}
    return dataclasses.replace(own, **{**null, **own.given()}).with_defaults()


def _read(path: Path) -> SamplingConfig | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
        if unknown := set(values) - set(DEFAULTS):
            raise ValueError(f"unknown {', '.join(sorted(unknown))}")
        return SamplingConfig(**values)
    except (ValueError, TypeError) as error:
        known = ", ".join(DEFAULTS)
        raise UserError(f"{path} is not a JSON object with any of {known}: {error}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def write(config: SamplingConfig, folder: str | os.PathLike) -> None:
    """Write folder/sampling_config.json: what a model names that is not PixArt's default."""
    given = config.given().items()
    write_json(Path(folder) / FILE, {name: v for name, v in given if v != DEFAULTS[name]})


def check_choice(what: str, value: str, known: tuple[str, ...]) -> str:
    """Return the value; raise UserError with the nearest known one."""
    if value not in known:
        raise UserError(f"{what} {value!r} is unknown{nearest(str(value), known)}")
    return value


def check_guidance(value: float) -> None:
    """Raise UserError for a guidance scale that is not a finite number in fp32."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not abs(value) < 3e38:
        raise UserError(f"guidance {value!r}: a finite number is needed; 1 does no second pass")


def check_count(what: str, value: int) -> None:
    """Raise UserError for what is not a whole number from 1."""
    _integer(what, value, 1)


def check_seed(value: int | str) -> int:
    """The seed as an int of 64 bits, from an int or its decimal digits."""
    try:
        seed = int(value)
    except (TypeError, ValueError):
        seed = -1
    if not 0 <= seed < 2**64 or isinstance(value, bool | float):
        raise UserError(f"seed {value}: a whole number from 0 to {2**64 - 1} is needed")
    return seed


def _integer(what: str, value: int | None, least: int, why: str = "") -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise UserError(f"{what} {value!r}: at least {least} is needed{why and f', {why}'}")
