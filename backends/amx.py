"""`amx`: bfloat16 splines as matrix products, for CPUs with units that multiply such matrices (Intel's AMX).

A lookup cannot follow a unit that does a thousand multiply-adds in the time of one vector operation. So native.cpp
writes the basis, ramps as in `dense`, in bfloat16, and PyTorch (oneDNN) multiplies it with the rises of the control
points. The basis is laid out column by column, (N, columns, I), so that vectors of features are written at once.
Everything but bfloat16 is computed by `native`.
"""

import ctypes

import torch
from torch import Tensor

from backends import dense, instruction_set, native, native_build, standard
from backends.native_shape import addresses, shape_of
from backends.operators import operator
from backends.problem import Problem, except_on_meta


def is_supported() -> bool:
    """Whether this CPU has AMX, as far as PyTorch can tell, and $SPLINEGPT_CPU does not rule it out."""
    return instruction_set.why_no_amx() is None


@except_on_meta
def why_not(problem: Problem) -> str | None:
    on_cpu = problem.device.type == "cpu"
    return (instruction_set.why_no_amx() if on_cpu else None) or native.why_not(problem)


@standard.under_transforms
def spline_sum(x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
    """x (N, I), control_points (I, G, O) → (N, O). Saves only its arguments."""
    if dtype is not torch.bfloat16 or torch.float64 in (x.dtype, control_points.dtype):
        return native.spline_sum(x, control_points, spline_width, dtype)
    x = x if x.dtype is torch.bfloat16 else x.float()
    return _BasisMatmul.apply(x, control_points, spline_width)


def rises(control_points: Tensor) -> Tensor:
    """Of each spline over each of its cells: (I, G, O) → ((G-1)·I, O) in bfloat16."""
    return control_points.transpose(0, 1).diff(dim=0).flatten(0, 1).to(torch.bfloat16)


class _BasisMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, control_points: Tensor, spline_width: float) -> Tensor:
        ctx.save_for_backward(x, control_points)
        ctx.spline_width = spline_width
        ramps = basis(x, control_points.shape[1], spline_width, hats=False)  # (N, (G-1)·I)
        at_first_knot = control_points[:, 0].sum(dim=0).to(torch.bfloat16)  # (O,)
        return torch.addmm(at_first_knot, ramps, rises(control_points))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, control_points = ctx.saved_tensors
        points = control_points.shape[1]
        if standard.is_wanted_in_backward():
            wanted = ctx.needs_input_grad[:2]
            return *dense.gradients(grad, x, control_points, ctx.spline_width, grad.dtype, wanted), None
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = slopes(x, grad @ rises(control_points).t(), points, ctx.spline_width)
        if ctx.needs_input_grad[1]:
            # Hats, not ramps: a control point's gradient as the difference of two ramps' would cancel.
            hats = basis(x, points, ctx.spline_width, hats=True)  # (N, G·I)
            grad_weight = (hats.t() @ grad).unflatten(0, (points, -1)).transpose(0, 1)  # (G·I, O) → (I, G, O)
            grad_weight = grad_weight.to(control_points.dtype)
        return grad_x, grad_weight, None


@operator("splinegpt::basis", "cpu")
def basis(x: Tensor, num_control_points: int, spline_width: float, hats: bool) -> Tensor:
    """Hats (N, G·I), or ramps (N, (G-1)·I), of x (N, I), in bfloat16."""
    x = x.contiguous()
    result = _empty_basis(x, num_control_points, spline_width, hats)
    shape = shape_of(x, num_control_points, spline_width)
    library = native_build.load()
    write = library.splinegpt_hats if hats else library.splinegpt_ramps
    write(ctypes.byref(shape), *addresses(x, result))
    return result


@basis.register_fake
def _empty_basis(x: Tensor, num_control_points: int, spline_width: float, hats: bool) -> Tensor:
    columns = num_control_points if hats else num_control_points - 1
    return x.new_empty(x.shape[0], x.shape[1] * columns, dtype=torch.bfloat16)


@operator("splinegpt::slopes", "cpu")
def slopes(x: Tensor, grad_ramps: Tensor, num_control_points: int, spline_width: float) -> Tensor:
    """The gradient of x (N, I), in its type, from that of its ramps, (N, (G-1)·I) in bfloat16."""
    x, grad_ramps = x.contiguous(), grad_ramps.contiguous()
    grad_x = torch.empty_like(x)
    shape = shape_of(x, num_control_points, spline_width)
    native_build.load().splinegpt_grad_x(ctypes.byref(shape), *addresses(x, grad_ramps, grad_x))
    return grad_x


@slopes.register_fake
def _(x: Tensor, grad_ramps: Tensor, num_control_points: int, spline_width: float) -> Tensor:
    return x.new_empty(x.shape)


basis.refuse_autograd()  # within the gradient above, whose own would miss what goes through these two
slopes.refuse_autograd()
