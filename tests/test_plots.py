"""Numbers as pictures."""

from __future__ import annotations

import numpy as np
from PIL import Image

from pixart_jax import plots


def blue(path) -> np.ndarray:
    """bool [h, w]: where bars are drawn."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return (abs(pixels - (0x3B, 0x6E, 0xA5)) < 12).all(-1)


def test_a_bar_is_as_long_as_its_number(tmp_path):
    drawn = blue(plots.bars(tmp_path / "bars.png", {"a": 100, "b": 50, "c": 0}, title="three"))
    heights = drawn.sum(0)
    tall = heights.max()
    values, counts = np.unique(heights[heights > 0], return_counts=True)
    assert len(values[counts > 5]) == 2, "two bars are seen, the third is 0"
    assert abs(min(values[counts > 5]) / tall - 0.5) < 0.02


def test_the_same_numbers_give_the_same_bytes_and_nothing_half_written_stays(tmp_path):
    how = {"title": "t", "axis": "tokens", "mark": 1.5}
    one, two, other = (
        plots.histograms(tmp_path / f"{n}.png", [0, 1, 2], {"x": [3, last]}, **how).read_bytes()
        for n, last in ((1, 4), (2, 4), (3, 5))
    )
    assert one == two != other
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.png", "2.png", "3.png"]


def test_panels_show_every_set_in_every_measure(tmp_path):
    values = {"nouns": {"a": 10, "b": 20}, "average": {"a": 1.5, "b": 3.0}}
    drawn = blue(plots.panels(tmp_path / "panels.png", values, title="sets"))
    left, right = drawn[:, : drawn.shape[1] // 2], drawn[:, drawn.shape[1] // 2 :]
    for panel in (left, right):
        lengths = np.unique(panel.sum(1)[panel.sum(1) > 5])
        assert len(lengths) == 2 and abs(lengths[0] / lengths[1] - 0.5) < 0.03
