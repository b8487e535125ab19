"""A page to draw on: one matplotlib Axes, measured in inches from the top left, and panels that place curves on it.

All curves of a picture go into a few collections of that one Axes. This takes a tenth of the time that one Axes per
panel would take.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from splines.grid import Array

if TYPE_CHECKING:
    from matplotlib.collections import LineCollection, PolyCollection
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


@dataclass(frozen=True)
class Style:
    """Colours of a picture: paper, three greys for text and lines, two backgrounds, and one accent.

    The accent is a blue, which people with any kind of colour vision can tell from grey.
    """

    paper: str = "#ffffff"
    ink: str = "#1c2128"
    muted: str = "#6a737d"
    rule: str = "#c9ced6"
    outside: str = "#f4f5f7"
    area: str = "#d5dae2"
    shares: str = "#9fc0e4"
    accent: str = "#0a5fb4"
    ramp: tuple[str, ...] = ("#ffffff", "#b9d3ee", "#5f9ed8", "#0a5fb4", "#06294f")
    """Colours of importance, from none to much, in even steps of lightness."""
    scale: float = 1.0
    """Factor for the sizes of text and lines."""


STYLES = {
    "light": Style(),
    "dark": Style(
        paper="#14171c",
        ink="#e8eaee",
        muted="#98a1ad",
        rule="#3a424d",
        outside="#1b1f26",
        area="#333b46",
        shares="#3f6a96",
        accent="#6cb0f2",
        ramp=("#14171c", "#173a5e", "#2a71b0", "#6cb0f2", "#e3f1ff"),
    ),
    "print": Style(  # only black ink and heavier lines, to be legible after photocopying
        ink="#000000",
        muted="#333333",
        rule="#999999",
        outside="#f2f2f2",
        area="#d0d0d0",
        shares="#8c8c8c",
        accent="#000000",
        ramp=("#ffffff", "#c8c8c8", "#8f8f8f", "#4a4a4a", "#000000"),
        scale=1.15,
    ),
}


def chosen_style(name: str) -> Style:
    """The style with this name. Raises ValueError for an unknown one."""
    if name not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}; got {name!r}")
    return STYLES[name]


@contextmanager
def matplotlib_defaults() -> Iterator[None]:
    """Use matplotlib's default settings, whatever a matplotlibrc, a style or a notebook has chosen.

    It decorates every function that draws or saves, so that pictures look the same everywhere and need no LaTeX.
    """
    from matplotlib import style

    with style.context("default"):
        yield


@dataclass(frozen=True)
class Panel:
    """A rectangle on the page, in inches, for curves with x in ±x_end and y in ±limit."""

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
        """The rectangle from x0 to x1 at full height, as a polygon."""
        return self.at([x0, x1, x1, x0], [-self.limit, -self.limit, self.limit, self.limit])


class Page:
    """A blank figure of the given size in inches, with methods that draw in the colours of `style`."""

    def __init__(self, width: float, height: float, style: Style = STYLES["light"], show: bool = False) -> None:
        self.style = style
        if show:  # only figures made by pyplot have a window
            import matplotlib.pyplot as plt

            self.figure: Figure = plt.figure(figsize=(width, height), FigureClass=notebook_figure())
        else:
            self.figure = notebook_figure()(figsize=(width, height))
        self.figure.set_facecolor(style.paper)
        self.axes = self.figure.add_axes((0, 0, 1, 1), frameon=False, autoscale_on=False)
        self.axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])

    def text(self, x: float, y: float, text: str, size: float = 7.5, color: str = "", **style: Any) -> None:
        style = {"ha": "left", "va": "center", "linespacing": 1.45, **style}
        self.axes.text(x, y, text, fontsize=size * self.style.scale, color=color or self.style.muted, **style)

    def lines(self, paths: Sequence[Array], color: Any = None, width: float = 0.6, **style: Any) -> LineCollection:
        from matplotlib.collections import LineCollection

        style = {"capstyle": "round", "joinstyle": "round", **style}
        colors = self.style.ink if color is None else color
        pen = LineCollection(list(paths), colors=colors, linewidths=width * self.style.scale, **style)
        self.axes.add_collection(pen, autolim=False)
        return pen

    def areas(self, polygons: Sequence[Array], color: str, zorder: float = 0) -> PolyCollection:
        from matplotlib.collections import PolyCollection

        area = PolyCollection(list(polygons), facecolors=color, linewidths=0, zorder=zorder)
        self.axes.add_collection(area, autolim=False)
        return area

    def dots(self, points: Sequence[Array], size: float) -> Line2D:
        x, y = np.concatenate(points).T
        (dots,) = self.axes.plot(
            x,
            y,
            "o",
            markersize=size * self.style.scale,
            color=self.style.accent,
            markeredgecolor=self.style.paper,
            markeredgewidth=0.5,
            zorder=4,
        )
        return dots

    def image(self, values: Array, left: float, top: float, width: float, height: float) -> None:
        """Draw `values` in 0 … 1 as colours of importance, the first row at the top."""
        extent = (left, left + width, top + height, top)
        colors = ramp(self.style)
        self.axes.imshow(values, cmap=colors, vmin=0, vmax=1, extent=extent, aspect="auto", zorder=1)
        self.axes.set(xlim=self.axes.get_xlim(), ylim=self.axes.get_ylim())

    def heading(self, title: str, subtitle: str, left: float) -> None:
        self.text(left, 0.34, title, size=13, color=self.style.ink, weight="bold")
        self.text(left, 0.55, subtitle, size=8, va="top")


@cache
def ramp(style: Style) -> Colormap:
    """The style's colour map of importance, 0 … 1."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("importance", list(style.ramp))


@cache
def notebook_figure() -> type[Figure]:
    """A class of matplotlib figures that a notebook displays even if pyplot is not set up there."""
    from matplotlib.figure import Figure as BareFigure

    class NotebookFigure(BareFigure):
        @matplotlib_defaults()
        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=110)
            return buffer.getvalue()

    return NotebookFigure
