"""`semi_structured`: splines of five control points as a 2:4 sparse matrix product, half the arithmetic of a dense one.

The spline's value at the centre is added separately: it is the sum of the middle control points. The rest of a spline
of five has four basis functions. Only the left two are not zero at x < 0 and only the right two at x ≥ 0. So two of
four are always zero, also beyond the grid, and this is the pattern that sparse tensor cores take. With v = |x| in knot
units from the centre, a = max(v - 1, 0) and b = v - 2a, the basis functions are

    x < 0:  (a, b, 0, 0)        x ≥ 0:  (0, 0, b, a)

so both the stored values and the places where they belong (one bit: the sign) are computed directly from x.

The product is CUTLASS's, which PyTorch has for GPUs of compute capability 8.x. Elsewhere, and for shapes and dtypes
that it does not take, the same function is computed with the zeros materialised. On newer GPUs only cuSPARSELt uses
sparse tensor cores. It keeps the places in a format that is not documented, and letting it find them by compression at
each step made training of a vision transformer slower (torchao, pull request 184). The products of the backward pass do
not have the sparsity that the hardware wants, so `dense` computes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backends import dense, standard
from backends.cells import accumulation_dtype, knot_units
from backends.operators import operator
from backends.problem import Problem

POINTS = 5
OUTER = (0, 1, 3, 4)  # all control points but the middle one
HALF = (torch.bfloat16, torch.float16)
# CUTLASS's kernel takes multiples of these (torch/sparse/semi_structured.py).
TOKENS, FEATURES, OUTPUTS = 32, 16, 8


def why_not(problem: Problem) -> str | None:
    if problem.num_control_points == POINTS:
        return None
    return f"2:4 sparsity needs num_control_points {POINTS}, and the layer has {problem.num_control_points}"


def caveat(problem: Problem) -> str | None:
    reason = why_dense(problem.in_features, problem.out_features, problem.device)
    return reason and f"with its zeros written out, as {reason}"


def why_dense(in_features: int, out_features: int, device: torch.device) -> str | None:
    """Why the zeros are materialised for such a layer, or None where half precision uses sparse tensor cores."""
    if device.type != "cuda":
        return f"sparse tensor cores are in CUDA GPUs, and the layer is on {device.type}"
    if torch.cuda.get_device_properties(device).major != 8:  # which compilers know, unlike get_device_capability
        return "PyTorch has 2:4 products whose places can be written directly only for compute capability 8.x"
    if in_features % FEATURES or out_features % OUTPUTS:
        shape = f"{in_features} and {out_features}"
        return f"its 2:4 product needs in_features a multiple of {FEATURES} and out_features of {OUTPUTS}, not {shape}"
    if not hasattr(torch, "_sparse_semi_structured_mm"):  # private: it may go
        return "this PyTorch has no 2:4 product whose places can be written directly"
    if device not in _WORKING:  # tried when a layer takes this backend, before any compiler sees it
        _WORKING[device] = _product_works(device)
    return None if _WORKING[device] else "PyTorch's 2:4 product fails on this GPU"


@standard.under_transforms
def spline_sum(x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
    """x (N, I), control_points (I, 5, O) → (N, O). Saves only its arguments."""
    y: Tensor = _SparseMatmul.apply(x, control_points, spline_width, dtype)  # type: ignore[no-untyped-call]
    return y


class _SparseMatmul(dense.SplineFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
        dense.SplineFunction.save(ctx, x, control_points, spline_width, dtype)
        pair = values(x, spline_width).to(dtype)  # (N, I, 2)
        middle = control_points[:, POINTS // 2]  # (I, O)
        at_centre = middle.sum(dim=0).to(dtype)  # (O,)
        table = (control_points[:, OUTER] - middle.unsqueeze(1)).flatten(0, 1).to(dtype)  # (I·4, O)
        if dtype not in HALF or why_dense(control_points.shape[0], control_points.shape[2], x.device) is not None:
            return torch.addmm(at_centre, basis(pair, x), table)
        return sparse_product(x, pair, table) + at_centre


def values(x: Tensor, spline_width: float) -> Tensor:
    """The two non-zeros of each feature in the order of their control points: (N, I) → (N, I, 2)."""
    from_centre = knot_units(x, POINTS, spline_width) - POINTS // 2
    distance = from_centre.abs()
    outer = (distance - 1).clamp_(min=0)
    inner = distance - 2 * outer
    left = x < 0
    pair = torch.stack((torch.where(left, outer, inner), torch.where(left, inner, outer)), dim=-1)
    return pair.to(accumulation_dtype(x.dtype))


def basis(pair: Tensor, x: Tensor) -> Tensor:
    """The basis with its zeros materialised: (N, I, 2) → (N, I·4)."""
    left = (x < 0).unsqueeze(-1)
    return torch.cat((torch.where(left, pair, 0), torch.where(left, 0, pair)), dim=-1).flatten(1)


def places(x: Tensor) -> Tensor:
    """Where the non-zeros belong, as 2:4 metadata in CUTLASS's order: (N, I) → (N, I/4) int16; N % 32 == I % 16 == 0.

    Each feature has four bits: the lower two are the place of its first non-zero among four, the upper two that of its
    second.
    CUTLASS keeps these words column pair by column pair, with the 32 rows of a group interleaved and 2 × 2 blocks
    transposed (tools/util/include/cutlass/util/host_reorder.h; ColumnMajorInterleaved<2> in layout/matrix.h).
    """
    tokens, features = x.shape
    nibble = torch.where(x < 0, 0b0100, 0b1110).unflatten(1, (features // 4, 4))  # (N, I/4, 4)
    word = (nibble << torch.tensor([0, 4, 8, 12], device=x.device)).sum(-1).to(torch.int16)  # (N, I/4)
    # Within a group row 8·a + b goes to 4·b + a. Then top right and bottom left of each 2 × 2 block change places.
    rows: Tensor = word.unflatten(0, (tokens // 32, 4, 8)).transpose(1, 2)  # (N/32, 8, 4, I/4)
    blocks = rows.reshape(tokens // 2, 2, features // 8, 2).transpose(1, 3)  # row pair, row, column pair, column
    return blocks.permute(2, 0, 1, 3).reshape(tokens, features // 4)  # column pairs first


def sparse_product(x: Tensor, pair: Tensor, table: Tensor) -> Tensor:
    """The product of the basis, given by its non-zeros (N, I, 2) and the signs of x, and table (I·4, O) → (N, O)."""
    tokens = x.shape[0]
    missing = -tokens % TOKENS
    if missing:
        x, pair = (torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:]))) for rows in (x, pair))
    return sparse_matmul(pair.flatten(1), places(x), table)[:tokens]


@operator("splinegpt::semi_structured_matmul", "cuda")
def sparse_matmul(nonzeros: Tensor, metadata: Tensor, table: Tensor) -> Tensor:
    """nonzeros (N, I·2), metadata (N, I/4), table (I·4, O) → (N, O)."""
    if nonzeros.numel() == 0:
        return table.new_zeros(nonzeros.shape[0], table.shape[1])
    operands = (nonzeros.contiguous(), metadata.contiguous(), table.contiguous())
    product: Tensor = torch._sparse_semi_structured_mm(*operands)
    return product.contiguous()


@sparse_matmul.register_fake
def _(nonzeros: Tensor, metadata: Tensor, table: Tensor) -> Tensor:
    return table.new_empty(nonzeros.shape[0], table.shape[1])


sparse_matmul.refuse_autograd()

_WORKING: dict[torch.device, bool] = {}  # whether the product is right


def _product_works(device: torch.device) -> bool:
    """Whether this GPU computes the product of a small problem, and correctly."""
    x = torch.linspace(-3, 3, 2 * TOKENS * FEATURES, device=device).view(2 * TOKENS, FEATURES)
    pair = values(x, 4.0).bfloat16()
    table = torch.linspace(-1, 1, 4 * FEATURES * OUTPUTS, device=device).view(4 * FEATURES, OUTPUTS).bfloat16()
    try:
        product = sparse_product(x, pair, table)
    except (RuntimeError, TypeError):  # TypeError: its arguments have changed
        return False
    return torch.allclose(product, basis(pair, x) @ table, rtol=0.02, atol=0.02)
