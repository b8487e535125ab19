"""The choice of features and layers that a user wants to see, by number."""

from __future__ import annotations

from collections.abc import Sequence

from common.errors import UserError
from splines.grid import Array
from splines.snapshot import Snapshot

Features = int | Sequence[int] | None


def chosen_features(name: str, chosen: Features, there: Array) -> list[int]:
    """Places in `there`, the features that can be drawn, of those `chosen`: one, several, or all of them if None.

    ValueError naming the argument for a feature that is not there.
    """
    if chosen is None:
        return list(range(len(there)))
    features = [int(feature) for feature in ([chosen] if isinstance(chosen, int) else chosen)]
    if not features:
        raise ValueError(f"{name} must name at least one feature; got none")
    places = {int(feature): place for place, feature in enumerate(there)}
    for feature in features:
        if feature not in places:
            is_whole = len(there) == int(there[-1]) + 1
            allowed = f"from 0 to {there[-1]}" if is_whole else f"one of the {len(there)} that were recorded"
            raise ValueError(f"{name} must be {allowed}; got {feature}")
    return [places[feature] for feature in features]


def parse_features(text: str, name: str) -> list[int] | None:
    """The features that "3,17" names; None for "", which names none. UserError for what is not that."""
    if not text:
        return None
    numbers = text.replace(" ", "").split(",")
    if not all(number.isdecimal() for number in numbers):
        raise UserError(f"{name} must be numbers of features, as in 3 or 3,17; got {text!r}")
    return [int(number) for number in numbers]


def layers_to_draw(snapshots: Sequence[Snapshot], layer: int | None) -> list[int]:
    """Numbers of the spline layers that the user wants to see."""
    if layer is None:
        return list(range(len(snapshots)))
    if not 0 <= layer < len(snapshots):
        raise UserError(f"layer must be from 0 to {len(snapshots) - 1}; got {layer}")
    return [layer]
