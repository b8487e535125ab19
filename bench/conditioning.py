"""Compute how well conditioned each variant of the splines is: `python bench/conditioning.py --help`.

The Hessian is that in a spline's G coefficients. It is taken of the mean squared error over inputs ("data"), of the
squared second differences ("penalty", without the straight lines, which are not penalised), and of both together. The
condition number is its largest eigenvalue over its smallest. Gradient descent needs about that many steps.

The penalty's weight multiplies the mean squared second derivative on a grid of width 2. So it means the same for every
number of control points: 1e-4 smooths details finer than a tenth of the grid, 1 smooths nearly everything.
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

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone, before this folder

import common.threads  # noqa: F401  before torch

import numpy as np
import numpy.typing as npt

from common.command_line import OptionParser
from common.errors import UserError, exit_on_user_error
from splines.grid import Grid
from splines.parametrisation import VARIANTS, basis

USAGE = "python bench/conditioning.py [--grids 8,129 --weights 1e-4,1]"
Array = npt.NDArray[Any]
INPUTS = 200_001  # evenly spaced quantiles, so that means are integrals rather than samples


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
    """Data, with inputs that are uniform on the grid."""
    normal: float
    """Data, with inputs from N(0, 1), including those outside the grid."""
    both: tuple[float, ...]
    """Uniform data and the penalty together, for each weight of the penalty."""


@exit_on_user_error
def main() -> None:
    arguments = OptionParser(Arguments, USAGE).parse(sys.argv[1:])
    try:
        grids = [int(grid) for grid in arguments.grids.split(",")]
        weights = [float(weight) for weight in arguments.weights.split(",")]
    except ValueError as error:
        raise UserError(f"grids must be integers and weights numbers, separated by commas; {error}") from None
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
    """Largest over smallest eigenvalue, leaving out `null` zeros; inf if the smallest is 0 up to rounding."""
    values = np.linalg.eigvalsh(hessian)[null:]
    if not len(values):
        return 1.0
    return float(values[-1] / values[0]) if values[0] > 1e-15 * values[-1] else math.inf


@lru_cache
def data_hessians(grid: int, width: float) -> tuple[Array, Array]:
    """E[B Bᵀ] of the hat basis B, (G, G), for inputs that are uniform on the grid and for N(0, 1)."""
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
