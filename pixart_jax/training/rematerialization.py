"""The remat policy of a stage whose config leaves it to the machine: remat "auto".

The policies in the order of their measured time (models/remat.py), and of them the first whose step
fits a device: its state, and what training/activations.py counts of the largest bucket times
MARGIN. Which device it is, and what of its memory a program may have, is read from the one table of
parallel/chips.py, not from the device's own account, so that the plan of a run and all of its
processes choose the same. Where nothing is known of the device, "full".
"""

from __future__ import annotations

import dataclasses
import math
import os

import jax
from jax.sharding import Mesh

from pixart_jax.config import Config, StageConfig
from pixart_jax.models.remat import BY_SPEED
from pixart_jax.parallel.chips import GIB, chip_of
from pixart_jax.training.activations import activation_bytes

# compiled temporaries over the count: tests/planning/test_programs_for_hardware.py holds them below
# it
MARGIN = 1.2
_OF_A_GPU = 0.75  # of its memory JAX takes, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
_OF_A_HOST = 0.8  # of its memory, shared by the devices that a CPU is made of
COUNTED = ("text_to_image", "class_conditional")  # the tasks whose steps are counted


@dataclasses.dataclass(frozen=True)
class Choice:
    """The policy, and why: bytes a device that its step needs by count, and that a program may have
    there (None: unknown)."""

    name: str
    needed: float | None = None
    usable: float | None = None

    def __str__(self) -> str:
        if self.needed is None:
            return f"remat {self.name}: what this stage takes, or what its device has, is not known"
        why = (
            "the fastest that fits"
            if self.needed <= self.usable
            else "the smallest, which may not fit"
        )
        return (
            f"remat {self.name}, {why}: by count {self.needed / GIB:.1f} of "
            f"{self.usable / GIB:.1f} GiB a device"
        )


def choose_remat(config: Config, stage: StageConfig, state, mesh: Mesh) -> Choice:
    """The policy for a stage on a mesh. state: its abstract TrainState there."""
    device = mesh.devices.flat[0]
    usable = usable_bytes(device)
    if usable is None or stage.task not in COUNTED:
        return Choice("full")
    held, parameters = bytes_per_device(state), bytes_per_device(state.params)
    bucket = max(stage.data.buckets, key=lambda bucket: bucket[0] * bucket[1])
    for name in BY_SPEED:
        needed = held + MARGIN * sum(
            activation_bytes(
                config, stage, name, dict(mesh.shape), bucket, device.platform, parameters
            ).values()
        )
        if needed <= usable:
            break
    return Choice(name, needed, usable)


def usable_bytes(device: jax.Device) -> float | None:
    """Of a device's memory, what a program may have; None where it is not known."""
    if device.platform == "cpu":
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return _OF_A_HOST * whole / jax.local_device_count() if jax.process_count() == 1 else None
    chip = chip_of(device.device_kind)
    if chip is None or device.platform != "gpu":
        return chip and chip.usable_bytes
    return min(
        chip.usable_bytes,
        chip.hbm_bytes * float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", _OF_A_GPU)),
    )


def bytes_per_device(tree) -> float:
    """Bytes of a tree of arrays, or of shapes with shardings, on one device."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * _itemsize(leaf.dtype)
            for leaf in jax.tree.leaves(tree)
        )
    )


def _itemsize(dtype) -> int:
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize
