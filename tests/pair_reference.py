"""Splines of pairs of features in float64 NumPy, one function at a time. It shares no code with the program."""

import numpy as np


def pair_sum(x: np.ndarray, z: np.ndarray, control_points: np.ndarray, width: float) -> np.ndarray:
    """The output (N, O) for x and z (N, I), control_points (I, G, G, O): the sum over all knots of hat times value."""
    y = np.zeros((len(x), control_points.shape[3]))
    points = control_points.shape[1]
    spacing = width / (points - 1)
    for i, values in enumerate(control_points):
        u, v = (np.clip(each[:, i], -width / 2, width / 2) / spacing + (points - 1) / 2 for each in (x, z))
        for a in range(points):
            for b in range(points):
                distances = np.stack([u - a, v - b, np.zeros_like(u)])
                hat = np.maximum(0, 1 - (distances.max(0) - distances.min(0)))
                y += hat[:, None] * values[a, b]
    return y


def gradients(
    x: np.ndarray, z: np.ndarray, control_points: np.ndarray, width: float, dy: np.ndarray, places: type = np.float64
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dx and dz (N, I), dW (I, G, G, O) for dy (N, O): each triangle's barycentric coordinates and their slopes.

    `places`: the dtype in which the two places in a cell are compared, which decides the slope beside the diagonal.
    """
    dx, dz, dw = np.zeros_like(x), np.zeros_like(z), np.zeros_like(control_points)
    points = control_points.shape[1]
    spacing = width / (points - 1)
    for n, i in np.ndindex(*x.shape):
        u, v = (np.clip((each[n, i] + width / 2) / spacing, 0, points - 1) for each in (x, z))
        j, k = (min(int(place), points - 2) for place in (u, v))
        middle = (j + 1, k) if places(u - j) >= places(v - k) else (j, k + 1)
        corners = [(j, k), middle, (j + 1, k + 1)]
        to_coordinates = np.linalg.inv(np.array([[a, b, 1] for a, b in corners], float).T)
        coordinates = to_coordinates @ [u, v, 1]
        products = np.array([dy[n] @ control_points[i, a, b] for a, b in corners])
        dx[n, i] = products @ to_coordinates[:, 0] / spacing * (abs(x[n, i]) <= width / 2)
        dz[n, i] = products @ to_coordinates[:, 1] / spacing * (abs(z[n, i]) <= width / 2)
        for (a, b), coordinate in zip(corners, coordinates, strict=True):
            dw[i, a, b] += coordinate * dy[n]
    return dx, dz, dw
