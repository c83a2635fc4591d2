"""The table of chips."""

from __future__ import annotations

import dataclasses

import pytest

from pixart_jax.parallel.chips import CHIPS, chip_of


@pytest.mark.parametrize(
    "kind, name",
    [
        ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"), ("TPU7x", "tpu7x"),  # noqa: E501
        ("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"),
    ],
)  # fmt: skip
def test_a_devices_own_name_finds_its_row(kind, name):
    assert chip_of(kind).name == name


@pytest.mark.parametrize(
    "kind",
    ["cpu", "TPU v4 lite", "TPU v50", "TPU v5x", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 PCIe", ""],
)
def test_an_unknown_device_has_no_row_and_so_no_mfu(kind):
    assert chip_of(kind) is None


def test_every_figure_is_positive_and_no_more_is_usable_than_there_is():
    for chip in CHIPS.values():
        figures = dataclasses.asdict(chip)
        assert all(value > 0 for name, value in figures.items() if name not in ("name", "torus"))
        assert chip.usable_bytes <= chip.hbm_bytes
