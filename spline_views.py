"""What is worth seeing of a spline layer, as plain data: its most curved splines, and where its curvature lies.

A spline that is straight where the activations are does nothing a linear layer could not. So a spline's importance is
its curvature weighted with use: the root mean square, over the knots that the activations come near, of the second
difference of its control points. Everything here costs O(tokens·I + I·G·O); nothing of size tokens x I x O is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from kan_layer import KANLayer
    from model import GPT

Array = npt.NDArray[Any]

HISTOGRAM_BINS = 60
VISIBLE = 0.75  # what is looked at of the input axis, ± in grid widths: the grid and half as much again
CURVED_BINS = 25
HEAT_MAP_SIZE = 128
MOST_TOKENS = 4096
TOKENS_AT_ONCE = 1024  # bounds the logits, which nobody reads here


@dataclass(frozen=True, eq=False)
class SplineView:
    """One spline and what reaches it."""

    layer: int
    input: int
    output: int
    control_points: Array
    """Values at the knots, (G,)."""
    spline_width: float
    histogram: Array
    """Shares of the activations, (HISTOGRAM_BINS,), in even bins on ±VISIBLE · spline_width; zeros if not known."""
    below: float
    """Share of the activations below the first bin."""
    above: float
    """Share of the activations above the last bin."""
    importance: float
    """Curvature weighted with use; 0 for a straight line."""


@dataclass(frozen=True, eq=False)
class LayerView:
    """One spline layer: the splines to draw, and what sums up all others."""

    layer: int
    in_features: int
    out_features: int
    splines: tuple[SplineView, ...]
    """Most important first."""
    heat_map: Array
    """Importance by input (down) and output (across), the maximum of blocks where more than HEAT_MAP_SIZE."""
    curved_shares: Array
    """Shares of the splines, (CURVED_BINS,), in even bins of the part of their variation no straight line explains."""
    curved: float
    """That part over all splines together, 0 … 1."""
    outside: float
    """Share of the activations outside the grid; nan if not known."""


def layer_view(layer: KANLayer, index: int, activations: Tensor | None, count: int) -> LayerView:
    """Look at `layer`, the model's spline layer number `index`, through `activations` (M, I): its `count` splines."""
    inputs = as_rows(layer, activations)
    importance = edge_importance(layer, inputs)
    curved_shares, curved = curved_variation(layer, inputs)
    return LayerView(
        layer=index,
        in_features=layer.in_features,
        out_features=layer.out_features,
        splines=tuple(view_splines(layer, index, inputs, varied_top(importance, count), importance)),
        heat_map=max_pool(most_important_first(importance), HEAT_MAP_SIZE),
        curved_shares=curved_shares,
        curved=curved,
        outside=float(np.mean(np.abs(inputs) > layer.spline_width / 2)) if inputs is not None else math.nan,
    )


def most_curved(
    layer: KANLayer, activations: Tensor | None = None, count: int = 12, index: int = 0
) -> list[SplineView]:
    """The `count` most important splines, most important first, no feature more than twice while others are left."""
    inputs = as_rows(layer, activations)
    importance = edge_importance(layer, inputs)
    return view_splines(layer, index, inputs, varied_top(importance, count), importance)


def view_splines(
    layer: KANLayer, index: int, inputs: Array | None, edges: Iterable[tuple[int, int]], importance: Array
) -> list[SplineView]:
    """Views of the splines named by (input, output) pairs; `inputs` as from `as_rows`."""
    control_points = to_numpy(layer.control_points())  # (I, G, O)
    views = []
    for i, o in edges:
        histogram, below, above = activation_histogram(None if inputs is None else inputs[:, i], layer.spline_width)
        views.append(
            SplineView(
                layer=index,
                input=i,
                output=o,
                control_points=control_points[i, :, o].copy(),
                spline_width=layer.spline_width,
                histogram=histogram,
                below=below,
                above=above,
                importance=float(importance[i, o]),
            )
        )
    return views


def to_numpy(values: Tensor) -> Array:
    return values.detach().float().cpu().numpy()


def as_rows(layer: KANLayer, activations: Tensor | None) -> Array | None:
    """Activations (*, I) as an array (M, I); None when there are none. ValueError for a wrong width or NaN."""
    if activations is None or activations.numel() == 0:
        return None
    if activations.shape[-1] != layer.in_features:
        raise ValueError(
            f"the last dimension of activations must be in_features={layer.in_features}; "
            f"got shape {tuple(activations.shape)}"
        )
    rows = to_numpy(activations).reshape(-1, layer.in_features)  # (*, I) → (M, I)
    if not np.isfinite(rows).all():
        raise ValueError("activations must be finite; got NaN or infinity")
    return rows


def knot_use(inputs: Array | None, layer: KANLayer) -> Array:
    """How much each knot matters to each feature, (I, G): the mean over tokens of its hat; rows sum to 1.

    Activations outside the grid count for the end knots; without activations all knots count the same.
    """
    G = layer.num_control_points
    if inputs is None:
        return np.full((layer.in_features, G), 1 / G)
    step = layer.spline_width / (G - 1)
    position = np.clip((inputs + layer.spline_width / 2) / step, 0, G - 1)  # (M, I), in knots
    cell = np.minimum(position.astype(np.int64), G - 2)
    share = position - cell
    left = (cell + G * np.arange(layer.in_features)).ravel()  # (M, I) → (M·I,)
    size = layer.in_features * G
    use = np.bincount(left, 1 - share.ravel(), size) + np.bincount(left + 1, share.ravel(), size)
    return use.reshape(layer.in_features, G) / len(inputs)  # (I·G,) → (I, G)


def edge_importance(layer: KANLayer, inputs: Array | None) -> Array:
    """Curvature weighted with use of every spline, (I, O): sqrt(Σ_g use[i,g] · (second difference at g)²)."""
    control_points = to_numpy(layer.control_points())  # (I, G, O)
    use = knot_use(inputs, layer)
    total = np.zeros((layer.in_features, layer.out_features))
    for g in range(1, layer.num_control_points - 1):  # a line in place of (I, G, O) at once: two (I, O) at a time
        bend = control_points[:, g - 1] - 2 * control_points[:, g] + control_points[:, g + 1]
        total += use[:, g, None] * bend**2
    return np.sqrt(total)


def varied_top(importance: Array, count: int, at_most: int = 2) -> list[tuple[int, int]]:
    """The (input, output) of the largest entries, none in more than `at_most` in a row or column while others are."""
    wanted = min(count, importance.size)
    left = importance.copy()
    picked: list[tuple[int, int]] = []
    while len(picked) < wanted:
        i, o = (int(k) for k in np.unravel_index(left.argmax(), left.shape))
        if left[i, o] < 0:  # every row and column had its turn: fill up with what is left
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


def activation_histogram(values: Array | None, spline_width: float) -> tuple[Array, float, float]:
    """Shares of `values` (M,) in even bins on ±VISIBLE · spline_width, below these and above these."""
    if values is None:
        return np.zeros(HISTOGRAM_BINS, np.float32), 0.0, 0.0
    end = VISIBLE * spline_width
    counts, _ = np.histogram(values, HISTOGRAM_BINS, (-end, end))
    shares = (counts / len(values)).astype(np.float32)
    return shares, float(np.mean(values < -end)), float(np.mean(values > end))


def most_important_first(importance: Array) -> Array:
    """Rows and columns in falling order of their sums; features have no order of their own. (I, O) → (I, O)."""
    rows, columns = importance.sum(axis=1), importance.sum(axis=0)
    return importance[np.argsort(-rows)][:, np.argsort(-columns)]


def max_pool(values: Array, size: int) -> Array:
    """`values` (I, O) in at most size x size blocks as even as can be, the maximum of each; float32."""
    for axis, length in enumerate(values.shape):
        if length > size:
            values = np.maximum.reduceat(values, np.arange(size) * length // size, axis=axis)
    return values.astype(np.float32)


def curved_variation(layer: KANLayer, inputs: Array | None) -> tuple[Array, float]:
    """What share of the splines' variation no straight line explains: how it is distributed, and over all splines.

    Variation is the variance of a spline's values at its knots, weighted with use; a weighted least-squares line
    explains a part of it. Returns the shares of splines in CURVED_BINS even bins on 0 … 1 of the rest, and that of all
    variation taken together. A spline without variation is straight.
    """
    values = to_numpy(layer.control_points()).astype(np.float64)  # (I, G, O)
    use = knot_use(inputs, layer)
    knots = to_numpy(layer.knots()) - use @ to_numpy(layer.knots())[:, None]  # (I, G), around each feature's mean
    values -= np.einsum("ig,igo->io", use, values)[:, None]  # (I, G, O), around each spline's mean
    variation = np.einsum("ig,igo->io", use, values**2)
    spread = np.maximum((use * knots**2).sum(1), np.finfo(np.float32).tiny)
    explained = np.einsum("ig,igo->io", use * knots, values) ** 2 / spread[:, None]
    rest = np.maximum(variation - explained, 0)
    share = np.divide(rest, variation, out=np.zeros_like(rest), where=variation > 0)
    counts, _ = np.histogram(share, CURVED_BINS, (0, 1))
    return (counts / share.size).astype(np.float32), float(rest.sum() / (variation.sum() or 1.0))


@torch.no_grad()
def layer_inputs(model: GPT, batches: Iterable[Tensor | Sequence[Tensor]]) -> list[Tensor]:
    """What reaches each spline layer of the (uncompiled) model: one tensor (M, I) a layer, M up to MOST_TOKENS.

    A batch is tokens (B, T), or a pair of tokens and targets; no more are taken than needed. Without batches, [].
    """
    layers = model.spline_layers()
    seen: list[list[Tensor]] = [[] for _ in layers]
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, store=store: store.append(args[0].flatten(0, -2)))
        for layer, store in zip(layers, seen, strict=True)
    ]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        missing = MOST_TOKENS
        for batch in batches:
            tokens = batch if isinstance(batch, Tensor) else batch[0]
            tokens = tokens[: math.ceil(missing / tokens.shape[1])]
            for rows in tokens.split(max(1, TOKENS_AT_ONCE // tokens.shape[1])):
                model(rows.to(device))
            missing -= tokens.numel()
            if missing <= 0:
                break
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return [torch.cat(store)[:MOST_TOKENS] for store in seen if store]


def save_views(path: str | PathLike[str], layers: Sequence[LayerView]) -> None:
    """Write the views as one .npz of plain arrays."""
    arrays: dict[str, Array] = {"layers": np.array([view.layer for view in layers])}
    for view in layers:
        fields = {
            "shape": np.array([view.in_features, view.out_features]),
            "heat_map": view.heat_map,
            "curved_shares": view.curved_shares,
            "curved": np.array(view.curved),
            "outside": np.array(view.outside),
            "edges": np.array([(s.input, s.output) for s in view.splines]),
            "control_points": np.array([s.control_points for s in view.splines]),
            "spline_width": np.array([s.spline_width for s in view.splines]),
            "histogram": np.array([s.histogram for s in view.splines]),
            "beyond": np.array([(s.below, s.above) for s in view.splines]),
            "importance": np.array([s.importance for s in view.splines]),
        }
        arrays |= {f"layer_{view.layer:02d}.{name}": value for name, value in fields.items()}
    with open(path, "wb") as file:  # given a name, numpy would append .npz
        np.savez_compressed(file, allow_pickle=False, **arrays)


def load_views(path: str | PathLike[str]) -> list[LayerView]:
    """What `save_views` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        return [_read_layer(int(layer), arrays) for layer in arrays["layers"]]


def _read_layer(layer: int, arrays: Any) -> LayerView:
    def read(name: str) -> Array:
        return arrays[f"layer_{layer:02d}.{name}"]

    rows = zip(
        read("edges"),
        read("control_points"),
        read("spline_width"),
        read("histogram"),
        read("beyond"),
        read("importance"),
        strict=True,
    )
    splines = tuple(
        SplineView(layer, int(i), int(o), values, float(width), histogram, float(below), float(above), float(value))
        for (i, o), values, width, histogram, (below, above), value in rows
    )
    in_features, out_features = read("shape").tolist()
    return LayerView(
        layer=layer,
        in_features=in_features,
        out_features=out_features,
        splines=splines,
        heat_map=read("heat_map"),
        curved_shares=read("curved_shares"),
        curved=float(read("curved")),
        outside=float(read("outside")),
    )
