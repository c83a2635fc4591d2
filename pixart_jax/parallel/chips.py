"""The chips that a run may use: the one table of peaks that training (MFU) and planning read.

A row is one JAX device: a chip, but of TPU7x half a chip, as its chips show as two devices.
Sources, by column:

  FLOP/s, memory, links  Google Cloud's page of the generation (docs.cloud.google.com/tpu/docs/v4,
             v5e, v5p, v6e, tpu7x; its inter-chip bandwidth is both ways a chip, here one way a
             link); NVIDIA's data sheets of H100 and H200 SXM (dense bf16, half of the figure with
             sparsity)
  usable     libtpu's out-of-memory message ("Used … of 15.75G hbm"); assumed for TPU7x and GPUs
  network    Google Cloud's page; NVIDIA DGX H100/H200: eight 400 Gbit/s ports a host of eight
  W          v4: Jouppi et al., ISCA 2023 (arXiv 2304.01433), table 4; other TPUs: assumed, no
             published figure; GPUs: TDP
  USD/h      on-demand list price, US: cloud.google.com/tpu/pricing (TPU7x: assumed); AWS
             p5.48xlarge and p5en.48xlarge / 8

What is assumed, the configuration's ``hardware`` overrides.
"""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device. All rates are peaks, in FLOP/s and bytes/s.

    usable_bytes: of hbm_bytes, what the compiler lets a program have. link_bandwidth: one way of
    one of the torus's links, or of a GPU's whole NVLink. torus: dimensions of the torus (each has
    two links a chip), 0 for a switch that joins all devices of a host. network_bandwidth: one way
    a device between slices or hosts. watts, usd_per_hour: of one device at work.
    """

    name: str
    peak_bf16_flops: float
    hbm_bytes: float
    usable_bytes: float
    hbm_bandwidth: float
    torus: int
    link_bandwidth: float
    network_bandwidth: float
    watts: float
    usd_per_hour: float


# fmt: off
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        # name     bf16       memory      usable        memory/s torus link  network   W   USD/h
        Chip("v4",    275e12,    32 * GIB,  30.75 * GIB,  1228e9, 3,    50e9,  6.25e9,  170, 3.22),
        Chip("v5e",   197e12,    16 * GIB,  15.75 * GIB,  819e9,  2,    50e9,  3.125e9, 200, 1.20),
        Chip("v5p",   459e12,    96 * GIB,  95.74 * GIB,  2765e9, 3,    100e9, 6.25e9,  450, 4.20),
        Chip("v6e",   918e12,    32 * GIB,  31.25 * GIB,  1640e9, 2,    100e9, 12.5e9,  300, 2.70),
        Chip("tpu7x", 1153.5e12, 96 * GIB,  94.75 * GIB,  3690e9, 3,    50e9,  6.25e9,  450, 6.00),
        Chip("h100",  989.4e12,  80e9,      0.92 * 80e9,  3350e9, 0,    450e9, 50e9,    700, 6.88),
        Chip("h200",  989.4e12,  141e9,     0.92 * 141e9, 4800e9, 0,    450e9, 50e9,    700, 7.91),
    )
}
# fmt: on

# The beginning of jax.Device.device_kind → the row; the longest one wins.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "TPU v7x": "tpu7x",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


def chip_of(device_kind: str) -> Chip | None:
    """The row of a ``jax.Device.device_kind``; None for a device without one (a CPU, TPU v4
    lite)."""
    if device_kind.startswith("TPU v4 lite"):
        return None
    found = [kind for kind in _KINDS if device_kind == kind or device_kind.startswith(kind + " ")]
    found = [kind for kind in found if not (kind == "TPU v5" and device_kind != "TPU v5")]
    return CHIPS[_KINDS[max(found, key=len)]] if found else None
