"""Splines of pairs of features in float64 NumPy, one pair at a time. It shares no code with the program.

A function is the sum over knots of its value there times a share (G, G), and so is its slope.
"""

from typing import NamedTuple

import numpy as np


class Place(NamedTuple):
    """Where an input lies: in cell 0 … G-2, at a place there, 0 … 1 or, beyond the grid, below 0 or above 1."""

    cell: int
    place: float

    @property
    def beyond(self) -> float:
        """How far it lies beyond the grid, in cells; below 0 if before the first knot."""
        return self.place - min(max(self.place, 0), 1)

    @property
    def nearest(self) -> float:
        """The nearest point of the grid, 0 … G-1."""
        return self.cell + self.place - self.beyond

    def edge(self, points: int) -> np.ndarray:
        """The shares (G,) of the knots in the slope of a function of one input."""
        knots = np.eye(points)
        return knots[self.cell + 1] - knots[self.cell]


def locate(x: float, points: int, width: float, places: type) -> Place:
    """The place of an input, rounded to the dtype `places`: this decides between the slopes at a kink."""
    u = (x + width / 2) / (width / (points - 1))
    cell = int(np.clip(np.floor(u), 0, points - 2))
    return Place(cell, float(places(u - cell)))


def hats(u: float, points: int) -> np.ndarray:
    """The shares (G,) of the knots in a piecewise-linear function of one input on the grid, 0 … G-1."""
    return np.maximum(0, 1 - np.abs(u - np.arange(points)))


def shares(u: Place, v: Place, points: int) -> np.ndarray:
    """The shares (G, G) of all knots in the value at (u, v)."""
    across, up = np.meshgrid(u.nearest - np.arange(points), v.nearest - np.arange(points), indexing="ij")
    distances = np.stack([across, up, np.zeros_like(across)])
    on_grid = np.maximum(0, 1 - (distances.max(0) - distances.min(0)))
    along_u = u.beyond * np.outer(u.edge(points), hats(v.nearest, points))
    along_v = v.beyond * np.outer(hats(u.nearest, points), v.edge(points))
    return on_grid + along_u + along_v


def slopes(u: Place, v: Place, points: int) -> tuple[np.ndarray, np.ndarray]:
    """The shares (G, G) of all knots in the slopes along u and along v at (u, v)."""
    knots = np.eye(points)
    if u.beyond or v.beyond:
        at_u, at_v = (
            hats(each.nearest, points) + (0 if other.beyond else each.beyond * each.edge(points))
            for each, other in ((u, v), (v, u))
        )
    else:  # along the edges of the triangle, to which the diagonal belongs if u's place is not the smaller
        below = u.place >= v.place
        at_u, at_v = knots[u.cell + below], knots[v.cell + (not below)]
    return np.outer(u.edge(points), at_v), np.outer(at_u, v.edge(points))


def pair_sum(
    x: np.ndarray, z: np.ndarray, control_points: np.ndarray, width: float, places: type = np.float64
) -> np.ndarray:
    """The output (N, O) for x and z (N, I), control_points (I, G, G, O)."""
    y = np.zeros((len(x), control_points.shape[3]))
    points = control_points.shape[1]
    for n, i in np.ndindex(*x.shape):
        u, v = (locate(each[n, i], points, width, places) for each in (x, z))
        y[n] += np.einsum("ab,abo->o", shares(u, v, points), control_points[i])
    return y


def gradients(
    x: np.ndarray, z: np.ndarray, control_points: np.ndarray, width: float, dy: np.ndarray, places: type = np.float64
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dx and dz (N, I), dW (I, G, G, O) for dy (N, O)."""
    dx, dz, dw = np.zeros_like(x), np.zeros_like(z), np.zeros_like(control_points)
    points = control_points.shape[1]
    for n, i in np.ndindex(*x.shape):
        u, v = (locate(each[n, i], points, width, places) for each in (x, z))
        by_value = control_points[i] @ dy[n]  # (G, G)
        dx[n, i], dz[n, i] = ((slope * by_value).sum() * (points - 1) / width for slope in slopes(u, v, points))
        dw[i] += shares(u, v, points)[:, :, None] * dy[n]
    return dx, dz, dw
