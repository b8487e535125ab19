"""`dense`: the basis written out elementwise, then one matmul; the fastest way in plain PyTorch for small grids.

The forward uses ramps in place of hats: with r_k(u) = u - k clamped to [0, 1] (the first ramp unclamped below, the last
above), f(u) = W_0 + Σ_k r_k(u)·(W_{k+1} - W_k). One clamp builds all G-1 of them, without floor, gather or scatter, and
in half precision differences of control points round far better than the control points themselves.

The basis is laid out (N, grid, I): elementwise loops then run along the features, not along a handful of cells.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from backends import standard
from backends.cells import accumulation_dtype, find_cell, knot_units


@standard.under_transforms
def spline_sum(x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
    """x (N, I), control_points (I, G, O) → (N, O). Writes an (N, (G-1)·I) matrix; saves only its arguments."""
    return _RampMatmul.apply(x, control_points, spline_width, dtype)


def ramps(u: Tensor, num_control_points: int) -> Tensor:
    """The share of each cell that lies left of position u (in knot units): (N, I) → (N, G-1, I)."""
    cells = torch.arange(num_control_points - 1, device=u.device, dtype=u.dtype).unsqueeze(1)  # (G-1, 1)
    ramp = (u.unsqueeze(1) - cells).clamp_(0, 1)
    ramp[:, 0] += u.clamp(max=0)  # outside the domain the first and the last cell go on
    ramp[:, -1] += (u - (num_control_points - 1)).clamp_(min=0)
    return ramp


def hats(ramp: Tensor) -> Tensor:
    """Hat basis from the ramps: B_0 = 1 - r_0, B_g = r_{g-1} - r_g, B_{G-1} = r_{G-2}. (N, G-1, I) → (N, G, I)."""
    return torch.cat((1 - ramp[:, :1], ramp[:, :-1] - ramp[:, 1:], ramp[:, -1:]), dim=1)


def _slopes(control_points: Tensor, dtype: torch.dtype) -> Tensor:
    """The rise over each cell: (I, G, O) → ((G-1)·I, O)."""
    return control_points.transpose(0, 1).diff(dim=0).flatten(0, 1).to(dtype)


class _RampMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, control_points)
        ctx.spline_width, ctx.dtype = spline_width, dtype
        u = knot_units(x, control_points.shape[1], spline_width).to(accumulation_dtype(x.dtype))
        ramp = ramps(u, control_points.shape[1]).to(dtype).flatten(1)  # (N, (G-1)·I)
        at_first_knot = control_points[:, 0].sum(dim=0).to(dtype)  # (O,)
        return torch.addmm(at_first_knot, ramp, _slopes(control_points, dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, control_points = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        return *gradients(grad, x, control_points, ctx.spline_width, ctx.dtype, wanted), None, None


def gradients(
    grad: Tensor, x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Of x, (N, I), and of the control points, (I, G, O), by matrix products in `dtype`; None for one not wanted."""
    in_features, num_control_points, _ = control_points.shape
    u = knot_units(x, num_control_points, spline_width)
    grad_x = grad_weight = None
    if wanted[0]:
        grad_ramp = grad @ _slopes(control_points, dtype).t()  # (N, (G-1)·I)
        grad_ramp = grad_ramp.reshape(len(x), num_control_points - 1, in_features)  # PyTorch cannot batch unflatten
        cell = find_cell(u, num_control_points).unsqueeze(1)  # (N, 1, I)
        rise = grad_ramp.gather(1, cell).squeeze(1)
        grad_x = rise.to(x.dtype) * ((num_control_points - 1) / spline_width)
    if wanted[1]:
        # Hats, not ramps: a control point's gradient as the difference of two ramps' would cancel.
        basis = hats(ramps(u.to(accumulation_dtype(x.dtype)), num_control_points)).to(dtype).flatten(1)
        grad_weight = (basis.t() @ grad).reshape(num_control_points, in_features, -1)  # (G, I, O)
        grad_weight = grad_weight.transpose(0, 1).to(control_points.dtype)
    return grad_x, grad_weight
