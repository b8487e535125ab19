"""Splines of pairs of features in PyTorch's standard operators: on every device, in every dtype, under every transform.

A cell of the grid is divided by the diagonal on which the places t (of x) and s (of z) in it are equal. With the larger
and the smaller of the two places, a function on either triangle is

    (1 - larger)·W[j, k] + (larger - smaller)·W[middle] + smaller·W[j+1, k+1]

where the middle corner is (j+1, k) if t ≥ s, else (j, k+1). Its slopes are differences of two of these rows.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backends.cells import accumulation_dtype, find_cell, knot_units, widen


def pair_sum(x: Tensor, z: Tensor, control_points: Tensor, spline_width: float) -> Tensor:
    """x and z (N, I), control_points (I, G, G, O) → (N, O), in float32 for half precisions, else in the dtype of x.

    Materialises the smaller of (N, I, G²) and (N, I, O) values.
    """
    points, outputs = control_points.shape[2:]
    with _without_autocast(x.device.type):
        corners = Corners.of(x, z, points, spline_width)
        table = control_points.to(sum_dtype(x, control_points)).reshape(-1, outputs)  # (I·G², O)
        if points**2 <= outputs:
            y = corners.basis(points, table.dtype) @ table
        else:
            y = corners.gathered_sum(points, table)
        return y.to(accumulation_dtype(x.dtype))


def gradients(
    grad: Tensor, x: Tensor, z: Tensor, control_points: Tensor, spline_width: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, z (N, I) and the control points (I, G, G, O), in their dtypes; they can be differentiated again.

    Materialises (N, I, G²) values.
    """
    inputs, points, _, outputs = control_points.shape
    with _without_autocast(x.device.type):
        corners = Corners.of(x, z, points, spline_width)
        table = control_points.to(sum_dtype(x, control_points)).reshape(-1, outputs)  # (I·G², O)
        grad = grad.to(table.dtype)
        grad_weight = corners.basis(points, table.dtype).t() @ grad
        by_knot = (grad @ table.t()).reshape(len(x), inputs, points**2)  # PyTorch cannot batch unflatten
        at = (by_knot.gather(2, row.unsqueeze(2)).squeeze(2) for row in corners.rows(points))
        lower, middle, upper = at
        by_larger, by_smaller = middle - lower, upper - middle
        slopes = (points - 1) / spline_width
        grad_x = torch.where(corners.x_is_larger, by_larger, by_smaller) * slopes
        grad_z = torch.where(corners.x_is_larger, by_smaller, by_larger) * slopes
        grad_x, grad_z = (
            torch.where(is_inside(place, spline_width), slope, torch.zeros_like(slope)).to(place.dtype)
            for place, slope in ((x, grad_x), (z, grad_z))
        )
        return grad_x, grad_z, grad_weight.reshape(control_points.shape).to(control_points.dtype)


def check_arguments(x: Tensor, z: Tensor, control_points: Tensor, spline_width: float) -> None:
    """Raise ValueError that says which shape, width or dtype does not fit."""
    if x.ndim != 2 or x.shape != z.shape or control_points.ndim != 4 or x.shape[1] != control_points.shape[0]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, z, control_points))
        raise ValueError(f"x and z must be (N, I) and control_points (I, G, G, O); got {shapes}")
    inputs, points, points_of_z, outputs = control_points.shape
    if min(inputs, outputs) < 1 or points < 2 or points_of_z != points or not 0 < spline_width < math.inf:
        raise ValueError(
            "I and O must be at least 1, G at least 2 and the same for x and z, spline_width positive and finite; got "
            f"control_points {tuple(control_points.shape)} and spline_width {spline_width}"
        )
    if not all(tensor.is_floating_point() for tensor in (x, z, control_points)):
        raise ValueError(f"all must be of floating dtypes; got {x.dtype}, {z.dtype} and {control_points.dtype}")


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """A context in which sums are not rounded to half precision; nothing on PyTorch's meta device, which has none."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def sum_dtype(x: Tensor, control_points: Tensor) -> torch.dtype:
    """The dtype to sum in: float32, or float64 if either is."""
    return torch.promote_types(accumulation_dtype(x.dtype), accumulation_dtype(control_points.dtype))


def is_inside(x: Tensor, spline_width: float) -> Tensor:
    """Whether each input lies on the grid, its ends included. NaN does not."""
    return widen(x).abs() <= spline_width / 2


@dataclass(frozen=True)
class Corners:
    """The triangle that each pair lies in, and its place there; all (N, I)."""

    row: Tensor  # of the lower corner, (j, k), among the G² control points of its function; int64
    x_is_larger: Tensor  # whether t ≥ s; NaN is not
    larger: Tensor  # the larger of t and s
    smaller: Tensor

    @classmethod
    def of(cls, x: Tensor, z: Tensor, points: int, spline_width: float) -> Corners:
        """The triangles of the pairs x, z, differentiable; inputs beyond the grid are moved to its edge."""
        dtype = accumulation_dtype(torch.promote_types(x.dtype, z.dtype))
        (j, t), (k, s) = (_locate_on_grid(each, points, spline_width, dtype) for each in (x, z))
        x_is_larger = t >= s
        larger, smaller = torch.where(x_is_larger, t, s), torch.where(x_is_larger, s, t)
        return cls(j * points + k, x_is_larger, larger, smaller)

    def rows(self, points: int) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of the lower, middle and upper corner among the G² control points of a function."""
        return self.row, self.row + torch.where(self.x_is_larger, points, 1), self.row + (points + 1)

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The shares of the three corners, which sum to 1."""
        larger, smaller = self.larger.to(dtype), self.smaller.to(dtype)
        return 1 - larger, larger - smaller, smaller

    def basis(self, points: int, dtype: torch.dtype) -> Tensor:
        """The share of every control point, (N, I·G²)."""
        knots = torch.arange(points**2, device=self.row.device)
        basis = torch.zeros((), dtype=dtype, device=self.row.device)
        for row, weight in zip(self.rows(points), self.weights(dtype), strict=True):
            basis = torch.where(knots == row.unsqueeze(-1), weight.unsqueeze(-1), basis)
        return basis.flatten(1)

    def gathered_sum(self, points: int, table: Tensor) -> Tensor:
        """The sum over features of the three rows of `table` (I·G², O), weighted: (N, O)."""
        first_row = torch.arange(self.row.shape[1], device=table.device) * points**2  # of each feature
        y = table.new_zeros(())
        for row, weight in zip(self.rows(points), self.weights(table.dtype), strict=True):
            y = y + weight.unsqueeze(-1) * F.embedding(first_row + row, table)
        return y.sum(dim=1)


def _locate_on_grid(x: Tensor, points: int, spline_width: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The cell of each input (int64, 0 … G-2) and its place there, 0 … 1, the nearest place for inputs beyond the grid.

    The slope of the place is that of the cell, and 0 beyond the grid; at the ends of the grid it is that of the cell.
    """
    u = knot_units(widen(x).clamp(-spline_width / 2, spline_width / 2), points, spline_width)
    cell = find_cell(u, points)
    return cell, (u - cell).to(dtype)
