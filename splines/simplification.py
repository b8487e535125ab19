"""Splines that may as well be straight lines or constants, and the layer with these in their place.

How much a replacement changes is measured on the activations themselves, those outside the grid included: a spline is
b(x)·c with c its control points and b(x) two weights that add up to 1, so means and variances over tokens follow from
the means of b, of b bᵀ and of x b, which are the same for all outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from splines.grid import Array, Grid


@dataclass(frozen=True)
class Replacements:
    """What to do with each spline of a layer, and the lines to do it with; (I, O) each."""

    removed: Array
    """Splines that become constants."""
    straight: Array
    """Splines that become straight lines (none of `removed`)."""
    mean: Array
    """Mean over the activations."""
    slope: Array
    """Of the least-squares line."""
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
    """The means over activations (M, I) that the replacement of splines on `grid` needs."""
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
    """Replace what changes little: by at most `tolerance` times a typical spline into the same output.

    A typical spline's size is the root mean square of the standard deviations of all splines into that output; what a
    replacement changes is its root mean square over the activations. So if changes are independent of one another,
    each output changes by at most `tolerance` times what it varies.
    """
    values = control_points.astype(np.float64)  # (I, G, O)
    mean = np.einsum("ig,igo->io", seen.hats, values)
    variance = np.einsum("igo,igh,iho->io", values, seen.pairs, values, optimize=True) - mean**2
    variance = np.maximum(variance, 0)
    covariance = np.einsum("ig,igo->io", seen.products, values)
    spread = np.maximum(seen.spread, np.finfo(np.float64).tiny)[:, None]
    rest = np.maximum(variance - covariance**2 / spread, 0)
    most = tolerance**2 * variance.mean(0)
    removed = variance <= most
    return Replacements(removed, (rest <= most) & ~removed, mean, covariance / spread, seen.center)


def replace(
    control_points: Array, knots: Array, plan: Replacements, has_bias: bool, zero_centred: bool
) -> tuple[Array, Array]:
    """The control points (I, G, O) of a layer whose splines are replaced as planned, and what its bias gains (O,).

    Removed splines leave their means to the bias. Without one the largest spline of the output takes them.
    """
    level = plan.mean - plan.slope * plan.center[:, None]  # of the lines at 0, (I, O)
    lines = plan.slope[:, None] * knots[:, None] + level[:, None]
    values = np.where(plan.straight[:, None], lines, np.where(plan.removed[:, None], 0.0, control_points))
    lost = np.where(plan.removed, plan.mean, 0.0)
    if zero_centred:  # lines go through zero there, so the bias takes their levels too
        values -= np.where(plan.straight, level, 0.0)[:, None]
        lost = lost + np.where(plan.straight, level, 0.0)
    if has_bias:
        return values, lost.sum(0)
    size = np.where(plan.removed, -1.0, values.var(1))
    carrier = size.argmax(0)  # (O,)
    values[carrier, :, np.arange(values.shape[2])] += lost.sum(0)[:, None]
    return values, np.zeros(values.shape[2])
