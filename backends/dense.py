"""`dense`: the basis written out elementwise, then one matmul; the fastest way in plain PyTorch for small grids.

The forward uses ramps in place of hats: with r_k(u) = u - k clamped to [0, 1] (the first ramp unclamped below, the last
above), f(u) = W_0 + Σ_k r_k(u)·(W_{k+1} - W_k). One clamp builds all G-1 of them, without floor, gather or scatter, and
in half precision differences of control points round far better than the control points themselves.
"""

import torch
from torch import Tensor

from backends.grid import accumulation_dtype, knot_units, locate


def spline_sum(x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
    """x (N, I), control_points (I, G, O) → (N, O). Writes an (N, I·(G-1)) matrix; saves only its arguments."""
    return _RampMatmul.apply(x, control_points, spline_width, dtype)


def ramps(x: Tensor, num_control_points: int, spline_width: float) -> Tensor:
    """The share of each cell that lies left of x: 0 before the cell, 1 behind it. (N, I) → (N, I, G-1)."""
    u = knot_units(x, num_control_points, spline_width).to(accumulation_dtype(x.dtype))
    cells = torch.arange(num_control_points - 1, device=x.device, dtype=u.dtype)
    first, last = cells == 0, cells == num_control_points - 2
    lower = torch.where(first, -torch.inf, 0.0).to(u.dtype)
    upper = torch.where(last, torch.inf, 1.0).to(u.dtype)
    return (u.unsqueeze(-1) - cells).clamp(lower, upper)


def hats(ramp: Tensor) -> Tensor:
    """Hat basis from the ramps: B_0 = 1 - r_0, B_g = r_{g-1} - r_g, B_{G-1} = r_{G-2}. (…, G-1) → (…, G)."""
    return torch.cat((1 - ramp[..., :1], ramp[..., :-1] - ramp[..., 1:], ramp[..., -1:]), dim=-1)


def _slopes(control_points: Tensor, dtype: torch.dtype) -> Tensor:
    """(I, G, O) → (I·(G-1), O): the rise over each cell."""
    return control_points.diff(dim=1).flatten(0, 1).to(dtype)


class _RampMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, control_points)
        ctx.spline_width, ctx.dtype = spline_width, dtype
        ramp = ramps(x, control_points.shape[1], spline_width).to(dtype).flatten(1)  # (N, I·(G-1))
        at_first_knot = control_points[:, 0].sum(dim=0).to(dtype)  # (O,)
        return torch.addmm(at_first_knot, ramp, _slopes(control_points, dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, control_points = ctx.saved_tensors
        in_features, num_control_points, _ = control_points.shape
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            cell, _ = locate(x, num_control_points, ctx.spline_width)
            grad_ramp = grad @ _slopes(control_points, ctx.dtype).t()  # (N, I·(G-1))
            grad_ramp = grad_ramp.unflatten(1, (in_features, num_control_points - 1))
            rise = grad_ramp.gather(-1, cell.unsqueeze(-1)).squeeze(-1)  # (N, I)
            grad_x = rise.to(x.dtype) * ((num_control_points - 1) / ctx.spline_width)
        if ctx.needs_input_grad[1]:
            # Hats, not ramps: a control point's gradient as the difference of two ramps' would cancel.
            basis = hats(ramps(x, num_control_points, ctx.spline_width)).to(ctx.dtype).flatten(1)  # (N, I·G)
            grad_weight = (basis.t() @ grad).view_as(control_points).to(control_points.dtype)
        return grad_x, grad_weight, None, None
