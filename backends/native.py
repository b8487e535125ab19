"""`native`: our own C++ kernel (native.cpp) for CPUs, float32 and bfloat16, forward and backward.

Costs 2·I·O multiply-adds per token whatever G is; the basis is never materialised. Weights that autocast asks to be
bfloat16 are read as they are stored, in float32, since the arithmetic is float32 anyway.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from backends import dense, embedding_bag, native_build, standard
from backends.native_shape import Shape, addresses, shape_of
from backends.operators import operator
from backends.problem import Problem, check_arguments, except_on_meta

_NARROW = (torch.float32, torch.bfloat16)  # what the kernel reads and writes


@except_on_meta
def why_not(problem: Problem) -> str | None:
    if problem.device.type != "cpu":
        return f"it is for CPUs, and the layer is on {problem.device.type}"
    return native_build.why_not()


@standard.under_transforms
def spline_sum(x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
    """x (N, I), control_points (I, G, O) → (N, O). embedding_bag computes float64; float16 is computed in float32."""
    if torch.float64 in (x.dtype, control_points.dtype, dtype):
        return embedding_bag.spline_sum(x, control_points, spline_width, dtype)
    x, control_points = (t if t.dtype in _NARROW else t.float() for t in (x, control_points))
    y = spline_sum_op(x, control_points, spline_width, dtype if dtype in _NARROW else torch.float32)
    return y.to(dtype)


@operator("splinegpt::native", "cpu")
def spline_sum_op(x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
    """The sum, for float32 and bfloat16 in any mixture. Raises ValueError for arguments that do not fit."""
    check_arguments(x, control_points, spline_width, _NARROW)
    x, control_points = x.contiguous(), control_points.contiguous()
    y = x.new_empty(x.shape[0], control_points.shape[2], dtype=dtype)
    shape = _shape(x, control_points, y, spline_width)
    native_build.load().splinegpt_forward(ctypes.byref(shape), *addresses(x, control_points, y))
    return y


@spline_sum_op.register_fake
def _(x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], control_points.shape[2], dtype=dtype)


@operator("splinegpt::native_backward", "cpu")
def spline_sum_backward(grad: Tensor, x: Tensor, control_points: Tensor, spline_width: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the control points, in their dtypes; sums over tokens are float32."""
    check_arguments(x, control_points, spline_width, _NARROW)
    if grad.shape != (x.shape[0], control_points.shape[2]):
        raise ValueError(f"grad must be (tokens, outputs) of x and control_points; got {tuple(grad.shape)}")
    grad, x, control_points = grad.contiguous(), x.contiguous(), control_points.contiguous()
    grad_x = torch.empty_like(x)
    grad_weight = torch.empty_like(control_points, dtype=torch.float32)
    shape = _shape(x, control_points, grad, spline_width)
    where = addresses(x, control_points, grad, grad_x, grad_weight)
    native_build.load().splinegpt_backward(ctypes.byref(shape), *where)
    return grad_x, grad_weight.to(control_points.dtype)


@spline_sum_backward.register_fake
def _(grad: Tensor, x: Tensor, control_points: Tensor, spline_width: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), control_points.new_empty(control_points.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, control_points, ctx.spline_width, _ = inputs
    ctx.save_for_backward(x, control_points)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, control_points = ctx.saved_tensors
    if standard.is_wanted_in_backward():
        wanted = ctx.needs_input_grad[:2]
        return *dense.gradients(grad, x, control_points, ctx.spline_width, grad.dtype, wanted), None, None
    return *spline_sum_backward(grad, x, control_points, ctx.spline_width), None, None


spline_sum_op.register_autograd(_backward, setup_context=_save_for_backward)
spline_sum_backward.refuse_autograd()


def _shape(x: Tensor, control_points: Tensor, y: Tensor, spline_width: float) -> Shape:
    weight_half, y_half = (tensor.dtype is torch.bfloat16 for tensor in (control_points, y))
    _, points, outputs = control_points.shape
    return shape_of(x, points, spline_width, outputs, weight_half, y_half)
