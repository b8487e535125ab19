"""Training coarse to fine: when the splines get more knots, and how the optimizer's state is carried over."""

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

# The per-parameter state of the optimizers (training/optimizer.py): 1 averages gradients, 2 averages their squares.
MOMENT_ORDER = {"exp_avg": 1, "momentum": 1, "exp_avg_sq": 2}


@dataclass(frozen=True)
class Stage:
    """Splines have `points` control points from step `step` on."""

    points: int
    step: int


def parse_stages(text: str, num_control_points: int) -> tuple[Stage, ...]:
    """Parse `kan_refine`: "5@0,9@1000" means 5 control points at first, and 9 after 1,000 steps.

    ValueError if the text has another form, or if the knots of a stage do not include those of the stage before.
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
    """The number of control points that splines have after `step` steps."""
    return next(stage.points for stage in reversed(stages) if stage.step <= step)


def refine_model(model: GPT, points: int, optimizer: torch.optim.Optimizer | None = None) -> bool:
    """Refine every spline layer that has fewer than `points` control points, without changing its function.

    Returns whether there were any. The optimizer's state is carried over to the new parameters.
    """
    layers = [layer for layer in model.spline_layers() if layer.num_control_points < points]
    for layer in layers:
        parameter, before = layer.weight, layer.grid
        layer.refine(points)
        if optimizer is not None:
            replace_parameter(optimizer, parameter, layer.weight, gradient_transfer(layer, before))
    return bool(layers)


def gradient_transfer(layer: KANLayer, before: Grid) -> Array:
    """The matrix (new, old) that turns a gradient of the coefficients on grid `before` into one on the layer's grid.

    The gradient of a control point sums over the inputs near its knot. So gradients are interpolated between knots, and
    scaled down because each knot of a finer grid sees fewer inputs. Gradients of coefficients become gradients of
    control points, and back, by the transposes of the matrices that do so for coefficients.
    """
    old = stored_basis(layer.variant, before.points, layer.zero_centred)
    new = stored_basis(layer.variant, layer.num_control_points, layer.zero_centred)
    shrinkage = (before.points - 1) / (layer.num_control_points - 1)
    return shrinkage * new.T @ before.interpolation(layer.grid) @ np.linalg.pinv(old).T


def replace_parameter(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, transfer: Array) -> None:
    """Let `optimizer` train `new` in place of `old`, and map its moments along the middle axis by `transfer`.

    First moments transform like gradients. Second moments transform like variances of independent values, scaled up
    because each new knot averages over fewer inputs. ValueError for a moment whose order is not known.
    """
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is None:
        return
    linear = torch.from_numpy(transfer)
    squared = linear.square() * (new.shape[1] / old.shape[1])
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == old.shape:
            if name not in MOMENT_ORDER:
                raise ValueError(f"the optimizer's {name} has no order in MOMENT_ORDER, so no way to a finer grid")
            matrix = linear if MOMENT_ORDER[name] == 1 else squared
            state[name] = torch.matmul(matrix.to(value), value)  # (I, new, O)
    optimizer.state[new] = state
