"""Views of a spline layer, as plain data: its most curved splines, and where its curvature lies.

A spline that is straight where the activations are does nothing that a linear layer could not do. So the importance of
a spline is its curvature weighted by use: the root mean square, over the knots near activations, of the second
differences of its control points.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from splines.grid import Array, Grid
from splines.snapshot import Snapshot

CURVED_BINS = 25
HEAT_MAP_SIZE = 128


@dataclass(frozen=True, eq=False)
class SplineView:
    """One spline and the histogram of its activations."""

    layer: int
    input: int
    output: int
    control_points: Array
    """Values at the knots, (G,)."""
    spline_width: float
    histogram: Array
    """Shares of the activations, (HISTOGRAM_BINS,), in even bins on ±VISIBLE · spline_width; zeros if not known."""
    importance: float
    """Curvature weighted by use; 0 for a straight line."""

    @property
    def grid(self) -> Grid:
        return Grid(len(self.control_points), self.spline_width)


@dataclass(frozen=True, eq=False)
class LayerView:
    """One spline layer: the splines to draw, and summaries of all splines."""

    layer: int
    name: str
    in_features: int
    out_features: int
    splines: tuple[SplineView, ...]
    """Most important first."""
    heat_map: Array
    """Importance by input (down) and output (across). Larger layers show the maxima of HEAT_MAP_SIZE² blocks."""
    curved_shares: Array
    """Histogram of `Variation.curved_share`: the share of the splines in each of CURVED_BINS even bins."""
    curved: float
    """Curved share of the variation of all splines together, 0 … 1."""
    outside: float
    """Share of the activations outside the grid; nan if not known."""


@dataclass(frozen=True, eq=False)
class Variation:
    """The variation of a layer's splines under use, and the part that no straight line explains; (I, O) each.

    Variation is the variance of a spline's values at its knots, weighted by use. A weighted least-squares line explains
    a part of it; the rest is curved.
    """

    total: Array
    curved: Array

    @property
    def curved_share(self) -> Array:
        """From 0, for a straight line and for a constant, to 1."""
        return np.divide(self.curved, self.total, out=np.zeros_like(self.curved), where=self.total > 0)


def layer_view(snapshot: Snapshot, count: int) -> LayerView:
    """The `count` most important splines of a layer, and its summary."""
    importance = edge_importance(snapshot)
    variation = edge_variation(snapshot)
    counts, _ = np.histogram(variation.curved_share, CURVED_BINS, (0, 1))
    return LayerView(
        layer=snapshot.layer,
        name=snapshot.name,
        in_features=snapshot.in_features,
        out_features=snapshot.out_features,
        splines=tuple(view_splines(snapshot, varied_top(importance, count), importance)),
        heat_map=max_pool(most_important_first(importance), HEAT_MAP_SIZE),
        curved_shares=(counts / importance.size).astype(np.float32),
        curved=float(variation.curved.sum() / (variation.total.sum() or 1.0)),
        outside=float(snapshot.outside.mean()) if snapshot.has_activations else math.nan,
    )


def most_curved(snapshot: Snapshot, count: int = 12) -> list[SplineView]:
    """The `count` most important splines, most important first. See `varied_top` for how often a feature occurs."""
    importance = edge_importance(snapshot)
    return view_splines(snapshot, varied_top(importance, count), importance)


def view_splines(
    snapshot: Snapshot, edges: Iterable[tuple[int, int]], importance: Array | None = None
) -> list[SplineView]:
    """Views of the splines at these (row, column) positions in the snapshot."""
    importance = edge_importance(snapshot) if importance is None else importance
    return [
        SplineView(
            layer=snapshot.layer,
            input=int(snapshot.inputs[i]),
            output=int(snapshot.outputs[o]),
            control_points=snapshot.control_points[i, :, o].copy(),
            spline_width=snapshot.spline_width,
            histogram=snapshot.histogram[i],
            importance=float(importance[i, o]),
        )
        for i, o in edges
    ]


def edge_importance(snapshot: Snapshot) -> Array:
    """The importance of every spline, (I, O): sqrt(Σ_g use[i,g] · (second difference at g)²)."""
    points = snapshot.control_points  # (I, G, O)
    total = np.zeros((points.shape[0], points.shape[2]))
    for g in range(1, points.shape[1] - 1):  # knot by knot, to save the memory of (I, G, O)
        bend = points[:, g - 1] - 2 * points[:, g] + points[:, g + 1]
        total += snapshot.use[:, g, None] * bend**2
    return np.sqrt(total)


def edge_variation(snapshot: Snapshot) -> Variation:
    """The total and the curved variation of every spline."""
    values = snapshot.control_points.astype(np.float64)  # (I, G, O)
    use = snapshot.use.astype(np.float64)
    values -= np.einsum("ig,igo->io", use, values)[:, None]  # (I, G, O), around each spline's mean
    knots = snapshot.grid.knots()
    knots = knots - use @ knots[:, None]  # (I, G), around each feature's mean
    total = np.einsum("ig,igo->io", use, values**2)
    spread = np.maximum((use * knots**2).sum(1), np.finfo(np.float32).tiny)
    explained = np.einsum("ig,igo->io", use * knots, values) ** 2 / spread[:, None]
    return Variation(total, np.maximum(total - explained, 0))


def varied_top(importance: Array, count: int, at_most: int = 2) -> list[tuple[int, int]]:
    """(input, output) of the largest entries, at most `at_most` per row and column until those run out."""
    wanted = min(count, importance.size)
    left = importance.copy()
    picked: list[tuple[int, int]] = []
    while len(picked) < wanted:
        i, o = (int(k) for k in np.unravel_index(left.argmax(), left.shape))
        if left[i, o] < 0:  # no row and column may take more: drop the limit
            left, at_most = importance.copy(), wanted
            left[tuple(zip(*picked, strict=True))] = -1
            continue
        picked.append((i, o))
        left[i, o] = -1
        if sum(i == other for other, _ in picked) >= at_most:
            left[i] = -1
        if sum(o == other for _, other in picked) >= at_most:
            left[:, o] = -1
    return picked


def most_important_first(importance: Array) -> Array:
    """Sort rows and columns by their sums, largest first: features have no order of their own. (I, O) → (I, O)."""
    rows, columns = importance.sum(axis=1), importance.sum(axis=0)
    return importance[np.argsort(-rows)][:, np.argsort(-columns)]


def max_pool(values: Array, size: int) -> Array:
    """Maxima of `values` (I, O) over at most size x size blocks of nearly equal size; float32."""
    for axis, length in enumerate(values.shape):
        if length > size:
            values = np.maximum.reduceat(values, np.arange(size) * length // size, axis=axis)
    return values.astype(np.float32)
