"""Condition numbers of each variant, of penalty, data and both together: `python bench/conditioning.py --help`.

Of the Hessian in a spline's G coefficients: of the mean squared error over inputs (data), of the squared second
differences (penalty, on its range: straight lines are not penalized), and of data and penalty together. A condition
number is the largest eigenvalue over the smallest; gradient descent needs about as many steps.

Weights of the penalty are those of the mean squared second derivative over the grid, its width taken as 2, so that they
mean the same for every number of control points: 1e-4 smooths what is finer than a tenth of the grid, 1 nearly all.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common.threads  # noqa: F401  before torch

import numpy as np
import numpy.typing as npt

from common.command_line import OptionParser
from common.errors import UserError, exit_on_user_error
from splines.grid import Grid
from splines.parametrisation import VARIANTS, basis

USAGE = "python bench/conditioning.py [--grids 8,129 --weights 1e-4,1]"
Array = npt.NDArray[Any]
INPUTS = 200_001  # evenly spaced quantiles: an integral, not a sample


@dataclass(frozen=True)
class Arguments:
    """Condition numbers in float64, by variant and number of control points."""

    grids: str = "8,16,33,64,129,257"
    """Numbers of control points."""
    width: float = 4.0
    """Width of the grid in standard deviations, for normal inputs."""
    weights: str = "1e-4,1e-2,1"
    """Weights of the penalty beside the data's mean squared error."""


@dataclass(frozen=True)
class Conditions:
    penalty: float
    uniform: float
    """Of the data, for inputs that are uniform on the grid."""
    normal: float
    """For inputs N(0, 1), those outside the grid included."""
    both: tuple[float, ...]
    """Of uniform data and the penalty, by the penalty's weight."""


@exit_on_user_error
def main() -> None:
    arguments = OptionParser(Arguments, USAGE).parse(sys.argv[1:])
    try:
        grids = [int(grid) for grid in arguments.grids.split(",")]
        weights = [float(weight) for weight in arguments.weights.split(",")]
    except ValueError as error:
        raise UserError(f"grids are integers and weights are numbers, with commas between; {error}") from None
    if min(grids) < 2 or not 0 < arguments.width < math.inf or not all(0 <= w < math.inf for w in weights):
        raise UserError("grids must be at least 2, width above 0 and weights at least 0, all finite")
    both = "".join(f"{f'both, {weight:g}':>14}" for weight in weights)
    print(f"{'G':>5} {'variant':14} {'penalty':>10} {'uniform data':>14} {'normal data':>14}{both}")
    for grid in grids:
        for variant in VARIANTS:
            c = conditions(variant, grid, arguments.width, weights)
            both = "".join(f"{value:>14.3g}" for value in c.both)
            print(f"{grid:>5} {variant:14} {c.penalty:>10.3g} {c.uniform:>14.3g} {c.normal:>14.3g}{both}")


def conditions(variant: str, grid: int, width: float = 4.0, weights: Sequence[float] = ()) -> Conditions:
    matrix = basis(variant, grid)
    bends = np.diff(matrix, n=2, axis=0)  # (G-2, G)
    uniform, normal = data_hessians(grid, width)
    data = matrix.T @ uniform @ matrix
    penalized = bends.T @ bends
    per_weight = ((grid - 1) / 2) ** 4 / max(1, grid - 2)  # of the mean squared second derivative
    return Conditions(
        condition(penalized, null=2),
        condition(data),
        condition(matrix.T @ normal @ matrix),
        tuple(condition(data + weight * per_weight * penalized) for weight in weights),
    )


def condition(hessian: Array, null: int = 0) -> float:
    """The largest over the smallest eigenvalue, `null` zeros left out; infinite where float64 cannot tell it from 0."""
    values = np.linalg.eigvalsh(hessian)[null:]
    if not len(values):
        return 1.0
    return float(values[-1] / values[0]) if values[0] > 1e-15 * values[-1] else math.inf


@lru_cache
def data_hessians(grid: int, width: float) -> tuple[Array, Array]:
    """E[B B'] of the hat basis B, (G, G): for inputs uniform on the grid, and for N(0, 1)."""
    shares = (np.arange(INPUTS) + 0.5) / INPUTS
    normal = np.array([NormalDist().inv_cdf(share) for share in shares])
    return second_moments(grid, width, (shares - 0.5) * width), second_moments(grid, width, normal)


def second_moments(grid: int, width: float, inputs: Array) -> Array:
    u = (inputs + width / 2) / Grid(grid, width).spacing
    cell = np.clip(np.floor(u), 0, grid - 2).astype(int)
    t = u - cell
    moments = np.zeros((grid, grid))
    np.add.at(moments, (cell, cell), (1 - t) ** 2)
    np.add.at(moments, (cell + 1, cell + 1), t**2)
    np.add.at(moments, (cell, cell + 1), t * (1 - t))
    np.add.at(moments, (cell + 1, cell), t * (1 - t))
    return moments / len(inputs)


if __name__ == "__main__":
    main()
