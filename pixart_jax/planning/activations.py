"""What a train step must hold besides its state, counted from shapes: the yardstick for what a compiler makes of it.

A device has s samples of n image tokens and l text tokens; a stream a = s·n·d values of the compute dtype. In bytes a device:

kept        depth × what the remat policy keeps of a block (models/remat.py): full a; attention_out 3·a; dots 12·a and the text's keys and
            values; and with a flash kernel that is not run again, the softmax's logarithm, 4 bytes a token and head. What splash keeps
            of its output is as wide as its lanes: 128/72 of a.
gradients   fp32, of each parameter as it lies.
cast        the parameters in the compute dtype, as they lie: XLA casts them once, before the loop over the blocks.
block       of one block while its backward pass runs: 12·a of the MLP (inner values, GELU, their gradient), 8·a of self-attention (queries,
            keys, values, output and their gradients, in lanes of 128 with splash), 4·a of cross-attention, 8·a of streams, norms and
            projections; where attention is dense, s·k·n·m logits as fp32 logits, weights and their gradient: 10 bytes each, m in lanes.
gathered    over fsdp, two blocks' parameters (the next one's come while one runs) and one's gradient, in the compute dtype.
batch       its texts once more, in fp32.
"""

from __future__ import annotations

import jax.numpy as jnp

from pixart_jax.errors import UserError
from pixart_jax.models.attention import Call, choose
from pixart_jax.planning.jobs import Job

LANES = 128  # the last axis of an array in a TPU's memory is a multiple of this


def counted(job: Job, parameters: float) -> dict[str, float]:
    """Bytes a device by term; of a text-to-image step. parameters: the bytes of its share of them, fp32. UserError for other policies."""
    config, stage, model = job.config, job.stage_config, job.config.model
    axes = job.axes
    tensor, context = axes["tensor"], axes["context"]
    width = jnp.dtype(config.compute_dtype).itemsize
    s = stage.batch_size / (axes["data"] * axes["fsdp"] * stage.optimizer.accumulate)
    n = (job.bucket[0] // 8 // model.patch_size) * (job.bucket[1] // 8 // model.patch_size) / context
    text, heads = stage.data.max_text_tokens, model.heads / tensor
    a = s * n * model.width * width
    platform = {"cuda": "gpu"}.get(job.topology.platform, job.topology.platform)

    def backend(keys: int, lengths: bool) -> str:
        if model.attention_backend != "auto":
            return model.attention_backend
        return choose(Call(platform, round(n), keys, model.head_dim, jnp.dtype(config.compute_dtype), lengths))

    ours, cross = backend(round(n * context), False), backend(text, True)
    wide = {name: _lanes(model.head_dim) / model.head_dim if name == "splash" else 1.0 for name in ("xla", "cudnn", "splash")}
    logarithm = sum(4 * s * n * heads for name in (ours, cross) if name != "xla")
    of_a_block = {
        "full": a,
        "attention_out": a * (1 + wide[ours] + wide[cross]) + logarithm,
        "dots": 12 * a + 2 * s * text * model.width * width,
    }
    if config.remat not in of_a_block:
        raise UserError(f"remat {config.remat!r}: activations are counted for {', '.join(of_a_block)}")
    keys = [m for name, m in ((ours, n * context), (cross, text)) if name == "xla"]
    logits = sum(10 * s * heads * n * (_lanes(m) if platform == "tpu" else m) for m in keys)
    block = 8 * model.width**2 + 2 * model.width * model.mlp_width
    return {
        "kept": model.depth * of_a_block[config.remat],
        "gradients": parameters,
        "cast": parameters * width / 4 if width < 4 else 0.0,
        "block": a * (24 + 8 * wide[ours]) + logits,
        "gathered": 3 * block * width / tensor if axes["fsdp"] > 1 else 0.0,
        "batch": 4.0 * s * text * model.caption_width,
    }


def _lanes(size: float) -> float:
    return LANES * -(-size // LANES)
