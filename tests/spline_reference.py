"""The layer's definition in float64 NumPy, one feature at a time. It shares no code with the program."""

import numpy as np


def spline_sum(x: np.ndarray, control_points: np.ndarray, width: float) -> np.ndarray:
    """The layer's output, (N, O), for x (N, I) and control_points (I, G, O)."""
    y = np.zeros((len(x), control_points.shape[2]))
    for feature, spline in zip(x.T, control_points, strict=True):  # (N,) and (G, O)
        j, t = cells(feature, len(spline), width)
        y += (1 - t) * spline[j] + t * spline[j + 1]
    return y


def gradients(x: np.ndarray, control_points: np.ndarray, width: float, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """dx (N, I) and dW (I, G, O), by the definition's formulas, for dy (N, O)."""
    h = width / (control_points.shape[1] - 1)
    dx, dw = np.zeros_like(x), np.zeros_like(control_points)
    for i, spline in enumerate(control_points):
        j, t = cells(x[:, i], len(spline), width)
        dx[:, i] = (dy * (spline[j + 1] - spline[j])).sum(1) / h
        np.add.at(dw[i], j, (1 - t) * dy)
        np.add.at(dw[i], j + 1, t * dy)
    return dx, dw


def cells(x: np.ndarray, points: int, width: float) -> tuple[np.ndarray, np.ndarray]:
    """Cell of each input, (N,), and place in the cell, (N, 1), which is in [0, 1) unless x is outside the grid."""
    u = (x + width / 2) / (width / (points - 1))
    j = np.clip(np.floor(u), 0, points - 2).astype(int)
    return j, (u - j)[:, None]
