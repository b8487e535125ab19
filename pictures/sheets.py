"""Draws splines: one large spline, a sheet of panels, or a contact sheet of a whole layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pictures.page import STYLES, Page, Panel, Style, matplotlib_defaults, ramp
from splines.choice import Features, chosen_splines
from splines.grid import Array
from splines.snapshot import VISIBLE, Snapshot
from splines.views import SplineView, edge_importance, view_splines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
SHEET_SPLINES, SHEET_COLUMNS = 12, 4
GRID_FEATURES = 8  # layers with at most this many inputs and outputs show all splines as panels
MAX_PANELS = 64  # on a sheet of named splines
HOW_TO_READ = (
    "Across: the activation; up: what it adds to the output. Label: input → output feature. Dots: control points.\n"
    "Dashes on grey ground: beyond the grid the spline goes on straight."
)
HOW_TO_READ_AREA = " Grey area: where the activations lie."
HOW_TO_READ_CONTACT = "Inputs down, outputs across; the darker a spline, the more its curvature matters."


def nice_limit(value: float) -> float:
    """The smallest of … 0.1, 0.2, 0.5, 1, 2, 5 … that is at least `value`; 0.1 for 0."""
    if not value > 0:
        return 0.1
    exponent = math.floor(math.log10(value)) - 1  # one lower than necessary, because log10 is inexact
    ladder = (float(f"{digit}e{exponent + k}") for k in range(4) for digit in (1, 2, 5))
    return next(step for step in ladder if step >= value)


def needed_limit(splines: Sequence[SplineView]) -> float:
    """The largest absolute control point."""
    return max((float(np.abs(spline.control_points).max()) for spline in splines), default=0.0)


@matplotlib_defaults()
def draw_layer_sheet(
    views: Sequence[SplineView],
    title: str,
    limit: float,
    columns: int = SHEET_COLUMNS,
    style: Style = STYLES["light"],
    show: bool = False,
) -> Figure:
    """Draw `views` as panels, row by row, all with the same y axis, ±limit."""
    rows = max(1, math.ceil(len(views) / columns))
    width, height, gap, left, top = 2.05, 1.42, 0.16, 0.75, 1.22
    page_width = max(left + columns * (width + gap) + 0.25, 7.2)
    page = Page(page_width, top + rows * (height + gap) + 0.42, style, show)
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


@matplotlib_defaults()
def draw_spline(view: SplineView, title: str, style: Style = STYLES["light"], show: bool = False) -> Figure:
    """Draw one large spline, with labelled axes."""
    left, top, width, height = 0.95, 1.22, 5.9, 3.5
    page = Page(left + width + 0.35, top + height + 0.75, style, show)
    page.heading(title, HOW_TO_READ + HOW_TO_READ_AREA * bool(view.histogram.any()), left)
    panel = Panel(left, top, width, height, VISIBLE * view.spline_width, nice_limit(needed_limit([view])))
    draw_tick_labels(page, panel, view.spline_width / 2, left=True, bottom=True)
    page.text(left + width / 2, top + height + 0.42, f"activation of input feature {view.input}", 8.5, ha="center")
    page.text(left - 0.7, top + height / 2, f"added to output feature {view.output}", 8.5, ha="center", rotation=90)
    draw_splines(page, [panel], [view], 2.4)
    return page.figure


def draw_edge_label(page: Page, panel: Panel, view: SplineView, size: float, with_layer: bool = False) -> None:
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.5, foreground=page.style.paper, alpha=0.85)]  # legible in front of a curve
    text = f"layer {view.layer}, " * with_layer + f"{view.input} → {view.output}"
    page.text(panel.left + 0.08, panel.top + 0.13, text, size, page.style.ink, path_effects=halo, zorder=6)


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
    """Draw each view in its panel: background, histogram, zero line, curve and control points."""
    pairs = list(zip(panels, views, strict=True))
    if not pairs:
        return
    ends = [(panel, view.spline_width / 2) for panel, view in pairs]
    page.areas([panel.box(s * end, s * panel.x_end) for panel, end in ends for s in (-1, 1)], page.style.outside)
    page.areas([histogram_area(panel, view) for panel, view in pairs], page.style.area, zorder=1)
    page.lines([panel.at([-panel.x_end, panel.x_end], 0) for panel in panels], page.style.rule, zorder=2)
    page.lines(
        [panel.at([s * end] * 2, [-panel.limit, panel.limit]) for panel, end in ends for s in (-1, 1)],
        page.style.rule,
        linestyles=(0, (1, 2)),
        zorder=2,
    )
    beyond = [panel.at(*line) for panel, view in pairs for line in extrapolations(view, panel.x_end, panel.limit)]
    page.lines(beyond, page.style.accent, line_width * 0.7, linestyles=(0, (2.2, 2)), capstyle="butt", zorder=3)
    curves = [panel.at(view.grid.knots(), view.control_points) for panel, view in pairs]
    page.lines(curves, page.style.accent, line_width, zorder=3)
    if len(views[0].control_points) <= 40:  # more would hide the curve
        page.dots(curves, 2.4 * line_width)


def histogram_area(panel: Panel, view: SplineView) -> Array:
    """The outline of the view's histogram, its peak at six tenths of the panel's height."""
    edges = np.linspace(-panel.x_end, panel.x_end, len(view.histogram) + 1)
    tops = view.histogram * (1.2 * panel.limit / max(float(view.histogram.max()), 1e-12)) - panel.limit
    x = np.repeat(edges, 2)
    # Down to the floor at both ends.
    y = np.concatenate([[-panel.limit], np.repeat(tops, 2), [-panel.limit]])
    return panel.at(x, y)


def extrapolations(view: SplineView, x_end: float, limit: float) -> list[tuple[Array, Array]]:
    """The straight lines beyond the grid on both sides, up to the panel's edge: x (2,) and y (2,) of each."""
    knots, values = view.grid.knots(), view.control_points
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


@matplotlib_defaults()
def draw_contact_sheet(
    control_points: Array, importance: Array, title: str, style: Style = STYLES["light"], show: bool = False
) -> Figure:
    """Draw every spline of a layer, inputs down and outputs across: control_points (I, G, O), importance (I, O)."""
    rows, knots, columns = control_points.shape
    cell = max(0.04, min(1.0, 14 / max(rows, columns)))  # inches
    left, top = 0.75, 1.5
    page = Page(max(left + columns * cell + 0.35, 7.2), top + rows * cell + 0.35, style, show)
    values = control_points - control_points.mean(1, keepdims=True)
    limit = float(np.quantile(np.abs(values), 0.97)) or 1.0
    page.heading(
        title, f"{HOW_TO_READ_CONTACT}\nCells span ±{limit:.2g} around each mean; larger values are cut.", left
    )
    stripe = cell * np.array([(0, 0), (1, 0), (1, rows), (0, rows)])
    page.areas([stripe + np.array([left + o * cell, top]) for o in range(0, columns, 2)], page.style.outside)
    x = left + cell * (np.arange(columns)[:, None] + 0.08 + 0.84 * np.linspace(0, 1, knots))  # (O, G)
    down = 0.5 - 0.45 * np.clip(values / limit, -1, 1).transpose(0, 2, 1)  # (I, O, G), in cells
    y = top + cell * (np.arange(rows)[:, None, None] + down)
    paths = np.stack(np.broadcast_arrays(x, y), axis=-1).reshape(-1, knots, 2)  # (I, O, G, 2) → (I·O, G, 2)
    strength = np.sqrt(importance.ravel() / (importance.max() or 1.0))
    page.lines(list(paths), ramp(style)(0.15 + 0.85 * strength), max(0.4, min(1.5, 6 * cell)), zorder=3)
    step = next(s for s in (1, 2, 4, 8, 16) if s * cell >= 0.25)
    for i in range(0, rows, step):
        page.text(left - 0.08, top + (i + 0.5) * cell, str(i), ha="right")
    for o in range(0, columns, step):
        page.text(left + (o + 0.5) * cell, top - 0.1, str(o), ha="center")
    return page.figure


def draw_snapshot(
    snapshot: Snapshot,
    inputs: Features = None,
    outputs: Features = None,
    everything: bool = False,
    count: int = SHEET_SPLINES,
    heading: str = "",
    style: Style = STYLES["light"],
    show: bool = False,
    limit: float = 0.0,
) -> Figure:
    """Draw the named splines, all splines, or the `count` most curved ones; `heading` goes before the title.

    The y axis of a sheet is at least ±`limit`, so that sheets of several steps are comparable. Raises ValueError for a
    feature that is not there, and for more named splines than fit on a sheet.
    """
    if everything and (inputs is not None or outputs is not None):
        raise ValueError("everything=True draws all splines; leave out inputs and outputs")
    importance = edge_importance(snapshot)
    if everything and max(importance.shape) > GRID_FEATURES:
        title = f"{heading}All {importance.size:,} splines"
        return draw_contact_sheet(snapshot.control_points, importance, title, style, show)
    all_of_them = everything or (inputs is not None and outputs is not None)
    edges = chosen_splines(snapshot, inputs, outputs, None if all_of_them else count, importance)
    if len(edges) > MAX_PANELS and all_of_them:
        raise ValueError(f"inputs and outputs name {len(edges)} splines; at most {MAX_PANELS} fit on a sheet")
    title = f"{len(edges)} splines" if all_of_them else f"The {len(edges)} most curved splines"
    columns = min(len({output for _, output in edges}), GRID_FEATURES) if all_of_them else SHEET_COLUMNS
    views = view_splines(snapshot, edges, importance)
    if len(views) == 1:
        return draw_spline(views[0], f"{heading}Spline {views[0].input} → {views[0].output}", style, show)
    return draw_layer_sheet(views, heading + title, max(limit, nice_limit(needed_limit(views))), columns, style, show)


def capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]
