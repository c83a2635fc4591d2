"""What is known of the chips that a run may lie on: the one table that training (MFU) and planning
(memory, time, cost) read.

A row is one JAX device, which is a chip but for TPU7x, whose chips show as two devices each: its
figures are half a chip's.
Rates are in the units of the sources: FLOP/s and bytes/s, one way where a link has two. The
sources, by the key that ``sources`` names:

  cloud    Google Cloud's page of the generation (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e,
  tpu7x), peak compute, memory,
           inter-chip bandwidth (said both ways a chip; here one way a link), network bandwidth
  isca23   Jouppi et al., TPU v4, ISCA 2023 (arXiv 2304.01433), table 4: mean power of a chip while
  it works nvidia   NVIDIA's data sheets of H100 and H200 SXM: dense bf16 (half of the figure with
  sparsity), memory, NVLink, TDP
  dgx      NVIDIA DGX H100/H200: eight 400 Gbit/s network ports a host of eight measured libtpu's
  compile-time out-of-memory message ("Used … of 15.75G hbm"): what of the memory a program may have
  list     on-demand list price, US, as last published: cloud.google.com/tpu/pricing; for GPUs AWS
  p5.48xlarge and p5en.48xlarge / 8
  assumed  no published figure: an assumption, which the configuration's ``hardware`` overrides
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device. All figures are peaks; what of them a program reaches is planning's to assume.

    usable_bytes: of hbm_bytes, what the compiler lets a program have. link_bandwidth: bytes/s one
    way of one of the torus's links, or of a GPU's whole NVLink. torus: dimensions of the torus
    (each has two links a chip), 0 for a switch that joins all devices of a host. network_bandwidth:
    bytes/s one way a device between slices or hosts. host_bandwidth: bytes/s one way a device to
    its host's memory. devices_per_host: of the usual host. watts, usd_per_hour: of one device at
    work.
    """

    name: str
    peak_bf16_flops: float
    hbm_bytes: float
    usable_bytes: float
    hbm_bandwidth: float
    torus: int
    link_bandwidth: float
    network_bandwidth: float
    host_bandwidth: float
    devices_per_host: int
    watts: float
    usd_per_hour: float
    sources: Mapping[str, str] = dataclasses.field(hash=False)

    @property
    def links(self) -> int:
        """Links of a device, both directions of each dimension of the torus; 1 where a switch joins
        the devices."""
        return 2 * self.torus or 1


def _tpu(watts: str, usd: str = "list", usable: str = "measured") -> dict[str, str]:
    return dict.fromkeys(("peak", "hbm", "links", "network"), "cloud") | {
        "usable": usable,
        "watts": watts,
        "usd": usd,
        "host": "assumed",
    }


_V4, _TPU, _TPU7X = _tpu("isca23"), _tpu("assumed"), _tpu("assumed", "assumed", "assumed")
_GPU = dict.fromkeys(("peak", "hbm", "links", "watts", "host"), "nvidia") | {
    "usable": "assumed",
    "network": "dgx",
    "usd": "list",
}

# fmt: off
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        # name     bf16       memory      usable        memory/s torus link   network  host  a host
        # W   USD/h
        Chip("v4",    275e12,    32 * GIB,   30.75 * GIB,  1228e9,  3,    50e9,  6.25e9,  16e9, 4,     170, 3.22, _V4),  # noqa: E501
        Chip("v5e",   197e12,    16 * GIB,   15.75 * GIB,  819e9,   2,    50e9,  3.125e9, 16e9, 8,     200, 1.20, _TPU),  # noqa: E501
        Chip("v5p",   459e12,    96 * GIB,   95.74 * GIB,  2765e9,  3,    100e9, 6.25e9,  16e9, 4,     450, 4.20, _TPU),  # noqa: E501
        Chip("v6e",   918e12,    32 * GIB,   31.25 * GIB,  1640e9,  2,    100e9, 12.5e9,  32e9, 8,     300, 2.70, _TPU),  # noqa: E501
        Chip("tpu7x", 1153.5e12, 96 * GIB,   94.75 * GIB,  3690e9,  3,    50e9,  6.25e9,  16e9, 8,     450, 6.00, _TPU7X),  # noqa: E501
        Chip("h100",  989.4e12,  80e9,       0.92 * 80e9,  3350e9,  0,    450e9, 50e9,    64e9, 8,     700, 6.88, _GPU),  # noqa: E501
        Chip("h200",  989.4e12,  141e9,      0.92 * 141e9, 4800e9,  0,    450e9, 50e9,    64e9, 8,     700, 7.91, _GPU),  # noqa: E501
    )
}
# fmt: on

# How jax.Device.device_kind begins → the row; the longest beginning wins.
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
    """The row of a ``jax.Device.device_kind``; None for a device that the table lacks (a CPU, TPU
    v4 lite, an H100 of another form)."""
    if device_kind.startswith("TPU v4 lite"):
        return None
    found = [kind for kind in _KINDS if device_kind == kind or device_kind.startswith(kind + " ")]
    found = [kind for kind in found if not (kind == "TPU v5" and device_kind != "TPU v5")]
    return CHIPS[_KINDS[max(found, key=len)]] if found else None
