"""The cost of a run."""

from __future__ import annotations

import sys
import types

import pytest

from pixart_jax.config import HardwareConfig
from pixart_jax.training.ledger import EnergyMeter, ledger

STAGES = {
    "a": {"seconds": 1800.0, "joules": 0.0, "steps": 5, "images": 40},
    "b": {"seconds": 5400.0, "joules": 0.0, "steps": 5, "images": 40},
}


def test_what_nothing_measured_is_said_to_be_assumed():
    hardware = HardwareConfig(watts_per_device=200, usd_per_device_hour=1.5, gco2_per_kwh=100)
    account = ledger(STAGES, 4, "TPU v5e", hardware, None)
    expected = {"device_hours": 8.0, "energy_kwh": 1.6, "usd": 12.0, "co2_kg": 0.16}
    assert {name: account[name]["value"] for name in expected} == pytest.approx(expected)
    assert account["device_hours"]["basis"].startswith("measured")
    assert account["energy_kwh"]["basis"] == "assumed: 200 W a device"
    assert account["usd"]["basis"].startswith("assumed")


def test_measured_energy_is_said_to_be_measured():
    stages = {"a": {**STAGES["a"], "joules": 7.2e6}}
    account = ledger(stages, 1, "GPU", HardwareConfig(), "codecarbon 3.3.2")
    measured = {"value": pytest.approx(2.0), "basis": "measured: codecarbon 3.3.2"}
    assert account["energy_kwh"] == measured


def test_the_papers_way_stands_beside():
    """88 V100 days × 24 h × 0.4 kW × 57 g."""
    stages = {"a": {"seconds": 88 * 86400.0, "joules": 0.0, "steps": 1, "images": 1}}
    account = ledger(stages, 1, "V100", HardwareConfig(), None)
    assert account["paper_way"]["device_days"] == pytest.approx(88)
    assert account["paper_way"]["co2_kg"] == pytest.approx(88 * 24 * 0.4 * 57 / 1000)


def test_without_codecarbon_nothing_is_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with EnergyMeter() as meter:
        assert meter.joules is None and meter.source is None


def test_codecarbons_energy_is_read_while_it_runs(monkeypatch):
    """A stand-in with the tracker's interface: a kWh more at each flush."""

    class Tracker:
        def __init__(self, output_handlers, **_):
            self.handler, self.kwh = output_handlers[0], 0.0

        def start(self):
            pass

        def stop(self):
            self.kwh = -1.0

        def flush(self):
            self.kwh += 1.0
            self.handler.out(types.SimpleNamespace(energy_consumed=self.kwh), None)

    package = types.ModuleType("codecarbon")
    package.__version__, package.OfflineEmissionsTracker = "3", Tracker
    base = types.ModuleType("codecarbon.output_methods.base_output")
    base.BaseOutput = object
    for name, module in (
        ("codecarbon", package),
        ("codecarbon.output_methods", types.ModuleType("codecarbon.output_methods")),
        ("codecarbon.output_methods.base_output", base),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    with EnergyMeter() as meter:
        assert (meter.source, meter.joules, meter.joules) == ("codecarbon 3", 3.6e6, 7.2e6)
