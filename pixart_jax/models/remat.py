"""Rematerialisation policies: what a block keeps for the backward pass, by name.

Kept values are in the compute dtype, for an image token of width d (MLP 4·d). FLOPs are those of
all products of a train step of XL/2, relative to "none", counted in the traced program with
attention "xla" at 256 px and at 1024 px.

name            kept on the device                recomputed              FLOPs       for
none            everything, with the softmaxes    nothing                 1     1     small models
dots_attention  as dots, and both attentions:     norms, GELU, the        1.01  1.06  long sequence,
                14·d                              logits of "xla"                     much memory
dots            the block's input, outputs of     attention, norms, GELU  1.01  1.11  usually best
                the projections: 12·d                                                 where it fits
attention_out   the block's input and both        projections, norms,     1.33  1.28  long sequence,
                attentions: 3·d                   GELU                                little memory
full            the block's input: d              one forward pass        1.33  1.33  least memory
offload         nothing; input and attentions,    as attention_out        1.33  1.28  long sequence
                3·d, in pinned host memory

dots also keeps the keys and values of the text, 2·d a text token. Only "none" keeps logits or
softmaxes. The kept value of an attention is its output and, with a flash kernel, the logsumexp
(4 bytes a token and head), so attention_out, dots_attention and offload do not rerun a forward
kernel; full and dots do. Splash keeps heads of 72 in 128 lanes. offload moves 2 × 3·d bytes a token
and block over PCIe, which the block's compute must hide. Compiled for one H200 (XL/2, bfloat16,
AdamW and EMA, 256 px, batch 32, attention "xla"), temporaries are 3.7 GiB with full, 4.9 with
attention_out, 9.7 with dots and 35.7 with none.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from pixart_jax.errors import UserError, nearest

# names by which blocks mark values (jax.ad_checkpoint.checkpoint_name)
ATTENTION_OUT = "attention_out"  # the output of an attention
BLOCK_INPUT = "block_input"  # the residual stream
HOST = "pinned_host"  # the JAX memory kind of "offload"

# JAX's primitives of cuDNN's kernels
CUDNN_FORWARD, CUDNN_BACKWARD = (
    "dot_product_attention_fwd_wrapper",
    "dot_product_attention_bwd_wrapper",
)


def _with_kernels(policy: Callable) -> Callable:
    """The policy, with the results of cuDNN's forward kernel treated as ATTENTION_OUT: names cannot
    be put inside its primitive."""
    (mark,) = jax.make_jaxpr(lambda x: checkpoint_name(x, ATTENTION_OUT))(0.0).eqns

    def with_kernels(primitive, *avals, **params):
        if primitive.name == CUDNN_FORWARD:
            return policy(mark.primitive, *avals, **mark.params)
        return policy(primitive, *avals, **params)

    return with_kernels


_OFFLOAD = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[BLOCK_INPUT, ATTENTION_OUT],
    offload_src="device",
    offload_dst=HOST,
)
_POLICIES: dict[str, Callable] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention_out": jax.checkpoint_policies.save_only_these_names(ATTENTION_OUT),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "dots_attention": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENTION_OUT),
    ),
    "offload": _OFFLOAD,
}
NAMES = ("none", *_POLICIES)
# fastest first, as measured (docs/benchmarks.md); without "none" and without host memory
BY_SPEED = ("dots_attention", "dots", "attention_out", "full")
# in a config: training chooses by the device's memory (training/memory.py)
AUTO = "auto"


def policy(name: str) -> Callable | None:
    """The jax.checkpoint policy of this name; None for "none". UserError when unknown."""
    if name == AUTO:
        raise UserError(
            f"remat 'auto' is for a run, which knows its device: name one of {', '.join(NAMES)} "
            "here"
        )
    if name not in NAMES:
        raise UserError(f"remat policy {name!r} is unknown{nearest(name, (*NAMES, AUTO))}")
    found = _POLICIES.get(name)
    return found and _with_kernels(found)


def check_platform(name: str, platform: str) -> None:
    """UserError for a policy that devices of this platform ('tpu', 'gpu', 'cpu') cannot run."""
    if name == "offload" and platform == "cpu":
        raise UserError(
            "remat offload: a CPU has no other memory to offload to; attention_out computes the "
            "same again, full keeps least"
        )


def remat(step: Callable, name: str, transform: Callable = nn.remat) -> Callable:
    """Wrap the body of a scan over blocks, ``step(module, carry, …)``, in the named policy.
    transform: nn.remat for a Flax module, jax.checkpoint for a function of arrays.

    prevent_cse is off: inside a scan the loop keeps forward and backward apart, and the barriers
    would cost speed.
    """
    chosen = policy(name)
    if chosen is None:
        return step

    def named(module, carry, *rest):
        return step(module, checkpoint_name(carry, BLOCK_INPUT), *rest)

    return transform(named, policy=chosen, prevent_cse=False)
