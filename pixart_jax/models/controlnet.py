"""The ControlNet-Transformer (PixArt-δ, arXiv 2401.05252, section 4): copies of a model's first
blocks read a condition, such as an edge map, and add to the inputs of its later blocks.

    c = patches(condition) + positions        the base's embedder and positions, frozen
    x = base[0](x);  s = x + before(c)
    for i in 0 … units − 1:
        s = copy[i](s)                        the base's text, time and lengths
        x = base[i + 1](x + scale · after[i](s))
    x = base[units + 1 …](x)

before and after are linear and start at zero, so that training begins with the base itself, to the
bit. A LoRA changes the base alone: the copies were made of the base without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pixart_jax.errors import UserError
from pixart_jax.models.configs import ControlNetConfig, TransformerConfig
from pixart_jax.models.layers import Dense, scan_blocks, zeros
from pixart_jax.models.remat import remat
from pixart_jax.models.transformer import Block, PixArtTransformer
from pixart_jax.parallel.axes import EMBED

UNITS = 13  # of the released ones


class Control(NamedTuple):
    """What one evaluation is controlled by. A scale of 0 skips the copies."""

    condition: jax.Array  # [b, n, d], of encode_control: the same at every step
    scale: jax.Array | float = 1.0


def config_of(model: TransformerConfig, units: int | None = None) -> ControlNetConfig:
    """The ControlNet of a model: 13 copies, or one less than the model's blocks. UserError for a
    model that has none."""
    units = min(UNITS, model.depth - 1) if units is None else units
    if units < 1 or model.kv_compression > 1:
        raise UserError(
            "a ControlNet needs a transformer of at least 2 blocks, without key and value "
            "compression"
        )
    fields = dataclasses.fields(ControlNetConfig)
    shared = {field.name: getattr(model, field.name) for field in fields}
    return ControlNetConfig(**{**shared, "depth": units})


def check_fits(config: ControlNetConfig, model: TransformerConfig) -> None:
    """Raise UserError for a ControlNet of another model."""
    wanted = config_of(model)
    what = {"width": "of width", "heads": "with heads:", "mlp_width": "with an MLP of width"}
    for name, words in what.items():
        ours, theirs = getattr(wanted, name), getattr(config, name)
        if ours != theirs:
            raise UserError(
                f"a ControlNet {words} {theirs} does not fit a transformer {words} {ours}: give "
                "the one that was trained with it"
            )
    if config.depth >= model.depth or config.qk_norm != model.qk_norm:
        raise UserError(
            f"a ControlNet of {config.depth} blocks{' with qk_norm' * config.qk_norm} does not fit "
            f"a transformer of {model.depth}{' with qk_norm' * model.qk_norm}: give the one that "
            "was trained with it"
        )


class Unit(nn.Module):
    """A copy of a block, and the projection of its output into the base's stream."""

    config: ControlNetConfig
    dtype: jnp.dtype = jnp.float32
    context_attention: str = "all_gather"

    def setup(self):
        self.block = Block(self.config, self.dtype, self.context_attention)
        self.after = Dense(self.config.width, (EMBED, EMBED), zeros, self.dtype)


class ControlNet(nn.Module):
    """The trained part. Parameters are fp32; those of the copies are stacked over the units,
    params["units"]["block"][…] and params["units"]["after"] [units, …], beside params["before"]."""

    config: ControlNetConfig
    dtype: jnp.dtype = jnp.float32
    context_attention: str = "all_gather"

    def setup(self):
        self.units = Unit(self.config, self.dtype, self.context_attention)
        self.before = Dense(self.config.width, (EMBED, EMBED), zeros, self.dtype)

    def __call__(
        self,
        condition: jax.Array,  # [b, n, d]
        modulation: jax.Array,  # [b, 6, d] fp32
        text: jax.Array,  # [b, l, d]
        lengths: jax.Array,  # [b]
    ) -> jax.Array:  # [units, b, n, d]
        """What the units give without a base: every parameter's use, for init."""

        def step(unit, s, modulation, text, lengths):
            kv = unit.block.keys_values(text)
            s = unit.block(s, modulation, *kv, lengths, None, (1, s.shape[1]))
            return s, unit.after(s)

        scan = scan_blocks(step, self.config.depth)
        return scan(self.units, self.before(condition), modulation, text, lengths)[1]

    def keys_values(self, text: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Projected text [b, l, d] → the copies' own keys and values [units, b, l, k, h]."""

        def step(unit, carry, text):
            return carry, unit.block.keys_values(text)

        return scan_blocks(step, self.config.depth)(self.units, (), text)[1]


class ControlledTransformer(PixArtTransformer):
    """A PixArt transformer with a ControlNet, whose parameters are params["control"].

    Keys and values of an encoded text are those of the base's blocks, then the copies'.
    """

    units: int = UNITS

    def setup(self):
        super().setup()
        config = config_of(self.config, self.units)
        self.control = ControlNet(config, self.dtype, self.context_attention)

    def controlled(
        self,
        condition: jax.Array,  # [b, h, w, in_channels], scaled latents
        scale: jax.Array | float,
        latents: jax.Array,
        *arguments,  # the others of the base's call
    ) -> jax.Array:  # [b, h, w, out_channels] fp32
        """One evaluation under a condition."""
        conditioning, text = self.conditioned(latents, *arguments)
        control = Control(self.encode_control(condition), scale)
        return self.denoise(latents, conditioning, text, control=control)[0]

    def encode_control(self, latents: jax.Array) -> jax.Array:
        """The condition's scaled latents [b, h, w, in_channels] → Control.condition [b, n, d]."""
        return self.control.before(self.patch_embedder(latents))

    def _keys_values(self, text: jax.Array) -> tuple[jax.Array, jax.Array]:
        pairs = zip(super()._keys_values(text), self.control.keys_values(text))
        keys, values = (jnp.concatenate(pair) for pair in pairs)
        return keys, values

    def _run_blocks(
        self, step: Callable, x: jax.Array, per_block: tuple, shared: tuple, control: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The three stretches. Rows of the base's stacks are taken where they are used: a slice of
        them would be a copy of half the model."""
        depth, units = self.config.depth, self.units
        keys_values, *others = per_block
        block, base = self.blocks.unbind()
        unit, copies = self.control.units.unbind()

        def plain(i, x):
            variables, kv, rest = _row((base, keys_values, others), i)
            return step(block.bind(variables), x, (kv, *rest), *shared)

        def controlled(i, carry, variables):
            def run(s):
                bound = unit.bind(variables)
                kv = _row(keys_values, depth + i)
                s, _ = step(bound.block, s, (kv, None, None, None), *shared)
                return s, bound.after(s)

            x, s = carry
            if isinstance(control.scale, jax.Array):  # of this step
                skip = lambda s: (s, jnp.zeros_like(s))  # noqa: E731
                s, left = jax.lax.cond(control.scale != 0, run, skip, s)
                left = left * control.scale.astype(left.dtype)
            else:
                s, left = run(s)
                left = left if control.scale == 1 else left * control.scale
            x, outputs = plain(i + 1, x + left)
            return (x, s), outputs

        plain_, controlled_ = (remat(f, self.remat, jax.checkpoint) for f in (plain, controlled))
        x, first = plain_(0, x)
        carry = x, x + control.condition
        (x, _), middle = jax.lax.scan(
            lambda carry, at: controlled_(at[0], carry, at[1]), carry, (jnp.arange(units), copies)
        )
        x, last = jax.lax.scan(lambda x, i: plain_(i, x), x, jnp.arange(units + 1, depth))
        first = jax.tree.map(lambda a: a[None], first)
        return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), first, middle, last)


def _row(tree: Any, i: jax.Array | int) -> Any:
    """Row i of stacked arrays."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), tree)
