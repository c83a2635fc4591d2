"""Which backend computes an attention: what each can run, and the rule by which "auto" takes one.

name    platform  what it is                                       takes xla     any       two
products and a softmax (dense.py)            everything cudnn   CUDA      cuDNN's flash attention
(cudnn.py)               bf16 and fp16, heads of a multiple of 8 up to 128, no bias splash  TPU
JAX's splash attention, in Pallas (splash.py)    bf16 and fp32, no bias

The rule weighs what the dense way moves against what the kernel costs. The dense way writes and
reads a logit for each query, key and
head: 4 bytes written, 4 read for the softmax, 2 and 2 for the weights. A logit costs 4·h floating
point operations, so heads of 72 give 24 operations a byte, where an H200 needs 206 and a TPU v5e
240 to be busy: dense attention is bound by memory whatever its size. A flash kernel moves queries,
keys, values and output alone, 8·h bytes a token and head.

- On CUDA the kernel wins as soon as a query's logits are more bytes than its own vectors: 12·m >
  4·h, so m > h/3. Captions of 120 or 300 tokens are far above that (1,440 bytes of logits against
  288 at h = 72), and a block of keys holds 128, so they fill it. Below 64 keys most of a block is
  padding, and dense is taken.
- On a TPU a kernel is a loop on one core, and each of its turns has a fixed cost of about 0.35 µs,
  in which a v5p moves 1 MB: the dense logits of 1,024 queries by 80 keys. The dense products also
  take queries and keys as the projections leave them, while the kernel wants heads before tokens,
  which is a copy. From 256 keys on, self-attention of 256 px, the kernel is no slower on a v5e and
  wins with every larger size. Keys with lengths, a caption's 120 or 300, are padded to whole lanes
  (300 to 384), and their mask is computed
  again for every head: they stay dense below 512.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pixart_jax.errors import UserError, nearest

NAMES = ("auto", "xla", "cudnn", "splash")
# the fewest keys from which auto takes the kernel
CUDNN_KEYS, SPLASH_KEYS, SPLASH_KEYS_WITH_LENGTHS = 64, 256, 512


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """What decides: 'tpu', 'gpu' or 'cpu'; numbers of queries and keys, width of a head, dtype;
    whether lengths and a bias are given."""

    platform: str
    queries: int
    keys: int
    head_dim: int
    dtype: jnp.dtype
    lengths: bool = False
    bias: bool = False


def choose(call: AttentionShape) -> str:
    """The backend that "auto" takes for this call."""
    if (
        call.platform == "gpu"
        and call.keys >= CUDNN_KEYS
        and unsupported_reason("cudnn", call) is None
    ):
        return "cudnn"
    fewest = SPLASH_KEYS_WITH_LENGTHS if call.lengths else SPLASH_KEYS
    if (
        call.platform == "tpu"
        and min(call.queries, call.keys) >= fewest
        and unsupported_reason("splash", call) is None
    ):
        return "splash"
    return "xla"


def unsupported_reason(name: str, call: AttentionShape) -> str | None:
    """Why this backend cannot compute this call, and None where it can."""
    if name == "xla":
        return None
    at, dtypes = {
        "cudnn": ("gpu", ("bfloat16", "float16")),
        "splash": ("tpu", ("bfloat16", "float32")),
    }[name]
    if call.platform != at:
        return (
            f"runs on {'a CUDA GPU' if at == 'gpu' else 'a TPU'}, and this program is for a "
            f"{call.platform.upper()}"
        )
    if jnp.dtype(call.dtype).name not in dtypes:
        return f"computes in {' or '.join(dtypes)}, not in {jnp.dtype(call.dtype).name}"
    if call.bias:
        return "is used here without a bias on the logits"
    if name == "cudnn" and (call.head_dim % 8 or call.head_dim > 128):
        return f"takes heads of a multiple of 8, 128 at most, not of {call.head_dim}"
    return None


def resolve_backend(name: str, call: AttentionShape) -> str:
    """The backend of this name, with "auto" resolved. UserError where it does not exist or cannot
    compute the call."""
    check_backend(name)
    if name == "auto":
        return choose(call)
    reason = unsupported_reason(name, call)
    if reason is not None:
        raise UserError(f"attention_backend {name!r} {reason}; 'auto' would take {choose(call)!r}")
    return name


def check_backend(name: str) -> None:
    """Raises UserError when no backend has this name."""
    if name not in NAMES:
        raise UserError(f"attention backend {name!r} is unknown{nearest(name, NAMES)}")


def platform() -> str:
    """What the program that is being traced will run on: 'tpu', 'gpu' or 'cpu'.

    The devices of the mesh that jax.set_mesh has set, which may be described and not here (planning
    compiles for them); without a mesh, this process's default devices.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
