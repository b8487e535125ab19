"""The picture of bench/step.py: a bar for each contestant, divided into the parts of its step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.shared.step_parts import PARTS
from pictures.page import STYLES, Page, matplotlib_defaults

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = STYLES["light"]
LAYER_COLORS = ("#06294f", "#0a5fb4", "#5f9ed8", "#b9d3ee")  # blues: the layer; all else has other hues
OTHER_COLORS = (
    "#7c2d12",
    "#c2410c",
    "#ea8a4b",
    "#f6c7a4",
    "#a16207",
    "#d9b44a",
    "#efe0ad",
    "#8a8f98",
    "#0b8a6b",
    "#86cbb5",
    "#86198f",
    "#5b51b8",
    "#a9a3dc",
    "#d5dae2",
    "#ebedf0",
)
COLORS = dict(zip(PARTS, (*LAYER_COLORS, *OTHER_COLORS), strict=True))
LEFT, BAR_WIDTH, TOP, BAR, GAP, GROUP_GAP = 1.45, 6.6, 1.0, 0.2, 0.07, 0.42  # inches
LEGEND, LEGEND_ROW, MARGIN = 2.5, 0.2, 0.35
LABEL_FROM = 0.28  # inches of a part that has room for its number


@matplotlib_defaults()
def draw_steps(steps: Sequence[Mapping[str, Any]], where: str) -> Figure:
    """Draw the steps, which are records of bench/step.py, in groups of one width, optimizer and mode."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for step in steps:
        groups.setdefault((step["width"], step["optimizer"], step["mode"]), []).append(step)
    shown = [part for part in PARTS if any(step["parts"][part] > 0 for step in steps)]
    bars = len(steps) * (BAR + GAP) + len(groups) * GROUP_GAP
    height = TOP + max(bars, len(shown) * LEGEND_ROW) + MARGIN
    page = Page(LEFT + BAR_WIDTH + 0.9 + LEGEND, height, STYLE)
    about = f"Milliseconds of each part; behind the bar the whole step, and the twin's step over it. {where}"
    page.heading("Where a training step's time goes", about, MARGIN)
    y = TOP
    for (width, optimizer, mode), members in groups.items():
        longest = max(step["ms"] for step in members)
        page.text(MARGIN, y + 0.1, f"width {width}, {optimizer}, {mode}", color=STYLE.ink, size=8.5, weight="bold")
        y += 0.26
        for step in members:
            draw_bar(page, step, y, BAR_WIDTH / longest)
            y += BAR + GAP
        y += GROUP_GAP - 0.26
    for row, part in enumerate(shown):
        x, top = LEFT + BAR_WIDTH + 0.9, TOP + row * LEGEND_ROW
        page.areas([box(x, top, 0.16, 0.12)], COLORS[part])
        page.text(x + 0.24, top + 0.06, part, color=STYLE.ink)
    return page.figure


def draw_bar(page: Page, step: Mapping[str, Any], y: float, inches_per_ms: float) -> None:
    page.text(LEFT - 0.1, y + BAR / 2, step["block"].replace("_", " "), ha="right", color=STYLE.ink)
    x = LEFT
    for part in PARTS:
        length = step["parts"][part] * inches_per_ms
        page.areas([box(x, y, length, BAR)], COLORS[part])
        if length > LABEL_FROM:
            dark = sum(bytes.fromhex(COLORS[part][1:])) < 3 * 140
            color = STYLE.paper if dark else STYLE.ink
            page.text(x + length / 2, y + BAR / 2, f"{step['parts'][part]:.1f}", size=6.5, color=color, ha="center")
        x += length
    ratio = f"  ×{step['twin_over_it']:.2f}" if step["twin_over_it"] else ""
    page.text(x + 0.08, y + BAR / 2, f"{step['ms']:.1f} ms{ratio}", color=STYLE.ink)


def box(x: float, y: float, width: float, height: float) -> np.ndarray:
    return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]])
