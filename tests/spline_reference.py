"""The layer's definition once more, in float64 NumPy loops that share no line with the package."""

import numpy as np


def spline_sum(x: np.ndarray, control_points: np.ndarray, width: float) -> np.ndarray:
    """x (N, I), control_points (I, G, O) → (N, O)."""
    N, I = x.shape  # noqa: E741  the names of the definition
    G, O = control_points.shape[1:]  # noqa: E741
    h = width / (G - 1)
    y = np.zeros((N, O))
    for n in range(N):
        for i in range(I):
            u = (x[n, i] + width / 2) / h
            j = int(min(max(np.floor(u), 0), G - 2))
            t = u - j
            y[n] += (1 - t) * control_points[i, j] + t * control_points[i, j + 1]
    return y


def gradients(x: np.ndarray, control_points: np.ndarray, width: float, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """dx (N, I) and dW (I, G, O), by the formulas of the definition."""
    N, I = x.shape  # noqa: E741  the names of the definition
    G = control_points.shape[1]
    h = width / (G - 1)
    dx, dw = np.zeros_like(x), np.zeros_like(control_points)
    for n in range(N):
        for i in range(I):
            u = (x[n, i] + width / 2) / h
            j = int(min(max(np.floor(u), 0), G - 2))
            t = u - j
            dx[n, i] = dy[n] @ (control_points[i, j + 1] - control_points[i, j]) / h
            dw[i, j] += (1 - t) * dy[n]
            dw[i, j + 1] += t * dy[n]
    return dx, dw
