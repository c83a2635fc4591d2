"""What a train step must hold besides its state, counted from shapes: the yardstick for what a
compiler makes of it.

A device has s samples of n image tokens and l text tokens; a stream a = s·n·d values of the compute
dtype. In bytes a device:

kept        depth × what the remat policy keeps of a block (models/remat.py): full a; attention_out
3·a; dots 12·a and the text's keys and
            values; dots_attention 2·a more; offload none; and with a flash kernel that is not run
            again, the softmax's logarithm, 4 bytes a token and head. What splash keeps of its
            output is as wide as its lanes: 128/72 of a.
gradients   fp32, of each parameter as it lies. cast        the parameters in the compute dtype, as
they lie: XLA casts them once, before the loop over the blocks. block       of one block while its
backward pass runs: 12·a of the MLP (inner values, GELU, their gradient), 8·a of self-attention
(queries,
            keys, values, output and their gradients, in lanes of 128 with splash), 4·a of
            cross-attention, 8·a of streams, norms and projections; where attention is dense,
            s·k·n·m logits as fp32 logits, weights and their gradient: 10 bytes each, m in lanes.
gathered    over fsdp, two blocks' parameters (the next one's come while one runs) and one's
gradient, in the compute dtype. batch       its texts once more, in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from pixart_jax.config import Config, StageConfig
from pixart_jax.errors import UserError
from pixart_jax.models.attention import AttentionShape, choose

# the terms that do not depend on the policy, nor on a block's work
ANY_POLICY = ("gradients", "cast", "gathered", "batch")
LANES = 128  # the last axis of an array in a TPU's memory is a multiple of this


def activation_bytes(
    config: Config,
    stage: StageConfig,
    remat: str,
    axes: Mapping[str, int],
    bucket: tuple[int, int],
    platform: str,
    parameters: float,
) -> dict[str, float]:
    """Bytes a device by term, of a text-to-image step; of a class-conditional one, which has no
    text, rather more than it takes.

    axes: sizes of the mesh's axes. bucket: (height, width) in pixels. platform: 'tpu', 'gpu' or
    'cpu'. parameters: the bytes of a device's share of them, fp32. UserError for policies that are
    not counted ("none").
    """
    model = config.model
    tensor, context = axes["tensor"], axes["context"]
    width = jnp.dtype(config.compute_dtype).itemsize
    s = stage.batch_size / (axes["data"] * axes["fsdp"] * stage.optimizer.accumulate)
    n = (bucket[0] // 8 // model.patch_size) * (bucket[1] // 8 // model.patch_size) / context
    text, heads = stage.data.max_text_tokens, model.heads / tensor
    a = s * n * model.width * width

    def backend(keys: int, lengths: bool) -> str:
        if model.attention_backend != "auto":
            return model.attention_backend
        return choose(
            AttentionShape(
                platform, round(n), keys, model.head_dim, jnp.dtype(config.compute_dtype), lengths
            )
        )

    ours, cross = backend(round(n * context), False), backend(text, True)
    wide = {
        name: _lanes(model.head_dim) / model.head_dim if name == "splash" else 1.0
        for name in ("xla", "cudnn", "splash")
    }
    logarithm = sum(4 * s * n * heads for name in (ours, cross) if name != "xla")
    attentions = a * (wide[ours] + wide[cross]) + logarithm
    projections = 12 * a + 2 * s * text * model.width * width
    of_a_block = {
        "full": a,
        "attention_out": a + attentions,
        "dots": projections,
        "dots_attention": projections + attentions,
        "offload": 0.0,
    }
    if remat not in of_a_block:
        raise UserError(f"remat {remat!r}: activations are counted for {', '.join(of_a_block)}")
    keys = [m for name, m in ((ours, n * context), (cross, text)) if name == "xla"]
    logits = sum(10 * s * heads * n * (_lanes(m) if platform == "tpu" else m) for m in keys)
    block = 8 * model.width**2 + 2 * model.width * model.mlp_width
    return {
        "kept": model.depth * of_a_block[remat],
        "gradients": parameters,
        "cast": parameters * width / 4 if width < 4 else 0.0,
        "block": a * (24 + 8 * wide[ours]) + logits,
        "gathered": 3 * block * width / tensor if axes["fsdp"] > 1 else 0.0,
        "batch": 4.0 * s * text * model.caption_width,
    }


def _lanes(size: float) -> float:
    return LANES * -(-size // LANES)
