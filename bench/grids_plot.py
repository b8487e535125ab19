"""The picture of bench/grids.py: final loss against control points, and how it came about for few and for many."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bench.layer_plot import moved_apart
from bench.race_plot import COLORS, DASHES, STYLE, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bench.grids import Entry

SHOWN = 0.75  # of the way from the lowest of the last losses to the highest of the first


def draw_grids(entries: Sequence[Entry], where: str) -> Figure:
    """Lines are means over seeds, bands go from the lowest to the highest."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    methods = list(dict.fromkeys(entry.method for entry in entries))
    colors = {method: COLORS[k % len(COLORS)] for k, method in enumerate(methods)}
    grids = sorted({entry.grid for entry in entries})
    figure = Figure(figsize=(12.6, 4.6), facecolor="white")
    figure.text(0.04, 0.94, "Loss by the number of control points", fontsize=13, weight="bold", color=STYLE.ink)
    figure.text(0.04, 0.89, "Validation loss, mean and range over seeds", fontsize=9, color=STYLE.muted)
    figure.text(0.04, 0.85, where, fontsize=8, color=STYLE.muted)
    finals, curves = (figure.add_axes((x, 0.13, w, 0.66)) for x, w in ((0.05, 0.32), (0.52, 0.3)))
    style_axes(finals, "control points")
    style_axes(curves, "steps")
    finals.set_xscale("log", base=2)
    finals.set_xticks(grids, [str(grid) for grid in grids])
    finals.xaxis.set_minor_locator(NullLocator())
    lines: dict[str, tuple[float, str]] = {}
    for method, color in colors.items():
        own = {grid: chosen(entries, method, grid) for grid in grids}
        last = {grid: [entry.losses[-1] for entry in runs] for grid, runs in own.items() if runs}
        lines[method] = draw_band(finals, list(last), list(last.values()), color, "-"), color
    label_ends(finals, max(grids), lines)
    lines = {}
    for grid, dashes in zip(dict.fromkeys((grids[0], grids[-1])), DASHES[1:], strict=False):
        for method, color in colors.items():
            runs = chosen(entries, method, grid)
            if runs:
                losses = [list(at) for at in zip(*(run.losses for run in runs), strict=True)]
                lines[f"{method}, G={grid}"] = draw_band(curves, runs[0].steps, losses, color, dashes), color
    lowest = min(at for at, _ in lines.values())
    highest = max(entry.losses[0] for entry in entries)
    curves.set_ylim(lowest - 0.03 * (highest - lowest), lowest + SHOWN * (highest - lowest))
    label_ends(curves, max(entry.steps[-1] for entry in entries), lines)
    return figure


def chosen(entries: Sequence[Entry], method: str, grid: int) -> list[Entry]:
    return [entry for entry in entries if (entry.method, entry.grid) == (method, grid)]


def draw_band(axes: Axes, x: Sequence[int], losses: Sequence[Sequence[float]], color: str, dashes: str) -> float:
    """One line: losses of all seeds for each x. Returns its last mean."""
    means = [statistics.mean(at) for at in losses]
    marker = "o" if len(x) < 8 and axes.get_xscale() == "log" else ""
    axes.plot(x, means, color=color, linestyle=dashes, linewidth=1.6, marker=marker, markersize=3.5)
    axes.fill_between(x, [min(at) for at in losses], [max(at) for at in losses], color=color, alpha=0.13, lw=0)
    return means[-1]


def label_ends(axes: Axes, x: int, lines: Mapping[str, tuple[float, str]]) -> None:
    """Each line's name and last loss at its right end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    names = sorted(lines, key=lambda name: lines[name][0])
    places = moved_apart([lines[name][0] for name in names], 0.055 * (high - low))
    lift = max(0.0, low + 0.02 * (high - low) - places[0])  # clear of the numbers under the axis
    for name, y in zip(names, places, strict=True):
        at, color = lines[name]
        axes.text(x, y + lift, f"   {name} {at:.3f}", color=color, fontsize=8, va="center", clip_on=False)
