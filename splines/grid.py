"""A uniform grid of knots: where inputs lie on it, values of splines, and the change to another grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

SAME_KNOT = 1e-6  # knots closer than this share of a cell are one
MAX_ACTIVATIONS = 2**22  # enough for a quantile


@dataclass(frozen=True)
class Grid:
    """`points` knots, evenly on [-width/2, width/2]."""

    points: int
    width: float

    @property
    def spacing(self) -> float:
        return self.width / (self.points - 1)

    def knots(self) -> Array:
        return np.linspace(-self.width / 2, self.width / 2, self.points)

    def widened(self, cells: int) -> Grid:
        """This grid with `cells` more cells of the same width on each side."""
        return Grid(self.points + 2 * cells, self.width + 2 * cells * self.spacing)

    def locate(self, x: Array) -> tuple[Array, Array]:
        """The cell that each x falls in, 0 … points - 2, and its position there; shapes as x, float64.

        Inside the grid the position is from 0 to 1. Outside it the nearest cell counts, and the position is below 0 or
        above 1.
        """
        u = (np.asarray(x, np.float64) + self.width / 2) / self.spacing
        cell = np.clip(np.floor(u), 0, self.points - 2).astype(np.int64)
        return cell, u - cell

    def values(self, control_points: Array, x: Array) -> Array:
        """A spline with these control points, (points,), at x; straight lines beyond the ends. Shape of x, float64."""
        cell, t = self.locate(x)
        points = control_points.astype(np.float64)
        values: Array = points[cell] + t * (points[cell + 1] - points[cell])
        return values

    def interpolation(self, new: Grid) -> Array:
        """The matrix, (new.points, points), that maps control points on this grid to values at the knots of `new`."""
        cell, t = self.locate(new.knots())
        rows = np.arange(new.points)
        matrix = np.zeros((new.points, self.points))
        matrix[rows, cell] = 1 - t
        matrix[rows, cell + 1] = t
        return matrix

    def is_exact_on(self, new: Grid) -> bool:
        """Whether splines on this grid stay exact on `new`: every inner knot, where they may bend, is a knot there."""
        u = (self.knots()[1:-1] + new.width / 2) / new.spacing
        nearest = np.round(u)
        on_a_knot = np.abs(u - nearest) < SAME_KNOT * max(1.0, self.spacing / new.spacing)
        return bool(np.all(on_a_knot & (nearest > 0) & (nearest < new.points - 1)))


def fitted_width(activations: Tensor, outside: float) -> float:
    """Width of the narrowest grid around 0 with at most a share `outside` of the activations beyond its ends.

    Raises ValueError if there are no activations, or if they are all zero or not finite.
    """
    if not 0 <= outside < 1:
        raise ValueError(f"outside must be a share, at least 0 and below 1; got {outside!r}")
    sizes = activations.detach().abs().flatten().float()
    stride = math.ceil(sizes.numel() / MAX_ACTIVATIONS) or 1
    sizes = sizes[::stride].sort().values
    if not len(sizes):
        raise ValueError("a grid cannot be fitted to no activations; give at least one")
    largest_inside = float(sizes[math.ceil((1 - outside) * len(sizes)) - 1])
    if not 0 < largest_inside < math.inf:
        raise ValueError(
            f"a grid cannot be fitted to activations of size {largest_inside:g} (a share of {outside:g} left out); "
            f"they must be finite and not all zero"
        )
    return 2 * largest_inside


def second_differences(control_points: Tensor) -> Tensor:
    """Second differences along the grid: (I, G, O) → (I, G-2, O)."""
    return torch.diff(control_points, n=2, dim=1)
