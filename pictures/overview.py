"""The overview of a model, one row per layer: its most curved splines and how curvature is distributed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pictures.page import STYLES, Page, Panel, Style, matplotlib_defaults
from pictures.sheets import capitalized, draw_edge_label, draw_splines, draw_tick_labels
from splines.grid import Array
from splines.snapshot import VISIBLE, Snapshot
from splines.views import HEAT_MAP_SIZE, LayerView, edge_importance, max_pool, most_important_first

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@matplotlib_defaults()
def draw_overview(
    layers: Sequence[LayerView], title: str, limit: float, importance_limit: float, style: Style = STYLES["light"]
) -> Figure:
    """Draw the model in one picture, one row per layer.

    A row shows the three most curved splines, a heat map of curvature, and a histogram of how curved the splines are.
    The y axes are ±`limit`; the colours of the heat maps end at `importance_limit`.
    """
    left, width, gap, height, row_height, top = 1.72, 1.6, 0.1, 1.707, 1.95, 1.72
    map_left = left + 3 * (width + gap) + 0.4
    share_left = map_left + height + 0.45
    page = Page(share_left + width + 0.35, top + len(layers) * row_height + 0.3, style)
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
        page.lines([np.array([*corners, corners[0]])], page.style.rule, zorder=2)
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
        page.text(x, top - 0.58, name, size=9.5, color=page.style.ink, weight="bold", va="baseline")
        page.text(x, top - 0.48, reading, size=7, va="top")


def draw_layer_label(page: Page, view: LayerView, x: float, y: float) -> None:
    block, _, place = view.name.partition(", ")
    page.text(x, y + 0.09, capitalized(block), size=10.5, color=page.style.ink, weight="bold")
    facts = f"{view.in_features} → {view.out_features}"
    if not math.isnan(view.outside):
        facts += f"\n{100 * view.outside:.1f} % of\nactivations\noff the grid"
    page.text(x, y + 0.26, f"{place}\n" * bool(place) + facts, va="top")


def draw_curved_shares(page: Page, view: LayerView, panel: Panel, tallest: float, is_last: bool) -> None:
    """Draw the histogram of the splines' curved shares, in a panel with axes ±1, and the layer's share as a number."""
    edges = np.linspace(-1, 1, len(view.curved_shares) + 1)
    tops = np.repeat(1.2 * view.curved_shares / tallest - 1, 2)
    outline = panel.at(np.repeat(edges, 2), np.concatenate([[-1], tops, [-1]]))
    page.areas([panel.box(-1, 1)], page.style.outside)
    page.areas([outline], page.style.shares, zorder=1)
    page.text(
        panel.left + 0.07,
        panel.top + 0.22,
        f"{100 * view.curved:.0f} %",
        size=15,
        color=page.style.accent,
        weight="bold",
    )
    if is_last:
        for x, label, align in ((-1, "straight", "left"), (1, "curved", "right")):
            across, down = panel.at(x, -1)
            page.text(across, down + 0.16, label, ha=align, va="baseline")


def draw_color_scale(page: Page, x: float, y: float, width: float, limit: float) -> None:
    """Draw the colour scale from 0 to `limit`, in which colours follow the square root."""
    page.image(np.sqrt(np.linspace(0, 1, 128))[None], x + 0.15, y, width - 0.6, 0.07)
    page.text(x, y + 0.035, "0")
    page.text(x + width, y + 0.035, f"≥ {limit:g}", ha="right")


def curvature_map(snapshot: Snapshot, style: Style = STYLES["light"]) -> Array:
    """An RGB image (rows, columns, 3), in bytes, of the importance of a layer's splines, the most curved first."""
    importance = max_pool(most_important_first(edge_importance(snapshot)), HEAT_MAP_SIZE)
    strength = np.sqrt(importance / (importance.max() or 1.0))
    stops = np.array([[int(color[k : k + 2], 16) for k in (1, 3, 5)] for color in style.ramp])
    places = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(strength, places, stops[:, k]) for k in range(3)], axis=-1).astype(np.uint8)
