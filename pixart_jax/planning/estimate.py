"""How long a program takes, from what is known of it and of the chip: a roofline. Every figure here
is an estimate.

  compute   = FLOPs of the matrix products, recomputation included, over the chip's peak, of which
  PRODUCTS is reached memory    = bytes that have to move, over the memory's bandwidth, of which
  MEMORY is reached: operands and results of the products,
              state read and written, gradients written and read, weights read once a pass, what
              collectives bring written and read
  wires     = bytes that each collective sends, over the links that its mesh axes lie on, of which
  WIRES is reached step      = max(compute, memory) + exposed exposed   = wires of collectives that
  the program waits for, and of the asynchronous ones what exceeds HIDDEN · max(compute, memory)

Left out: traffic of element-wise work that the compiler does not fuse into a product, latency of
small collectives, contention of two axes for one link, and all that a run does besides stepping
(input, saves, previews, restarts).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pixart_jax.config import HardwareConfig
from pixart_jax.parallel.chips import Chip
from pixart_jax.planning.collectives import Collective
from pixart_jax.planning.jobs import CompiledStats, Link, PlanTarget

# a large bf16 product reaches 0.80 of an H200's peak; those of width 1152 and heads of 72 are
# smaller
PRODUCT_EFFICIENCY = 0.70
MEMORY_EFFICIENCY = 0.85  # a device-to-device copy reaches 0.90 of an H200's
WIRE_EFFICIENCY = 0.80
OVERLAP = 0.80

ASSUMPTIONS = (
    f"products reach {PRODUCT_EFFICIENCY:.0%} of the peak, memory {MEMORY_EFFICIENCY:.0%} and "
    f"links {WIRE_EFFICIENCY:.0%} of "
    "theirs; "
    f"asynchronous collectives hide behind {OVERLAP:.0%} of the work, others behind none of it"
)


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one execution of a program. wires: of all collectives, in the order of
    Facts.collectives; exposed: not hidden."""

    compute: float
    memory: float
    wires: tuple[float, ...]
    exposed: float

    @property
    def work(self) -> float:
        return max(self.compute, self.memory)

    @property
    def step(self) -> float:
        return self.work + self.exposed

    @property
    def bound(self) -> str:
        """What most of the step's time is."""
        named = {"compute": self.compute, "memory": self.memory, "communication": self.exposed}
        return max(named, key=named.get)


def time_of(job: PlanTarget, facts: CompiledStats, chip: Chip) -> StepTime:
    """The roofline of a compiled program."""
    devices = job.topology.size
    train = job.drawing is None
    weights = (
        sum(facts.counted.get(name, 0.0) for name in ("parameters", "transformer"))
        * _cuts(job)
        / job.axes["tensor"]
    )
    if train:
        narrow = 0.5 if job.config.compute_dtype == "bfloat16" else 1.0
        state = sum(facts.counted[name] for name in ("parameters", "optimizer", "EMA"))
        moved = 2 * state + 2 * facts.counted["parameters"] + 3 * weights * narrow
    else:
        moved = (job.drawing.steps if job.part == "denoise" else 1) * (
            weights if job.part == "denoise" else facts.counted["VAE"]
        )
    moved += facts.product_bytes / devices + 2 * sum(c.bytes for c in facts.collectives)
    compute = facts.flops / devices / (chip.peak_bf16_flops * PRODUCT_EFFICIENCY)
    memory = moved / (chip.hbm_bandwidth * MEMORY_EFFICIENCY)
    wires = tuple(seconds(c, facts.links, chip, job.topology.platform) for c in facts.collectives)
    work = max(compute, memory)
    waited = sum(w for w, c in zip(wires, facts.collectives, strict=True) if not c.asynchronous)
    hidden = sum(w for w, c in zip(wires, facts.collectives, strict=True) if c.asynchronous)
    return StepTime(compute, memory, wires, waited + max(0.0, hidden - OVERLAP * work))


def _cuts(job: PlanTarget) -> int:
    return job.axes["fsdp"] * job.axes["tensor"]


def seconds(collective: Collective, links: Sequence[Link], chip: Chip, platform: str) -> float:
    """Time on the wires. A group that spans several networks first works within each, then sends
    its share across."""
    link = next(link for link in links if link.axes == collective.axes)
    inner = max(1, link.group // link.networks)
    if platform == "tpu" and link.links == 0 and inner > 1:
        within = chip.hbm_bandwidth / 2  # two devices of one chip
    else:
        within = chip.link_bandwidth * max(1, link.links)
    total = 0.0
    if inner > 1:
        total += collective.moved / (within * WIRE_EFFICIENCY)
    if link.networks > 1:
        total += collective.moved / inner / (chip.network_bandwidth * WIRE_EFFICIENCY)
    return total


@dataclasses.dataclass(frozen=True)
class Cost:
    """What so many device-hours cost. basis: of each figure."""

    days: float
    device_hours: float
    usd: float
    kwh: float
    kg_co2: float
    basis: str


def account(hours: float, devices: int, chip: Chip, hardware: HardwareConfig) -> Cost:
    """The cost of ``hours`` on so many devices: the config's assumptions where it makes any of its
    own, else the chip table's."""
    plain = HardwareConfig()
    watts, usd = chip.watts, chip.usd_per_hour
    said = []
    if hardware.watts_per_device != plain.watts_per_device:
        watts = hardware.watts_per_device
        said.append("W by the config")
    if hardware.usd_per_device_hour != plain.usd_per_device_hour:
        usd = hardware.usd_per_device_hour
        said.append("USD by the config")
    kwh = hours * devices * watts / 1000
    basis = f"{usd:g} USD a device-hour, {watts:g} W a device, {hardware.gco2_per_kwh:g} gCO2e/kWh"
    basis += f" ({', '.join(said)})" if said else " (chip table)"
    return Cost(
        hours / 24,
        hours * devices,
        hours * devices * usd,
        kwh,
        kwh * hardware.gco2_per_kwh / 1000,
        basis,
    )
