"""The picture of a race of grids: final loss by the number of control points, twins without splines as lines."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.shared.race import Curve
from bench.shared.race_plot import COLORS, DASHES, STYLE, draw_band, label_ends, style_axes
from pictures.page import matplotlib_defaults

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@matplotlib_defaults()
def draw_losses_by_grid(curves: Sequence[Curve], title: str, where: str) -> Figure:
    """Draw means over seeds, and bands or error bars from the lowest to the highest seed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    families: dict[str, dict[int, list[float]]] = {}
    twins: dict[str, list[float]] = {}
    for curve in curves:
        if curve.splines:
            by_grid = families.setdefault(curve.splines, {})
            by_grid.setdefault(curve.control_points, []).append(curve.losses[-1])
        else:
            twins.setdefault(curve.contestant, []).append(curve.losses[-1])
    grids = sorted({grid for by_grid in families.values() for grid in by_grid})
    figure = Figure(figsize=(8.4, 4.4), facecolor="white")
    figure.text(0.06, 0.94, "Loss by the number of control points", fontsize=13, weight="bold", color=STYLE.ink)
    figure.text(0.06, 0.89, f"{title}. Validation loss, mean and range over seeds", fontsize=9, color=STYLE.muted)
    figure.text(0.06, 0.85, where, fontsize=8, color=STYLE.muted)
    axes = figure.add_axes((0.09, 0.13, 0.62, 0.68))
    style_axes(axes, "control points of a spline")
    axes.set_xscale("log", base=2)
    axes.set_xticks(grids, [str(grid) for grid in grids])
    axes.xaxis.set_minor_locator(NullLocator())
    lines: dict[str, tuple[float, str]] = {}
    for k, (name, losses) in enumerate(twins.items()):
        color = COLORS[(k + 2) % len(COLORS)]
        draw_band(axes, [grids[0], grids[-1]], [losses, losses], color, DASHES[k % 2 + 2])
        lines[name] = statistics.mean(losses), color
    for (name, by_grid), color in zip(families.items(), (STYLE.accent, *COLORS[4:]), strict=False):
        own = sorted(by_grid)
        lines[name] = draw_band(axes, own, [by_grid[grid] for grid in own], color, "-", "o"), color
    label_ends(axes, grids[-1], lines)
    return figure
