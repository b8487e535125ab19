"""Snapshots: a spline layer at one step of training and its activations, as plain arrays.

Pictures, statistics and the report work on snapshots only. Taking one costs O(tokens·I + I·G·O); nothing of size
tokens x I x O is materialised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

import numpy as np

from splines.grid import Array, Grid

HISTOGRAM_BINS = 60
VISIBLE = 0.75  # pictures show inputs up to ± this many grid widths: the grid and half as much again
MAX_VOCABULARY = 128  # activations are averaged for so many of the most frequent tokens
MIN_COUNT = 4  # the mean over fewer occurrences of a token says little
REACH = 0.99


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One layer, or some of its features: the rows `inputs` and columns `outputs` of its I x O splines."""

    layer: int
    """Its number among the model's spline layers."""
    name: str
    """For example "layer 3"; if a Transformer block has several spline layers, "block 1, attention gate"."""
    in_features: int
    """Input features of the whole layer."""
    out_features: int
    """Output features of the whole layer."""
    spline_width: float
    inputs: Array
    """Numbers of the input features that are kept, (I,)."""
    outputs: Array
    """Numbers of the output features that are kept, (O,)."""
    control_points: Array
    """Values at the knots, (I, G, O), float32."""
    use: Array
    """Use of each knot by each feature, (I, G): the mean of the knot's hat function over tokens. Rows sum to 1.

    Activations outside the grid count for the end knots. Without activations all knots count the same.
    """
    cells: Array
    """Share of the activations in each cell of the grid, (I, G-1); zeros if not known."""
    histogram: Array
    """Shares of the activations, (I, HISTOGRAM_BINS), in even bins on ±VISIBLE · spline_width; zeros if not known."""
    below: Array
    """Share of the activations below the first bin, (I,)."""
    above: Array
    """Share of the activations above the last bin, (I,)."""
    outside: Array
    """Share of the activations outside the grid, (I,); nan if not known."""
    reach: float
    """The REACH quantile of the absolute activations of the layer; nan if not known."""
    tokens: Array
    """The most frequent tokens, (V,), most frequent first; empty if not known."""
    token_means: Array
    """Mean activation of each feature at each of these tokens, (V, I)."""

    @property
    def num_control_points(self) -> int:
        return int(self.control_points.shape[1])

    @property
    def grid(self) -> Grid:
        return Grid(self.num_control_points, self.spline_width)

    @property
    def is_whole(self) -> bool:
        """Whether the snapshot has all features of the layer."""
        return len(self.inputs) == self.in_features and len(self.outputs) == self.out_features

    @property
    def has_activations(self) -> bool:
        return not math.isnan(self.reach)

    def block(self, rows: Array, columns: Array) -> Snapshot:
        """The snapshot of some of the features, by their position in `inputs` and `outputs`."""
        per_input = {
            name: getattr(self, name)[rows]
            for name in ("inputs", "use", "cells", "histogram", "below", "above", "outside")
        }
        rest = {
            "outputs": self.outputs[columns],
            "control_points": self.control_points[rows][:, :, columns],
            "token_means": self.token_means[:, rows],
        }
        kept = {field.name: getattr(self, field.name) for field in fields(self)}
        return Snapshot(**{**kept, **per_input, **rest})


def take(
    control_points: Array,
    spline_width: float,
    rows: Array | None = None,
    tokens: Array | None = None,
    layer: int = 0,
    name: str = "",
) -> Snapshot:
    """The snapshot of a layer with these control points, (I, G, O), float32.

    `rows` are its input activations, (M, I), finite; `tokens` are the tokens that they belong to, (M,). `layer` is the
    layer's number among the model's spline layers.
    """
    in_features, points, out_features = control_points.shape
    outside, reach = np.full(in_features, math.nan, np.float32), math.nan
    if rows is not None:
        distance = np.abs(rows)
        outside = np.mean(distance > spline_width / 2, axis=0, dtype=np.float32)
        reach = float(np.quantile(distance, REACH))
    histogram, below, above = activation_histogram(rows, in_features, spline_width)
    use, cells = knot_use(rows, in_features, Grid(points, spline_width))
    seen, means = token_means(rows, tokens)
    return Snapshot(
        layer=layer,
        name=name or f"layer {layer}",
        in_features=in_features,
        out_features=out_features,
        spline_width=spline_width,
        inputs=np.arange(in_features),
        outputs=np.arange(out_features),
        control_points=control_points,
        use=use,
        cells=cells,
        histogram=histogram,
        below=below,
        above=above,
        outside=outside,
        reach=reach,
        tokens=seen,
        token_means=means if len(seen) else np.zeros((0, in_features), np.float32),
    )


def knot_use(rows: Array | None, features: int, grid: Grid) -> tuple[Array, Array]:
    """`Snapshot.use` and `Snapshot.cells` from activations (M, I)."""
    knots = grid.points
    if rows is None:
        return np.full((features, knots), 1 / knots, np.float32), np.zeros((features, knots - 1), np.float32)
    cell, position = grid.locate(rows)  # (M, I) each
    inside = (position >= 0) & (position <= 1)
    share = position.clip(0, 1).ravel()
    left = (cell + knots * np.arange(features)).ravel()  # (M, I) → (M·I,)
    use = np.bincount(left, 1 - share, features * knots) + np.bincount(left + 1, share, features * knots)
    cells = np.bincount(left, inside.ravel(), features * knots).reshape(features, knots)[:, :-1]
    return (use.reshape(features, knots) / len(rows)).astype(np.float32), (cells / len(rows)).astype(np.float32)


def activation_histogram(rows: Array | None, features: int, width: float) -> tuple[Array, Array, Array]:
    """`Snapshot.histogram`, `below` and `above` from activations (M, I)."""
    if rows is None:
        return (
            np.zeros((features, HISTOGRAM_BINS), np.float32),
            np.zeros(features, np.float32),
            np.zeros(features, np.float32),
        )
    end = VISIBLE * width
    below, above = ((rows < -end).mean(0).astype(np.float32), (rows > end).mean(0).astype(np.float32))
    bins = HISTOGRAM_BINS + 2  # one more at each end, for everything beyond it
    place = np.clip(np.floor((rows + end) * (HISTOGRAM_BINS / (2 * end))), 0, HISTOGRAM_BINS - 1).astype(np.int64) + 1
    place[rows < -end] = 0
    place[rows > end] = bins - 1
    counts = np.bincount((place + bins * np.arange(features)).ravel(), minlength=features * bins).reshape(
        features, bins
    )
    return (counts[:, 1:-1] / len(rows)).astype(np.float32), below, above


def token_means(rows: Array | None, tokens: Array | None) -> tuple[Array, Array]:
    """`Snapshot.tokens` and `token_means` from activations (M, I) and the tokens (M,) that they belong to."""
    if rows is None or tokens is None or tokens.size != len(rows):
        return np.zeros(0, np.int64), np.zeros((0, 0), np.float32)
    found, place, counts = np.unique(tokens.ravel(), return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MAX_VOCABULARY]
    order = order[counts[order] >= MIN_COUNT]
    by_token = np.argsort(place, kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts)])
    means = [rows[by_token[starts[k] : starts[k + 1]]].mean(0, dtype=np.float32) for k in order]
    return found[order], np.array(means, np.float32).reshape(len(order), rows.shape[1])


def save(path: str | PathLike[str], snapshots: Sequence[Snapshot]) -> None:
    """Write snapshots as one .npz of plain arrays."""
    arrays = {
        f"{number}.{field.name}": np.asarray(getattr(snapshot, field.name))
        for number, snapshot in enumerate(snapshots)
        for field in fields(snapshot)
    }
    with open(path, "wb") as file:  # given a name, numpy would append .npz
        np.savez(file, allow_pickle=False, count=np.array(len(snapshots)), **arrays)


def load(path: str | PathLike[str]) -> list[Snapshot]:
    """Read snapshots that `save` wrote. Raises OSError, ValueError or KeyError. Nothing in the file is executed."""
    with np.load(path, allow_pickle=False) as arrays:
        return [_read(f"{number}.", arrays) for number in range(int(arrays["count"]))]


def _read(prefix: str, arrays: Any) -> Snapshot:
    values: dict[str, Any] = {field.name: arrays[prefix + field.name] for field in fields(Snapshot)}
    plain = {name: value.item() for name, value in values.items() if value.ndim == 0}
    return Snapshot(**{**values, **plain})
