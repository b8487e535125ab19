"""Training coarse to fine: when the splines' grid gets more knots, and what becomes of the optimizer's state."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from splines.grid import Array, Grid
from splines.parametrisation import stored_basis

if TYPE_CHECKING:
    from kan_layer import KANLayer
    from model import GPT


@dataclass(frozen=True)
class Stage:
    """From `step` steps on, splines of `points` control points."""

    points: int
    step: int


def parse_stages(text: str, num_control_points: int) -> tuple[Stage, ...]:
    """The stages of `kan_refine`: "5@0,9@1000" is 5 control points at first and 9 after 1,000 steps.

    Raises ValueError if the text is not of that form, or if a stage's knots do not include those of the one before.
    """
    if not text:
        return (Stage(num_control_points, 0),)
    example = 'write grids and steps like "5@0,9@1000,17@1500"'
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not re.fullmatch(r"\d{1,9}@\d{1,12}", part):
            raise ValueError(f"kan_refine has {part!r} for a stage; {example}")
    stages = [Stage(*map(int, part.split("@"))) for part in parts]
    if stages[0].step > 0:
        stages.insert(0, Stage(num_control_points, 0))
    if stages[0].points != num_control_points:
        raise ValueError(
            f"kan_refine begins with {stages[0].points} control points and num_control_points is {num_control_points}; "
            f"give --num_control_points {stages[0].points}"
        )
    for before, after in itertools.pairwise(stages):
        if after.step <= before.step:
            raise ValueError(f"kan_refine must have rising steps; got {after.step} behind {before.step}: {example}")
        cells = before.points - 1
        if after.points <= before.points or (after.points - 1) % cells:
            raise ValueError(
                f"kan_refine cannot go from {before.points} to {after.points} control points: their number less one "
                f"must be a multiple of {cells}, as with {2 * cells + 1} or {3 * cells + 1}"
            )
    return tuple(stages)


def points_after(stages: Sequence[Stage], step: int) -> int:
    """Control points of a model that has been trained for `step` steps."""
    return next(stage.points for stage in reversed(stages) if stage.step <= step)


def refine_model(model: GPT, points: int, optimizer: torch.optim.Optimizer | None = None) -> bool:
    """Give every spline layer that has fewer `points` control points, its function unchanged; whether any had.

    The optimizer goes on with the new parameters and with its state, carried over to them.
    """
    layers = [layer for layer in model.spline_layers() if layer.num_control_points < points]
    for layer in layers:
        parameter, before = layer.weight, layer.grid
        layer.refine(points)
        if optimizer is not None:
            replace_parameter(optimizer, parameter, layer.weight, gradient_transfer(layer, before))
    return bool(layers)


def gradient_transfer(layer: KANLayer, before: Grid) -> Array:
    """What a gradient of the coefficients on grid `before` becomes on the layer's grid now: (new, old).

    A gradient of control points is a density over the grid, so it is interpolated, and every knot's share of the inputs
    shrinks. To and from control points it goes by the transpose of what coefficients go by.
    """
    old = stored_basis(layer.variant, before.points, layer.zero_centred)
    new = stored_basis(layer.variant, layer.num_control_points, layer.zero_centred)
    shrinkage = (before.points - 1) / (layer.num_control_points - 1)
    return shrinkage * new.T @ before.interpolation(layer.grid) @ np.linalg.pinv(old).T


def replace_parameter(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, transfer: Array) -> None:
    """Let `optimizer` train `new` in place of `old`, its state carried along the middle axis by `transfer`.

    What is an average of gradients follows as gradients do. An average of their squares (a name with "sq") follows as
    variances of independent numbers do, but as much larger as the inputs of a knot are fewer: a mean over fewer.
    """
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is None:
        return
    linear = torch.from_numpy(transfer)
    squared = linear.square() * (new.shape[1] / old.shape[1])
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == old.shape[1]:
            matrix = (squared if "sq" in name else linear).to(value)
            state[name] = torch.matmul(matrix, value)  # (I, new, O)
    optimizer.state[new] = state
