"""The layer in standard operators of PyTorch, which every transform knows: torch.func, forward mode, export to ONNX.

The kernels know one derivative, backwards. Under `torch.func.jvp`, `jacfwd`, `grad`, `jacrev` or `vmap`, within
`torch.autograd.forward_ad`, and while a model is exported to ONNX, a layer is therefore computed by this module,
whatever its `impl`. It is exact, and slower: its work grows with the grid.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from backends import embedding
from backends.cells import accumulation_dtype, locate

SplineSum = Callable[[Tensor, Tensor, float, torch.dtype], Tensor]

# Private names of PyTorch, here and in _is_in_forward_mode, may go. Without the first, torch.func refuses the kernels.
# Without the second, all is computed here, since a kernel would drop forward-mode derivatives silently.
_torch_func_is_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def spline_sum(x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
    """x (N, I), control_points (I, G, O) → (N, O). Writes out the basis, (N, I, G), or `embedding`'s rows if fewer."""
    _, num_control_points, out_features = control_points.shape
    if num_control_points > out_features:
        return embedding.spline_sum(x, control_points, spline_width, dtype)
    cell, t = locate(x, num_control_points, spline_width)
    weight = control_points.to(accumulation_dtype(dtype))
    t = t.to(weight.dtype).unsqueeze(-1)  # (N, I, 1)
    knots_to_the_right = torch.arange(num_control_points, device=x.device) - cell.unsqueeze(-1)  # (N, I, G)
    # A comparison gives the slope of the right-hand cell at a knot; a clamp would give both or neither.
    basis = torch.where(knots_to_the_right == 0, 1 - t, torch.where(knots_to_the_right == 1, t, torch.zeros_like(t)))
    return (basis.flatten(1) @ weight.flatten(0, 1)).to(dtype)


def _is_in_forward_mode() -> bool:
    return getattr(forward_ad, "_current_level", 0) >= 0


def is_wanted() -> bool:
    """Whether what is computed now is transformed in a way that kernels do not know."""
    return _torch_func_is_active() or _is_in_forward_mode() or torch.onnx.is_in_onnx_export()


def is_wanted_in_backward() -> bool:
    """Whether a gradient that is computed now may be differentiated again, or is transformed."""
    # Compiled gradients are not differentiated again; a compiler may trace them in grad mode all the same.
    return (torch.is_grad_enabled() and not torch.compiler.is_compiling()) or is_wanted()


def refuse_forward_mode(operator: str) -> None:
    """Raise RuntimeError where forward mode is on: PyTorch takes an operator's derivative for zero there."""
    if _is_in_forward_mode():
        raise RuntimeError(
            f"{operator} has no forward-mode derivative; KANLayer and the backends' spline_sum have, for every impl"
        )


def under_transforms(kernel: SplineSum) -> SplineSum:
    """Decorates the spline_sum of a backend: under transforms it is computed in standard operators."""

    @functools.wraps(kernel)
    def transformable(x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
        compute = spline_sum if is_wanted() else kernel
        return compute(x, control_points, spline_width, dtype)

    return transformable
