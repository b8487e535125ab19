"""`reference`: the definition of the layer in plain indexing, which the tests compare every other backend with."""

import torch
from torch import Tensor

from backends.cells import accumulation_dtype, locate


def spline_sum(x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
    """y[n,o] = Σ_i (1-t)·W[i,j,o] + t·W[i,j+1,o].  x (N, I), control_points (I, G, O) → (N, O)."""
    in_features, num_control_points, _ = control_points.shape
    cell, t = locate(x, num_control_points, spline_width)
    weight = control_points.to(accumulation_dtype(dtype))
    t = t.to(weight.dtype).unsqueeze(-1)  # (N, I, 1)
    feature = torch.arange(in_features, device=x.device)
    lower, upper = weight[feature, cell], weight[feature, cell + 1]  # (N, I, O) each
    return ((1 - t) * lower + t * upper).sum(dim=1).to(dtype)
