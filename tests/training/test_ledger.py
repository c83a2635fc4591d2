"""What a run cost."""

from __future__ import annotations

import pytest

from pixart_jax.config import HardwareConfig
from pixart_jax.training.ledger import PowerMeter, ledger

STAGES = {
    "a": {"seconds": 1800.0, "joules": 0.0, "steps": 5, "images": 40},
    "b": {"seconds": 5400.0, "joules": 0.0, "steps": 5, "images": 40},
}


def test_what_nothing_measured_is_said_to_be_assumed():
    account = ledger(
        STAGES,
        4,
        "TPU v5e",
        HardwareConfig(watts_per_device=200, usd_per_device_hour=1.5, gco2_per_kwh=100),
        None,
    )
    assert account["device_hours"]["value"] == pytest.approx(8.0) and account["device_hours"][
        "basis"
    ].startswith("measured")
    assert account["energy_kwh"] == {
        "value": pytest.approx(1.6),
        "basis": "assumed: 200 W a device",
    }
    assert account["usd"]["value"] == pytest.approx(12.0) and account["usd"]["basis"].startswith(
        "assumed"
    )
    assert account["co2_kg"]["value"] == pytest.approx(0.16)


def test_measured_energy_is_said_to_be_measured():
    stages = {"a": {**STAGES["a"], "joules": 7.2e6}}
    account = ledger(stages, 1, "GPU", HardwareConfig(), "nvidia-smi power.draw")
    assert account["energy_kwh"] == {
        "value": pytest.approx(2.0),
        "basis": "measured: nvidia-smi power.draw",
    }


def test_the_papers_way_stands_beside():
    """88 V100 days × 24 h × 0.4 kW × 57 g."""
    account = ledger(
        {"a": {"seconds": 88 * 86400.0, "joules": 0.0, "steps": 1, "images": 1}},
        1,
        "V100",
        HardwareConfig(),
        None,
    )
    assert account["paper_way"]["device_days"] == pytest.approx(88)
    assert account["paper_way"]["co2_kg"] == pytest.approx(88 * 24 * 0.4 * 57 / 1000)


def test_a_meter_that_cannot_read_says_none():
    with PowerMeter("tpu") as meter:
        assert meter.joules is None and meter.source is None
