"""`embedding`: two gathers of rows and a linear interpolation; simple, and fused into one loop when compiled."""

import torch
import torch.nn.functional as F
from torch import Tensor

from backends.cells import accumulation_dtype, flat_rows, locate


def spline_sum(x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
    """x (N, I), control_points (I, G, O) → (N, O). Materialises (N, I, O) unless compiled."""
    _, num_control_points, out_features = control_points.shape
    cell, t = locate(x, num_control_points, spline_width)
    table = control_points.to(accumulation_dtype(dtype)).reshape(-1, out_features)  # (I·G, O)
    row = flat_rows(cell, num_control_points)
    lower, upper = F.embedding(row, table), F.embedding(row + 1, table)  # (N, I, O) each
    return torch.lerp(lower, upper, t.to(table.dtype).unsqueeze(-1)).sum(dim=1).to(dtype)
