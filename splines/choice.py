"""Choosing layers, features and splines by number, or the most curved ones."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from common.errors import UserError
from splines.grid import Array
from splines.snapshot import Snapshot
from splines.views import edge_importance, varied_top

Features = int | Sequence[int] | None
ALL = sys.maxsize  # as a count: every spline, most curved first


def chosen_features(name: str, chosen: Features, there: Array) -> list[int]:
    """Positions in `there`, the features that can be drawn, of the `chosen` ones: one, several, or all if None.

    Raises ValueError that names the argument for a feature that is not there.
    """
    if chosen is None:
        return list(range(len(there)))
    features = [int(feature) for feature in ([chosen] if isinstance(chosen, int) else chosen)]
    if not features:
        raise ValueError(f"{name} must name at least one feature; got none")
    positions = {int(feature): position for position, feature in enumerate(there)}
    for feature in features:
        if feature not in positions:
            is_whole = len(there) == int(there[-1]) + 1
            allowed = f"from 0 to {there[-1]}" if is_whole else f"one of the {len(there)} that were recorded"
            raise ValueError(f"{name} must be {allowed}; got {feature}")
    return [positions[feature] for feature in features]


def chosen_splines(
    snapshot: Snapshot,
    inputs: Features = None,
    outputs: Features = None,
    count: int | None = None,
    importance: Array | None = None,
) -> list[tuple[int, int]]:
    """Positions (row, column) in the snapshot of splines between these features.

    The `count` most curved ones, most curved first, or all of them in the order of the features if None. `importance`
    is that of `edge_importance`, where it is known already. Raises ValueError for a feature that is not there.
    """
    rows = chosen_features("inputs", inputs, snapshot.inputs)
    columns = chosen_features("outputs", outputs, snapshot.outputs)
    if count is None:
        return [(row, column) for row in rows for column in columns]
    importance = edge_importance(snapshot) if importance is None else importance
    return [(rows[i], columns[o]) for i, o in varied_top(importance[rows][:, columns], count)]


def parse_features(text: str, name: str) -> list[int] | None:
    """The features in a list like "3,17"; None for "". Raises UserError for any other text."""
    if not text:
        return None
    numbers = text.replace(" ", "").split(",")
    if not all(number.isdecimal() for number in numbers):
        raise UserError(f"{name} must be numbers of features, as in 3 or 3,17; got {text!r}")
    return [int(number) for number in numbers]


def layers_to_draw(snapshots: Sequence[Snapshot], layer: int | None) -> list[int]:
    """The spline layers to draw, by number: the one that was asked for, or all. Raises UserError if it is not there."""
    if layer is None:
        return list(range(len(snapshots)))
    if not 0 <= layer < len(snapshots):
        raise UserError(f"layer must be from 0 to {len(snapshots) - 1}; got {layer}")
    return [layer]
