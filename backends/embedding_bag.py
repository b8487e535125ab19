"""`embedding_bag`: PyTorch's weighted bag of rows; nothing of size N·I·O or N·I·G is ever materialised."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backends import standard
from backends.cells import accumulation_dtype, flat_rows, interleave, locate

TWICE_DIFFERENTIABLE = ("dense", "csr", "embedding", "reference")  # in every dtype, on any machine


@standard.under_transforms
def spline_sum(x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
    """x (N, I), control_points (I, G, O) → (N, O).

    Half precisions compute in float32: CUDA lacks the bfloat16 gradient of `per_sample_weights`
    (pytorch issue 185808), and the gradient of the table sums over all tokens.
    """
    _, num_control_points, out_features = control_points.shape
    cell, t = locate(x, num_control_points, spline_width)
    table = control_points.to(accumulation_dtype(dtype)).reshape(-1, out_features)  # (I·G, O)
    t = t.to(table.dtype)
    row = flat_rows(cell, num_control_points)
    bags, weights = interleave(row, row + 1), interleave(1 - t, t)  # (N, 2·I) each
    for tensor in (table, weights):
        if tensor.requires_grad and not torch.compiler.is_compiling():
            tensor.register_hook(_only_once_differentiable)
    return F.embedding_bag(bags, table, per_sample_weights=weights, mode="sum").to(dtype)


def _only_once_differentiable(grad: Tensor) -> Tensor:
    """The gradient, with an error that names other impls if it is differentiated in turn; PyTorch's error does not."""
    guarded: Tensor = _NoSecondDerivative.apply(grad) if torch.is_grad_enabled() else grad  # type: ignore[no-untyped-call]
    return guarded


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise RuntimeError(
            "impl 'embedding_bag', which native and triton use for float64, has no second derivatives; "
            f"choose an impl that has: {', '.join(TWICE_DIFFERENTIABLE)}"
        )
