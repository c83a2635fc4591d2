"""The losses of distillation against evaluations of their formulas in float64, and what has a
gradient by them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from pixart_jax import diffusion
from pixart_jax.diffusion import schedule
from pixart_jax.diffusion.distillation import consistency_loss, trajectory_losses
from pixart_jax.diffusion.solvers import DMD, TDM
from pixart_jax.errors import UserError
from tests.models.reference import relative_error

LINEAR = schedule.linear()
BARS = LINEAR.alphas_cumprod
SHAPE = (6, 3, 2, 4)
DRAWN = np.random.default_rng(0).normal(size=(2, *SHAPE))
# of the networks: what each output is times x, and its wave over t
STUDENT, TARGET, FAKE, TEACHER, NULL = (0.9, 1.0), (0.8, 2.0), (0.7, 1.5), (0.6, 0.5), (0.3, 0.2)


def network(scale, wave):
    """A denoiser in NumPy or JAX, with variance logits that must be ignored."""

    def denoiser(x, t):
        xp = np if isinstance(x, np.ndarray) else jnp
        turned = xp.sin(wave * t / 300).reshape(-1, 1, 1, 1)
        out = scale * x + turned * xp.roll(x, 1, axis=-1) ** 2 / 4
        return xp.concatenate([out, x + 7], axis=-1)

    return denoiser


def column(values):
    return np.asarray(values, np.float64).reshape(-1, 1, 1, 1)


def clean(output, x, t, prediction):
    """(x_0, ε) in float64."""
    a, s, output = np.sqrt(column(BARS[t])), np.sqrt(column(1 - BARS[t])), output[..., :4]
    if prediction == "epsilon":
        return (x - s * output) / a, output
    return a * x - s * output, a * output + s * x


def far(a, b, kind):
    squares = (a - b) ** 2
    return (squares if kind == "l2" else np.sqrt(squares + 1e-6) - 1e-3).mean((1, 2, 3))


@pytest.mark.parametrize(("prediction", "kind"), [("epsilon", "pseudo_huber"), ("v", "l2")])
def test_the_consistency_loss_is_its_formula(prediction, kind):
    x0, noise = DRAWN
    index = np.array([0, 1, 20, 33, 48, 49])
    tau = 20 * (np.arange(50) + 1) - 1
    t, before = tau[index], np.where(index > 0, tau[index - 1], 0)
    x_t = np.sqrt(column(BARS[t])) * x0 + np.sqrt(column(1 - BARS[t])) * noise

    def consistent(parts, x, t):
        skip, out = 0.25 / ((10 * t) ** 2 + 0.25), 10 * t / np.sqrt((10 * t) ** 2 + 0.25)
        found, _ = clean(network(*parts)(x, t), x, t, prediction)
        return column(skip) * x + column(out) * found

    with_text, without = (
        clean(network(*parts)(x_t, t), x_t, t, prediction) for parts in (TEACHER, NULL)
    )
    guided, epsilon = (a + 4.5 * (a - b) for a, b in zip(with_text, without, strict=True))
    bar = column(BARS[before])
    x_before = np.sqrt(bar) * guided + np.sqrt(1 - bar) * epsilon
    target = consistent(TARGET, x_before, before)
    np.testing.assert_array_equal(target[0], x_before[0])  # the boundary
    wanted = far(consistent(STUDENT, x_t, t), target, kind)

    def loss(student, target, teacher):
        return consistency_loss(
            network(*student),
            network(*target),
            lambda x, t: (network(*teacher)(x, t), network(*NULL)(x, t)),
            *jnp.asarray(DRAWN, jnp.float32),
            jnp.asarray(index),
            schedule=LINEAR,
            prediction=prediction,
            kind=kind,
        )

    parts = [jnp.asarray(p) for p in (STUDENT, TARGET, TEACHER)]

    def both(*parts):
        found = loss(*parts)
        return found.mean(), found

    gradient, found = jax.jit(jax.grad(both, (0, 1, 2), has_aux=True))(*parts)
    error = relative_error(found, wanted)
    print(f"{prediction}: {error:.1e}")
    assert error <= 1e-4
    assert np.abs(gradient[0]).min() > 0 and not np.any(gradient[1:])


CASES = {
    "tdm": (TDM(), 4, "epsilon", {}),
    "tdm up to 890": (TDM(), 3, "v", {"last_time": 890, "kind": "l2"}),
    "dmd": (
        *(DMD(), 1, "epsilon"),
        {"first_time": 1, "last_time": 950, "from_x0": True, "snr_gamma": None, "kind": "l2"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_trajectory_losses_are_their_formulas(case):
    solver, steps, prediction, options = CASES[case]
    kind, gamma = options.get("kind", "pseudo_huber"), options.get("snr_gamma", 5.0)
    table = solver.plan(LINEAR, steps, times="integer", start=0, stochastic=False)
    times = table.t.astype(int)
    assert list(times) == {1: [400], 3: [899, 599, 299], 4: [899, 674, 449, 224]}[steps]
    noise, keys = DRAWN[0].astype(np.float32), jax.random.split(jax.random.key(3), SHAPE[0])

    def losses(student, fake, teacher):
        return trajectory_losses(
            network(*student),
            network(*jax.lax.stop_gradient(student)),
            network(*fake),
            lambda x, t: (network(*teacher)(x, t), network(*NULL)(x, t)),
            jnp.asarray(noise),
            keys,
            table,
            schedule=LINEAR,
            prediction=prediction,
            **options,
        )

    mids = np.append(times[1:] + 1, 0)

    @jax.jit
    def draw(keys):
        choose, when, what = jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, 3))(keys), 1, 0)
        chosen = jax.vmap(lambda k: jax.random.randint(k, (), 0, steps))(choose)
        high = options.get("last_time", jnp.asarray(times)[chosen] - 10) + 0 * chosen
        low = jnp.maximum(options.get("first_time", 20), jnp.asarray(mids)[chosen])
        t = jax.vmap(lambda k, a, b: jax.random.randint(k, (), a, b))(when, low, high)
        return chosen, t, jax.vmap(lambda k: jax.random.normal(k, SHAPE[1:]))(what)

    chosen, t, z = (np.asarray(part) for part in draw(keys))
    z, mids = z.astype(np.float64), mids[chosen]
    # the roll-out
    path = [noise.astype(np.float64)]
    for now, then in zip(times, times[1:]):
        all_now = np.full(len(noise), now)
        x0, e = clean(network(*STUDENT)(path[-1], all_now), path[-1], all_now, prediction)
        path.append(np.sqrt(BARS[then]) * x0 + np.sqrt(1 - BARS[then]) * e)
    x = np.stack([path[n][row] for row, n in enumerate(chosen)])
    made, e = clean(network(*STUDENT)(x, times[chosen]), x, times[chosen], prediction)
    bar_m = np.ones_like(column(mids)) if options.get("from_x0") else column(BARS[mids])
    bar = column(BARS[t])
    y = np.sqrt(bar_m) * made + np.sqrt(1 - bar_m) * e
    ratio = np.sqrt(bar / bar_m)
    added = np.sqrt((1 - bar) - ratio**2 * (1 - bar_m))
    x_t = ratio * y + added * z
    whole = (ratio * np.sqrt(1 - bar_m) * e + added * z) / np.sqrt(1 - bar)

    guess, real, free = (
        clean(network(*parts)(x_t, t), x_t, t, prediction)[0] for parts in (FAKE, TEACHER, NULL)
    )
    snr = (bar / (1 - bar)).reshape(-1)
    weight = snr if gamma is None else np.minimum(snr, gamma)
    weight *= np.exp(-0.5 * (whole**2).mean((1, 2, 3))) / np.exp(-0.5 * (z**2).mean((1, 2, 3)))
    of_fake = ((guess - made) ** 2).mean((1, 2, 3)) * weight
    goal = made + (real - guess) + 3.5 * (real - free)
    guided = real + 3.5 * (real - free)
    of_student = far(made, goal, kind) / np.abs(made - guided).mean((1, 2, 3))

    parts = [jnp.asarray(p) for p in (STUDENT, FAKE, TEACHER)]

    def both(*parts):
        found = losses(*parts)
        return jax.tree.map(jnp.mean, found), found

    jacobian, found = jax.jit(jax.jacrev(both, (0, 1, 2), has_aux=True))(*parts)
    errors = {
        "fake": relative_error(found["fake"], of_fake),
        "student": relative_error(found["student"], of_student),
    }
    print(case, {name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) <= 1e-4
    for term, number in (("student", 0), ("fake", 1)):
        gradient = jacobian[term]
        moves = [bool(np.any(g)) for g in gradient]
        assert moves == [n == number for n in range(3)], term


def test_tdm_is_diffusers_first_order_solver_at_given_times():
    noise = DRAWN[0].astype(np.float32)

    def denoiser(x, t):
        return network(*STUDENT)(x, t)[..., :4]

    ours = diffusion.sample(denoiser, jnp.asarray(noise), solver="tdm", steps=4)
    options = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "solver_order": 1}
    theirs = DPMSolverMultistepScheduler(**options)
    theirs.set_timesteps(timesteps=[899, 674, 449, 224])
    x = torch.tensor(noise)
    for t in theirs.timesteps:
        output = denoiser(x.numpy(), np.full(len(x), float(t), np.float32))
        x = theirs.step(torch.tensor(output), t, x).prev_sample
    assert relative_error(ours, x.numpy()) <= 1e-5
    with pytest.raises(UserError, match="divides 900"):
        diffusion.timesteps("tdm", 7)
