"""Bar charts, histograms and curves as PNG files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pixart_jax.files import atomic_write


def bars(
    path: str | os.PathLike,
    values: Mapping[str, float],
    *,
    title: str,
    axis: str = "",
    across: bool = False,
) -> Path:
    """One labelled bar per name; across: horizontal bars, for long names. Returns ``path``."""
    figure, axes = _figure(
        title,
        (6.4, max(2.4, 1.2 + 0.24 * len(values)))
        if across
        else (max(4.8, 1.2 + 0.32 * len(values)), 4.0),
    )
    names, numbers = list(values), list(values.values())
    drawn = (axes.barh if across else axes.bar)(range(len(names)), numbers, color="#3b6ea5")
    axes.bar_label(
        drawn,
        labels=[f"{n:,.4g}" if isinstance(n, float) else f"{n:,}" for n in numbers],
        fontsize=7,
        padding=2,
    )
    if across:
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(axis)
    else:
        axes.set_xticks(range(len(names)), names, fontsize=8, rotation=90 if len(names) > 8 else 0)
        axes.set_ylabel(axis)
    return _save(figure, path)


def histograms(
    path: Path,
    edges: Sequence[float],
    counts: Mapping[str, Sequence[float]],
    *,
    title: str,
    axis: str,
    mark: float | None = None,
) -> Path:
    """Histograms over the same bins, one line each. edges: n + 1 borders of n bins; counts: name →
    n values; mark: where to draw a vertical line."""
    figure, axes = _figure(title, (6.4, 4.0))
    for name, values in counts.items():
        axes.stairs(values, edges, fill=len(counts) == 1, label=name, alpha=0.9)
    if mark is not None:
        axes.axvline(mark, color="#b03030", linestyle="--", linewidth=1, label=f"{mark:g}")
    axes.set_xlabel(axis)
    axes.set_ylabel("count")
    axes.set_ylim(bottom=0)
    if len(counts) > 1 or mark is not None:
        axes.legend(fontsize=8, frameon=False)
    return _save(figure, path)


def curves(
    path: Path,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    axis: str,
    log: bool = False,
) -> Path:
    """Lines over a common axis. series: name → (x, y). log: the y axis is logarithmic. Returns
    ``path``."""
    figure, axes = _figure(title, (8.0, 4.0))
    for name, (x, y) in series.items():
        axes.plot(x, y, label=name, linewidth=1.5, marker="." if len(x) == 1 else None)
    axes.set_xlabel(axis)
    axes.grid(axis="y", color="#e0e0e0")
    if log and series:
        axes.set_yscale("log")
    if series:
        axes.legend(fontsize=8, frameon=False)
    return _save(figure, path)


def panels(path: Path, values: Mapping[str, Mapping[str, float]], *, title: str) -> Path:
    """One panel of horizontal bars per measure, one bar per set. values: measure → set → value."""
    from matplotlib.figure import Figure

    sets = list(dict.fromkeys(name for row in values.values() for name in row))
    figure = Figure((2.2 + 2.4 * len(values), 1.2 + 0.32 * len(sets)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for number, (axes, (measure, row)) in enumerate(
        zip(figure.subplots(1, len(values), squeeze=False)[0], values.items())
    ):
        numbers = [row.get(name, 0) for name in sets]
        drawn = axes.barh(range(len(sets)), numbers, color="#3b6ea5")
        axes.bar_label(drawn, labels=[f"{n:,}" for n in numbers], fontsize=7, padding=2)
        axes.set_yticks(range(len(sets)), sets if number == 0 else [""] * len(sets), fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.3)
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))
        axes.tick_params(axis="x", labelsize=7)
        axes.set_title(measure, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def intervals(
    path: Path,
    panels: Mapping[str, Mapping[str, tuple[float, float, float]]],
    *,
    title: str,
    mark: float,
) -> Path:
    """Values with their intervals, one panel below the other. panels: title → name → (value, low,
    high); mark: where to draw a vertical line. Returns ``path``."""
    from matplotlib.figure import Figure

    rows = [len(values) for values in panels.values()]
    figure = Figure((6.4, 0.8 + sum(0.7 + 0.3 * count for count in rows)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    ratios = {"height_ratios": [count + 0.6 for count in rows]}
    places = figure.subplots(len(rows), 1, sharex=True, squeeze=False, gridspec_kw=ratios)[:, 0]
    for axes, (name, values) in zip(places, panels.items()):
        value, low, high = zip(*values.values())
        reach = [[v - a for v, a in zip(value, low)], [b - v for v, b in zip(value, high)]]
        axes.errorbar(value, range(len(value)), xerr=reach, fmt="o", color="#3b6ea5", capsize=3)
        axes.axvline(mark, color="#909090", linestyle="--", linewidth=1)
        axes.set_yticks(range(len(value)), list(values), fontsize=8)
        axes.set_ylim(len(value) - 0.4, -0.6)
        axes.set_title(name, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def _figure(title: str, size: tuple[float, float]):
    # without pyplot: no window system, no state shared between threads
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure, path: str | os.PathLike) -> Path:
    with atomic_write(path) as file:
        # no version in the file: the same numbers give the same bytes
        figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    return Path(path)
