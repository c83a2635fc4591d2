"""The solvers that users of diffusers switch to, and the grids of times, against its schedulers."""

from __future__ import annotations

import functools
import itertools

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_euler_ancestral_discrete

from pixart_jax import diffusion
from pixart_jax.diffusion.solvers import by_name
from pixart_jax.errors import UserError
from tests.diffusion.test_solvers import EPSILON, START, X, _noise, _run_with

BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
SCHEDULERS = {
    "dpm++": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
}
SPACINGS = ("linspace", "leading", "trailing", "karras", "exponential")


def theirs(name: str, steps: int, monkeypatch, at=None, **options) -> np.ndarray:
    """A run of diffusers' scheduler in its own variable, x/α for all but the multistep ones."""
    scheduler = SCHEDULERS[name](**BETAS, **options)
    scheduler.set_timesteps(**({"timesteps": at} if at else {"num_inference_steps": steps}))
    noises = iter(torch.tensor(_noise(i), dtype=torch.float32) for i in range(steps))
    module = scheduling_euler_ancestral_discrete
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(noises))
    x = torch.tensor(START, dtype=torch.float32)
    if name not in ("dpm++", "unipc"):
        x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t).numpy().astype(np.float64)
        output = torch.tensor(EPSILON(seen, float(t)), dtype=torch.float32)
        x = scheduler.step(output, t, x).prev_sample
    return x.numpy()


def ours(solver, steps: int) -> np.ndarray:
    if solver == by_name("euler_ancestral"):
        return _run_with(solver, steps, EPSILON, _noise)
    return np.asarray(diffusion.sample(EPSILON, X, solver, steps, times="integer"))


# diffusers' ancestral scheduler has no such sigmas
CASES = set(itertools.product(SCHEDULERS, SPACINGS)) - {
    ("euler_ancestral", "karras"),
    ("euler_ancestral", "exponential"),
}


@pytest.mark.parametrize("name, spacing", sorted(CASES))
def test_each_solver_on_each_grid_is_diffusers(name, spacing, monkeypatch):
    own, options = {"spacing": spacing}, {"timestep_spacing": spacing}
    if spacing in ("karras", "exponential"):
        options = {f"use_{spacing}_sigmas": True}
    if spacing == "leading":
        own["offset"] = options["steps_offset"] = 1
    worst = 0.0
    # heun's two steps multiply fp32's rounding at σ/α = 157 in both programs
    for steps in (20, 7) if name == "heun" else (20, 7, 2):
        want = theirs(name, steps, monkeypatch, **options)
        worst = max(worst, float(np.abs(ours(by_name(name, **own), steps) - want).max()))
    print(f"{name} {spacing}: {worst:.1e}")
    assert worst <= 1e-4


@pytest.mark.parametrize("order", [1, 3])
def test_other_orders_of_unipc_are_diffusers(order, monkeypatch):
    want = theirs("unipc", 20, monkeypatch, solver_order=order)
    np.testing.assert_allclose(ours(by_name("unipc", order=order), 20), want, atol=1e-4)


@pytest.mark.parametrize("name", ["dpm++", "euler", "heun"])
def test_a_list_of_times_is_diffusers(name, monkeypatch):
    at = [999 - 40 * i - i * i // 2 for i in range(20)]
    want = theirs(name, 20, monkeypatch, at=at)
    solver = by_name(name, at=tuple(map(float, at)))
    np.testing.assert_allclose(ours(solver, 20), want, atol=1e-4)
    visited = diffusion.timesteps(solver, 20, times="integer")
    assert sorted(set(visited), reverse=True) == at


def test_every_grid_at_fractional_times_leads_to_the_same_end():
    """Where diffusers has no such pair of a solver and a grid."""
    end = np.asarray(diffusion.sample(EPSILON, X, "dpm++", 1000))
    far = {}
    for name in ("dpm++", "unipc", "euler", "heun", "ddim"):
        for spacing in ("linspace", "karras", "exponential"):
            got = diffusion.sample(EPSILON, X, by_name(name, spacing=spacing), 200)
            far[name, spacing] = float(np.abs(np.asarray(got) - end).max())
    print({" ".join(pair): round(value, 4) for pair, value in far.items()})
    assert max(far.values()) < 0.04
    assert max(far[name, "karras"] for name in ("dpm++", "unipc")) < 0.01


def test_a_run_from_the_middle_is_the_rest_of_the_run():
    """heun's step has two evaluations; euler and heun have no memory, so the rest is exact."""
    for name in ("euler", "heun"):
        whole = diffusion.timesteps(name, 10)
        rest = diffusion.timesteps(name, 10, start=4)
        np.testing.assert_array_equal(rest, whole[-len(rest) :])
        assert len(rest) == {"euler": 6, "heun": 11}[name]
        seen: list[int] = []
        kept = functools.partial(lambda seen, step, _: seen.append(step), seen)
        diffusion.sample(EPSILON, X, name, 10, start=4, preview=kept)
        jax.effects_barrier()
        assert min(seen) == len(whole) - len(rest) and max(seen) == len(whole) - 1


def test_ancestral_noise_is_each_images_own():
    keys = jax.random.split(jax.random.key(3), 2)
    both = diffusion.sample(EPSILON, X, "euler_ancestral", 8, key=keys)
    one = diffusion.sample(EPSILON, X[1:], "euler_ancestral", 8, key=keys[1:])
    np.testing.assert_allclose(both[1:], one, atol=1e-6)
    assert np.abs(both - diffusion.sample(EPSILON, X, "euler_ancestral", 8)).max() > 1e-2


def test_times_are_no_part_of_a_solvers_identity():
    for name in SCHEDULERS:
        assert by_name(name) == by_name(name, spacing="karras") == by_name(name, at=(9.0, 1.0))
        assert hash(by_name(name)) == hash(by_name(name, spacing="karras"))


@pytest.mark.parametrize(
    ("name", "how", "says"),
    [
        ("euler", {"spacing": "karas"}, "did you mean 'karras'"),
        ("sa", {"spacing": "karras"}, "has its own times: .* heun"),
        ("heun", {"at": (500.0, 700.0)}, "timesteps 500 700: they must fall"),
        ("heun", {"at": (500.0, -1.0)}, "not below 0"),
        ("unipc", {"order": 4}, "order 4: must be 1, 2 or 3"),
    ],
)
def test_bad_grids_are_one_line(name, how, says):
    with pytest.raises(UserError, match=says):
        by_name(name, **how)


def test_lists_that_do_not_fit_are_one_line():
    with pytest.raises(UserError, match="2 from 999 to 0 do not fit 2 steps .* above 0"):
        diffusion.sample(EPSILON, X, by_name("dpm++", at=(999.0, 0.0)), 2)
    with pytest.raises(UserError, match="2 from 1000 to 0 do not fit 2 steps of times 999"):
        diffusion.sample(EPSILON, X, by_name("euler", at=(1000.0, 0.0)), 2)
