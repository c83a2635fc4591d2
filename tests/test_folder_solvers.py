"""A folder's scheduler selects the solver and its times: latents of diffusers' own pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import PixArtAlphaPipeline
from diffusers.schedulers import scheduling_euler_ancestral_discrete

from pixart_jax import Pipeline, diffusion
from pixart_jax.errors import UserError
from pixart_jax.pipeline import SamplingConfig, sampler
from tests import tiny_diffusers
from tests.diffusion.test_grids import SCHEDULERS

PROMPTS = ["a large red circle", "a small blue star left of a green square"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    theirs = tiny_diffusers.build(folder)
    return theirs, folder, theirs.scheduler.config


def check(built, tmp_path, monkeypatch, name: str, **options) -> Pipeline:
    """20 guided steps of a folder of this scheduler, told nothing but diffusers' way to round."""
    theirs, folder, config = built
    theirs.scheduler = SCHEDULERS[name].from_config(config, **options)
    theirs.scheduler.save_pretrained(folder / "scheduler")
    pipe = Pipeline.from_pretrained(folder)
    assert pipe.sampling.solver == name
    noise, keys = pipe.noise(0, range(2), 64, 64)
    steps = iter(range(20))

    def same_noise(*_, **__):
        here = next(steps)
        fold = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, here), (8, 8, 4)))
        return torch.from_numpy(np.array(fold(keys))).permute(0, 3, 1, 2)

    monkeypatch.setattr(scheduling_euler_ancestral_discrete, "randn_tensor", same_noise)
    how = {"num_inference_steps": 20, "guidance_scale": 4.5}
    want, _ = tiny_diffusers.draw(theirs, PROMPTS, np.asarray(noise), **how)
    text, negatives = pipe.encode_text(PROMPTS), pipe.encode_text([""] * 2)
    key = keys if name == "euler_ancestral" else None
    full = {"steps": 20, "solver": name, "times": "integer", "keys": key}
    found = np.asarray(pipe.denoise(*text, noise, *negatives, **full))
    error = np.linalg.norm(found - want) / np.linalg.norm(want)
    print(f"{name} {options}: {error:.1e}")
    assert error <= 1e-4
    pipe.save_pretrained(tmp_path)
    assert Pipeline.from_pretrained(tmp_path).scheduler == pipe.scheduler
    kind, index = (
        type(theirs.scheduler).__name__,
        json.loads((tmp_path / "model_index.json").read_text()),
    )
    assert index["scheduler"] == ["diffusers", kind]
    again = PixArtAlphaPipeline.from_pretrained(tmp_path).scheduler
    again.set_timesteps(20)
    theirs.scheduler.set_timesteps(20)
    np.testing.assert_array_equal(again.sigmas, theirs.scheduler.sigmas)
    return pipe


def test_unipc_with_karras_sigmas(built, tmp_path, monkeypatch):
    pipe = check(built, tmp_path, monkeypatch, "unipc", use_karras_sigmas=True)
    # as many steps, other times: no new program
    text = pipe.encode_text(PROMPTS)
    noise = pipe.noise(0, range(2), 64, 64)[0]
    how = {"steps": 20, "solver": "unipc", "times": "integer"}
    karras = pipe.denoise(*text, noise, **how)
    before = sampler.sample_latents_jit._cache_size()
    listed = pipe.denoise(*text, noise, **how, timesteps=tuple(range(999, 99, -45)))
    assert sampler.sample_latents_jit._cache_size() == before
    assert np.abs(karras - listed).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dpm++", {"use_exponential_sigmas": True}),
        ("dpm++", {"use_karras_sigmas": True}),
        ("unipc", {}),
        ("euler", {}),
        ("euler", {"use_karras_sigmas": True}),
        ("euler_ancestral", {}),
        ("euler_ancestral", {"timestep_spacing": "trailing"}),
        ("heun", {}),
        ("heun", {"use_karras_sigmas": True}),
    ],
)
def test_every_solver(built, tmp_path, monkeypatch, name, options):
    check(built, tmp_path, monkeypatch, name, **options)


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("UniPCMultistepScheduler", {"use_beta_sigmas": True}, "use_beta_sigmas"),
        ("UniPCMultistepScheduler", {"solver_type": "bh1"}, "solver_type"),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, "final_sigmas_type"),
        (
            "HeunDiscreteScheduler",
            {"use_karras_sigmas": True, "timestep_spacing": "trailing"},
            "timestep_spacing 'trailing' with use_karras_sigmas",
        ),
    ],
)
def test_what_is_not_supported_is_named(built, kind, change, says):
    from pixart_jax.pipeline.scheduler import SchedulerConfig

    values = {"_class_name": kind, "prediction_type": "epsilon", **change}
    with pytest.raises(UserError, match=f"s.json: {says} is not supported"):
        SchedulerConfig.from_json(values, Path("s.json"))


def test_times_and_steps_are_one_choice():
    config = SamplingConfig(timesteps=(900, 500, 100)).with_defaults()
    assert config.steps == 3 and config.settings()["timesteps"] == [900, 500, 100]
    with pytest.raises(UserError, match="steps 4: 3 timesteps are given"):
        SamplingConfig(steps=4, timesteps=(900, 500, 100))
    with pytest.raises(UserError, match="spacing 'karas' is unknown .did you mean 'karras'"):
        SamplingConfig(spacing="karas")
    assert set(diffusion.solvers.NAMES) >= {"unipc", "euler", "euler_ancestral", "heun"}
