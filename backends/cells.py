"""Where an input lies on the uniform grid of knots: the arithmetic that every backend shares."""

import torch
from torch import Tensor


def knot_units(x: Tensor, num_control_points: int, spline_width: float) -> Tensor:
    """Position of each input in knot units: 0 at the first knot, G-1 at the last. Same shape as `x`.

    In float64 wherever the device has it: a bfloat16 position loses the cell altogether, and a float32 one falls
    on the wrong side of knots that float32 cannot represent (G=8, width 4), where the slope, and so the gradient,
    jumps. It is N·I arithmetic beside N·I·O, so it costs next to nothing.
    """
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    spacing = spline_width / (num_control_points - 1)
    return (x.to(wide) + spline_width / 2) / spacing


def locate(x: Tensor, num_control_points: int, spline_width: float) -> tuple[Tensor, Tensor]:
    """The cell j (int64, 0 … G-2) that each input falls in, and its position t within it. Shapes as `x`.

    Inside the domain 0 ≤ t ≤ 1. Outside it the nearest cell is taken and t runs below 0 or above 1, which makes the
    interpolation extrapolate linearly. NaN and ±Inf get a valid cell (never an out-of-range read) and a t of NaN or
    ±Inf, which then spoils the outputs of their own row.
    """
    u = knot_units(x, num_control_points, spline_width)
    cell = find_cell(u, num_control_points)
    return cell, (u - cell).to(accumulation_dtype(x.dtype))


def find_cell(u: Tensor, num_control_points: int) -> Tensor:
    """Number of the cell at position `u` in knot units; int64, 0 … G-2 whatever u is."""
    last = num_control_points - 2
    # Truncation is floor once u is not negative. What NaN converts to differs by machine, hence the second clamp.
    return u.clamp(0, last).long().clamp(0, last)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What to sum in: half precisions sum in float32, since a bfloat16 sum over tokens stalls after a few hundred."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def flat_rows(cell: Tensor, num_control_points: int) -> Tensor:
    """Row of control point `cell` in the (I·G, O) view of the control points. (N, I) → (N, I)."""
    offsets = torch.arange(cell.shape[-1], device=cell.device) * num_control_points
    return cell + offsets


def interleave(lower: Tensor, upper: Tensor) -> Tensor:
    """(N, I), (N, I) → (N, 2·I) as l₁ u₁ l₂ u₂ …: the two non-zeros of a feature side by side."""
    return torch.stack((lower, upper), dim=-1).flatten(-2)
