"""The layer in PyTorch's standard operators, which every transform supports: torch.func, forward mode, ONNX export.

The kernels have only a backward derivative. So this module computes the layer, whatever its `impl`, under
`torch.func.jvp`, `jacfwd`, `grad`, `jacrev` and `vmap`, within `torch.autograd.forward_ad`, and while a model is
exported to ONNX. It is exact but slower: its work grows with the grid.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from backends import embedding
from backends.cells import accumulation_dtype, locate
from backends.problem import SplineSum

# These names, here and in _is_in_forward_mode, are private to PyTorch and may disappear. Without the first, torch.func
# refuses the kernels. Without the second, this module computes everything, since a kernel would silently drop the
# derivatives of forward mode.
_torch_func_is_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def spline_sum(x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
    """x (N, I), control_points (I, G, O) → (N, O). Materialises the smaller of (N, I, G) and (N, I, O) values."""
    _, num_control_points, out_features = control_points.shape
    if num_control_points > out_features:
        return embedding.spline_sum(x, control_points, spline_width, dtype)
    cell, t = locate(x, num_control_points, spline_width)
    weight = control_points.to(accumulation_dtype(dtype))
    t = t.to(weight.dtype).unsqueeze(-1)  # (N, I, 1)
    knots_to_the_right = torch.arange(num_control_points, device=x.device) - cell.unsqueeze(-1)  # (N, I, G)
    # At a knot, comparisons give the slope of the cell to the right. The slope of a clamp would be both or neither.
    basis = torch.where(knots_to_the_right == 0, 1 - t, torch.where(knots_to_the_right == 1, t, torch.zeros_like(t)))
    return (basis.flatten(1) @ weight.flatten(0, 1)).to(dtype)


def _is_in_forward_mode() -> bool:
    return getattr(forward_ad, "_current_level", 0) >= 0


def is_wanted() -> bool:
    """Whether a transform is active that the kernels do not support."""
    return _torch_func_is_active() or _is_in_forward_mode() or torch.onnx.is_in_onnx_export()


def is_wanted_in_backward() -> bool:
    """Whether the gradient that is being computed may be differentiated again, or is transformed."""
    # Compiled gradients are not differentiated again, although a compiler may trace them in grad mode.
    return (torch.is_grad_enabled() and not torch.compiler.is_compiling()) or is_wanted()


def refuse_forward_mode(operator: str) -> None:
    """Raise RuntimeError in forward mode, where PyTorch would take the derivative of an operator to be zero."""
    if _is_in_forward_mode():
        raise RuntimeError(
            f"{operator} has no forward-mode derivative; KANLayer and the backends' spline_sum have, for every impl"
        )


def under_transforms(kernel: SplineSum) -> SplineSum:
    """Decorate the spline_sum of a backend so that standard operators compute it under transforms."""

    @functools.wraps(kernel)
    def transformable(x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
        compute = spline_sum if is_wanted() else kernel
        return compute(x, control_points, spline_width, dtype)

    return transformable
