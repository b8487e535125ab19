"""`embedding_bag`: PyTorch's weighted bag of rows; nothing of size N·I·O or N·I·G is ever written."""

import torch
import torch.nn.functional as F
from torch import Tensor

from backends.cells import accumulation_dtype, flat_rows, interleave, locate


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
    return F.embedding_bag(bags, table, per_sample_weights=weights, mode="sum").to(dtype)
