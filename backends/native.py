"""`native`: our own C++ kernel (native.cpp) for CPUs, float32 and bfloat16, forward and backward.

It does the 2·I·O multiply-adds a token that the layer needs, whatever G is, and never writes out a basis. Weights that
autocast asks to be bfloat16 are read as they are stored, in float32, since the arithmetic is float32 anyway.
"""

import ctypes

import torch
from torch import Tensor

from backends import dense, embedding_bag, native_build, standard
from backends.native_shape import Shape, addresses, shape_of
from backends.operators import operator
from backends.problem import Problem, except_on_meta

_NARROW = (torch.float32, torch.bfloat16)  # what the kernel reads and writes


@except_on_meta
def why_not(problem: Problem) -> str | None:
    if problem.device.type != "cpu":
        return f"it is for CPUs, and the layer is on {problem.device.type}"
    return native_build.why_not()


@standard.under_transforms
def spline_sum(x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
    """x (N, I), control_points (I, G, O) → (N, O). float64 goes through embedding_bag; float16 computes in float32."""
    if torch.float64 in (x.dtype, control_points.dtype, dtype):
        return embedding_bag.spline_sum(x, control_points, spline_width, dtype)
    x, control_points = (t if t.dtype in _NARROW else t.float() for t in (x, control_points))
    y = spline_sum_op(x, control_points, spline_width, dtype if dtype in _NARROW else torch.float32)
    return y.to(dtype)


@operator("splinegpt::native", "cpu")
def spline_sum_op(x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
    """As `spline_sum`, for float32 and bfloat16 in any mixture. Raises ValueError for shapes that do not fit."""
    _check(x, control_points, spline_width)
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
    """Gradients of x and of the control points, in their types; sums over tokens are float32."""
    _check(x, control_points, spline_width)
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


def _save_for_backward(ctx, inputs, output) -> None:
    x, control_points, ctx.spline_width, _ = inputs
    ctx.save_for_backward(x, control_points)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, control_points = ctx.saved_tensors
    if standard.is_wanted_in_backward():
        wanted = ctx.needs_input_grad[:2]
        return *dense.gradients(grad, x, control_points, ctx.spline_width, grad.dtype, wanted), None, None
    return *spline_sum_backward(grad, x, control_points, ctx.spline_width), None, None


spline_sum_op.register_autograd(_backward, setup_context=_save_for_backward)
spline_sum_backward.refuse_autograd()


def _check(x: Tensor, control_points: Tensor, spline_width: float) -> None:
    """The kernel trusts its caller; operators can be called by anyone."""
    if x.ndim != 2 or control_points.ndim != 3 or x.shape[1] != control_points.shape[0]:
        shapes = f"{tuple(x.shape)} and {tuple(control_points.shape)}"
        raise ValueError(f"x must be (N, I) and control_points (I, G, O); got {shapes}")
    inputs, points, outputs = control_points.shape
    if min(inputs, outputs) < 1 or points < 2 or not spline_width > 0:
        raise ValueError(
            f"I and O must be at least 1, G at least 2, spline_width positive; got {inputs}, {outputs}, "
            f"{points}, {spline_width}"
        )
    if not {x.dtype, control_points.dtype} <= set(_NARROW):
        raise ValueError(f"x and control_points must be float32 or bfloat16; got {x.dtype} and {control_points.dtype}")


def _shape(x: Tensor, control_points: Tensor, y: Tensor, spline_width: float) -> Shape:
    weight_half, y_half = (tensor.dtype is torch.bfloat16 for tensor in (control_points, y))
    _, points, outputs = control_points.shape
    return shape_of(x, points, spline_width, outputs, weight_half, y_half)
