"""Finds splines that can be replaced by straight lines or constants, and makes the replacements.

The change that a replacement makes is measured on the activations themselves, also outside the grid. A spline is
b(x)·c, where c are its control points and b(x) has two non-zero weights that add up to 1. So its mean and variance over
tokens follow from the means of b, of b bᵀ and of x b, which are the same for all outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from splines.grid import Array, Grid


@dataclass(frozen=True)
class Replacements:
    """For each spline of a layer, whether to replace it, and the line that replaces it; (I, O) each."""

    removed: Array
    """Splines that become constants."""
    straight: Array
    """Splines that become straight lines; none of them is in `removed`."""
    mean: Array
    """Mean of the spline over the activations."""
    slope: Array
    """Slope of the least-squares line."""
    center: Array
    """Mean activation of each input, (I,)."""

    @property
    def kept(self) -> Array:
        return ~(self.removed | self.straight)


@dataclass(frozen=True)
class Moments:
    """Means over the activations that reach a layer's inputs."""

    hats: Array
    """E[b], (I, G)."""
    pairs: Array
    """E[b bᵀ], (I, G, G)."""
    products: Array
    """E[(x - E[x]) b], (I, G)."""
    center: Array
    """E[x], (I,)."""
    spread: Array
    """Var[x], (I,)."""


def moments(rows: Array, grid: Grid) -> Moments:
    """The means over activations (M, I) that `plan` needs for splines on `grid`."""
    count, features = rows.shape
    points = grid.points
    x = rows.astype(np.float64)
    cell, t = grid.locate(x)
    hats = np.zeros((features, points))
    products = np.zeros((features, points))
    pairs = np.zeros((features, points, points))
    center, feature = x.mean(0), np.broadcast_to(np.arange(features), (count, features))
    for first, weight in ((0, 1 - t), (1, t)):
        np.add.at(hats, (feature, cell + first), weight)
        np.add.at(products, (feature, cell + first), weight * (x - center))
        for second, other in ((0, 1 - t), (1, t)):
            np.add.at(pairs, (feature, cell + first, cell + second), weight * other)
    return Moments(hats / count, pairs / count, products / count, center, x.var(0))


def plan(control_points: Array, seen: Moments, tolerance: float) -> Replacements:
    """Choose replacements that change a spline by at most `tolerance` times a typical spline into the same output.

    The size of a typical spline is the root mean square of the standard deviations of all splines into that output. The
    size of a change is its root mean square over the activations. So if changes are independent of one another, each
    output changes by at most `tolerance` times its standard deviation.
    """
    values = control_points.astype(np.float64)  # (I, G, O)
    mean = np.einsum("ig,igo->io", seen.hats, values)
    variance = np.einsum("igo,igh,iho->io", values, seen.pairs, values, optimize=True) - mean**2
    variance = np.maximum(variance, 0)
    covariance = np.einsum("ig,igo->io", seen.products, values)
    spread = np.maximum(seen.spread, np.finfo(np.float64).tiny)[:, None]
    rest = np.maximum(variance - covariance**2 / spread, 0)
    limit = tolerance**2 * variance.mean(0)
    removed = variance <= limit
    return Replacements(removed, (rest <= limit) & ~removed, mean, covariance / spread, seen.center)


def replace(
    control_points: Array, knots: Array, plan: Replacements, has_bias: bool, zero_centred: bool
) -> tuple[Array, Array]:
    """The control points (I, G, O) after the planned replacements, and the values to add to the bias, (O,).

    The bias takes over the means of removed splines. Without a bias the largest spline of the output takes them over.
    """
    level = plan.mean - plan.slope * plan.center[:, None]  # values of the lines at 0, (I, O)
    lines = plan.slope[:, None] * knots[:, None] + level[:, None]
    values = np.where(plan.straight[:, None], lines, np.where(plan.removed[:, None], 0.0, control_points))
    lost = np.where(plan.removed, plan.mean, 0.0)
    if zero_centred:  # there all splines are zero at 0, so the bias takes over the levels of the lines too
        values -= np.where(plan.straight, level, 0.0)[:, None]
        lost = lost + np.where(plan.straight, level, 0.0)
    if has_bias:
        return values, lost.sum(0)
    size = np.where(plan.removed, -1.0, values.var(1))
    carrier = size.argmax(0)  # (O,)
    values[carrier, :, np.arange(values.shape[2])] += lost.sum(0)[:, None]
    return values, np.zeros(values.shape[2])
