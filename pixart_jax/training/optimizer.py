"""The Optax chain of a stage: clip → AdamW or CAME → schedule → EMA; the null caption is not
trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from pixart_jax.config import OptimizerConfig
from pixart_jax.parallel import axes
from pixart_jax.training.came import scale_by_came

FROZEN = ("null_caption",)  # the official null caption is a buffer: random, and never trained


def schedule(
    config: OptimizerConfig, steps: int, batch_size: int
) -> Callable[[jax.Array], jax.Array]:
    """Learning rate of the stage's step 0, 1, …, steps − 1: linear warm-up from 0, then the named
    curve."""
    peak = config.learning_rate
    if config.sqrt_scale_from is not None:
        peak *= (batch_size / config.sqrt_scale_from) ** 0.5
    after = max(steps - config.warmup_steps, 1)
    if config.schedule == "cosine":
        curve = optax.cosine_decay_schedule(peak, after, config.final_fraction)
    elif config.schedule == "linear":
        curve = optax.linear_schedule(peak, peak * config.final_fraction, after)
    elif config.schedule == "rsqrt":
        knee = max(config.warmup_steps, 1)

        def curve(count):
            return peak * jnp.sqrt(knee / (knee + count))
    else:
        curve = optax.constant_schedule(peak)
    if config.warmup_steps == 0:
        return curve
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, config.warmup_steps), curve], [config.warmup_steps]
    )


def make_optimizer(
    config: OptimizerConfig, steps: int, batch_size: int, names, fake_rate: float | None = None
) -> optax.GradientTransformationExtraArgs:
    """The chain. names: tree like the parameters of tuples of logical axis names
    (parallel.rules.logical_names). fake_rate: those of "fake" have a chain of their own with so
    many times the learning rate, and no average, beside those of "student"."""
    rates = {"trained": config.learning_rate}
    if fake_rate is not None:
        rates["fake"] = config.learning_rate * fake_rate

    def is_names(leaf):
        return isinstance(leaf, tuple)

    def label(path, _):
        group = "fake" if path and path[0].key in rates else "trained"
        return "frozen" if path and path[-1].key in FROZEN else group

    labels = jax.tree_util.tree_map_with_path(label, names, is_leaf=is_names)

    def chain(group: str) -> optax.GradientTransformationExtraArgs:
        own = dataclasses.replace(config, learning_rate=rates[group])
        rate = schedule(own, steps, batch_size)
        parts = [] if config.clip is None else [clip_by_global_norm(config.clip, len(rates) > 1)]
        if config.name == "came":
            stacked = jax.tree.map(
                lambda name, tag: axes.LAYERS in name if tag == group else optax.MaskedNode(),
                names,
                labels,
                is_leaf=is_names,
            )
            parts += [
                scale_by_came(config.b1, config.b2, config.b3, config.came_eps, stacked=stacked),
                optax.add_decayed_weights(config.weight_decay),
                optax.scale_by_learning_rate(rate),
            ]
        else:
            decay = config.weight_decay
            parts.append(optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=decay))
        return optax.chain(*parts)

    groups = {group: chain(group) for group in rates}
    optimizer = optax.partition({**groups, "frozen": optax.set_to_zero()}, labels)
    if not config.ema:
        return optax.with_extra_args_support(optimizer)
    average = parameter_ema(config.ema)
    if fake_rate is not None:
        average = optax.masked(average, {"student": True, "fake": False})
    return optax.with_extra_args_support(optax.chain(optimizer, average))


def clip_by_global_norm(limit: float, own: bool = False) -> optax.GradientTransformationExtraArgs:
    """g · min(1, limit / ‖g‖), the norm over all parameters: the update's grad_norm where the
    caller has it already, or with ``own`` that of the gradient given here, of a part of them.

    optax's version selects between g and its clipped form, for which XLA keeps both: a second copy
    of all gradients (2.4 GB for XL/2). A factor is fused into whatever reads the gradient.
    """

    def update(updates, state, params=None, *, grad_norm=None, **_):
        del params
        norm = optax.tree.norm(updates) if own or grad_norm is None else grad_norm
        factor = jnp.minimum(1.0, limit / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
        return jax.tree.map(lambda g: g * factor, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


class EmaState(NamedTuple):
    ema: optax.Params  # the same tree, shapes and dtypes as the parameters


def parameter_ema(decay: float) -> optax.GradientTransformationExtraArgs:
    """Keep ema ← decay · ema + (1 − decay) · parameters after each update; updates pass through
    unchanged.

    It starts as a copy of the parameters, without bias correction, as PixArt's and DiT's do. It
    comes last in a chain: it averages what ``optax.apply_updates`` will make of the parameters.
    """

    def init(params):
        return EmaState(jax.tree.map(jnp.copy, params))

    def update(updates, state, params=None, **_):
        new = optax.apply_updates(params, updates)
        # in this form what does not change, as the null caption, stays equal to the bit
        ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, new)
        return updates, EmaState(ema)

    return optax.GradientTransformationExtraArgs(init, update)


def averaged(opt_state: optax.OptState) -> optax.Params | None:
    """The average inside an optimizer's state, or None where none is kept."""
    return optax.tree.get(opt_state, "ema")
