"""Time of a program, a roofline from its compiled figures and the chip's, and cost. Every figure
here is an estimate.

  compute  FLOPs of the matrix products, recomputation included, over PRODUCT_EFFICIENCY of the peak
  memory   bytes over MEMORY_EFFICIENCY of the bandwidth: operands and results of the products,
           state read and written, gradients written and read, weights read once a pass, and what
           collectives deliver, written and read
  wires    bytes that each collective sends, over WIRE_EFFICIENCY of the links of its mesh axes
  exposed  wires of synchronous collectives, and of asynchronous ones what exceeds
           OVERLAP · max(compute, memory)
  step     max(compute, memory) + exposed

Not included: element-wise work that is not fused into a product, latency of small collectives,
contention of two axes for one link, and all that a run does besides steps.
"""

from __future__ import annotations

import dataclasses

from pixart_jax.config import HardwareConfig
from pixart_jax.parallel.chips import Chip
from pixart_jax.planning.collectives import Collective
from pixart_jax.planning.target import CompiledStats, PlanTarget

# A large bf16 product reaches 0.80 of an H200's peak; those of width 1152 and heads of 72 less.
PRODUCT_EFFICIENCY = 0.70
MEMORY_EFFICIENCY = 0.85  # a copy on the device reaches 0.90 of an H200's bandwidth
WIRE_EFFICIENCY = 0.80
OVERLAP = 0.80

ASSUMPTIONS = (
    f"products reach {PRODUCT_EFFICIENCY:.0%} of the peak, memory {MEMORY_EFFICIENCY:.0%} and "
    f"links {WIRE_EFFICIENCY:.0%} of theirs; asynchronous collectives hide behind {OVERLAP:.0%} "
    "of the work, others behind none of it"
)


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one execution. wires: of each of CompiledStats.collectives."""

    compute: float
    memory: float
    wires: tuple[float, ...]
    exposed: float

    @property
    def step(self) -> float:
        return max(self.compute, self.memory) + self.exposed

    @property
    def bound(self) -> str:
        """What takes most of the time."""
        parts = {"compute": self.compute, "memory": self.memory, "communication": self.exposed}
        return max(parts, key=lambda name: parts[name])


def time_of(target: PlanTarget, stats: CompiledStats, chip: Chip) -> StepTime:
    """The roofline of a compiled program."""
    axes, counted = target.axes, stats.counted
    weights = counted.get("parameters", 0.0) + counted.get("transformer", 0.0)
    gathered = weights * axes["fsdp"]  # read by every device at each pass
    if target.sampling is None:
        narrow = 0.5 if target.config.compute_dtype == "bfloat16" else 1.0
        state = sum(counted[name] for name in ("parameters", "optimizer", "EMA"))
        moved = 2 * state + 2 * counted["parameters"] + 3 * gathered * narrow
        # below an adapter or a ControlNet, kernels in the compute dtype, read forward and backward
        moved += 2 * counted.get("frozen base", 0.0) * axes["fsdp"]
    elif target.part == "denoise":
        moved = target.sampling.evaluations * gathered
    else:
        moved = counted["VAE"]
    devices = target.topology.size
    moved += stats.product_bytes / devices + 2 * sum(c.bytes for c in stats.collectives)
    compute = stats.flops / devices / (chip.peak_bf16_flops * PRODUCT_EFFICIENCY)
    memory = moved / (chip.hbm_bandwidth * MEMORY_EFFICIENCY)
    wires = tuple(wire_seconds(c, chip) for c in stats.collectives)
    waited, hidden = (
        sum(s for s, c in zip(wires, stats.collectives, strict=True) if c.asynchronous == kind)
        for kind in (False, True)
    )
    exposed = waited + max(0.0, hidden - OVERLAP * max(compute, memory))
    return StepTime(compute, memory, wires, exposed)


def wire_seconds(c: Collective, chip: Chip) -> float:
    """Time on the wires. A group that spans several networks works within each, then across."""
    inner = max(1, c.group // c.networks)
    # without a link: two devices of one chip
    rate = chip.link_bandwidth * c.links if c.links else chip.hbm_bandwidth / 2
    seconds = c.moved / (rate * WIRE_EFFICIENCY) if inner > 1 else 0.0
    if c.networks > 1:
        seconds += c.moved / inner / (chip.network_bandwidth * WIRE_EFFICIENCY)
    return seconds


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of so many device-hours. basis: the prices and rates behind it."""

    days: float
    device_hours: float
    usd: float
    kwh: float
    kg_co2: float
    basis: str


def cost_of(hours: float, devices: int, chip: Chip, hardware: HardwareConfig) -> Cost:
    """Cost of ``hours`` on so many devices, with the config's figures where it changes their
    defaults and else the chip table's."""
    default, notes = HardwareConfig(), []
    figures = {"watts_per_device": chip.watts, "usd_per_device_hour": chip.usd_per_hour}
    for name, unit in (("watts_per_device", "W"), ("usd_per_device_hour", "USD")):
        if getattr(hardware, name) != getattr(default, name):
            figures[name] = getattr(hardware, name)
            notes.append(f"{unit} by the config")
    watts, usd = figures.values()
    total = hours * devices
    kwh = total * watts / 1000
    basis = f"{usd:g} USD a device-hour, {watts:g} W a device, {hardware.gco2_per_kwh:g} gCO2e/kWh"
    basis += f" ({', '.join(notes) or 'chip table'})"
    return Cost(hours / 24, total, total * usd, kwh, kwh * hardware.gco2_per_kwh / 1000, basis)
