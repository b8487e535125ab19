"""The drawing of splines: a sheet of panels, a contact sheet of a whole layer, an overview of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

from page import ACCENT, AREA, INK, OUTSIDE, RULE, Page, Panel, importance_colors
from spline_views import (
    VISIBLE,
    Array,
    LayerView,
    SplineView,
    as_rows,
    edge_importance,
    to_numpy,
    varied_top,
    view_splines,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from kan_layer import KANLayer

DPI = 150
SHEET_SPLINES, SHEET_COLUMNS = 12, 4
GRID_FEATURES = 8  # up to so many inputs and outputs, all splines are drawn as panels
MOST_PAIRS = 64  # panels on a sheet of named splines
HOW_TO_READ = (
    "Across: the activation; up: what it adds to the output. Label: input → output feature. Dots: control points.\n"
    "Dashes on grey ground: beyond the grid the spline goes on straight."
)
HOW_TO_READ_AREA = " Grey area: where the activations lie."
HOW_TO_READ_CONTACT = "Inputs down, outputs across; the darker a spline, the more its curvature matters."


def nice_limit(value: float) -> float:
    """The least of … 0.1, 0.2, 0.5, 1, 2, 5 … that is not below `value`; 0.1 for 0."""
    if not value > 0:
        return 0.1
    exponent = math.floor(math.log10(value)) - 1  # one lower than needed: log10 is inexact
    ladder = (float(f"{digit}e{exponent + k}") for k in range(4) for digit in (1, 2, 5))
    return next(step for step in ladder if step >= value)


def needed_limit(splines: Sequence[SplineView]) -> float:
    """The largest absolute control point."""
    return max((float(np.abs(spline.control_points).max()) for spline in splines), default=0.0)


def draw_layer_sheet(
    views: Sequence[SplineView], title: str, limit: float, columns: int = SHEET_COLUMNS, show: bool = False
) -> Figure:
    """Small multiples of `views`, row by row, all with the same axes: y in ±limit."""
    rows = max(1, math.ceil(len(views) / columns))
    width, height, gap, left, top = 2.05, 1.42, 0.16, 0.75, 1.22
    page_width = max(left + columns * (width + gap) + 0.25, 7.2)
    page = Page(page_width, top + rows * (height + gap) + 0.42, show)
    has_area = any(view.histogram.any() for view in views)
    page.heading(title, HOW_TO_READ + HOW_TO_READ_AREA * has_area, left)
    panels = []
    for k, view in enumerate(views):
        row, column = divmod(k, columns)
        x, y = left + column * (width + gap), top + row * (height + gap)
        panels.append(Panel(x, y, width, height, VISIBLE * view.spline_width, limit))
        is_lowest = k + columns >= len(views)
        draw_tick_labels(page, panels[-1], view.spline_width / 2, left=column == 0, bottom=is_lowest)
        draw_edge_label(page, panels[-1], view, 8)
    draw_splines(page, panels, views)
    return page.figure


def draw_edge_label(page: Page, panel: Panel, view: SplineView, size: float) -> None:
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.5, foreground="white", alpha=0.85)]  # a curve may pass behind
    text = f"{view.input} → {view.output}"
    page.text(panel.left + 0.08, panel.top + 0.13, text, size, INK, path_effects=halo, zorder=6)


def draw_tick_labels(page: Page, panel: Panel, grid_end: float, left: bool, bottom: bool) -> None:
    if bottom:
        for x in (-grid_end, 0, grid_end):
            across, down = panel.at(x, -panel.limit)
            page.text(across, down + 0.12, f"{x:g}".replace("-", "−"), ha="center")
    if left:
        for y in (-panel.limit, 0, panel.limit):
            across, down = panel.at(-panel.x_end, y)
            page.text(across - 0.08, down, f"{y:g}".replace("-", "−"), ha="right")


def draw_splines(page: Page, panels: Sequence[Panel], views: Sequence[SplineView], line_width: float = 1.7) -> None:
    """Each view in its panel: histogram, the ground beyond the grid, zero, the curve, its control points."""
    pairs = list(zip(panels, views, strict=True))
    if not pairs:
        return
    ends = [(panel, view.spline_width / 2) for panel, view in pairs]
    page.areas([panel.box(s * end, s * panel.x_end) for panel, end in ends for s in (-1, 1)], OUTSIDE)
    page.areas([histogram_area(panel, view) for panel, view in pairs], AREA, zorder=1)
    page.lines([panel.at([-panel.x_end, panel.x_end], 0) for panel in panels], RULE, zorder=2)
    page.lines(
        [panel.at([s * end] * 2, [-panel.limit, panel.limit]) for panel, end in ends for s in (-1, 1)],
        RULE,
        linestyles=(0, (1, 2)),
        zorder=2,
    )
    beyond = [panel.at(*line) for panel, view in pairs for line in extrapolations(view, panel.x_end, panel.limit)]
    page.lines(beyond, ACCENT, line_width * 0.7, linestyles=(0, (2.2, 2)), capstyle="butt", zorder=3)
    curves = [panel.at(view_knots(view), view.control_points) for panel, view in pairs]
    page.lines(curves, ACCENT, line_width, zorder=3)
    if len(views[0].control_points) <= 40:  # more would hide the curve
        page.dots(curves, 2.4 * line_width)


def view_knots(view: SplineView) -> Array:
    return np.linspace(-view.spline_width / 2, view.spline_width / 2, len(view.control_points))


def histogram_area(panel: Panel, view: SplineView) -> Array:
    """The outline of the view's histogram, its peak at six tenths of the panel's height."""
    edges = np.linspace(-panel.x_end, panel.x_end, len(view.histogram) + 1)
    tops = view.histogram * (1.2 * panel.limit / max(float(view.histogram.max()), 1e-12)) - panel.limit
    x = np.concatenate([np.repeat(edges, 2)])  # down to the floor at both ends
    y = np.concatenate([[-panel.limit], np.repeat(tops, 2), [-panel.limit]])
    return panel.at(x, y)


def extrapolations(view: SplineView, x_end: float, limit: float) -> list[tuple[Array, Array]]:
    """The straight continuations on both sides, up to the panel's edge: x (2,) and y (2,) of each."""
    knots, values = view_knots(view), view.control_points
    lines = []
    for end, inner in ((0, 1), (-1, -2)):
        slope = float(values[end] - values[inner]) / float(knots[end] - knots[inner])
        length = x_end - view.spline_width / 2
        rise = slope * length * np.sign(knots[end])
        room = limit - np.sign(rise) * values[end]
        cut = min(1.0, max(0.0, room / abs(rise))) if rise else 1.0
        x = knots[end] + np.array([0, cut * length * np.sign(knots[end])])
        lines.append((x, values[end] + np.array([0, cut * rise])))
    return lines


def draw_contact_sheet(control_points: Array, importance: Array, title: str, show: bool = False) -> Figure:
    """Every spline of a layer, control points (I, G, O) and importance (I, O): inputs down, outputs across."""
    rows, knots, columns = control_points.shape
    cell = max(0.04, min(1.0, 14 / max(rows, columns)))  # inches
    left, top = 0.75, 1.5
    page = Page(max(left + columns * cell + 0.35, 7.2), top + rows * cell + 0.35, show)
    values = control_points - control_points.mean(1, keepdims=True)
    limit = float(np.quantile(np.abs(values), 0.97)) or 1.0
    page.heading(
        title, f"{HOW_TO_READ_CONTACT}\nCells span ±{limit:.2g} around each mean; what is larger is cut.", left
    )
    stripe = cell * np.array([(0, 0), (1, 0), (1, rows), (0, rows)])
    page.areas([stripe + np.array([left + o * cell, top]) for o in range(0, columns, 2)], OUTSIDE)
    x = left + cell * (np.arange(columns)[:, None] + 0.08 + 0.84 * np.linspace(0, 1, knots))  # (O, G)
    down = 0.5 - 0.45 * np.clip(values / limit, -1, 1).transpose(0, 2, 1)  # (I, O, G), in cells
    y = top + cell * (np.arange(rows)[:, None, None] + down)
    paths = np.stack(np.broadcast_arrays(x, y), axis=-1).reshape(-1, knots, 2)  # (I, O, G, 2) → (I·O, G, 2)
    strength = np.sqrt(importance.ravel() / (importance.max() or 1.0))
    page.lines(list(paths), importance_colors()(0.15 + 0.85 * strength), max(0.4, min(1.5, 6 * cell)), zorder=3)
    step = next(s for s in (1, 2, 4, 8, 16) if s * cell >= 0.25)
    for i in range(0, rows, step):
        page.text(left - 0.08, top + (i + 0.5) * cell, str(i), ha="right")
    for o in range(0, columns, step):
        page.text(left + (o + 0.5) * cell, top - 0.1, str(o), ha="center")
    return page.figure


def draw_overview(layers: Sequence[LayerView], title: str, limit: float, importance_limit: float) -> Figure:
    """The model in one picture, a row a layer: three splines, where curvature lies, how curved the splines are.

    `limit` is the y axis's, as everywhere; `importance_limit` is where the heat maps' colours end.
    """
    left, width, gap, height, row_height, top = 1.72, 1.6, 0.1, 1.707, 1.95, 1.72
    map_left = left + 3 * (width + gap) + 0.4
    share_left = map_left + height + 0.45
    page = Page(share_left + width + 0.35, top + len(layers) * row_height + 0.3)
    page.heading(title, overview_summary(layers), 0.35)
    draw_column_heads(page, (left, map_left, share_left), top)
    tallest = max((float(view.curved_shares.max()) for view in layers), default=1.0)
    panels, splines = [], []
    for row, view in enumerate(layers):
        y, is_last = top + row * row_height, row == len(layers) - 1
        draw_layer_label(page, view, 0.35, y)
        for column, spline in enumerate(view.splines[:3]):
            panel = Panel(left + column * (width + gap), y, width, height, VISIBLE * spline.spline_width, limit)
            panels.append(panel)
            splines.append(spline)
            draw_tick_labels(page, panel, spline.spline_width / 2, left=column == 0, bottom=is_last)
            draw_edge_label(page, panel, spline, 7.5)
        page.image(np.sqrt(np.minimum(view.heat_map / importance_limit, 1)), map_left, y, height, height)
        corners = [(map_left, y), (map_left, y + height), (map_left + height, y + height), (map_left + height, y)]
        page.lines([np.array([*corners, corners[0]])], RULE, zorder=2)
        draw_curved_shares(page, view, Panel(share_left, y, width, height, 1, 1), tallest, is_last)
    draw_splines(page, panels, splines)
    draw_color_scale(page, map_left, top + len(layers) * row_height - 0.17, height, importance_limit)
    return page.figure


def overview_summary(layers: Sequence[LayerView]) -> str:
    splines = sum(view.in_features * view.out_features for view in layers)
    curved = float(np.mean([view.curved for view in layers])) if layers else 0.0
    straight = f"Straight lines would explain {100 * (1 - curved):.0f} % of their variation."
    return (
        f"{splines:,} learnable piecewise-linear functions in {len(layers)} layers. "
        f"{straight if curved > 1e-6 else 'All are still straight lines.'}"
    )


def draw_column_heads(page: Page, lefts: tuple[float, float, float], top: float) -> None:
    heads = (
        ("The most curved", "Label: input → output feature. Dots: control points.\nGrey: where the activations lie."),
        ("Where curvature lies", "Input features down, output features\nacross, the most curved first."),
        ("How curved they are", "All splines by the share of their\nvariation no straight line makes."),
    )
    for x, (name, reading) in zip(lefts, heads, strict=True):
        page.text(x, top - 0.58, name, size=9.5, color=INK, weight="bold", va="baseline")
        page.text(x, top - 0.48, reading, size=7, va="top")


def draw_layer_label(page: Page, view: LayerView, x: float, y: float) -> None:
    page.text(x, y + 0.09, f"Layer {view.layer}", size=10.5, color=INK, weight="bold")
    facts = f"{view.in_features} → {view.out_features}"
    if not math.isnan(view.outside):
        facts += f"\n{100 * view.outside:.1f} % of\nactivations\noff the grid"
    page.text(x, y + 0.26, facts, va="top")


def draw_curved_shares(page: Page, view: LayerView, panel: Panel, tallest: float, is_last: bool) -> None:
    """The distribution of the splines' curved share of variation, in a panel with axes ±1; the layer's as a number."""
    edges = np.linspace(-1, 1, len(view.curved_shares) + 1)
    tops = np.repeat(1.2 * view.curved_shares / tallest - 1, 2)
    outline = panel.at(np.repeat(edges, 2), np.concatenate([[-1], tops, [-1]]))
    page.areas([panel.box(-1, 1)], OUTSIDE)
    page.areas([outline], "#9fc0e4", zorder=1)
    page.text(panel.left + 0.07, panel.top + 0.22, f"{100 * view.curved:.0f} %", size=15, color=ACCENT, weight="bold")
    if is_last:
        for x, label, align in ((-1, "straight", "left"), (1, "curved", "right")):
            across, down = panel.at(x, -1)
            page.text(across, down + 0.16, label, ha=align, va="baseline")


def draw_color_scale(page: Page, x: float, y: float, width: float, limit: float) -> None:
    """A strip from 0 to `limit`; the colours are those of the square root."""
    page.image(np.sqrt(np.linspace(0, 1, 128))[None], x + 0.15, y, width - 0.6, 0.07)
    page.text(x, y + 0.035, "0")
    page.text(x + width, y + 0.035, f"≥ {limit:g}", ha="right")


def plot_layer(
    layer: KANLayer,
    inputs: Sequence[int] | None = None,
    outputs: Sequence[int] | None = None,
    everything: bool = False,
    activations: Tensor | None = None,
    save_path: str | PathLike[str] | None = None,
    show: bool = False,
    title: str = "",
) -> Figure:
    """Draw splines of one layer; see `KANLayer.plot`. `title` goes before the sheet's own.

    Raises ValueError for a feature that is not there, for more than MOST_PAIRS named pairs, and for activations that
    are not finite or not (*, in_features).
    """
    ins, outs = (
        chosen_features("inputs", inputs, layer.in_features),
        chosen_features("outputs", outputs, layer.out_features),
    )
    both_named = inputs is not None and outputs is not None
    if both_named and len(ins) * len(outs) > MOST_PAIRS:
        raise ValueError(
            f"inputs and outputs name {len(ins)} x {len(outs)} splines; at most {MOST_PAIRS} fit on a sheet"
        )
    if everything and (inputs is not None or outputs is not None):
        raise ValueError("everything=True draws all splines; leave out inputs and outputs")
    rows = as_rows(layer, activations)
    importance = edge_importance(layer, rows)
    if everything and max(importance.shape) > GRID_FEATURES:
        title += f"All {importance.size:,} splines"
        figure = draw_contact_sheet(to_numpy(layer.control_points()), importance, title, show)
    else:
        if both_named or everything:
            edges = [(i, o) for i in ins for o in outs]
            columns = min(len(outs), GRID_FEATURES)
            title += f"{len(edges)} splines"
        else:
            top = varied_top(importance[np.ix_(ins, outs)], SHEET_SPLINES)
            edges = [(ins[i], outs[o]) for i, o in top]
            columns = SHEET_COLUMNS
            title += f"The {len(edges)} most curved splines"
        views = view_splines(layer, 0, rows, edges, importance)
        figure = draw_layer_sheet(views, title, nice_limit(needed_limit(views)), columns, show)
    if save_path is not None:
        figure.savefig(save_path, dpi=DPI)
    if show:
        import matplotlib.pyplot as plt

        plt.show()
    return figure


def chosen_features(name: str, chosen: Sequence[int] | None, count: int) -> list[int]:
    """`chosen` as a list, all features if None; ValueError naming the argument for one that is not 0 … count - 1."""
    if chosen is None:
        return list(range(count))
    features = [int(feature) for feature in chosen]
    if not features:
        raise ValueError(f"{name} must name at least one feature; got none")
    for feature in features:
        if not 0 <= feature < count:
            raise ValueError(f"{name} must be from 0 to {count - 1}; got {feature}")
    return features
