"""Rows of the whole pipeline beside diffusers' PixArtAlphaPipeline: final latents from the same
noise, and images."""

from __future__ import annotations

import functools
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks.parity_rows.row import Outputs, Row

SHAPES = Path(__file__).resolve().parents[2] / "assets" / "shapes"
PROMPTS = ("a large red circle", "a small blue star left of a large green square")
STEPS = {"dpm++": 20, "ddim": 20, "lcm": 4}
GUIDANCE = {"dpm++": 4.5, "ddim": 4.5, "lcm": 1.0}  # LCM's models have theirs built in
_BETAS = dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", num_train_timesteps=1000)


def noise() -> np.ndarray:
    return np.random.default_rng(4).normal(size=(len(PROMPTS), 8, 8, 4)).astype(np.float32)


def keys():
    """What the noise between LCM's steps is drawn from, on both sides."""
    import jax

    return jax.random.split(jax.random.key(5), len(PROMPTS))


def open_theirs(model: str, folder: Path):
    """diffusers' pipeline: 'tiny', built and saved to folder/model, or the trained model in
    assets/shapes."""
    if model == "tiny":
        from tests import tiny_diffusers

        return tiny_diffusers.build(folder / "model")
    from diffusers import PixArtAlphaPipeline

    pipe = PixArtAlphaPipeline.from_pretrained(SHAPES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def open_ours(model: str, folder: Path):
    from pixart_jax import Pipeline

    return Pipeline.from_pretrained(folder / "model" if model == "tiny" else SHAPES)


def scheduler(solver: str, prediction: str):
    """diffusers' scheduler that is the same process as our solver at whole times; None for the one
    that the folder names."""
    from diffusers import DDIMScheduler, LCMScheduler

    if solver == "ddim":  # its defaults clip x_0 to [-1, 1], which latents do not keep to
        how = {"timestep_spacing": "leading", "steps_offset": 0, "prediction_type": prediction}
        return DDIMScheduler(**_BETAS, **how, clip_sample=False, set_alpha_to_one=True)
    return LCMScheduler(**_BETAS, prediction_type=prediction) if solver == "lcm" else None


def _noise_of_steps(steps: int):
    """A function in place of the one that diffusers' LCM draws its noise with: the values that ours
    draws from its keys."""
    import jax
    import torch

    draws = []
    for step in range(steps):
        values = jax.vmap(
            lambda key, step=step: jax.random.normal(jax.random.fold_in(key, step), (8, 8, 4))
        )(keys())
        draws.append(torch.from_numpy(np.array(values)).permute(0, 3, 1, 2))
    left = iter(draws)
    return lambda *_, **__: next(left)


def theirs_latents(model: str, solver: str, folder: Path) -> Outputs:
    from diffusers.schedulers import scheduling_lcm

    from tests import tiny_diffusers

    pipe = open_theirs(model, folder)
    pipe.scheduler = scheduler(solver, pipe.scheduler.config.prediction_type) or pipe.scheduler
    how = {"num_inference_steps": STEPS[solver], "guidance_scale": GUIDANCE[solver]}

    draws = _noise_of_steps(STEPS[solver]) if solver == "lcm" else None
    with mock.patch.object(scheduling_lcm, "randn_tensor", draws):
        made = tiny_diffusers.draw(pipe, PROMPTS, noise(), **how, negative_prompt="")
    return {"latents": made[0]}


def ours_latents(model: str, solver: str, folder: Path) -> Outputs:
    pipe = open_ours(model, folder)
    how = {"steps": STEPS[solver], "guidance": GUIDANCE[solver], "solver": solver}
    how["keys"] = keys() if solver == "lcm" else None
    return {"latents": np.asarray(denoised(pipe, **how))}


def denoised(pipe, **how):
    text, negative = pipe.encode_text(PROMPTS), pipe.encode_text([""] * len(PROMPTS))
    return pipe.denoise(*text, noise(), *negative, times="integer", **how)


def theirs_images(model: str, folder: Path) -> Outputs:
    """The folder is written by pixart_jax and opened by diffusers, which draws from it."""
    from diffusers import PixArtAlphaPipeline

    from tests import tiny_diffusers

    if model == "tiny":
        open_theirs(model, folder)
    open_ours(model, folder).save_pretrained(folder / "written")
    pipe = PixArtAlphaPipeline.from_pretrained(folder / "written")
    pipe.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": 20, "guidance_scale": 4.5, "negative_prompt": ""}
    return {"images": tiny_diffusers.draw(pipe, PROMPTS, noise(), **how)[1]}


def ours_images(folder: Path) -> Outputs:
    from pixart_jax import Pipeline

    pipe = Pipeline.from_pretrained(folder / "written")
    how = {"steps": 20, "guidance": 4.5}
    return {"images": np.asarray(pipe.decode(denoised(pipe, **how)))}


# ---- the rows ----

_NAMES = {"dpm++": "DPM-Solver++ at whole times", "ddim": "DDIM", "lcm": "LCM"}
_MODELS = {"tiny": "tiny", "shapes": "assets/shapes"}


def _latents(model: str, solver: str) -> Row:
    guided = "" if GUIDANCE[solver] == 1 else f", guidance {GUIDANCE[solver]}"
    return Row(
        name=f"pipeline {model} {solver}",
        model="pipeline, final latents",
        format=f"{_NAMES[solver]}, {STEPS[solver]} steps{guided}",
        size=f"{_MODELS[model]}, 64 × 64 px",
        bound=1e-3,
        theirs=functools.partial(theirs_latents, model, solver),
        ours=functools.partial(ours_latents, model, solver),
    )


def _images(model: str) -> Row:
    return Row(
        name=f"pipeline {model} images",
        model="pipeline, images",
        format="folder written here, opened in diffusers; 20 steps, guidance 4.5",
        size=f"{_MODELS[model]}, 64 × 64 px",
        bound=45.0,
        measure="psnr",
        theirs=functools.partial(theirs_images, model),
        ours=ours_images,
    )


ROWS = (
    *(_latents(model, solver) for model in _MODELS for solver in STEPS),
    *(_images(model) for model in _MODELS),
)
