"""The picture of a race: validation loss against steps and training time, and final loss against parameters."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bench.shared.layer_plot import moved_apart
from bench.shared.race import Curve
from pictures.page import STYLES, matplotlib_defaults

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = STYLES["light"]
COLORS = (STYLE.ink, STYLE.accent, "#c2410c", "#0b8a6b", "#86198f", "#a16207", "#5b51b8", "#3fa7e0")
DASHES = ("-", "-", "--", "-.", ":", "--", "-.", ":")
SHOWN = 0.35  # the share of the losses' range, from the lowest up, that is drawn; higher up all are alike


@matplotlib_defaults()
def draw_race(curves: Sequence[Curve], title: str, where: str) -> Figure:
    """Draw means over seeds as lines, and bands from the lowest to the highest seed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(curve.contestant for curve in curves))
    styles = {name: (COLORS[k % len(COLORS)], DASHES[k % len(DASHES)]) for k, name in enumerate(names)}
    figure = Figure(figsize=(12.6, 4.3), facecolor="white")
    figure.text(0.04, 0.94, title, fontsize=13, weight="bold", color=STYLE.ink)
    figure.text(0.04, 0.885, f"Validation loss, mean and range over seeds. {where}", fontsize=8, color=STYLE.muted)
    steps, seconds, sizes = (figure.add_axes((x, 0.14, w, 0.64)) for x, w in ((0.05, 0.25), (0.45, 0.25), (0.77, 0.2)))
    lowest, last_of_all = (end(curve.losses[-1] for curve in curves) for end in (min, max))
    highest = max(curve.losses[0] for curve in curves)
    ceiling = max(lowest + SHOWN * (highest - lowest), lowest + 1.2 * (last_of_all - lowest))
    for axes, label in ((steps, "steps"), (seconds, "seconds of training"), (sizes, "parameters, millions")):
        style_axes(axes, label)
    for axes in (steps, seconds):
        axes.set_ylim(lowest - 0.03 * (ceiling - lowest), ceiling)
    lines: dict[str, tuple[float, str]] = {}
    for name in names:
        color, dashes = styles[name]
        own = [curve for curve in curves if curve.contestant == name]
        losses = list(zip(*(curve.losses for curve in own), strict=True))
        times = [statistics.mean(at) for at in zip(*(curve.seconds for curve in own), strict=True)]
        for axes, x in ((steps, own[0].steps), (seconds, times)):
            lines[name] = draw_band(axes, x, losses, color, dashes), color
        last = [curve.losses[-1] for curve in own]
        sizes.plot([own[0].parameters / 1e6] * len(last), last, "o", color=color, markersize=4.5, alpha=0.75)
    sizes.xaxis.set_major_locator(MaxNLocator(3))
    label_ends(steps, max(curve.steps[-1] for curve in curves), lines)
    return figure


def style_axes(axes: Axes, label: str) -> None:
    axes.set_xlabel(label, color=STYLE.muted, fontsize=8)
    axes.tick_params(colors=STYLE.muted, labelsize=8, length=0)
    axes.grid(axis="y", color=STYLE.rule, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.margins(x=0.12 if label.startswith("parameters") else 0.02)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(STYLE.rule)


def draw_band(
    axes: Axes, x: Sequence[float], losses: Sequence[Sequence[float]], color: str, dashes: str, marker: str = ""
) -> float:
    """Draw one line and its band. `losses` has those of all seeds for each x. Returns the last mean."""
    means = [statistics.mean(at) for at in losses]
    axes.plot(x, means, color=color, linestyle=dashes, linewidth=1.6, marker=marker, markersize=3.5)
    axes.fill_between(x, [min(at) for at in losses], [max(at) for at in losses], color=color, alpha=0.13, lw=0)
    return means[-1]


def label_ends(axes: Axes, x: int, lines: Mapping[str, tuple[float, str]]) -> None:
    """Write each line's name and last loss at its right end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    names = sorted(lines, key=lambda name: lines[name][0])
    places = moved_apart([lines[name][0] for name in names], 0.06 * (high - low))
    lift = max(0.0, low + 0.02 * (high - low) - places[0])  # clear of the numbers under the axis
    for name, y in zip(names, places, strict=True):
        at, color = lines[name]
        axes.text(x, y + lift, f"  {name} {at:.3f}", color=color, fontsize=8, va="center", clip_on=False)
