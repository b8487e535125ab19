"""Sums of products of modes: the control points of functions of pairs from their coefficients, on CPUs in float32.

    y[i,a,b,o] = Σ_cd modes[a,c]·modes[b,d]·scales[c,d]·weight[i,c,d,o]

PyTorch's operators take several passes over memory for it, and as long as a third of the layer itself. Our own C++
kernel (native.cpp) reads and writes every value once.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from backends import native_build, standard
from backends.native_shape import addresses
from backends.operators import operator


def can_compute(weight: Tensor) -> bool:
    """Whether the operator takes this tensor, and no active transform forbids it."""
    return weight.device.type == "cpu" and weight.dtype is torch.float32 and not standard.is_wanted()


@operator("splinegpt::mode_sums", "cpu")
def mode_sums(weight: Tensor, modes: Tensor, scales: Tensor, transposed: bool = False) -> Tensor:
    """weight (I, G, G, O), modes and scales (G, G) → (I, G, G, O), all float32; or the transposed map, for gradients.

    Raises ValueError for other arguments.
    """
    grid = weight.shape[1:3]
    if weight.ndim != 4 or modes.shape != grid or scales.shape != grid or grid[0] != grid[1] or not grid[0]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (weight, modes, scales))
        raise ValueError(f"weight must be (I, G, G, O), modes and scales (G, G); got {shapes}")
    if {weight.dtype, modes.dtype, scales.dtype} != {torch.float32}:
        raise ValueError(f"all must be float32; got {weight.dtype}, {modes.dtype} and {scales.dtype}")
    if native_build.why_not():
        return _in_standard_operators(weight, modes, scales, transposed)
    weight, modes, scales = weight.contiguous(), modes.contiguous(), scales.contiguous()
    y = torch.empty_like(weight)
    inputs, points, _, outputs = weight.shape
    native_build.load().splinegpt_mode_sums(
        *map(ctypes.c_int64, (inputs, points, outputs, torch.get_num_threads(), transposed)),
        *addresses(modes, scales, weight, y),
    )
    return y


def _in_standard_operators(weight: Tensor, modes: Tensor, scales: Tensor, transposed: bool) -> Tensor:
    matrix = modes.t() if transposed else modes
    scaled = weight if transposed else scales.unsqueeze(-1) * weight
    sums = torch.einsum("ac,bd,icdo->iabo", matrix, matrix, scaled)
    return (scales.unsqueeze(-1) * sums if transposed else sums).contiguous()


@mode_sums.register_fake
def _(weight: Tensor, modes: Tensor, scales: Tensor, transposed: bool = False) -> Tensor:
    return weight.new_empty(weight.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, modes, scales, ctx.transposed = inputs
    ctx.save_for_backward(modes, scales)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    if any(ctx.needs_input_grad[1:3]):
        raise RuntimeError("splinegpt::mode_sums has no derivatives by the modes and scales, which are constants")
    modes, scales = ctx.saved_tensors
    if standard.is_wanted():
        return _in_standard_operators(grad, modes, scales, not ctx.transposed), None, None, None
    return mode_sums(grad, modes, scales, not ctx.transposed), None, None, None


mode_sums.register_autograd(_backward, setup_context=_save_for_backward)
