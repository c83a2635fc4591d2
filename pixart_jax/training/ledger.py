"""The cost of a run: device-hours, energy, money and CO2, each marked as measured or assumed,
beside the paper's way of counting."""

from __future__ import annotations

from typing import Any

from pixart_jax.config import HardwareConfig

PAPER_WATTS, PAPER_GCO2_PER_KWH = 400.0, 57.0  # GPU-hours × 0.4 kW × 57 gCO2e/kWh


class EnergyMeter:
    """Energy of this machine while the context is open, where codecarbon (extra ``energy``) is
    installed: from NVIDIA's and the CPU's counters, else by codecarbon's load model.

    Without it ``joules`` and ``source`` are None.
    """

    def __init__(self) -> None:
        self.source: str | None = None
        self._tracker: Any = None
        self._kwh = 0.0

    def __enter__(self) -> EnergyMeter:
        try:
            import codecarbon
            from codecarbon.output_methods.base_output import BaseOutput
        except ImportError:
            return self
        meter = self

        class Reading(BaseOutput):
            def out(self, total, delta):
                meter._kwh = total.energy_consumed

            live_out = out

        self._tracker = codecarbon.OfflineEmissionsTracker(
            country_iso_code="USA",  # for its CO2 figure, which the ledger does not use
            output_methods=[],
            output_handlers=[Reading()],
            log_level="error",
            allow_multiple_runs=True,
        )
        self._tracker.start()
        self.source = f"codecarbon {codecarbon.__version__}"
        return self

    def __exit__(self, *_) -> None:
        if self._tracker:
            self._tracker.stop()

    @property
    def joules(self) -> float | None:
        if self._tracker is None:
            return None
        self._tracker.flush()
        return self._kwh * 3.6e6


def ledger(
    stages: dict[str, dict],
    devices: int,
    kind: str,
    hardware: HardwareConfig,
    energy_source: str | None,
) -> dict:
    """The ledger as JSON. stages: name → {"seconds", "steps", "images", "joules" (0 where not
    measured)}."""
    hours = sum(s["seconds"] for s in stages.values()) * devices / 3600
    joules = sum(s["joules"] for s in stages.values())
    if energy_source is not None and joules > 0:
        kwh, energy = joules / 3.6e6, f"measured: {energy_source}"
    else:
        kwh = hours * hardware.watts_per_device / 1000
        energy = f"assumed: {hardware.watts_per_device:g} W a device"
    price, carbon = hardware.usd_per_device_hour, hardware.gco2_per_kwh
    paper_kwh = hours * PAPER_WATTS / 1000
    paper_way = f"{PAPER_WATTS / 1000:g} kW × {PAPER_GCO2_PER_KWH:g} gCO2e/kWh"

    def entry(value: float, basis: str) -> dict:
        return {"value": value, "basis": basis}

    return {
        "devices": devices,
        "device_kind": kind,
        "stages": stages,
        "device_hours": entry(hours, "measured: wall-clock of committed training steps × devices"),
        "energy_kwh": entry(kwh, energy),
        "usd": entry(hours * price, f"assumed: {price:g} USD a device-hour"),
        "co2_kg": entry(kwh * carbon / 1000, f"{energy}; assumed: {carbon:g} gCO2e/kWh"),
        "paper_way": {
            "formula": f"device-hours × {paper_way}",
            "device_days": hours / 24,
            "energy_kwh": paper_kwh,
            "co2_kg": paper_kwh * PAPER_GCO2_PER_KWH / 1000,
        },
    }
