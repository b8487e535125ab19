"""`csr`: sparse × dense product, B(x) @ W with two non-zeros per feature (cuSPARSE on CUDA, MKL on CPU).

MKL's sparse products take float32 and float64. cuSPARSE's take half precisions too and sum in float32. That is not
documented for the sampled product of the backward pass (the gradient of the non-zeros), so that one gets float32. The
non-zeros themselves stay in float32 too: the gradient of x is the difference of two of their gradients, and rounding
would leave noise that grows with the number of control points.
"""

import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backends import standard
from backends.cells import accumulation_dtype, flat_rows, interleave, locate
from backends.operators import operator
from backends.problem import Problem, except_on_meta


@except_on_meta
def why_not(problem: Problem) -> str | None:
    if problem.device.type == "cpu" and not torch.backends.mkl.is_available():
        return "this PyTorch is built without MKL, which holds the sparse matrix products for CPUs"
    if problem.device.type not in ("cpu", "cuda"):
        return f"PyTorch has no CSR matrix products on {problem.device.type}"
    if problem.in_features * problem.num_control_points >= 2**31:
        return "in_features x num_control_points does not fit the int32 column indices"
    return None


@standard.under_transforms
def spline_sum(x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
    """x (N, I), control_points (I, G, O) → (N, O). In float32 where sparse products lack half precisions."""
    in_features, num_control_points, out_features = control_points.shape
    cell, t = locate(x, num_control_points, spline_width)
    table = control_points.to(accumulation_dtype(dtype)).reshape(-1, out_features)  # (I·G, O)
    t = t.to(table.dtype)
    row = flat_rows(cell, num_control_points)
    columns = interleave(row, row + 1).flatten().to(torch.int32)  # (N·2·I); MKL takes int32 faster than int64
    values = interleave(1 - t, t).flatten()
    return sparse_matmul(values, columns, 2 * in_features, table, dtype)


@functools.lru_cache
def takes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether sparse products on `device` work in `dtype`, found by trying a small one."""
    if dtype in (torch.float32, torch.float64):
        return True
    if device.type != "cuda":
        return False
    columns = torch.tensor([0, 1, 1, 2], dtype=torch.int32, device=device)
    values, table = torch.ones(4, dtype=dtype, device=device), torch.eye(3, dtype=dtype, device=device)
    try:
        product = times(values, columns, 2, table)
    except RuntimeError:
        return False
    return bool(product.tolist() == [[1, 1, 0], [0, 1, 1]])


def _csr_matrix(values: Tensor, columns: Tensor, row_nonzeros: int, width: int) -> Tensor:
    rows = values.numel() // row_nonzeros
    row_starts = torch.arange(0, values.numel() + 1, row_nonzeros, device=values.device, dtype=columns.dtype)
    with warnings.catch_warnings():  # "Sparse CSR tensor support is in beta state"
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(row_starts, columns, values, (rows, width), check_invariants=False)


def times(values: Tensor, columns: Tensor, row_nonzeros: int, table: Tensor) -> Tensor:
    """B @ table, all in one dtype."""
    return _csr_matrix(values, columns, row_nonzeros, table.shape[0]) @ table


def transposed_times(values: Tensor, columns: Tensor, row_nonzeros: int, grad: Tensor, width: int) -> Tensor:
    """Bᵀ @ grad, all in one dtype, where B is (N, width)."""
    return _csr_matrix(values, columns, row_nonzeros, width).t().to_sparse_csr() @ grad


# Custom ops, because torch.compile cannot trace the making of a sparse tensor (pytorch issues 171865, 180839), nor try
# what sparse products take.
@operator("splinegpt::csr_matmul")
def sparse_matmul(values: Tensor, columns: Tensor, row_nonzeros: int, table: Tensor, dtype: torch.dtype) -> Tensor:
    """B @ table in `dtype`, with B (N, I·G) given by its non-zeros, `row_nonzeros` to a row. → (N, O).

    The non-zeros and the table are float32 where `dtype` is a half precision, else of that dtype.
    """
    if values.numel() == 0:
        return table.new_zeros(0, table.shape[1], dtype=dtype)
    product = dtype if takes(dtype, table.device) else table.dtype
    return times(values.to(product), columns, row_nonzeros, table.to(product)).to(dtype)


@sparse_matmul.register_fake
def _(values: Tensor, columns: Tensor, row_nonzeros: int, table: Tensor, dtype: torch.dtype) -> Tensor:
    return table.new_empty(values.shape[0] // row_nonzeros, table.shape[1], dtype=dtype)


@operator("splinegpt::csr_matmul_backward")
def sparse_matmul_backward(
    grad: Tensor, values: Tensor, columns: Tensor, row_nonzeros: int, table: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the non-zeros (a product sampled at their places) and of the table (Bᵀ @ grad), in its dtype."""
    if values.numel() == 0:
        return torch.zeros_like(values), torch.zeros_like(table)
    product = grad.dtype if takes(grad.dtype, grad.device) else table.dtype
    with torch.autocast(grad.device.type, enabled=False):  # MKL's sparse products take no half precision
        narrow, grad_narrow = values.to(product), grad.to(product)
        grad_table = transposed_times(narrow, columns, row_nonzeros, grad_narrow, table.shape[0]).to(table.dtype)
        basis = _csr_matrix(values, columns, row_nonzeros, table.shape[0])
        grad_values = torch.sparse.sampled_addmm(basis, grad.to(table.dtype), table.t(), beta=0.0).values()
    return grad_values.clone(), grad_table


@sparse_matmul_backward.register_fake
def _(grad: Tensor, values: Tensor, columns: Tensor, row_nonzeros: int, table: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(values), torch.empty_like(table)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, columns, ctx.row_nonzeros, table, _ = inputs
    ctx.save_for_backward(values, columns, table)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor, None]:
    values, columns, table = ctx.saved_tensors
    if standard.is_wanted_in_backward():
        grad = grad.to(table.dtype)
        grad_values, grad_table = differentiable_gradients(grad, values, columns.long(), ctx.row_nonzeros, table)
        return grad_values, None, None, grad_table, None
    grad_values, grad_table = sparse_matmul_backward(grad.contiguous(), values, columns, ctx.row_nonzeros, table)
    return grad_values, None, None, grad_table, None


def differentiable_gradients(
    grad: Tensor, values: Tensor, columns: Tensor, row_nonzeros: int, table: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `sparse_matmul_backward`, in operators that have derivatives: materialises (N, nonzeros, O)."""
    grad = grad.unsqueeze(1)  # (N, 1, O)
    rows = F.embedding(columns.unflatten(0, (-1, row_nonzeros)), table)  # (N, row_nonzeros, O)
    shares = values.unflatten(0, (-1, row_nonzeros)).unsqueeze(-1) * grad
    grad_table = torch.zeros_like(table).index_add(0, columns, shares.flatten(0, 1))
    return (rows * grad).sum(-1).flatten(), grad_table


sparse_matmul.register_autograd(_backward, setup_context=_save_for_backward)
sparse_matmul_backward.refuse_autograd()
