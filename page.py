"""A page to draw on: one Axes measured in inches from the top left, pens, and panels that place curves on it.

All curves of a picture go into a few collections of that one Axes. That takes a tenth of the time that an Axes for each
panel would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from spline_views import Array

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

INK, MUTED, RULE, OUTSIDE, AREA = "#1c2128", "#6a737d", "#c9ced6", "#f4f5f7", "#d5dae2"
ACCENT = "#0a5fb4"  # one accent, a blue that all kinds of colour vision tell from grey


@dataclass(frozen=True)
class Panel:
    """A place on the page, in inches, for curves with x in ±x_end and y in ±limit."""

    left: float
    top: float
    width: float
    height: float
    x_end: float
    limit: float

    def at(self, x: Any, y: Any) -> Array:
        """Page coordinates of the points (x, y): (n, 2)."""
        across = self.left + (np.asarray(x) / self.x_end + 1) / 2 * self.width
        down = self.top + (1 - np.asarray(y) / self.limit) / 2 * self.height
        return np.stack(np.broadcast_arrays(across, down), axis=-1)

    def box(self, x0: float, x1: float) -> Array:
        """The full height from x0 to x1, as a polygon."""
        return self.at([x0, x1, x1, x0], [-self.limit, -self.limit, self.limit, self.limit])


class Page:
    """A blank figure of the given size in inches, and pens."""

    def __init__(self, width: float, height: float, show: bool = False) -> None:
        if show:  # only a figure of pyplot's has a window
            import matplotlib.pyplot as plt

            self.figure: Figure = plt.figure(figsize=(width, height))
        else:
            from matplotlib.figure import Figure as BareFigure

            self.figure = BareFigure(figsize=(width, height))
        self.figure.set_facecolor("white")
        self.axes = self.figure.add_axes((0, 0, 1, 1), frameon=False, autoscale_on=False)
        self.axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])

    def text(self, x: float, y: float, text: str, size: float = 7.5, color: str = MUTED, **style: Any) -> None:
        style = {"ha": "left", "va": "center", "linespacing": 1.45, **style}
        self.axes.text(x, y, text, fontsize=size, color=color, **style)

    def lines(self, paths: Sequence[Array], color: Any = INK, width: float = 0.6, **style: Any) -> None:
        from matplotlib.collections import LineCollection

        style = {"capstyle": "round", "joinstyle": "round", **style}
        self.axes.add_collection(LineCollection(list(paths), colors=color, linewidths=width, **style), autolim=False)

    def areas(self, polygons: Sequence[Array], color: str, zorder: float = 0) -> None:
        from matplotlib.collections import PolyCollection

        area = PolyCollection(list(polygons), facecolors=color, linewidths=0, zorder=zorder)
        self.axes.add_collection(area, autolim=False)

    def dots(self, points: Sequence[Array], size: float) -> None:
        x, y = np.concatenate(points).T
        self.axes.plot(x, y, "o", markersize=size, color=ACCENT, markeredgecolor="white", markeredgewidth=0.5, zorder=4)

    def image(self, values: Array, left: float, top: float, width: float, height: float) -> None:
        """`values` in 0 … 1, first row at the top."""
        extent = (left, left + width, top + height, top)
        self.axes.imshow(values, cmap=importance_colors(), vmin=0, vmax=1, extent=extent, aspect="auto", zorder=1)
        self.axes.set(xlim=self.axes.get_xlim(), ylim=self.axes.get_ylim())

    def heading(self, title: str, subtitle: str, left: float) -> None:
        self.text(left, 0.34, title, size=13, color=INK, weight="bold")
        self.text(left, 0.55, subtitle, size=8, va="top")


@cache
def importance_colors() -> Colormap:
    """White through the accent to nearly black, even steps in lightness."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("importance", ["#ffffff", "#b9d3ee", "#5f9ed8", ACCENT, "#06294f"])
