"""`dense`: the basis is materialised elementwise, then multiplied; the fastest way in plain PyTorch for small grids.

The forward pass uses ramps in place of hats: with r_k(u) = u - k clamped to [0, 1] (the first ramp is not clamped
below, the last one not above), f(u) = W_0 + Σ_k r_k(u)·(W_{k+1} - W_k). One clamp builds all G-1 ramps, without floor,
gather or scatter. In half precision, differences of control points also round far better than the points themselves.

The basis is laid out (N, grid, I), so that elementwise loops run along the features and not along a handful of cells.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backends import standard
from backends.cells import accumulation_dtype, find_cell, knot_units, rises


@standard.under_transforms
def spline_sum(x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
    """x (N, I), control_points (I, G, O) → (N, O). Materialises (N, (G-1)·I) values; saves only its arguments."""
    y: Tensor = _RampMatmul.apply(x, control_points, spline_width, dtype)  # type: ignore[no-untyped-call]
    return y


def ramps(u: Tensor, num_control_points: int) -> Tensor:
    """The share of each cell that lies left of position u (in knot units): (N, I) → (N, G-1, I)."""
    cells = torch.arange(num_control_points - 1, device=u.device, dtype=u.dtype).unsqueeze(1)  # (G-1, 1)
    ramp = (u.unsqueeze(1) - cells).clamp_(0, 1)
    ramp[:, 0] += u.clamp(max=0)  # outside the grid the first and the last ramp continue
    ramp[:, -1] += (u - (num_control_points - 1)).clamp_(min=0)
    return ramp


def hats(ramp: Tensor) -> Tensor:
    """Hat basis from the ramps: B_0 = 1 - r_0, B_g = r_{g-1} - r_g, B_{G-1} = r_{G-2}. (N, G-1, I) → (N, G, I)."""
    return torch.cat((1 - ramp[:, :1], ramp[:, :-1] - ramp[:, 1:], ramp[:, -1:]), dim=1)


def ramp_product(ramp: Tensor, control_points: Tensor) -> Tensor:
    """The splines' sums in the dtype of the ramps: ramps (N, (G-1)·I), control_points (I, G, O) → (N, O)."""
    at_first_knot = control_points[:, 0].sum(dim=0).to(ramp.dtype)  # (O,)
    return torch.addmm(at_first_knot, ramp, rises(control_points, ramp.dtype).flatten(0, 1))


class SplineFunction(torch.autograd.Function):
    """A way to compute y that saves only its arguments and has the gradients of `dense`; a subclass has the forward."""

    @staticmethod
    def save(ctx: Any, x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> None:
        ctx.save_for_backward(x, control_points)
        ctx.spline_width, ctx.dtype = spline_width, dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, control_points = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        return *gradients(grad, x, control_points, ctx.spline_width, ctx.dtype, wanted), None, None


class _RampMatmul(SplineFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
        SplineFunction.save(ctx, x, control_points, spline_width, dtype)
        points = control_points.shape[1]
        u = knot_units(x, points, spline_width).to(accumulation_dtype(x.dtype))
        return ramp_product(ramps(u, points).to(dtype).flatten(1), control_points)


def gradients(
    grad: Tensor, x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x (N, I) and of the control points (I, G, O), by matrix products in `dtype`; None if not wanted."""
    in_features, num_control_points, _ = control_points.shape
    u = knot_units(x, num_control_points, spline_width)
    grad_x = grad_weight = None
    if wanted[0]:
        grad_ramp = grad @ rises(control_points, dtype).flatten(0, 1).t()  # (N, (G-1)·I)
        grad_ramp = grad_ramp.reshape(len(x), num_control_points - 1, in_features)  # PyTorch cannot batch unflatten
        cell = find_cell(u, num_control_points).unsqueeze(1)  # (N, 1, I)
        rise = grad_ramp.gather(1, cell).squeeze(1)
        grad_x = rise.to(x.dtype) * ((num_control_points - 1) / spline_width)
    if wanted[1]:
        # Hats, not ramps: a control point's gradient would be the difference of two ramps' gradients, which cancels.
        basis = hats(ramps(u.to(accumulation_dtype(x.dtype)), num_control_points)).to(dtype).flatten(1)
        grad_weight = (basis.t() @ grad).reshape(num_control_points, in_features, -1)  # (G, I, O)
        grad_weight = grad_weight.transpose(0, 1).to(control_points.dtype)
    return grad_x, grad_weight
