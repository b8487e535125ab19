"""`csr`: sparse × dense product, B(x) @ W with two non-zeros per feature (cuSPARSE on CUDA, MKL on CPU).

MKL's sparse products are float32 and float64. cuSPARSE's take half precisions too and sum in float32, but for the
sampled product of the backward (the gradient of the non-zeros), for which that is not documented: it gets float32.
"""

import functools
import warnings

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
    product_dtype = dtype if takes(dtype, x.device) else accumulation_dtype(dtype)
    table = control_points.to(product_dtype).reshape(-1, out_features)  # (I·G, O)
    t = t.to(table.dtype)
    row = flat_rows(cell, num_control_points)
    columns = interleave(row, row + 1).flatten().to(torch.int32)  # (N·2·I); MKL takes int32 faster than int64
    values = interleave(1 - t, t).flatten()
    return sparse_matmul(values, columns, 2 * in_features, table).to(dtype)


@functools.lru_cache
def takes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether sparse products on `device` are to be had in `dtype`, and right: a small one is tried."""
    if dtype in (torch.float32, torch.float64):
        return True
    if device.type != "cuda":
        return False
    columns = torch.tensor([0, 1, 1, 2], dtype=torch.int32, device=device)
    values, table = torch.ones(4, dtype=dtype, device=device), torch.eye(3, dtype=dtype, device=device)
    try:
        product = _csr_matrix(values, columns, 2, 3) @ table
    except RuntimeError:
        return False
    return product.tolist() == [[1, 1, 0], [0, 1, 1]]


def _csr_matrix(values: Tensor, columns: Tensor, row_nonzeros: int, width: int) -> Tensor:
    rows = values.numel() // row_nonzeros
    row_starts = torch.arange(0, values.numel() + 1, row_nonzeros, device=values.device, dtype=columns.dtype)
    with warnings.catch_warnings():  # "Sparse CSR tensor support is in beta state"
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(row_starts, columns, values, (rows, width), check_invariants=False)


# Custom ops, because torch.compile cannot trace the making of a sparse tensor (pytorch issues 171865, 180839).
@operator("splinegpt::csr_matmul")
def sparse_matmul(values: Tensor, columns: Tensor, row_nonzeros: int, table: Tensor) -> Tensor:
    """B @ table, with B (N, I·G) given by its non-zeros, `row_nonzeros` to a row. → (N, O)."""
    if values.numel() == 0:
        return table.new_zeros(0, table.shape[1])
    return _csr_matrix(values, columns, row_nonzeros, table.shape[0]) @ table


@sparse_matmul.register_fake
def _(values: Tensor, columns: Tensor, row_nonzeros: int, table: Tensor) -> Tensor:
    return table.new_empty(values.shape[0] // row_nonzeros, table.shape[1])


@operator("splinegpt::csr_matmul_backward")
def sparse_matmul_backward(
    grad: Tensor, values: Tensor, columns: Tensor, row_nonzeros: int, table: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the non-zeros (a product sampled at their places) and of the table (Bᵀ @ grad)."""
    if values.numel() == 0:
        return torch.zeros_like(values), torch.zeros_like(table)
    basis = _csr_matrix(values, columns, row_nonzeros, table.shape[0])
    with torch.autocast(grad.device.type, enabled=False):  # MKL's sparse products take no half precision
        grad_table = basis.t().to_sparse_csr() @ grad
        wide = accumulation_dtype(table.dtype)
        basis, grad, table = basis.to(wide), grad.to(wide), table.to(wide)
        grad_values = torch.sparse.sampled_addmm(basis, grad, table.t(), beta=0.0).values()
    return grad_values.to(values.dtype, copy=True), grad_table


@sparse_matmul_backward.register_fake
def _(grad: Tensor, values: Tensor, columns: Tensor, row_nonzeros: int, table: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(values), torch.empty_like(table)


def _save_for_backward(ctx, inputs, output) -> None:
    values, columns, ctx.row_nonzeros, table = inputs
    ctx.save_for_backward(values, columns, table)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, Tensor]:
    values, columns, table = ctx.saved_tensors
    if standard.is_wanted_in_backward():
        grad_values, grad_table = differentiable_gradients(grad, values, columns.long(), ctx.row_nonzeros, table)
        return grad_values, None, None, grad_table
    grad_values, grad_table = sparse_matmul_backward(grad.contiguous(), values, columns, ctx.row_nonzeros, table)
    return grad_values, None, None, grad_table


def differentiable_gradients(
    grad: Tensor, values: Tensor, columns: Tensor, row_nonzeros: int, table: Tensor
) -> tuple[Tensor, Tensor]:
    """Those of `sparse_matmul_backward` in operators that have derivatives. Writes out (N, row_nonzeros, O)."""
    grad = grad.unsqueeze(1)  # (N, 1, O)
    rows = F.embedding(columns.unflatten(0, (-1, row_nonzeros)), table)  # (N, row_nonzeros, O)
    shares = values.unflatten(0, (-1, row_nonzeros)).unsqueeze(-1) * grad
    grad_table = torch.zeros_like(table).index_add(0, columns, shares.flatten(0, 1))
    return (rows * grad).sum(-1).flatten(), grad_table


sparse_matmul.register_autograd(_backward, setup_context=_save_for_backward)
sparse_matmul_backward.refuse_autograd()
