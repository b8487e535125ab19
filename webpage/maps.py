"""Packs functions of two inputs for the page, whose script draws them (maps.js): of each block the furthest from a sum.

Values are float32, written with as many digits as give the same float32 again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from common.errors import UserError
from kan_layer import to_numpy
from pair_layer import PairLayer
from pictures.maps import SHOWN, PairView, most_interacting
from splines.grid import Array
from training.checkpoint import LoadedCheckpoint


def pack_maps(checkpoint: LoadedCheckpoint, name: str) -> dict[str, Any] | None:
    """Data for the page's script about the model of the run `name`; None if it has no functions of two inputs.

    Each block has SHOWN functions, or all if it has fewer. The values (G, G) of each are one list, in which the second
    input's knots follow each other. Raises UserError if a block holds a value that is not finite.
    """
    blocks = []
    for number, layer in enumerate(checkpoint.model.pair_layers()):
        values = to_numpy(layer.control_points()).transpose(0, 3, 1, 2)  # (I, O, G, G)
        if not np.isfinite(values).all():
            raise UserError(f"block {number} of {checkpoint.path} holds values that are not finite")
        blocks.append(pack_block(layer, values))
    return {"run": name, "step": checkpoint.step, "blocks": blocks} if blocks else None


def pack_block(layer: PairLayer, values: Array) -> dict[str, Any]:
    views = most_interacting(values, SHOWN)
    return {
        "width": layer.spline_width,
        "points": layer.num_control_points,
        "limit": max(float(np.abs(view.values).max()) for view in views) or 1.0,  # where the block's colours end
        "all": layer.in_features * layer.out_features,
        "functions": [pack_function(view) for view in views],
    }


def pack_function(view: PairView) -> dict[str, Any]:
    values = [float(str(value)) for value in view.values.astype(np.float32).ravel()]
    return {"feature": view.feature, "output": view.output, "values": values}
