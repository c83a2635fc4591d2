"""From noise to data: one scan, whatever the solver."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from pixart_jax.diffusion.gaussian import check_prediction, predict_x0, split_output
from pixart_jax.diffusion.guidance import Denoiser
from pixart_jax.diffusion.schedule import Schedule, linear
from pixart_jax.diffusion.solvers import by_name
from pixart_jax.diffusion.solvers.base import Solver
from pixart_jax.errors import UserError, nearest

Preview = Callable[[int, np.ndarray], None]
TIMES = ("fractional", "integer")


class Known(NamedTuple):
    """What inpainting keeps: after each step x is replaced by latents with the noise of that time
    wherever mask is False, and after the last step by latents themselves."""

    latents: jax.Array  # [b, …, c], clean
    noise: jax.Array  # [b, …, c], standard normal
    mask: jax.Array  # bool [b, …, 1], True: generated


class Segment(NamedTuple):
    """Consecutive evaluations that are computed alike, in a scan of their own: two segments where
    the second half of a run costs less.

    steps: how many. denoise: (x [b, …, c], t [b] fp32, per_step, carry) → (prediction as a
    denoiser's, carry). per_step: this evaluation's row of ``sample(per_step=…)``; carry: what the
    evaluation before returned, of a structure that is constant within the segment. init_carry: the
    last carry of the segment before, None at first → the first one of this segment.
    """

    steps: int
    denoise: Callable[[jax.Array, jax.Array, Any, Any], tuple[jax.Array, Any]]
    init_carry: Callable[[Any], Any] = lambda carry: carry


def sample(
    denoiser: Denoiser | Sequence[Segment],
    noise: jax.Array,
    solver: str | Solver = "dpm++",
    steps: int | str = 20,
    schedule: Schedule | None = None,
    key: jax.Array | None = None,
    times: str = "fractional",
    *,
    order: int = 2,
    eta: float = 0.0,
    prediction: str = "epsilon",
    start: int | None = None,
    preview: Preview | None = None,
    per_step: Any = None,
    known: Known | None = None,
) -> jax.Array:
    """Integrate from noise to data. Returns x [b, …, c], in fp32 or wider.

    denoiser: (x [b, …, c], t [b] fp32) → the prediction [b, …, c], or [b, …, 2c] with the variance
        logits behind it, which ddpm uses ((9) of gaussian.py) and the others drop. Guidance wraps
        it (guidance.classifier_free_guidance). Or segments, one scan after the other over one
        solver's state, whose steps add up to those of the run.
    noise: [b, …, c], standard normal at start 0. The channel axis is the last.
    solver: a name (solvers.NAMES), or one of solvers/ with options of its own.
    steps: how many, of one evaluation but for heun's; ddpm and ddim also read a respacing ('100',
        'ddim50', '10,15,20').
    schedule: PixArt's linear one by default.
    key: for the noise that ddpm, sa, lcm, euler_ancestral and ddim with eta > 0 add; None adds
        none. One key (image i draws from fold_in(key, i)), or [b] keys, one for each image: then an
        image does not depend on the batch it is in.
    times: "fractional" as the official code, or "integer" as diffusers. dpm++, unipc and lcm have
        both; ddpm, ddim and dmd are always at integer times, sa never, euler and heun as diffusers.
    order: of dpm++ and unipc. eta: of ddim.
    prediction: what the denoiser predicts, "epsilon" or "v".
    start: skip so many steps; ``noise`` is then x at the first of the times that are left,
        ``timesteps(…, start=start)[0]`` (img2img: add_noise up to that time).
    per_step: a tree of arrays [n, …], a row for each evaluation, passed to the segments: what
        depends on the time alone is computed for all steps at once, before the scan.
    known: the part of x that is not generated.
    preview: called on the host after each evaluation with (step, x_0 estimate [b, …, c] as numpy);
        step counts from 0 and includes the skipped ones.

    Inside a jit it adds its scan to that program. Outside it compiles, and caches the programs of
    the last few denoiser objects. A denoiser that closes over large parameters is best called
    inside a jit that takes them as arguments.
    """
    check_prediction(prediction)
    x = jnp.asarray(noise)
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < 2:
        raise UserError(f"noise must be a floating array [b, …, c], got {x.dtype} {x.shape}")
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    solver = by_name(solver, order=order, eta=eta) if isinstance(solver, str) else solver
    keys = None if key is None else image_keys(key, x.shape[0])
    table, noisy = step_table(
        solver, steps, schedule, times, start=start, stochastic=key is not None, dtype=x.dtype
    )
    if not callable(denoiser):
        denoiser = tuple(denoiser)
        counts, n = [segment.steps for segment in denoiser], len(table["t"])
        if sum(counts) != n:
            raise UserError(f"segments of {counts} steps do not make the run's {n}")
    arguments = x, keys if noisy else None, table, per_step, known
    if isinstance(jnp.zeros(()), jax.core.Tracer):  # inside someone's jit: part of that program
        return integrate(denoiser, solver, prediction, preview, *arguments)
    try:
        program = _program(denoiser, solver, prediction, preview)
    except TypeError:  # an unhashable denoiser cannot be cached
        program = _program.__wrapped__(denoiser, solver, prediction, preview)
    return program(*arguments)


def step_table(
    solver: Solver,
    steps: int | str,
    schedule: Schedule | None = None,
    times: str = "fractional",
    *,
    start: int | None = None,
    stochastic: bool = True,
    dtype: Any = np.float32,
) -> tuple[dict[str, Any], bool]:
    """(the arrays [n, …] that a run's scan reads, whether its steps add noise). Runs of n steps
    share one program, whatever their times, if the arrays are its arguments."""
    plan = _plan(solver, steps, schedule, times, start, stochastic=stochastic)
    first, dtype = (start or 0) * plan.evaluations, np.dtype(dtype)
    # Host float64 becomes the dtype of x here, once; nothing of it is recomputed on the device.
    table = {
        "step": np.arange(first, first + len(plan.t), dtype=np.int32),
        "t": plan.t.astype(np.float32),
        "alpha": plan.alpha.astype(dtype),
        "sigma": plan.sigma.astype(dtype),
        "solver": {name: values.astype(dtype) for name, values in plan.coefficients.items()},
    }
    return table, plan.noisy


def timesteps(
    solver: str | Solver = "dpm++",
    steps: int | str = 20,
    schedule: Schedule | None = None,
    times: str = "fractional",
    *,
    start: int | None = None,
) -> np.ndarray:
    """The times that :func:`sample` evaluates the model at, in order; float64 [n]."""
    solver = by_name(solver) if isinstance(solver, str) else solver
    return _plan(solver, steps, schedule, times, start, stochastic=False).t


def image_keys(key: jax.Array, batch: int) -> jax.Array:
    """[b] typed keys: ``key`` folded with each image's index, or ``key`` itself when it holds one
    for each image already."""
    key = jnp.asarray(key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype != jnp.uint32 or key.ndim not in (1, 2):
            raise UserError(
                f"key must be a JAX random key, or one for each image, got {key.dtype} {key.shape}"
            )
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise UserError(
            f"{key.shape} keys for a batch of {batch}: give one key, or one for each image"
        )
    return key


def _plan(solver, steps, schedule, times, start, *, stochastic):
    if times not in TIMES:
        raise UserError(f"unknown times {times!r}{nearest(times, TIMES)}")
    return solver.plan(
        schedule or linear(), steps, times=times, start=start or 0, stochastic=stochastic
    )


def _normal(keys, step, like):
    """Standard normal noise of one step, like [b, …]; image i's from keys[i] and the step alone."""
    return jax.vmap(
        lambda key: jax.random.normal(jax.random.fold_in(key, step), like.shape[1:], like.dtype)
    )(keys)


@functools.lru_cache(maxsize=8)
def _program(denoiser, solver, prediction, preview):
    return jax.jit(functools.partial(integrate, denoiser, solver, prediction, preview))


def integrate(
    denoiser: Denoiser | Sequence[Segment],
    solver: Solver,
    prediction: str,
    preview: Preview | None,
    x: jax.Array,
    keys: jax.Array | None,  # [b], or None where no step adds noise
    table: dict[str, Any],  # step_table's
    per_step: Any = None,
    known: Known | None = None,
    both: bool = False,
) -> jax.Array:
    """The scan of :func:`sample`, to be traced in a jit. both: the denoiser is called with [2b, …,
    c], x before ``known`` replaced its part and x after it."""
    table = {**table, "per_step": per_step}
    if known is not None:
        table["next"] = [
            jnp.append(table[name][1:], jnp.asarray(last, x.dtype))
            for name, last in (("alpha", 1), ("sigma", 0))
        ]
    if callable(denoiser):
        plain = denoiser
        denoiser = (Segment(len(table["step"]), lambda x, t, _, carry: (plain(x, t), carry)),)
    state, carry, start = solver.init(x), None, 0
    before = x if both else None
    for segment in denoiser:
        rows = jax.tree.map(operator.itemgetter(slice(start, start + segment.steps)), table)
        step = _step(segment.denoise, solver, prediction, preview, keys, known, both)
        first = state, before, segment.init_carry(carry)
        (state, before, carry), _ = jax.lax.scan(step, first, rows)
        start += segment.steps
    return state[0]


def _step(denoise, solver: Solver, prediction, preview, keys, known, both):
    """The body of a segment's scan: evaluate the denoiser, then update the solver's state."""

    def step(carry, now):
        state, before, memory = carry
        x = state[0]
        t = jnp.full((x.shape[0],), now["t"], jnp.float32)
        seen = jnp.concatenate([before, x]) if both else x
        output, memory = denoise(seen, t, now["per_step"], memory)
        output, logits = split_output(output.astype(x.dtype), x.shape[-1])
        x0 = predict_x0(output, x, now["alpha"], now["sigma"], prediction)
        if preview is not None:

            def call(step, x0):
                io_callback(lambda i, x: preview(int(i), np.asarray(x)), None, step, x0)

            jax.lax.cond(now.get("previewed", True), call, lambda *_: None, now["step"], x0)
        z = None if keys is None else _normal(keys, now["step"], x)
        state = solver.update(state, x0, logits, now["solver"], z)
        before = state[0] if both else None
        if known is not None:
            alpha, sigma = now["next"]
            kept = alpha * known.latents + sigma * known.noise
            state = (jnp.where(known.mask, state[0], kept), *state[1:])
        return (state, before, memory), None

    return step
