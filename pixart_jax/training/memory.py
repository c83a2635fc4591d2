"""Device memory of a train step, counted from shapes, and the remat policy chosen by it
(remat "auto").

A device has s samples of n image tokens and l text tokens; a stream a = s·n·d values of the compute
dtype. Bytes a device besides the state:

    kept        depth, with a ControlNet's copies, × what the remat policy keeps of a block
                (models/remat.py): full a; attention_out 3·a; dots 12·a and the text's keys and
                values; dots_attention 2·a more, and of a LoRA the 12·a again, its products beside
                the kernels'; offload none; and with a flash kernel that is not run again, the
                softmax's logarithm, 4 bytes a token and head. Splash keeps its output as wide as
                its lanes: 128/72 of a.
    gradients   fp32, of each parameter as it is sharded.
    cast        the parameters in the compute dtype: XLA casts them once, before the loop over the
                blocks. A frozen base is stored in it.
    block       of one block while its backward pass runs: 12·a of the MLP (inner values, GELU,
                their gradient), 8·a of self-attention (queries, keys, values, output and their
                gradients, in lanes of 128 with splash), 4·a of cross-attention, 8·a of streams,
                norms and projections; where attention is dense, s·k·n·m logits as fp32 logits,
                weights and their gradient: 10 bytes each, m in lanes.
    gathered    over fsdp, two blocks' parameters (the next ones arrive while one runs) and one's
                gradient, in the compute dtype.
    batch       its texts once more, in fp32.

"auto" takes the policies in the order of their measured time (models/remat.py), and of them the
first whose step fits a device: its state, and MARGIN times the count for the largest bucket. Device
and usable memory come from the table of parallel/chips.py, not from the device's own report, so
that the plan of a run and all of its processes choose alike. For an unknown device it is "full".
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pixart_jax.config import TEXT_TO_IMAGE, Config, StageConfig
from pixart_jax.errors import UserError
from pixart_jax.models.attention import AttentionShape, choose
from pixart_jax.models.controlnet import config_of
from pixart_jax.models.remat import BY_SPEED
from pixart_jax.parallel.chips import GIB, chip_of

# compiled temporaries over the count; tests/planning/test_programs_for_hardware.py checks it
MARGIN = 1.2
LANES = 128  # the last axis of an array in a TPU's memory is a multiple of this
COUNTED = (*TEXT_TO_IMAGE, "controlnet", "class_conditional")  # the tasks whose steps are counted
# the terms that depend neither on the policy nor on a block's work
ANY_POLICY = ("gradients", "cast", "gathered", "batch")
_OF_A_GPU = 0.75  # of its memory JAX takes, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
_OF_A_HOST = 0.8  # of its memory, shared by the simulated devices of a CPU


@dataclasses.dataclass(frozen=True)
class Choice:
    """A policy, with the bytes a device that its step needs by count and those a program may use
    (None: unknown)."""

    name: str
    needed: float | None = None
    usable: float | None = None

    def __str__(self) -> str:
        if self.needed is None or self.usable is None:
            return f"remat {self.name}: what this stage takes, or what its device has, is not known"
        fits = self.needed <= self.usable
        why = "the fastest that fits" if fits else "the smallest, which may not fit"
        return (
            f"remat {self.name}, {why}: by count {self.needed / GIB:.1f} of "
            f"{self.usable / GIB:.1f} GiB a device"
        )


def choose_remat(config: Config, stage: StageConfig, state, mesh: Mesh, base=None) -> Choice:
    """The policy for a stage on a mesh. state: its abstract TrainState there. base: the parameters
    below an adapter."""
    device, axes = mesh.devices.flat[0], dict(mesh.shape)
    usable = usable_bytes(device)
    if usable is None or stage.task not in COUNTED:
        return Choice("full")
    held, parameters = bytes_per_device((state, base)), bytes_per_device(state.params)
    bucket = max(stage.data.buckets, key=lambda bucket: bucket[0] * bucket[1])
    for name in BY_SPEED:
        counted = activation_bytes(config, stage, name, axes, bucket, device.platform, parameters)
        needed = held + MARGIN * sum(counted.values())
        if needed <= usable:
            break
    return Choice(name, needed, usable)


def usable_bytes(device: jax.Device) -> float | None:
    """Bytes of a device's memory that a program may use; None where they are not known."""
    if device.platform == "cpu":
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return _OF_A_HOST * whole / jax.local_device_count() if jax.process_count() == 1 else None
    chip = chip_of(device.device_kind)
    if chip is None:
        return None
    if device.platform != "gpu":
        return chip.usable_bytes
    fraction = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", _OF_A_GPU))
    return min(chip.usable_bytes, chip.hbm_bytes * fraction)


def bytes_per_device(tree) -> float:
    """Bytes of a tree of arrays, or of shapes with shardings, on one device."""

    def itemsize(dtype) -> int:
        return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize

    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * itemsize(leaf.dtype)
            for leaf in jax.tree.leaves(tree)
        )
    )


def activation_bytes(
    config: Config,
    stage: StageConfig,
    remat: str,
    axes: Mapping[str, int],
    bucket: tuple[int, int],
    platform: str,
    parameters: float,
) -> dict[str, float]:
    """Bytes a device by term of a text-to-image step; for a class-conditional one, without text, an
    upper bound.

    axes: sizes of the mesh axes. bucket: (height, width) in pixels. platform: 'tpu', 'gpu' or
    'cpu'. parameters: fp32 bytes of a device's share of them. UserError for a policy that is not
    counted ("none").
    """
    model, dtype = config.model, jnp.dtype(config.compute_dtype)
    tensor, context, width = axes["tensor"], axes["context"], dtype.itemsize
    s = stage.batch_size / (axes["data"] * axes["fsdp"] * stage.optimizer.accumulate)
    n = (bucket[0] // 8 // model.patch_size) * (bucket[1] // 8 // model.patch_size) / context
    text, heads = stage.data.max_text_tokens, model.heads / tensor
    a = s * n * model.width * width

    def lanes(size: float) -> float:
        return LANES * -(-size // LANES)

    def backend(keys: int, lengths: bool) -> str:
        if model.attention_backend != "auto":
            return model.attention_backend
        return choose(AttentionShape(platform, round(n), keys, model.head_dim, dtype, lengths))

    ours, cross = backend(round(n * context), False), backend(text, True)
    wide = {"xla": 1.0, "cudnn": 1.0, "splash": lanes(model.head_dim) / model.head_dim}
    logarithm = sum(4 * s * n * heads for name in (ours, cross) if name != "xla")
    attentions = a * (wide[ours] + wide[cross]) + logarithm
    projections = 12 * a + 2 * s * text * model.width * width
    projections *= 1 if stage.lora is None else 2
    kept_of_block = {
        "full": a,
        "attention_out": a + attentions,
        "dots": projections,
        "dots_attention": projections + attentions,
        "offload": 0.0,
    }
    if remat not in kept_of_block:
        raise UserError(f"remat {remat!r}: activations are counted for {', '.join(kept_of_block)}")
    keys = [m for name, m in ((ours, n * context), (cross, text)) if name == "xla"]
    logits = sum(10 * s * heads * n * (lanes(m) if platform == "tpu" else m) for m in keys)
    copies = config_of(model).depth if stage.task == "controlnet" else 0
    block = 8 * model.width**2 + 2 * model.width * model.mlp_width
    # of tdm the fake score's backward pass may run beside the student's; lcm's target is cast too
    passes, casts = 1 + (stage.task == "tdm"), 1 + (stage.task == "lcm")
    return {
        "kept": passes * (model.depth + copies) * kept_of_block[remat] + copies * a,
        "gradients": parameters,
        "cast": casts * parameters * width / 4 if width < 4 else 0.0,
        "block": a * (24 + 8 * wide[ours]) + logits,
        "gathered": 3 * block * width / tensor if axes["fsdp"] > 1 else 0.0,
        "batch": 4.0 * s * text * model.caption_width,
    }
