"""The sampling scan: keys, jit, previews, later starts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax import diffusion
from pixart_jax.errors import UserError
from tests.diffusion.analytic import gaussian_epsilon

SCHEDULE = diffusion.schedule.linear()
EPSILON = gaussian_epsilon(SCHEDULE)
NOISE = jax.random.normal(jax.random.key(3), (4, 3, 2, 4))
SOLVERS = ["ddpm", "ddim", "dpm++", "sa"]


@pytest.mark.parametrize("solver", ["ddpm", "sa"])
def test_an_image_does_not_depend_on_its_batch(solver):
    keys = jax.random.split(jax.random.key(5), 4)
    whole = diffusion.sample(EPSILON, NOISE, solver, 10, key=keys)
    for i in range(4):
        alone = diffusion.sample(EPSILON, NOISE[i : i + 1], solver, 10, key=keys[i : i + 1])
        np.testing.assert_array_equal(alone[0], whole[i])
    one = diffusion.sample(EPSILON, NOISE, solver, 10, key=jax.random.key(6))
    folded = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(6), jnp.arange(4))
    np.testing.assert_array_equal(one, diffusion.sample(EPSILON, NOISE, solver, 10, key=folded))
    raw = jax.random.key_data(jax.random.key(6))
    np.testing.assert_array_equal(one, diffusion.sample(EPSILON, NOISE, solver, 10, key=raw))
    assert not np.allclose(one, whole)


def test_a_later_batch_size_draws_the_same_images_for_one_key():
    key = jax.random.key(8)
    four, two = (diffusion.sample(EPSILON, x, "ddpm", 10, key=key) for x in (NOISE, NOISE[:2]))
    np.testing.assert_array_equal(four[:2], two)


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_key_adds_no_noise(solver):
    """Equal inputs give equal outputs across the batch, run after run."""
    same = jnp.broadcast_to(NOISE[:1], NOISE.shape)
    out = np.asarray(diffusion.sample(EPSILON, same, solver, 10))
    np.testing.assert_allclose(out, np.broadcast_to(out[:1], out.shape), atol=1e-6)
    np.testing.assert_array_equal(out, diffusion.sample(EPSILON, same, solver, 10))


def test_deterministic_solvers_ignore_the_key():
    for solver in ("ddim", "dpm++"):
        keys = (None, jax.random.key(0))
        plain, keyed = (diffusion.sample(EPSILON, NOISE, solver, 10, key=key) for key in keys)
        np.testing.assert_array_equal(plain, keyed)


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_scan_inside_a_callers_jit_gives_the_eager_result(solver):
    def draw(scale, noise, key):
        return diffusion.sample(lambda x, t: scale * EPSILON(x, t), noise, solver, 10, key=key)

    eager = diffusion.sample(EPSILON, NOISE, solver, 10, key=jax.random.key(0))
    jitted = jax.jit(draw)(1.0, NOISE, jax.random.key(0))
    np.testing.assert_allclose(jitted, eager, atol=1e-5)
    jaxpr = jax.make_jaxpr(draw)(1.0, NOISE, jax.random.key(0))
    scans = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    assert [scan.params["length"] for scan in scans] == [10]
    assert "callback" not in str(jaxpr)


def test_the_model_is_traced_once_and_kept_for_the_same_denoiser():
    traces = []

    def denoiser(x, t):
        traces.append(x.shape)
        return EPSILON(x, t)

    for steps in (10, 10, 10):
        diffusion.sample(denoiser, NOISE, steps=steps)
    assert len(traces) == 1
    # another length of the scan is another program; the body is still traced once
    diffusion.sample(denoiser, NOISE, steps=11)
    assert len(traces) == 2


def test_an_unhashable_denoiser_works():
    class Denoiser:
        __hash__ = None

        def __call__(self, x, t):
            return EPSILON(x, t)

    np.testing.assert_array_equal(
        diffusion.sample(Denoiser(), NOISE, steps=5), diffusion.sample(EPSILON, NOISE, steps=5)
    )


def test_the_denoiser_sees_fp32_times_one_for_each_image():
    seen = []

    def denoiser(x, t):
        seen.append((t.shape, t.dtype))
        return EPSILON(x, t)

    out = diffusion.sample(denoiser, NOISE.astype(jnp.bfloat16), steps=3)
    assert seen == [((4,), jnp.float32)] and out.dtype == jnp.float32


@pytest.mark.parametrize("under_jit", [False, True])
def test_preview_gets_every_steps_x0_estimate(under_jit):
    frames = []

    def preview(step, x0):
        frames.append((step, x0))

    def draw(noise):
        return diffusion.sample(EPSILON, noise, steps=6, preview=preview)

    out = jax.block_until_ready((jax.jit(draw) if under_jit else draw)(NOISE))
    jax.effects_barrier()
    assert sorted(step for step, _ in frames) == list(range(6))
    assert all(isinstance(x0, np.ndarray) and x0.shape == NOISE.shape for _, x0 in frames)
    alpha, sigma = SCHEDULE.alpha(999.0), SCHEDULE.sigma(999.0)
    first = (NOISE - sigma * EPSILON(NOISE, np.float64(999.0))) / alpha
    np.testing.assert_allclose(dict(frames)[0], first, atol=1e-3)
    np.testing.assert_allclose(out, diffusion.sample(EPSILON, NOISE, steps=6), atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_starting_later_visits_the_rest_of_the_times(solver):
    times = diffusion.timesteps(solver, 20)
    assert len(times) == 20
    np.testing.assert_array_equal(diffusion.timesteps(solver, 20, start=12), times[12:])
    x0, noise = jnp.full((2, 4, 4, 4), 0.5), jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
    noisy = diffusion.add_noise(x0, noise, jnp.full((2,), times[15], jnp.float32))
    visited = []

    def preview(step, _):
        visited.append(step)

    out = diffusion.sample(EPSILON, noisy, solver, 20, start=15, preview=preview)
    jax.effects_barrier()
    assert sorted(visited) == list(range(15, 20)) and np.isfinite(out).all()


def test_starting_at_the_first_step_is_the_whole_run():
    np.testing.assert_array_equal(
        diffusion.sample(EPSILON, NOISE, start=0), diffusion.sample(EPSILON, NOISE)
    )


def test_ddpm_started_later_continues_with_the_same_noise():
    keys = jax.random.split(jax.random.key(2), 4)
    states = {}

    def denoiser(x, t):
        jax.debug.callback(lambda x, t: states.__setitem__(round(float(t[0])), np.asarray(x)), x, t)
        return EPSILON(x, t)

    whole = jax.block_until_ready(diffusion.sample(denoiser, NOISE, "ddpm", 10, key=keys))
    jax.effects_barrier()
    middle = states[int(diffusion.timesteps("ddpm", 10)[6])]
    rest = diffusion.sample(EPSILON, middle, "ddpm", 10, key=keys, start=6)
    np.testing.assert_allclose(rest, whole, atol=1e-6)


def test_bad_noise_keys_and_denoisers_are_named():
    three = jax.random.split(jax.random.key(0), 3)
    for denoiser, noise, key, says in (
        (EPSILON, jnp.zeros((2, 2), jnp.int32), None, "noise"),
        (EPSILON, NOISE, three, "batch of 4"),
        (EPSILON, NOISE, 7, "random key"),
        (lambda x, t: x[..., :3], NOISE, None, "3 channels"),
    ):
        with pytest.raises(UserError, match=says):
            diffusion.sample(denoiser, noise, "ddpm", 5, key=key)


def test_segments_pass_on_the_solvers_state_and_their_own_carry_and_get_their_rows():
    x = jax.random.normal(jax.random.key(1), (2, 3, 3, 4))
    given = np.arange(6, dtype=np.float32)

    def denoise(factor):
        return lambda x, t, row, memory: (0.1 * factor * x + row, memory + row)

    entered = []

    def zero(memory):
        return jnp.zeros(())

    def passed_on(memory):
        jax.debug.callback(entered.append, memory)
        return memory

    def segment(steps, factor, init):
        return diffusion.Segment(steps, denoise(factor), init)

    parts = [segment(4, 1.0, zero), segment(2, 1.0, passed_on)]
    one, two, other = (
        diffusion.sample(made, x, steps=6, per_step=given)
        for made in ([segment(6, 1.0, zero)], parts, [segment(6, 0.5, zero)])
    )
    np.testing.assert_allclose(one, two, rtol=1e-6)
    jax.effects_barrier()
    assert entered == [0 + 1 + 2 + 3]
    assert not np.allclose(one, other)
    with pytest.raises(UserError, match="do not make the run's 6"):
        diffusion.sample(parts[:1], x, steps=6, per_step=given)
