"""Draws functions of two inputs as maps: the value as colour, over the triangles on which it is linear."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pictures.page import STYLES, Style, matplotlib_defaults
from splines.grid import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import TriMesh
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

SHOWN, COLUMNS = 12, 4
SIZE, GAP, LEFT, TOP = 1.55, 0.5, 0.75, 1.25  # inches: a map, between maps, and to the first
HOW_TO_READ = (
    "Across: the feature {}; up: the feature {}. Colour: what it adds to the output.\n"
    "Above each map: input feature → output feature. Shown are the functions furthest from a sum of one of each."
)
DIVERGING = ("#8a3b12", "#e39a6b", "#f7f7f7", "#7fb2dd", "#0a4f96")  # orange below 0, blue above


@dataclass(frozen=True)
class PairView:
    """One function: its values (G, G) at the knots of the first input and the second, and its features."""

    feature: int
    output: int
    values: Array


def interaction(values: Array) -> Array:
    """How far each function is from a sum of two functions of one input each: (…, G, G) → (…).

    The root mean square of what is left after the means over either input are taken away.
    """
    means = values.mean(-1, keepdims=True) + values.mean(-2, keepdims=True) - values.mean((-2, -1), keepdims=True)
    return np.sqrt(np.square(values - means).mean((-2, -1)))


def most_interacting(values: Array, count: int) -> list[PairView]:
    """The `count` functions of a layer's (I, O, G, G) that are furthest from a sum, the furthest first."""
    strength = interaction(values)  # (I, O)
    order = np.argsort(strength, axis=None)[::-1][:count]
    places = zip(*np.unravel_index(order, strength.shape), strict=True)
    return [PairView(int(i), int(o), values[i, o]) for i, o in places]


@matplotlib_defaults()
def draw_maps(
    views: Sequence[PairView], width: float, title: str, axes_names: tuple[str, str], style: Style = STYLES["light"]
) -> Figure:
    """Draw a map for each function, in rows, with the same colours. `axes_names` are those of both inputs."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    rows = max(1, math.ceil(len(views) / COLUMNS))
    page_width, page_height = LEFT + COLUMNS * (SIZE + GAP) + 0.6, TOP + rows * (SIZE + GAP)
    figure = Figure(figsize=(page_width, page_height), facecolor=style.paper)

    def place(x: float, y: float, across: float, down: float) -> Axes:
        """Axes at (x, y) inches from the top left."""
        return figure.add_axes((x / page_width, 1 - (y + down) / page_height, across / page_width, down / page_height))

    left = LEFT / page_width
    figure.text(left, 1 - 0.42 / page_height, title, fontsize=13, weight="bold", color=style.ink)
    how = HOW_TO_READ.format(*axes_names)
    figure.text(left, 1 - 0.88 / page_height, how, fontsize=8, color=style.muted, linespacing=1.4)
    colours = LinearSegmentedColormap.from_list("diverging", DIVERGING)
    limit = max((float(np.abs(view.values).max()) for view in views), default=0.0) or 1.0
    for k, view in enumerate(views):
        row, column = divmod(k, COLUMNS)
        axes = place(LEFT + column * (SIZE + GAP), TOP + row * (SIZE + GAP), SIZE, SIZE)
        shades = draw_map(axes, view.values, width, colours, limit)
        axes.set_title(f"{view.feature} → {view.output}", fontsize=8, color=style.muted, pad=3)
        is_lowest = k + COLUMNS >= len(views)
        axes.tick_params(colors=style.muted, labelsize=7, length=0, labelleft=column == 0, labelbottom=is_lowest)
        for side in axes.spines.values():
            side.set_color(style.rule)
        if k == 0:
            bar = figure.colorbar(shades, cax=place(page_width - 0.6, TOP, 0.1, SIZE))
            bar.ax.tick_params(colors=style.muted, labelsize=7, length=0)
            bar.outline.set_edgecolor(style.rule)
    return figure


def draw_map(axes: Axes, values: Array, width: float, colours: Colormap, limit: float) -> TriMesh:
    """Draw values (G, G) over the grid: the first input across, the second up."""
    from matplotlib.tri import Triangulation

    knots = np.linspace(-width / 2, width / 2, len(values))
    across, up = np.meshgrid(knots, knots, indexing="ij")
    mesh = Triangulation(across.ravel(), up.ravel(), triangles(len(knots)))
    shades = axes.tripcolor(mesh, values.ravel(), shading="gouraud", cmap=colours, vmin=-limit, vmax=limit)
    axes.margins(0)
    axes.set_xticks([-width / 2, 0, width / 2])
    axes.set_yticks([-width / 2, 0, width / 2])
    return shades


def triangles(points: int) -> Array:
    """The corners of the triangles on which functions are linear, as indices of flat (G, G) values: (2·(G-1)², 3)."""
    corner = (np.arange(points - 1)[:, None] * points + np.arange(points - 1)).ravel()
    first = np.stack((corner, corner + points, corner + points + 1), axis=1)
    second = np.stack((corner, corner + 1, corner + points + 1), axis=1)
    return np.concatenate((first, second))
