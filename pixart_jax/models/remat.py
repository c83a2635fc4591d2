"""Which intermediate values of a block are kept for the backward pass, by name."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax

from pixart_jax.errors import UserError, nearest

# The name under which blocks mark the outputs of their attentions (jax.ad_checkpoint.checkpoint_name).
ATTENTION_OUT = "attention_out"

_POLICIES: dict[str, Callable] = {
    "full": jax.checkpoint_policies.nothing_saveable,  # only the blocks' inputs: the least memory, one more forward pass
    "attention_out": jax.checkpoint_policies.save_only_these_names(ATTENTION_OUT),  # and what the attentions gave
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # and every projection's output: attention and pointwise work again
}
NAMES = ("none", *_POLICIES)  # none: keep everything, compute nothing twice


def policy(name: str) -> Callable | None:
    """The jax.checkpoint policy of this name; None for "none". UserError when unknown."""
    if name not in NAMES:
        raise UserError(f"remat policy {name!r} is unknown{nearest(name, NAMES)}")
    return _POLICIES.get(name)


def remat(step: Callable, name: str) -> Callable:
    """Wrap the body of a scan over blocks, ``step(module, carry, …)``, in the named policy.

    prevent_cse is off: inside a scan the loop itself keeps forward and backward apart, and its barriers would cost speed.
    """
    chosen = policy(name)
    return step if chosen is None else nn.remat(step, policy=chosen, prevent_cse=False)
