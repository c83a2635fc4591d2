"""Which intermediate values of a block are kept for the backward pass, by name.

What a policy keeps of each block, in values of the compute dtype an image token of width d (MLP
4·d), and what the backward pass computes again. step: FLOPs of all products of a train step of XL/2
against those of "none", counted in the traced program with attention "xla" at 256 px and at 1024
px:

name            kept on the device                              computed again               step
for none            everything, the softmaxes too                   nothing                      1
1     small models dots_attention  as dots, and both attentions: 14·d              norms, GELU,
"xla"'s logits   1.01   1.06  long sequences, memory to spare dots            the block's input,
projections' outputs: 12·d   attention, norms, GELU       1.01   1.11  the usual one where it fits
attention_out   the block's input and both attentions: 3·d      projections, norms, GELU     1.33
1.28  long sequences, where dots does not fit
full            the block's input: d                            1 forward pass               1.33
1.33  the least memory without a host's
offload         nothing: input and attentions, 3·d, lie in      as attention_out             1.33
                1.28  long sequences; 2 × 3·d bytes a the host's pinned memory
                token and block cross PCIe, which must be shorter than the block's compute to be
                hidden

dots also keeps the keys and values of the text, 2·d a text token. No policy but none keeps logits
or probabilities of attention. What attentions give is their outputs, and of a flash kernel
(models/attention) also the softmax's logarithm, 4 bytes a token and head, so that attention_out,
dots_attention and offload run no forward kernel again; full and dots do. Of what splash gives,
heads of 72 lie in lanes of 128. Dense attention keeps no weights: its logits and softmax are
computed again. Compiled for one H200 (XL/2, bfloat16, AdamW and EMA, 256 px, batch 32, attention
"xla"), the temporaries are full 3.7 GiB, attention_out 4.9, dots 9.7 and none 35.7.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from pixart_jax.errors import UserError, nearest

# The names under which blocks mark values (jax.ad_checkpoint.checkpoint_name).
ATTENTION_OUT = "attention_out"  # the outputs of their attentions
BLOCK_INPUT = "block_input"  # the residual stream as it comes in
HOST = "pinned_host"  # JAX's kind of memory that "offload" writes to

# JAX's primitives of cuDNN's kernels; the forward one gives what the backward one needs.
CUDNN_FORWARD, CUDNN_BACKWARD = (
    "dot_product_attention_fwd_wrapper",
    "dot_product_attention_bwd_wrapper",
)


def _with_kernels(policy: Callable) -> Callable:
    """The policy, with what cuDNN's forward kernel gives treated as what is named ATTENTION_OUT:
    names cannot be put inside it."""
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
# The order of their measured time (docs/benchmarks.md), of those that keep less than everything and
# need no host.
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
    """UserError where devices of this platform ('tpu', 'gpu', 'cpu') have no host memory of their
    own to offload to."""
    if name == "offload" and platform == "cpu":
        raise UserError(
            "remat offload: a CPU has no other memory to offload to; attention_out computes the "
            "same again, full keeps least"
        )


def remat(step: Callable, name: str) -> Callable:
    """Wrap the body of a scan over blocks, ``step(module, carry, …)``, in the named policy.

    prevent_cse is off: inside a scan the loop itself keeps forward and backward apart, and its
    barriers would cost speed.
    """
    chosen = policy(name)
    if chosen is None:
        return step

    def named(module, carry, *rest):
        return step(module, checkpoint_name(carry, BLOCK_INPUT), *rest)

    return nn.remat(named, policy=chosen, prevent_cse=False)
