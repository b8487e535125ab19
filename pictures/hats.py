"""The basis of a linear B-spline: each triangle is a basis function, and a spline is a weighted sum of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pictures.page import STYLES, Page, Panel, Style, matplotlib_defaults
from splines.grid import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = (0.3, 0.9, 0.35, -0.7, -0.25, 0.75, 0.4)  # heights of the example's control points
WIDTH = 6.0
EXAMPLE_X = -1.7


@matplotlib_defaults()
def draw_basis(style: Style = STYLES["light"]) -> Figure:
    """Draw the hat functions above, two of them highlighted, and below the weighted hats and their sum."""
    left, top, width, height, gap = 0.75, 1.25, 6.6, 1.35, 0.75
    page = Page(left + width + 0.4, top + 2 * height + gap + 1.05, style)
    page.heading(
        "A piecewise-linear spline is a sum of triangles",
        "Every control point scales one triangle (hat) that is 1 at its own knot and 0 at all others. At any x just\n"
        "two of them are not zero, and they add up to 1: so a value takes one position and two control points.",
        left,
    )
    knots = np.linspace(-WIDTH / 2, WIDTH / 2, len(POINTS))
    upper = Panel(left, top, width, height, WIDTH / 2, 1.1)
    lower = Panel(left, top + height + gap, width, height, WIDTH / 2, 1.15)
    for panel, zero in ((upper, -1), (lower, 0)):
        page.areas([panel.box(-panel.x_end, panel.x_end)], style.outside)
        page.lines([panel.at([-panel.x_end, panel.x_end], zero)], style.rule, 0.8, zorder=1)
    eye = np.eye(len(POINTS))
    page.areas([upper.at(*triangle(knots, 2 * hat - 1, -1)) for hat in eye], style.area, zorder=1)
    page.lines([upper.at(knots, 2 * hat - 1) for hat in eye], style.muted, 1.0, zorder=2)
    page.lines([upper.at(knots[k - 1 : k + 2], [-1, 1, -1]) for k in example_hats()], style.accent, 2.0, zorder=3)
    page.text(left, top - 0.13, "The basis: one hat per knot", 8.5, color=style.ink, weight="bold")
    scaled = [lower.at(knots, weight * hat) for weight, hat in zip(POINTS, eye, strict=True)]
    areas = [lower.at(*triangle(knots, weight * hat, 0)) for weight, hat in zip(POINTS, eye, strict=True)]
    page.areas(areas, style.area, zorder=1)
    page.lines(scaled, style.muted, 0.8, zorder=2)
    page.lines([lower.at(knots, POINTS)], style.accent, 2.2, zorder=3)
    page.dots([lower.at(knots, POINTS)], 5)
    title = "The spline: hats times control points (dots), added up"
    page.text(left, lower.top - 0.13, title, 8.5, color=style.ink, weight="bold")
    draw_example(page, upper, lower)
    for g, knot in enumerate(knots):
        across, down = lower.at(knot, -lower.limit)
        page.text(across, down + 0.16, f"{knot:g}".replace("-", "−"), ha="center")
        page.text(across, down + 0.36, f"knot {g}", ha="center", size=7)
    page.text(left + width / 2, lower.top + height + 0.68, "activation x, in standard deviations", 8.5, ha="center")
    return page.figure


def triangle(x: Array, y: Array, floor: float) -> tuple[Array, Array]:
    """The outline of the area between the curve (x, y) and the floor."""
    return np.concatenate([x[:1], x, x[-1:]]), np.concatenate([[floor], y, [floor]])


def example_hats() -> tuple[int, int]:
    """The numbers of the knots on both sides of the example's x."""
    left = int((EXAMPLE_X + WIDTH / 2) / (WIDTH / (len(POINTS) - 1)))
    return left, left + 1


def draw_example(page: Page, upper: Panel, lower: Panel) -> None:
    """Draw an example: one x, the values of its two hats, and the spline's value."""
    from matplotlib.patheffects import withStroke

    cell = WIDTH / (len(POINTS) - 1)
    j, _ = example_hats()
    t = (EXAMPLE_X + WIDTH / 2) / cell - j
    value = (1 - t) * POINTS[j] + t * POINTS[j + 1]
    dashes = [panel.at([EXAMPLE_X] * 2, [-panel.limit, panel.limit]) for panel in (upper, lower)]
    page.lines(dashes, page.style.ink, 0.8, linestyles=(0, (2, 2)), zorder=4)
    page.dots([upper.at([EXAMPLE_X] * 2, [1 - 2 * t, 2 * t - 1])], 4)
    halo = [withStroke(linewidth=3, foreground=page.style.area)]
    for weight, label in ((1 - t, f"1 − t = {1 - t:.2f}"), (t, f"t = {t:.2f}")):
        across, down = upper.at(EXAMPLE_X, 2 * weight - 1)
        text: dict[str, Any] = {"color": page.style.ink, "zorder": 6, "path_effects": halo}
        page.text(across + 0.1, down - 0.02, label, 7.5, **text)
    page.dots([lower.at([EXAMPLE_X], [value])], 4)
    across, down = lower.at(EXAMPLE_X, value)
    formula = f"y = {1 - t:.2f} · {POINTS[j]:g} + {t:.2f} · {POINTS[j + 1]:g} = {value:.3g}".replace("-", "−")
    page.text(across + 0.12, down - 0.12, formula, 8, color=page.style.ink, zorder=6)
