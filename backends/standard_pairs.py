"""Splines of pairs of features in PyTorch's standard operators: on every device, in every dtype, under every transform.

A cell of the grid, with the corners W00, W10 (one knot on in x), W01 (one in z) and W11, is divided by the diagonal on
which the places t (of x) and s (of z) in it are equal. On either triangle a function is

    (1 - t)·W00 + (t - s)·W10 + s·W11   where t ≥ s,      (1 - s)·W00 + (s - t)·W01 + t·W11   elsewhere.

Beyond the grid it goes on straight from the nearest point of it. Where x lies beyond, the slope along x is that of the
edges of the cell along x, (1 - s)·(W10 - W00) + s·(W11 - W01), at the nearest s of the grid. Likewise for z.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backends.cells import accumulation_dtype, locate


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
        at00, at10, at01, at11 = (by_knot.gather(2, row.unsqueeze(2)).squeeze(2) for row in corners.rows(points))
        share_x, share_z = (share.to(table.dtype) for share in corners.slope_shares())
        slopes = (points - 1) / spline_width
        grad_x = torch.lerp(at10 - at00, at11 - at01, share_x) * slopes
        grad_z = torch.lerp(at01 - at00, at11 - at10, share_z) * slopes
        grad_weight = grad_weight.reshape(control_points.shape).to(control_points.dtype)
        return grad_x.to(x.dtype), grad_z.to(z.dtype), grad_weight


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


@dataclass(frozen=True)
class Corners:
    """The cell that each pair lies in, or is nearest to, and its place there; all (N, I)."""

    row: Tensor  # of W00 among the G² control points of its function; int64
    t: Tensor  # the nearest place of x in the cell, 0 … 1
    s: Tensor  # that of z
    beyond_t: Tensor  # how far x lies from that place, in cells; 0 on the grid
    beyond_s: Tensor
    x_is_larger: Tensor  # whether x lies further into the cell than z; not if either is NaN

    @classmethod
    def of(cls, x: Tensor, z: Tensor, points: int, spline_width: float) -> Corners:
        """The cells of the pairs x, z, differentiable."""
        (j, t), (k, s) = (locate(each, points, spline_width) for each in (x, z))
        inner_t, inner_s = t.clamp(0, 1), s.clamp(0, 1)
        return cls(j * points + k, inner_t, inner_s, t - inner_t, s - inner_s, t >= s)

    def rows(self, points: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The rows of W00, W10, W01 and W11 among the G² control points of a function."""
        return self.row, self.row + points, self.row + 1, self.row + (points + 1)

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The shares of W00, W10, W01 and W11, which sum to 1."""
        t, s, beyond_t, beyond_s = (each.to(dtype) for each in (self.t, self.s, self.beyond_t, self.beyond_s))
        larger, smaller = torch.where(self.x_is_larger, t, s), torch.where(self.x_is_larger, s, t)
        middle, none = larger - smaller, torch.zeros_like(t)
        low_x, high_x = beyond_t * (1 - s), beyond_t * s  # the steps along x on the lower and on the upper edge
        low_z, high_z = beyond_s * (1 - t), beyond_s * t
        return (
            1 - larger - low_x - low_z,
            torch.where(self.x_is_larger, middle, none) + low_x - high_z,
            torch.where(self.x_is_larger, none, middle) - high_x + low_z,
            smaller + high_x + high_z,
        )

    def slope_shares(self) -> tuple[Tensor, Tensor]:
        """What the upper of two edges contributes to the slope along x, and to that along z."""
        x_is_beyond, z_is_beyond = self.beyond_t != 0, self.beyond_s != 0
        one, none = torch.ones_like(self.t), torch.zeros_like(self.t)
        along_x = torch.where(z_is_beyond, self.s + self.beyond_s, torch.where(self.x_is_larger, none, one))
        along_z = torch.where(x_is_beyond, self.t + self.beyond_t, torch.where(self.x_is_larger, one, none))
        return torch.where(x_is_beyond, self.s, along_x), torch.where(z_is_beyond, self.t, along_z)

    def basis(self, points: int, dtype: torch.dtype) -> Tensor:
        """The share of every control point, (N, I·G²)."""
        knots = torch.arange(points**2, device=self.row.device)
        basis = torch.zeros((), dtype=dtype, device=self.row.device)
        for row, weight in zip(self.rows(points), self.weights(dtype), strict=True):
            basis = torch.where(knots == row.unsqueeze(-1), weight.unsqueeze(-1), basis)
        return basis.flatten(1)

    def gathered_sum(self, points: int, table: Tensor) -> Tensor:
        """The sum over features of the four rows of `table` (I·G², O), weighted: (N, O)."""
        first_row = torch.arange(self.row.shape[1], device=table.device) * points**2  # of each feature
        y = table.new_zeros(())
        for row, weight in zip(self.rows(points), self.weights(table.dtype), strict=True):
            y = y + weight.unsqueeze(-1) * F.embedding(first_row + row, table)
        return y.sum(dim=1)
