"""Every solver against its published implementation, on the same inputs, and against the exact
solution."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler
from diffusers.schedulers import scheduling_lcm

from pixart_jax import diffusion
from pixart_jax.diffusion.solvers import DDIM, DDPM, DMD, LCM, DPMSolver, SASolver
from pixart_jax.errors import UserError
from tests.diffusion.analytic import as_velocity, gaussian_epsilon, gaussian_flow, two_mode_epsilon

SCHEDULE = diffusion.schedule.linear()
EPSILON = two_mode_epsilon(SCHEDULE)
START = np.array([[-1.8, -0.7], [0.4, 1.3]])  # [b 2, c 2]
X = jnp.asarray(START, jnp.float32)

# The official PixArt-α samplers (commit cac2fd3) in float64 on two_mode_epsilon from START:
# dpm_solver.py, algorithm dpmsolver++, time_uniform, multistep, lower_order_final; key: (steps,
# order).
OFFICIAL_DPM = {
    (20, 2): [[-1.4687458185417268, -0.9476531354850238], [0.6196774077419519, 0.8763895805011017]],
    (14, 2): [[-1.5165121688212553, -1.3057320057315758], [0.6558273857478303, 0.8708649950398604]],
    (8, 2): [[-1.218431964147142, -0.52973379974931], [0.5952056620666787, 0.7037884141732935]],
    (20, 3): [[-1.387903911007497, 0.5848122875746121], [0.45525454588832165, 0.9262991699916436]],
    (20, 1): [[-1.258746858746454, -0.6690243893811116], [0.5926521076927903, 0.7533369623596047]],
}
# sa_solver.py, few_steps, 25 steps, time, predictor 2, corrector 2, PEC, data prediction; tau 0,
# and 1 on [0.2, 0.8] with _noise(i) in step i.
OFFICIAL_SA = {
    0: [[-1.3351079342277217, -0.8284799266189262], [0.6049961064021472, 0.7863187863483093]],
    1: [[0.4815620322116684, 0.4438019546653703], [0.473453076023604, 0.5502971248204122]],
}
# iddpm.py, respacing "100", learned range with logits sin(3x), x_0 not clipped, _noise(i) in step
# i.
OFFICIAL_DDPM = [[0.5394912705305233, 0.5671480023693426], [0.5939393622825472, 0.5961053110636527]]
# lcm_scheduler.py, 50 origin steps, with _noise(i) in step i.
OFFICIAL_LCM = {
    4: [[0.33799656867374567, 0.5084583866373756], [0.47588622994302704, 0.2029079008191525]],
    8: [[0.48905355896231234, 0.6081720444565064], [0.5835862492720862, 0.4118417817440183]],
}


def _noise(step: int) -> np.ndarray:
    return np.cos(np.arange(4.0) + 1.7 * (step + 1)).reshape(2, 2)


def _run_with(solver, steps, denoiser, noises, times="fractional") -> np.ndarray:
    """The solver's own plan and update in fp32, one step at a time, with noise that is given."""
    plan = solver.plan(SCHEDULE, steps, times=times, start=0, stochastic=True)
    assert plan.noisy

    @jax.jit
    def step(state, t, alpha, sigma, coefficients, noise):
        output = denoiser(state[0], t)
        epsilon, logits = output if isinstance(output, tuple) else (output, None)
        x0 = (state[0] - sigma * epsilon) / alpha
        return solver.update(state, x0, logits, coefficients, noise)

    state = solver.init(X)
    table = (plan.t, plan.alpha, plan.sigma, plan.coefficients)
    for i in range(len(plan.t)):
        row = (*jax.tree.map(lambda values, i=i: values[i], table), noises(i))
        state = step(state, *jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), row))
    return np.asarray(state[0])


@pytest.mark.parametrize("settings", OFFICIAL_DPM)
def test_dpm_at_fractional_times_is_the_official_solver(settings):
    steps, order = settings
    got = diffusion.sample(EPSILON, X, steps=steps, order=order)
    np.testing.assert_allclose(got, OFFICIAL_DPM[settings], atol=1e-5)


def test_sa_at_published_settings_is_the_official_solver():
    got = diffusion.sample(EPSILON, X, solver="sa", steps=25)
    np.testing.assert_allclose(got, OFFICIAL_SA[0], atol=1e-5)
    noisy = _run_with(SASolver(), 25, EPSILON, _noise)
    np.testing.assert_allclose(noisy, OFFICIAL_SA[1], atol=1e-5)


def test_ddpm_with_learned_range_is_the_official_sampler():
    got = _run_with(DDPM(), "100", lambda x, t: (EPSILON(x, t), jnp.sin(3 * x)), _noise)
    np.testing.assert_allclose(got, OFFICIAL_DDPM, atol=1e-5)


def test_published_times():
    np.testing.assert_allclose(diffusion.timesteps("dpm++", 20)[:3], [999, 949.05, 899.1])
    np.testing.assert_allclose(diffusion.timesteps("dpm++", 14)[:2], [999, 927.642857142857])
    assert list(diffusion.timesteps("dpm++", 20, times="integer")[:3]) == [999, 949, 899]
    assert list(diffusion.timesteps("ddim", "ddim50")) == list(range(980, -1, -20))


def _diffusers(scheduler, steps, predict=EPSILON, noises=None, **options) -> np.ndarray:
    scheduler.set_timesteps(steps)
    x = torch.tensor(START, dtype=torch.float32)
    for i, t in enumerate(scheduler.timesteps):
        output = torch.tensor(predict(x.numpy().astype(np.float64), float(t)), dtype=torch.float32)
        if noises is not None:
            options["variance_noise"] = torch.tensor(noises(i), dtype=torch.float32)
        x = scheduler.step(output, t, x, **options).prev_sample
    return x.numpy()


def _parametrised(prediction: str):
    """(denoiser, diffusers' name) of a prediction."""
    if prediction == "epsilon":
        return EPSILON, "epsilon"
    return as_velocity(SCHEDULE, EPSILON), "v_prediction"


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize(
    ("steps", "order"), [(20, 2), (14, 2), (15, 2), (4, 2), (1, 2), (20, 3), (10, 3), (20, 1)]
)
def test_dpm_at_integer_times_is_diffusers(steps, order, prediction):
    predict, name = _parametrised(prediction)
    theirs = DPMSolverMultistepScheduler(solver_order=order, prediction_type=name)
    expected = _diffusers(theirs, steps, predict)
    how = {"order": order, "times": "integer", "prediction": prediction}
    got = diffusion.sample(predict, X, steps=steps, **how)
    # A single step is x_0 at t = 999 itself, where ε → x_0 magnifies fp32's rounding by σ/α = 157
    # in both.
    np.testing.assert_allclose(got, expected, atol=1e-5 if steps > 1 else 1e-4)


@pytest.mark.parametrize("steps", [4, 7, 20, 30])
@pytest.mark.parametrize(("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0)])
def test_dpm_at_other_integer_times_is_diffusers(steps, spacing, offset):
    theirs = DPMSolverMultistepScheduler(timestep_spacing=spacing, steps_offset=offset)
    expected = _diffusers(theirs, steps)
    got = diffusion.sample(
        EPSILON, X, DPMSolver(spacing=spacing, offset=offset), steps, times="integer"
    )
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize(("steps", "to_one"), [(50, True), (50, False), (30, True), (1, True)])
def test_ddim_is_diffusers_with_leading_spacing(steps, to_one, prediction):
    predict, name = _parametrised(prediction)
    theirs = DDIMScheduler(clip_sample=False, set_alpha_to_one=to_one, prediction_type=name)
    expected = _diffusers(theirs, steps, predict)
    ours = DDIM(set_alpha_to_one=to_one)
    got = diffusion.sample(predict, X, ours, steps, prediction=prediction)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_ddim_with_eta_is_diffusers():
    expected = _diffusers(DDIMScheduler(clip_sample=False), 20, noises=_noise, eta=0.7)
    np.testing.assert_allclose(_run_with(DDIM(eta=0.7), 20, EPSILON, _noise), expected, atol=1e-5)


@pytest.mark.parametrize("steps", OFFICIAL_LCM)
def test_lcm_is_the_official_scheduler(steps):
    found = _run_with(LCM(), steps, EPSILON, _noise)
    np.testing.assert_allclose(found, OFFICIAL_LCM[steps], atol=1e-5)
    assert list(diffusion.timesteps("lcm", 4)) == [999, 759, 519, 279]
    assert list(diffusion.timesteps("lcm", 8)) == list(range(999, 158, -120))


@pytest.mark.parametrize("steps", [2, 4, 7, 8, 50])
def test_lcm_at_integer_times_is_diffusers(steps, monkeypatch):
    noises = (torch.tensor(_noise(i), dtype=torch.float32) for i in range(steps))
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, **__: next(noises))
    theirs = LCMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    expected = _diffusers(theirs, steps)
    found = _run_with(LCM(), steps, EPSILON, _noise, times="integer")
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_one_step_of_lcm_and_of_dmd_is_the_clean_image_that_the_model_names():
    for solver, t in ((LCM(), 999), (DMD(), 400)):
        x0 = (START - SCHEDULE.sigma(t) * EPSILON(START, t)) / SCHEDULE.alpha(t)
        got = diffusion.sample(EPSILON, X, solver, 1, key=jax.random.key(0))
        np.testing.assert_allclose(got, x0, atol=2e-4 if t == 999 else 1e-5)


def test_ddim_spacing_of_a_number_and_of_its_official_name_agree_where_it_divides():
    for count in (10, 50, 250):
        one, other = (diffusion.timesteps("ddim", steps) for steps in (count, f"ddim{count}"))
        assert list(one) == list(other)


def _errors(counts, solver="dpm++", **options):
    """Largest error at each number of steps on Gaussian data, in float64."""
    x = np.array([[-1.2, 0.1, 0.9]])
    exact = gaussian_flow(SCHEDULE, x, 999, 0)
    with jax.enable_x64(True):
        run = functools.partial(diffusion.sample, gaussian_epsilon(SCHEDULE), jnp.asarray(x))
        return [np.abs(run(solver, steps=n, **options) - exact).max() for n in counts]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_converges_at_its_order(order):
    """Half the step, 2^order times less error, at step counts where the lower-order start does not
    show yet."""
    coarse, fine = _errors((100, 200), order=order)
    assert fine < 0.01
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_sa_without_noise_converges_at_second_order():
    coarse, fine = _errors((200, 400), "sa")
    assert coarse / fine > 3.5


def test_all_deterministic_solvers_reach_the_exact_solution():
    x = np.linspace(-2, 2, 8).reshape(2, 4)
    exact = gaussian_flow(SCHEDULE, x, 999, 0)
    noise = jnp.asarray(x, jnp.float32)
    for solver, steps, tolerance in (
        ("dpm++", 400, 1e-3),
        ("sa", 400, 1e-3),
        (DDIM(set_alpha_to_one=False), 1000, 1e-2),
    ):
        got = diffusion.sample(gaussian_epsilon(SCHEDULE), noise, solver, steps)
        assert np.abs(got - exact).max() < tolerance, solver


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm++", "sa"])
def test_epsilon_and_v_parametrisations_agree(solver):
    key = jax.random.key(0)
    epsilon = diffusion.sample(EPSILON, X, solver, 50, key=key)
    v = diffusion.sample(as_velocity(SCHEDULE, EPSILON), X, solver, 50, key=key, prediction="v")
    np.testing.assert_allclose(v, epsilon, atol=2e-5)


@pytest.mark.parametrize(("solver", "steps"), [("ddpm", 200), (DDIM(eta=1.0), 200), ("sa", 50)])
def test_stochastic_solvers_draw_the_datas_distribution(solver, steps):
    """20,000 values of Gaussian data: mean and deviation within four standard errors and the
    solver's own bias."""
    noise, denoiser = jax.random.normal(jax.random.key(1), (50, 20, 20)), gaussian_epsilon(SCHEDULE)
    got = np.asarray(diffusion.sample(denoiser, noise, solver, steps, key=jax.random.key(2)))
    assert got.mean() == pytest.approx(0.3, abs=0.02)
    assert got.std() == pytest.approx(0.7, abs=0.035)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "dpm+"}, "did you mean 'dpm\\+\\+'"),
        ({"steps": 0}, "at least 1"),
        ({"steps": "ddim20"}, "whole number"),
        ({"steps": 1001, "times": "integer"}, "1000 integer times"),
        ({"times": "intger"}, "did you mean 'integer'"),
        ({"solver": "sa", "times": "integer"}, "fractional"),
        ({"order": 4}, "1, 2 or 3"),
        ({"solver": "ddim", "eta": 2.0}, "\\[0, 1\\]"),
        ({"solver": "ddpm", "steps": 2000}, "2000"),
        ({"start": 20}, "0 … 19"),
        ({"solver": "lcm", "steps": 51}, "at most the 50 steps"),
        ({"solver": "dmd", "steps": 20}, "1 step"),
        ({"prediction": "velocity"}, "unknown prediction"),
    ],
)
def test_bad_options_are_one_clear_line(options, message):
    with pytest.raises(UserError, match=message):
        diffusion.sample(EPSILON, X, **options)


@pytest.mark.parametrize(
    "solver, wrong", [(DPMSolver, {"order": 0}), (SASolver, {"corrector_order": 5, "tau": -1.0})]
)
def test_solver_dataclasses_check_themselves(solver, wrong):
    for name, value in wrong.items():
        with pytest.raises(UserError):
            solver(**{name: value})
