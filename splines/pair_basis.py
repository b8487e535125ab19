"""The coefficients of functions on a G x G grid, and the control points that they stand for."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from backends.mode_sums import can_compute, mode_sums
from common.tables import Tables
from splines.grid import Array
from splines.parametrisation import PASSBAND, cosine_modes, product, widest_dtype

VARIANTS = ("B-spline", "balanced")


def mode_scales(points: int) -> Array:
    """The factor of each product of two cosine modes, (G, G): (1 + λ(ω₁² + ω₂²)²)^(-1/2).

    Along either axis alone it is that of `splines.parametrisation.balanced_cosines`.
    """
    frequency = cosine_modes(points)[1] * points / (math.pi * PASSBAND)
    scales: Array = 1 / np.sqrt(1 + np.add.outer(frequency**2, frequency**2) ** 2)
    return scales


class PairBasis(Tables):
    """Converts stored weights (I, G², O) to control points (I, G, G, O) and back."""

    modes: Tensor | None  # (G, G), a mode in each column; None if control points are stored as they are
    scales: Tensor | None  # (G, G), of the products of modes

    def __init__(self, variant: str, points: int, like: Tensor) -> None:
        """`like` is a tensor with the device and dtype to compute in."""
        super().__init__()
        self.variant = variant
        self.points = points
        self.register_buffer("modes", None, persistent=False)
        self.register_buffer("scales", None, persistent=False)
        self.register_tables(like.device, like.dtype)

    def compute_tables(self) -> dict[str, Tensor]:
        if self.variant == "B-spline":
            return {}
        return {
            "modes": torch.from_numpy(cosine_modes(self.points)[0]),
            "scales": torch.from_numpy(mode_scales(self.points)),
        }

    def control_points(self, weight: Tensor) -> Tensor:
        """Σ over modes of coefficient · scale · mode(x) · mode(z): (I, G², O) → (I, G, G, O); differentiable."""
        by_knot: Tensor = weight.unflatten(1, (self.points, self.points))
        if self.modes is None or self.scales is None:
            return by_knot
        if can_compute(weight) and can_compute(self.modes):
            return mode_sums(by_knot, self.modes, self.scales)
        along_z = product(self.modes, self.scales.unsqueeze(-1) * by_knot)  # (I, mode of x, knot of z, O)
        along_both = product(self.modes, along_z.flatten(2))  # (I, knot of x, knots of z · O)
        return along_both.view(by_knot.shape)

    @torch.no_grad()
    def coefficients(self, control_points: Tensor) -> Tensor:
        """The inverse, in the dtype of the control points, computed in float64 where the device has it."""
        values = control_points
        if self.modes is not None:
            wide = widest_dtype(control_points.device)
            inverse = torch.from_numpy(np.linalg.inv(cosine_modes(self.points)[0])).to(control_points.device, wide)
            scales = torch.from_numpy(mode_scales(self.points)).to(inverse)
            values = torch.einsum("ag,bh,igho->iabo", inverse, inverse, control_points.to(wide))
            values = values / scales.unsqueeze(-1)
        return values.to(control_points.dtype).flatten(1, 2)
