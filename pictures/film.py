"""A film of splines over the checkpoints of a run, which shows how chosen functions formed."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.errors import UserError
from pictures.page import STYLES, Page, Panel, Style, matplotlib_defaults
from pictures.sheets import draw_edge_label, draw_splines, draw_tick_labels, needed_limit, nice_limit
from splines.snapshot import VISIBLE
from splines.views import SplineView

if TYPE_CHECKING:
    from matplotlib.animation import AbstractMovieWriter


@dataclass(frozen=True)
class Moment:
    """The contents of one frame."""

    step: float
    label: str
    views: Sequence[SplineView]


FORMATS = (".gif", ".png", ".mp4")  # .png: an APNG
COLUMNS = 4
FRAMES_PER_SECOND = 12
BETWEEN = 5  # frames between two checkpoints
HOLD_S = 1.6  # how long the last checkpoint stays
DPI = 100
EVEN_SIZE = "pad=ceil(iw/2)*2:ceil(ih/2)*2"  # the pixel format of MP4 needs even sizes
WIDTH, HEIGHT, GAP, LEFT, TOP = 1.75, 1.22, 0.14, 0.62, 0.92  # sizes and margins of the panels, in inches


@matplotlib_defaults()
def write_film(
    path: Path, frames: Sequence[tuple[int, Sequence[SplineView]]], title: str, style: Style = STYLES["light"]
) -> None:
    """Write a film of (step, splines) pairs, the same splines in each. The suffix of `path` decides the format.

    Between two steps the control points are interpolated; each step may have another grid. Raises UserError for a
    format that cannot be written here.
    """
    limit = max(nice_limit(needed_limit(views)) for _, views in frames)
    keys = [Moment(step, f"step {step:,}", views) for step, views in frames]
    moments = [moment for pair in itertools.pairwise(keys) for moment in between(*pair)]
    moments += [keys[-1]] * (1 + round(HOLD_S * FRAMES_PER_SECOND))
    page = Page(*sheet_size(len(frames[0][1])), style)
    writer = movie_writer(path)
    with writer.saving(page.figure, str(path), DPI):
        drawn: Moment | None = None
        for moment in moments:
            if moment is not drawn:
                draw_frame(page, moment, keys[-1].step, title, limit)
                drawn = moment
            writer.grab_frame(facecolor=style.paper)


def movie_writer(path: Path) -> AbstractMovieWriter:
    from matplotlib.animation import FFMpegWriter, PillowWriter

    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise UserError(f"a film ends in {', '.join(FORMATS)}; got {path}")
    if suffix != ".mp4":
        return PillowWriter(fps=FRAMES_PER_SECOND)
    if shutil.which("ffmpeg") is None:
        raise UserError(f"{path} needs the program ffmpeg, which is not installed; use --output NAME.gif")
    return FFMpegWriter(fps=FRAMES_PER_SECOND, codec="h264", extra_args=["-pix_fmt", "yuv420p", "-vf", EVEN_SIZE])


def between(first: Moment, second: Moment) -> list[Moment]:
    """`first`, and BETWEEN interpolated moments on the way to `second`, labelled as such."""
    moments = [first]
    for k in range(1, BETWEEN + 1):
        share = k / (BETWEEN + 1)
        views = [mixed(old, new, share) for old, new in zip(first.views, second.views, strict=True)]
        step = first.step + share * (second.step - first.step)
        moments.append(Moment(step, f"step {first.step:,} → {second.step:,}", views))
    return moments


def mixed(old: SplineView, new: SplineView, share: float) -> SplineView:
    """The spline at `share` of the way from `old` to `new`, on the grid of `new`."""
    old_values = old.grid.values(old.control_points, new.grid.knots())
    points = (1 - share) * old_values + share * new.control_points
    histogram = (1 - share) * old.histogram + share * new.histogram
    return replace(new, control_points=points, histogram=histogram)


def sheet_size(count: int) -> tuple[float, float]:
    rows, columns = -(-count // COLUMNS), min(count, COLUMNS)
    return max(LEFT + columns * (WIDTH + GAP) + 0.2, 5.2), TOP + rows * (HEIGHT + GAP) + 0.34


def draw_frame(page: Page, moment: Moment, last_step: float, title: str, limit: float) -> None:
    """Clear the page and draw one frame: the title, a bar that shows the time, and the panels."""
    views = moment.views
    several = len({view.layer for view in views}) > 1
    size = page.axes.get_xlim(), page.axes.get_ylim()
    page.axes.clear()
    page.axes.set(xlim=size[0], ylim=size[1], xticks=[], yticks=[], frame_on=False)
    page.text(LEFT, 0.34, title, size=11, color=page.style.ink, weight="bold")
    right = size[0][1] - 0.2
    page.text(right, 0.34, moment.label, size=9.5, ha="right")
    page.lines([np.array([(LEFT, 0.6), (right, 0.6)])], page.style.rule, 1.6)
    share = moment.step / last_step if last_step else 1.0
    page.lines([np.array([(LEFT, 0.6), (LEFT + share * (right - LEFT), 0.6)])], page.style.accent, 1.6, zorder=3)
    panels = []
    for k, view in enumerate(views):
        row, column = divmod(k, COLUMNS)
        x, y = LEFT + column * (WIDTH + GAP), TOP + row * (HEIGHT + GAP)
        panels.append(Panel(x, y, WIDTH, HEIGHT, VISIBLE * view.spline_width, limit))
        draw_tick_labels(page, panels[-1], view.spline_width / 2, left=column == 0, bottom=k + COLUMNS >= len(views))
        draw_edge_label(page, panels[-1], view, 7.5, with_layer=several)
    draw_splines(page, panels, views, 1.6)
