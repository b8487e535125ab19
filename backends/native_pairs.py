"""Splines of pairs of features by our own C++ kernel (native.cpp) for CPUs, float32, forward and backward.

Costs 3·I·O multiply-adds per token whatever G is, and 4·I·O beyond the grid; the basis is never materialised. Where the
kernel cannot be built, these operators compute the same in standard ones. They make this choice inside, where compilers
do not look, because the build cannot be traced.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from backends import native_build, standard, standard_pairs
from backends.native_shape import Shape, addresses, shape_of
from backends.operators import operator


@operator("splinegpt::pairs", "cpu")
def pair_sum_op(x: Tensor, z: Tensor, control_points: Tensor, spline_width: float) -> Tensor:
    """x and z (N, I), control_points (I, G, G, O) → (N, O), all float32. Raises ValueError for other arguments."""
    _check(x, z, control_points, spline_width)
    if native_build.why_not():
        return standard_pairs.pair_sum(x, z, control_points, spline_width)
    x, z, control_points = x.contiguous(), z.contiguous(), control_points.contiguous()
    y = x.new_empty(x.shape[0], control_points.shape[3])
    shape = _shape(x, control_points, spline_width)
    native_build.load().splinegpt_pairs_forward(ctypes.byref(shape), *addresses(x, z, control_points, y))
    return y


@pair_sum_op.register_fake
def _(x: Tensor, z: Tensor, control_points: Tensor, spline_width: float) -> Tensor:
    return x.new_empty(x.shape[0], control_points.shape[3])


@operator("splinegpt::pairs_backward", "cpu")
def pair_sum_backward(
    grad: Tensor, x: Tensor, z: Tensor, control_points: Tensor, spline_width: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, z and the control points, all float32. Raises ValueError for other arguments."""
    _check(x, z, control_points, spline_width)
    if grad.shape != (x.shape[0], control_points.shape[3]) or grad.dtype is not torch.float32:
        raise ValueError(f"grad must be float32, (tokens, outputs); got {grad.dtype} and {tuple(grad.shape)}")
    if native_build.why_not():
        return standard_pairs.gradients(grad, x, z, control_points, spline_width)
    grad, x, z, control_points = (tensor.contiguous() for tensor in (grad, x, z, control_points))
    grad_x, grad_z, grad_weight = (torch.empty_like(tensor) for tensor in (x, z, control_points))
    shape = _shape(x, control_points, spline_width)
    where = addresses(x, z, control_points, grad, grad_x, grad_z, grad_weight)
    native_build.load().splinegpt_pairs_backward(ctypes.byref(shape), *where)
    return grad_x, grad_z, grad_weight


@pair_sum_backward.register_fake
def _(grad: Tensor, x: Tensor, z: Tensor, control_points: Tensor, spline_width: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), z.new_empty(z.shape), control_points.new_empty(control_points.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.spline_width = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    x, z, control_points = ctx.saved_tensors
    if standard.is_wanted_in_backward():
        return *standard_pairs.gradients(grad, x, z, control_points, ctx.spline_width), None
    return *pair_sum_backward(grad, x, z, control_points, ctx.spline_width), None


pair_sum_op.register_autograd(_backward, setup_context=_save_for_backward)
pair_sum_backward.refuse_autograd()


def _check(x: Tensor, z: Tensor, control_points: Tensor, spline_width: float) -> None:
    standard_pairs.check_arguments(x, z, control_points, spline_width)
    if {x.dtype, z.dtype, control_points.dtype} != {torch.float32}:
        raise ValueError(f"all must be float32; got {x.dtype}, {z.dtype} and {control_points.dtype}")


def _shape(x: Tensor, control_points: Tensor, spline_width: float) -> Shape:
    return shape_of(x, control_points.shape[1], spline_width, control_points.shape[3])
