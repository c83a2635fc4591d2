"""Losses that distil a guided teacher of many steps into a student of few: latent consistency
(LCM, arXiv 2310.04378; PixArt-δ, arXiv 2401.05252) and trajectory distribution matching (TDM, arXiv
2503.06674), of which distribution matching (DMD, arXiv 2311.18828) is the case of one step.

All of them compare x̂_0, which (4) and (5) of gaussian.py imply, so a student keeps its teacher's
prediction type. A denoiser is (x [b, …, c], t [b] fp32) → [b, …, c or 2c]; a teacher gives two such
outputs, under the caption and without one. x_0 and noise are fp32; losses are [b].
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.diffusion.gaussian import add_noise, expand_to, split_output, to_epsilon, to_x0
from pixart_jax.diffusion.guidance import Denoiser
from pixart_jax.diffusion.objective import sample_mean
from pixart_jax.diffusion.schedule import Schedule
from pixart_jax.diffusion.solvers.base import StepTable
from pixart_jax.diffusion.solvers.lcm import scalings

Teacher = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
_MARGIN = 10  # times between a step of a path and the noisiest time that its result is diffused to


def distance(a: jax.Array, b: jax.Array, kind: str, c: float) -> jax.Array:
    """The mean over a sample's elements of √((a − b)² + c²) − c, or of (a − b)² for 'l2'; [b]."""
    squares = jnp.square(a - b)
    return sample_mean(squares if kind == "l2" else jnp.sqrt(squares + c**2) - c)


def consistency_loss(
    student: Denoiser,
    target: Denoiser,
    teacher: Teacher,
    x0: jax.Array,
    noise: jax.Array,
    index: jax.Array,
    *,
    schedule: Schedule,
    prediction: str,
    w: float = 4.5,
    steps: int = 50,
    kind: str = "pseudo_huber",
    c: float = 1e-3,
) -> jax.Array:
    """The distance of the student's f(x_t, t) to the target's f(x', t'), one step of the teacher
    ahead; only the student has a gradient.

    index [b] int, 0 … steps − 1, is i of t = τ_i = (i + 1) T / steps − 1 and t' = τ_{i−1}, 0 for
    i = 0. x' is DDIM's from x_t with the teacher's prediction p_c + w (p_c − p_u), so of guidance
    1 + w.
    """
    stride = schedule.timesteps // steps
    t = (index + 1) * stride - 1
    before = jnp.maximum(t - stride, 0)

    def consistent(denoiser: Denoiser, x: jax.Array, t: jax.Array) -> jax.Array:
        time = t.astype(jnp.float32)
        skip, out = (expand_to(scale, x) for scale in scalings(time))
        return skip * x + out * to_x0(denoiser(x, time), x, t, prediction, schedule)

    x_t = add_noise(x0, noise, t, schedule)
    conditional, unconditional = (
        split_output(output, x0.shape[-1])[0] for output in teacher(x_t, t.astype(jnp.float32))
    )
    guided = conditional + w * (conditional - unconditional)
    clean = to_x0(guided, x_t, t, prediction, schedule)
    x_before = add_noise(clean, to_epsilon(guided, x_t, t, prediction, schedule), before, schedule)
    x_before = jax.lax.stop_gradient(x_before)
    wanted = jax.lax.stop_gradient(consistent(target, x_before, before))
    return distance(consistent(student, x_t, t), wanted, kind, c)


def trajectory_losses(
    student: Denoiser,
    path: Denoiser,
    fake: Denoiser,
    teacher: Teacher,
    noise: jax.Array,
    keys: jax.Array,
    table: StepTable,
    *,
    schedule: Schedule,
    prediction: str,
    guidance: float = 4.5,
    kind: str = "pseudo_huber",
    c: float = 1e-3,
    first_time: int = 20,
    last_time: int | None = None,
    from_x0: bool = False,
    snr_gamma: float | None = 5.0,
) -> dict[str, jax.Array]:
    """{"student", "fake"}: what the student and the fake score each minimise; neither has a
    gradient by the other's loss.

    table: the student's sampler, x' = c_x x + c_x0 x̂_0 from pure noise, K steps at times t_k. path:
    the student without gradient, for the roll-out. A sample draws one of its steps: the student's
    x̂_0 there is moved to m = t_{k−1} + 1 (0 in the last step) by DDIM and diffused to t ~ U[max(
    first_time, m), last_time), by default t_k − 10; from_x0: x̂_0 itself is diffused.

    fake: |x̂_0,fake(x_t) − x̂_0|² · min(SNR_t, snr_gamma) · exp(−½ n²) / exp(−½ z²), n all of the
    noise in x_t in units of σ_t, z what was added, squares as means. student: the distance to x̂_0 +
    x̂_0,teacher − x̂_0,fake, the teacher guided, over the mean of |x̂_0 − x̂_0,teacher|. With 'l2' that
    has the gradient of DMD's loss.
    """
    wide, count = noise, len(table.t)

    def clean(output: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        return to_x0(output, x, t, prediction, schedule)

    times = jnp.asarray(table.t.astype(np.int32))
    rows = {name: jnp.asarray(table.coefficients[name], noise.dtype) for name in ("x", "x0")}

    def advance(x, row):
        t = jnp.full((len(x),), row["t"])
        output = path(x, t.astype(jnp.float32))
        return row["x"] * x + row["x0"] * clean(output, x, t), x

    steps = jax.tree.map(lambda a: a[:-1], {**rows, "t": times})
    last, inputs = jax.lax.scan(advance, noise, steps)
    inputs = jax.lax.stop_gradient(jnp.concatenate([inputs, last[None]]))

    choose, draw, diffuse = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0)
    chosen = jax.vmap(lambda key: jax.random.randint(key, (), 0, count))(choose)
    x = sum(jnp.where(expand_to(chosen, wide) == n, inputs[n], 0) for n in range(count))
    ends = jnp.asarray(np.append(table.t[1:] + 1, 0).astype(np.int32))
    at, end = times[chosen], ends[chosen]
    high = at - _MARGIN if last_time is None else jnp.full_like(at, last_time)
    t = jax.vmap(lambda key, low, high: jax.random.randint(key, (), low, high))(
        draw, jnp.maximum(first_time, end), high
    )
    z = jax.vmap(lambda key: jax.random.normal(key, noise.shape[1:]))(diffuse)

    output = student(x, at.astype(jnp.float32))
    made = clean(output, x, at)
    fixed = jax.lax.stop_gradient(made)
    epsilon, _ = split_output(to_epsilon(output, x, at, prediction, schedule), x.shape[-1])
    epsilon = jax.lax.stop_gradient(epsilon)
    if from_x0:
        alpha_m, sigma_m = jnp.ones(()), jnp.zeros(())
    else:
        alpha_m, sigma_m = (expand_to(part(end), wide) for part in (schedule.alpha, schedule.sigma))
    alpha_t, sigma_t = (expand_to(part(t), wide) for part in (schedule.alpha, schedule.sigma))
    ratio = alpha_t / alpha_m
    added = jnp.sqrt(jnp.maximum(sigma_t**2 - (ratio * sigma_m) ** 2, 0))
    whole = ratio * sigma_m * epsilon + added * z  # all of the noise
    x_t = alpha_t * fixed + whole

    time = t.astype(jnp.float32)
    guess = clean(fake(x_t, time), x_t, t)
    snr = jnp.square(alpha_t / sigma_t).reshape(-1)
    weight = snr if snr_gamma is None else jnp.minimum(snr, snr_gamma)
    likelihood = jnp.exp(
        0.5 * (sample_mean(jnp.square(z)) - sample_mean(jnp.square(whole / sigma_t)))
    )
    of_fake = sample_mean(jnp.square(guess - fixed)) * weight * likelihood

    conditional, unconditional = (clean(part, x_t, t) for part in teacher(x_t, time))
    real = conditional + (guidance - 1) * (conditional - unconditional)
    wanted = jax.lax.stop_gradient(made + real - guess)
    scale = sample_mean(jnp.abs(fixed - real)) + 1e-5
    of_student = distance(made, wanted, kind, c) / jax.lax.stop_gradient(scale)
    return {"student": of_student, "fake": of_fake}
