"""The picture of bench/layer.py: forward+backward time against G and against N, with a line for each contestant."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.shared.case import Case
from bench.shared.contestants import COMPILED, is_matrices
from bench.shared.result import Result
from pictures.page import STYLES, matplotlib_defaults

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = STYLES["light"]
HOW_TO_READ = "Grey: faster than the measured peaks of arithmetic and memory allow."
USUAL_GRID = 8  # gives the layer as many parameters as a GPT's MLP
LIMIT = "at this machine's peaks"  # of arithmetic and memory: no spline layer can be faster
LABEL_SIZE, LABEL_INCHES = 7.5, 0.135
WIDTH, HEIGHT, LEFT, BESIDE, TOP, BELOW = 3.4, 3.9, 0.75, 2.95, 1.25, 0.95  # inches of a panel and its margins

# Hues that are distinct in all kinds of colour vision. Dashes tell families apart, so that no line depends on its hue.
OURS = {
    **dict.fromkeys(("native", "triton"), STYLE.accent),  # never in one picture: one is for CPUs, the other for GPUs
    "dense": "#3fa7e0",
    "embedding_bag": "#0b8a6b",
    "csr": "#5b51b8",
    "embedding": "#78909c",
    "semi_structured": "#2f6f4f",
}
OTHERS = {
    "efficient-kan": "#c2410c",
    "fast-kan": "#d97706",
    "faster-kan": "#a16207",
    "cheby-kan": "#be185d",
    "lmkan": "#9f1239",
    "flashkat": "#7c2d12",
}
KANDITIONED = "#86198f"
MARKERS = "osD^vPX<>*hpd"


@dataclass(frozen=True)
class PanelPlan:
    """A panel's title, its axis, and the place of each case on that axis. Its cases differ in nothing else."""

    title: str
    x_label: str
    across: dict[Case, int]


def panels(cases: Sequence[Case]) -> list[PanelPlan]:
    """Panels with at least two points, for each dtype: time against G (largest layer) and time against N (usual G)."""
    plans = []
    for dtype in dict.fromkeys(case.dtype for case in cases):
        same = [case for case in cases if case.dtype == dtype]
        largest = max(same, key=lambda case: case.tokens * case.width**2)
        grid = min({case.grid for case in same}, key=lambda grid: abs(grid - USUAL_GRID))
        width = most_tokens(same)
        shape = f"{largest.tokens} tokens of width {largest.width}, {dtype}"
        by_grid = {c: c.grid for c in same if (c.tokens, c.width) == (largest.tokens, largest.width)}
        by_tokens = {c: c.tokens for c in same if (c.grid, c.width) == (grid, width)}
        plans += [
            PanelPlan(shape, "control points G", by_grid),
            PanelPlan(f"G = {grid}, width {width}, {dtype}", "tokens N", by_tokens),
        ]
    return [plan for plan in plans if len(plan.across) > 1]


def most_tokens(cases: Sequence[Case]) -> int:
    """The width that is timed with the largest number of different token counts."""
    widths = {case.width for case in cases}
    return max(widths, key=lambda width: (len({case.tokens for case in cases if case.width == width}), width))


@matplotlib_defaults()
def draw_times(results: Sequence[Result], subtitle: str) -> Figure:
    """Draw each of `panels`, with those of one dtype in a row."""
    from matplotlib.figure import Figure

    plans = panels(list(dict.fromkeys(result.case for result in results)))
    columns = min(2, len({plan.x_label for plan in plans}))
    rows = math.ceil(len(plans) / columns)
    page_width = LEFT + columns * (WIDTH + BESIDE) - 0.3
    page_height = TOP + rows * (HEIGHT + BELOW) - 0.3
    figure = Figure(figsize=(page_width, page_height), facecolor="white")
    heading: dict[str, Any] = {"x": 0.3 / page_width, "ha": "left", "va": "center"}
    figure.text(y=1 - 0.3 / page_height, s="Forward and backward of one layer", fontsize=13, weight="bold", **heading)
    figure.text(y=1 - 0.68 / page_height, s=subtitle, fontsize=8, color=STYLE.muted, linespacing=1.45, **heading)
    styles = line_styles(list(dict.fromkeys(result.contestant for result in results)))
    for k, plan in enumerate(plans):
        row, column = divmod(k, columns)
        x, y = LEFT + column * (WIDTH + BESIDE), page_height - TOP - row * (HEIGHT + BELOW) - HEIGHT
        axes = figure.add_axes((x / page_width, y / page_height, WIDTH / page_width, HEIGHT / page_height))
        draw_panel(axes, plan, results, styles)
    return figure


def line_styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Style of each line: MLP black, ours solid, others dashed, kanditioned dotted; compiled with hollow marks."""
    eager = list(dict.fromkeys(name.removesuffix(COMPILED) for name in names))
    marks = {name: MARKERS[k % len(MARKERS)] for k, name in enumerate(eager)}
    return {name: line_style(name, marks[name.removesuffix(COMPILED)]) for name in names}


def line_style(name: str, mark: str) -> dict[str, Any]:
    base = name.removesuffix(COMPILED)
    if base in OTHERS:
        color, dashes = OTHERS[base], "--"
    elif base.startswith("kanditioned"):
        color, dashes = KANDITIONED, ":"
    elif is_matrices(base):
        color, dashes = STYLE.ink, {"mlp": "-", "swiglu": "--"}.get(base, ":")
    else:
        color, dashes = OURS.get(base, STYLE.muted), "-"
    hollow = {"markerfacecolor": "white"} if name != base else {}
    width = 2.2 if base in ("mlp", "native", "triton") else 1.3
    return {"color": color, "linestyle": dashes, "linewidth": width, "marker": mark, "markersize": 4.5, **hollow}


def draw_panel(axes: Axes, plan: PanelPlan, results: Sequence[Result], styles: Mapping[str, dict[str, Any]]) -> None:
    curves: dict[str, dict[int, float]] = {}
    for result in results:
        if result.case in plan.across:
            x = plan.across[result.case]
            curves.setdefault(result.contestant, {})[x] = result.training.ms
            if not is_matrices(result.contestant):
                curves.setdefault(LIMIT, {})[x] = result.training.limit_ms
    times = [ms for curve in curves.values() for ms in curve.values()]
    style_axes(axes, plan, min(times) / 1.5, max(times) * 1.4)
    for name, curve in curves.items():
        points = sorted(curve.items())
        if name == LIMIT:
            axes.fill_between([x for x, _ in points], [ms for _, ms in points], color=STYLE.area, linewidth=0, zorder=1)
        else:
            axes.plot(*zip(*points, strict=True), **styles[name], zorder=3)
    label_ends(axes, {name: max(curve.items()) for name, curve in curves.items()}, styles)


def style_axes(axes: Axes, plan: PanelPlan, floor: float, ceiling: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set(xscale="log", yscale="log", ylim=(floor, ceiling), xlabel=plan.x_label, ylabel="milliseconds")
    ticks = sorted(set(plan.across.values()))
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title(plan.title, loc="left", fontsize=9.5, color=STYLE.ink, weight="bold")
    axes.tick_params(colors=STYLE.muted, labelsize=8, length=0)
    axes.grid(axis="y", color=STYLE.rule, linewidth=0.5)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=STYLE.muted, fontsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(STYLE.rule)


def label_ends(axes: Axes, ends: Mapping[str, tuple[int, float]], styles: Mapping[str, dict[str, Any]]) -> None:
    """Write the name of each line beside its last point, moved up or down where names would overlap."""
    floor, ceiling = np.log(axes.get_ylim())
    heights = [float((np.log(ms) - floor) / (ceiling - floor)) for _, ms in ends.values()]
    for (name, end), place in zip(ends.items(), moved_apart(heights, LABEL_INCHES / HEIGHT), strict=True):
        color = styles[name]["color"] if name in styles else STYLE.muted
        leader = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 2, "shrinkB": 4, "relpos": (0, 0.5)}
        axes.annotate(
            name,
            xy=end,
            xytext=(1.07, place),
            textcoords="axes fraction",
            fontsize=LABEL_SIZE,
            color=color,
            va="center",
            arrowprops=leader,
        )


def moved_apart(heights: Sequence[float], distance: float) -> list[float]:
    """The nearest heights in the same order that are at least `distance` apart."""
    order = sorted(range(len(heights)), key=lambda k: heights[k])
    groups: list[list[float]] = []  # neighbours that touch; for each, where it would put the lowest of its group
    for rank, k in enumerate(order):
        groups.append([heights[k] - rank * distance])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    lowest = [float(np.mean(group)) for group in groups for _ in group]
    return [lowest[order.index(k)] + order.index(k) * distance for k in range(len(heights))]
