"""What a run cost: device-hours, energy, money and CO2, each said to be measured or assumed, beside
the paper's way of counting."""

from __future__ import annotations

import glob
import subprocess
import threading
import time

from pixart_jax.config import HardwareConfig

PAPER_WATTS, PAPER_GCO2_PER_KWH = 400.0, 57.0  # GPU-hours × 0.4 kW × 57 gCO2e/kWh


class PowerMeter:
    """Energy of this machine while the context is open, where something measures it.

    NVIDIA GPUs: nvidia-smi's draw, summed over devices, sampled every ``interval`` seconds. Else
    the CPU packages' own counters (Linux powercap). ``joules`` is None where neither can be read.
    source: the name of what measured.
    """

    def __init__(self, platform: str, interval: float = 5.0):
        self.source, self._interval, self._joules = None, interval, 0.0
        self._stop = threading.Event()
        self._counters: list[tuple[str, int]] = []
        if platform == "gpu" and _gpu_watts() is not None:
            self.source = "nvidia-smi power.draw"
        elif platform == "cpu":
            self._counters = [
                (p, e)
                for p in glob.glob("/sys/class/powercap/intel-rapl:?/energy_uj")
                if (e := _read(p)) is not None
            ]
            self.source = "powercap energy_uj of the CPU packages" if self._counters else None

    def __enter__(self):
        if self.source:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()

    @property
    def joules(self) -> float | None:
        return self._joules if self.source else None

    def _watch(self):
        before = time.monotonic()
        while not self._stop.wait(self._interval):
            now = time.monotonic()
            if self._counters:
                fresh = [(path, _read(path)) for path, _ in self._counters]
                # a counter that wrapped around gives a negative difference, and is left out
                self._joules += (
                    sum(
                        max(new - old, 0)
                        for (_, new), (_, old) in zip(fresh, self._counters, strict=True)
                    )
                    / 1e6
                )
                self._counters = fresh
            else:
                self._joules += (_gpu_watts() or 0.0) * (now - before)
            before = now


def _read(path: str) -> int | None:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


def _gpu_watts() -> float | None:
    try:
        text = subprocess.run(
            ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout
        return sum(float(line) for line in text.split())
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def ledger(
    stages: dict[str, dict],
    devices: int,
    kind: str,
    hardware: HardwareConfig,
    power_source: str | None,
) -> dict:
    """The ledger as JSON. stages: name → {"seconds", "steps", "images", "joules" (0 where not
    measured)}."""
    seconds = sum(s["seconds"] for s in stages.values())
    hours = seconds * devices / 3600
    joules = sum(s["joules"] for s in stages.values())
    measured = power_source is not None and joules > 0
    kwh = joules / 3.6e6 if measured else hours * hardware.watts_per_device / 1000
    energy = (
        f"measured: {power_source}"
        if measured
        else f"assumed: {hardware.watts_per_device:g} W a device"
    )

    def entry(value, basis):
        return {"value": value, "basis": basis}

    return {
        "devices": devices,
        "device_kind": kind,
        "stages": stages,
        "device_hours": entry(hours, "measured: wall-clock of committed training steps × devices"),
        "energy_kwh": entry(kwh, energy),
        "usd": entry(
            hours * hardware.usd_per_device_hour,
            f"assumed: {hardware.usd_per_device_hour:g} USD a device-hour",
        ),
        "co2_kg": entry(
            kwh * hardware.gco2_per_kwh / 1000,
            f"{energy}; assumed: {hardware.gco2_per_kwh:g} gCO2e/kWh",
        ),
        "paper_way": {
            "formula": f"device-hours × {PAPER_WATTS / 1000:g} kW × {PAPER_GCO2_PER_KWH:g} "
            "gCO2e/kWh",
            "device_days": hours / 24,
            "energy_kwh": hours * PAPER_WATTS / 1000,
            "co2_kg": hours * PAPER_WATTS / 1000 * PAPER_GCO2_PER_KWH / 1000,
        },
    }
