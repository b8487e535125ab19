"""`amx`: bfloat16 splines as matrix products, for CPUs with units that multiply bfloat16 matrices (Intel's AMX).

These units do a thousand multiply-adds in the time of one vector operation, so a product with a mostly zero basis beats
looking up control points. native.cpp materialises the basis in bfloat16 (ramps, as in `dense`), and PyTorch (oneDNN)
multiplies it by the rises of the control points. The basis is laid out column by column, (N, columns, I), so that
vectors of features are written at once. Every other dtype is computed by `native`.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from backends import dense, instruction_set, native, native_build, standard
from backends.cells import rises
from backends.native_shape import addresses, shape_of
from backends.operators import operator
from backends.problem import Problem, except_on_meta


def is_supported() -> bool:
    """Whether PyTorch reports that this CPU has AMX, and $SPLINEGPT_CPU does not rule it out."""
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
    y: Tensor = _BasisMatmul.apply(x, control_points, spline_width, dtype)  # type: ignore[no-untyped-call]
    return y


class _BasisMatmul(dense.SplineFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
        dense.SplineFunction.save(ctx, x, control_points, spline_width, dtype)
        return dense.ramp_product(basis(x, control_points.shape[1], spline_width, hats=False), control_points)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if standard.is_wanted_in_backward():
            return dense.SplineFunction.backward(ctx, grad)
        x, control_points = ctx.saved_tensors
        points = control_points.shape[1]
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_ramps = grad @ rises(control_points, torch.bfloat16).flatten(0, 1).t()  # (N, (G-1)·I)
            grad_x = slopes(x, grad_ramps, points, ctx.spline_width)
        if ctx.needs_input_grad[1]:
            hats = basis(x, points, ctx.spline_width, hats=True)  # (N, G·I); hats and not ramps, as in `dense`
            grad_weight = (hats.t() @ grad).unflatten(0, (points, -1)).transpose(0, 1)  # (G·I, O) → (I, G, O)
            grad_weight = grad_weight.to(control_points.dtype)
        return grad_x, grad_weight, None, None


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
    """The gradient of x (N, I), in its dtype, from the gradient of its ramps, (N, (G-1)·I) in bfloat16."""
    x, grad_ramps = x.contiguous(), grad_ramps.contiguous()
    grad_x = torch.empty_like(x)
    shape = shape_of(x, num_control_points, spline_width)
    native_build.load().splinegpt_grad_x(ctypes.byref(shape), *addresses(x, grad_ramps, grad_x))
    return grad_x


@slopes.register_fake
def _(x: Tensor, grad_ramps: Tensor, num_control_points: int, spline_width: float) -> Tensor:
    return x.new_empty(x.shape)


# _BasisMatmul calls both and has their gradient. Called from elsewhere they would have none.
basis.refuse_autograd()
slopes.refuse_autograd()
