"""The picture of bench/grids.py: final loss against control points, and how it came about for few and for many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.race_plot import COLORS, DASHES, STYLE, draw_band, label_ends, style_axes
from page import matplotlib_defaults

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bench.grids import Entry

SHOWN = 0.75  # of the way from the lowest of the last losses to the highest of the first


@matplotlib_defaults()
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
        lines[method] = draw_band(finals, list(last), list(last.values()), color, "-", "o"), color
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
