"""Packs the splines of a run for the page: chooses the steps and features that fit, and writes their bytes.

A block a step, base64. For each layer: control points in 24-bit fixed point, whose rounding moves no drawn value by
more than MOST_ERROR (else float32, exact); use of knots and shares outside the grid in float32; histograms in 1/65535.
Mean activations by token, of the newest step, in float32.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from corpus.tokenizer import Tokenizer
from pictures.run_pictures import BRIGHT_SHARE
from pictures.sheets import capitalized, nice_limit
from splines.grid import Array
from splines.records import SplineRecords
from splines.snapshot import HISTOGRAM_BINS, VISIBLE, Snapshot
from splines.views import edge_importance

BUDGET = 14_000_000  # bytes of base64; the rest of the page takes about 200,000
MOST_ERROR = 4e-7
FEW_STEPS = 6  # fewer steps are kept only if the splines of a step are too many
SIDES = (1 << 30, *range(512, 0, -16))  # numbers of inputs and outputs to show: all, or fewer
ZERO = 1 << 23


@dataclass
class PackedSplines:
    """`metadata` for the page's script, and the blocks of bytes that it refers to, by name."""

    metadata: dict[str, Any]
    blocks: dict[str, str] = field(default_factory=dict)


def pack(
    records: SplineRecords, tokenizer: Tokenizer | None, budget: int = BUDGET, whole: bool = False
) -> PackedSplines | None:
    """The recorded splines, as many features and steps as fit into `budget` bytes; None if there are none.

    `whole`: all features of each layer, even if that leaves the newest step alone.
    """
    steps = records.steps()
    if not steps:
        return None
    newest = records.read(steps[-1])
    side, count = what_fits(newest, len(steps), budget, 1 if whole else FEW_STEPS)
    kept = [steps[k] for k in spread_with_last(len(steps), count)]
    chosen = [most_important(snapshot, side) for snapshot in newest]
    packed = PackedSplines({"bins": HISTOGRAM_BINS, "visible": VISIBLE, "steps": [], "layers": []})
    splines, importances = [0.0] * len(newest), [0.0] * len(newest)
    for step in kept:
        snapshots = newest if step == steps[-1] else records.read(step)
        if not alike(snapshots, newest):  # recorded by another version or another run
            continue
        parts, layers = bytearray(), []
        for k, (snapshot, (rows, columns)) in enumerate(zip(snapshots, chosen, strict=True)):
            block = snapshot.block(rows, columns)
            layers.append(pack_layer(block, parts))
            splines[k] = max(splines[k], float(np.abs(block.control_points).max()))
            importances[k] = max(importances[k], float(np.quantile(edge_importance(block), BRIGHT_SHARE)))
        name = f"splines-{step}"
        packed.blocks[name] = base64.b64encode(parts).decode()
        packed.metadata["steps"].append({"step": step, "block": name, "layers": layers})
    for snapshot, (rows, columns), spline, importance in zip(newest, chosen, splines, importances, strict=True):
        packed.metadata["layers"].append(
            {
                "layer": snapshot.layer,
                "name": capitalized(snapshot.name),
                "in_features": snapshot.in_features,
                "out_features": snapshot.out_features,
                "inputs": snapshot.inputs[rows].tolist(),
                "outputs": snapshot.outputs[columns].tolist(),
                "spline_limit": nice_limit(spline),
                "importance_limit": nice_limit(importance),
                **pack_tokens(snapshot.block(rows, columns), tokenizer, packed.blocks),
            }
        )
    is_char = tokenizer is not None and tokenizer.name == "char"
    packed.metadata["token_word"] = "Characters" if is_char else "Tokens"
    packed.metadata["all_steps"] = len(steps)
    return packed


def what_fits(snapshots: Sequence[Snapshot], steps: int, budget: int, few: int = FEW_STEPS) -> tuple[int, int]:
    """Features each way and steps: all features if at least `few` (or all) steps then fit, else fewer features."""
    for side in SIDES:
        a_step, tokens = base64_sizes(snapshots, side)
        count = int((budget - tokens) // a_step)
        if count >= min(few, steps):
            break
    return side, max(1, min(count, steps))


def base64_sizes(snapshots: Sequence[Snapshot], side: int = SIDES[0]) -> tuple[float, float]:
    """Bytes that a step takes with so many features each way, and those that the mean activations take once."""
    tokens = sum(4 * snapshot.token_means.shape[0] * min(side, len(snapshot.inputs)) for snapshot in snapshots)
    return 4 / 3 * sum(packed_size(snapshot, side) for snapshot in snapshots), 4 / 3 * tokens


def packed_size(snapshot: Snapshot, side: int) -> int:
    inputs, knots, outputs = snapshot.control_points.shape
    rows, columns = min(inputs, side), min(outputs, side)
    size = 3 if fixed_point_scale(snapshot.control_points) is not None else 4
    return rows * (size * knots * columns + 4 * knots + 2 * HISTOGRAM_BINS + 4)


def spread_with_last(count: int, at_most: int) -> list[int]:
    """Evenly spaced places that include the first and the last (only the last if there is room for one)."""
    if at_most == 1:
        return [count - 1]
    return sorted({round(k * (count - 1) / (at_most - 1)) for k in range(at_most)})


def most_important(snapshot: Snapshot, side: int) -> tuple[Array, Array]:
    """Places of the `side` inputs and outputs whose splines are most curved in total, in ascending order."""
    importance = edge_importance(snapshot)
    rows = np.sort(np.argsort(-importance.sum(1), kind="stable")[:side])
    columns = np.sort(np.argsort(-importance[rows].sum(0), kind="stable")[:side])
    return rows, columns


def alike(snapshots: Sequence[Snapshot], others: Sequence[Snapshot]) -> bool:
    """Whether both have the same layers and features. Their grids may differ."""
    return len(snapshots) == len(others) and all(
        np.array_equal(a.inputs, b.inputs) and np.array_equal(a.outputs, b.outputs)
        for a, b in zip(snapshots, others, strict=True)
    )


def pack_layer(snapshot: Snapshot, parts: bytearray) -> dict[str, Any]:
    """Append a layer's bytes to `parts`, and tell where they are."""
    where: dict[str, Any] = {"G": snapshot.num_control_points, "width": snapshot.spline_width}

    def append(name: str, data: bytes) -> None:
        where[name] = len(parts)
        parts.extend(data)

    scale = where["scale"] = fixed_point_scale(snapshot.control_points)
    points = snapshot.control_points
    append("points", points.astype("<f4").tobytes() if scale is None else fixed_point(points, scale))
    append("use", snapshot.use.astype("<f4").tobytes())
    append("outside", snapshot.outside.astype("<f4").tobytes())
    append("histogram", np.rint(snapshot.histogram * 65535).astype("<u2").tobytes())
    return where


def fixed_point_scale(points: Array) -> float | None:
    """The step of 24-bit fixed-point numbers; None if rounding could move a drawn value by more than MOST_ERROR.

    Beyond the grid a value is a difference of two control points times the distance from the grid, in knots.
    """
    scale = float(np.abs(points).max()) / (ZERO - 1) or 1.0
    farthest = (VISIBLE - 0.5) * (points.shape[1] - 1)
    return scale if scale / 2 * (1 + 2 * farthest) <= MOST_ERROR else None


def fixed_point(points: Array, scale: float) -> bytes:
    """Three bytes per value, the lowest first."""
    whole = (np.rint(points.astype(np.float64) / scale).astype(np.int64) + ZERO).astype("<u4")
    return whole.reshape(-1, 1).view(np.uint8).reshape(-1, 4)[:, :3].tobytes()


def pack_tokens(snapshot: Snapshot, tokenizer: Tokenizer | None, blocks: dict[str, str]) -> dict[str, Any]:
    """The tokens whose mean activations the page shows, and the block of these means, (tokens, inputs)."""
    if tokenizer is None or not len(snapshot.tokens):
        return {"tokens": [], "token_block": None}
    name = f"tokens-{snapshot.layer}"
    blocks[name] = base64.b64encode(snapshot.token_means.astype("<f4").tobytes()).decode()
    return {"tokens": [tokenizer.decode([int(token)]) for token in snapshot.tokens], "token_block": name}
