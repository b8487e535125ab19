"""Where an input lies on the uniform grid of knots: the arithmetic that every backend shares."""

import torch
from torch import Tensor


def knot_units(x: Tensor, num_control_points: int, spline_width: float) -> Tensor:
    """Position of each input in knot units: 0 at the first knot, G-1 at the last. Same shape as `x`.

    Computed in float64 wherever the device has it. In bfloat16 the position loses the cell altogether. In float32 it
    falls on the wrong side of knots that float32 cannot represent (G=8, width 4), where the slope, and so the gradient,
    jumps. This is N·I arithmetic beside N·I·O, so it costs next to nothing.
    """
    spacing = spline_width / (num_control_points - 1)
    return (widen(x) + spline_width / 2) / spacing


def widen(x: Tensor) -> Tensor:
    """The input in float64, or in the widest dtype that its device has."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def locate(x: Tensor, num_control_points: int, spline_width: float) -> tuple[Tensor, Tensor]:
    """The cell j (int64, 0 … G-2) that each input falls in, and its position t within it. Shapes as `x`.

    Inside the grid 0 ≤ t ≤ 1. Outside it the nearest cell is taken and t is below 0 or above 1, so that interpolation
    extrapolates linearly. NaN and ±Inf get a valid cell, so that no read is out of range, and a t of NaN or ±Inf, which
    spoils only the outputs of their own row.
    """
    u = knot_units(x, num_control_points, spline_width)
    cell = find_cell(u, num_control_points)
    return cell, (u - cell).to(accumulation_dtype(x.dtype))


def find_cell(u: Tensor, num_control_points: int) -> Tensor:
    """The cell at position `u` in knot units; int64, 0 … G-2 for any u."""
    last = num_control_points - 2
    # Truncation equals floor once u is not negative. The integer that NaN becomes differs by machine: clamp again.
    return u.clamp(0, last).long().clamp(0, last)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in: float32 for half precisions, since a bfloat16 sum over tokens stalls after a few hundred."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def flat_rows(cell: Tensor, num_control_points: int) -> Tensor:
    """Row of control point `cell` in the (I·G, O) view of the control points. (N, I) → (N, I)."""
    offsets = torch.arange(cell.shape[-1], device=cell.device) * num_control_points
    return cell + offsets


def interleave(lower: Tensor, upper: Tensor) -> Tensor:
    """(N, I), (N, I) → (N, 2·I) as l₁ u₁ l₂ u₂ …: the two non-zeros of a feature side by side."""
    return torch.stack((lower, upper), dim=-1).flatten(-2)


def rises(control_points: Tensor, dtype: torch.dtype) -> Tensor:
    """How much each spline rises over each cell, cells first: (I, G, O) → (G-1, I, O) in `dtype`."""
    return control_points.transpose(0, 1).diff(dim=0).to(dtype)
