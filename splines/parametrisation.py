"""Parametrisations: a layer stores coefficients p, and its control points are c = S p along the grid.

Each variant has its own matrix S, which depends only on the number of control points. Every variant can represent the
same functions. The variant decides which functions are close to each other in weight space, and so what an optimizer
learns first. Columns of S are scaled such that the effect of a coefficient does not depend on the grid, so a learning
rate stays good when the knots are doubled.

Sources: KANditioned's plans (Bui, 2025) for the prefix sums and cosines; Yserentant (1986) for the hierarchy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from common.tables import Tables
from splines.grid import Array

PASSBAND = 4  # balanced: cosine modes up to this one are learnt at full speed, higher ones at a rate that falls as k⁻²
MIN_KNOTS_FOR_HALVES = 400  # from here two products of half the size beat one (`python bench/variants.py`, on a CPU)
DECAY = 1.0  # hierarchical: a hat's height is its interval's length to this power


def hats(points: int) -> Array:
    """The identity: coefficients are the control points."""
    return np.eye(points)


def prefix_sums(points: int) -> Array:
    """Tents with one kink each (second differences, summed twice), and the line through both ends.

    Coefficients: value at the first knot, G-2 second differences, value at the last knot. On any grid, coefficients of
    one for all second differences make a parabola of height one.
    """
    u = np.linspace(0, 1, points)
    inner = u[1:-1]
    tents = np.minimum(np.outer(u, 1 - inner), np.outer(1 - u, inner)) * (points - 1)  # (G, G-2)
    return np.column_stack((1 - u, -8 / (points - 1) ** 2 * tents, u))


def cosine_modes(points: int) -> tuple[Array, Array]:
    """The DCT-II modes, as columns of root mean square one, (G, G), and ω_k = 2 sin(πk/2G), (G,).

    If mode k is reflected at its ends, its second differences are -ω_k² times the mode.
    """
    k = np.arange(points)
    modes = np.cos(np.pi / points * np.outer(k + 0.5, k)) * np.sqrt(2)
    modes[:, 0] = 1
    return modes, 2 * np.sin(np.pi * k / (2 * points))


def corrected_cosines(points: int) -> Array:
    """Cosine modes scaled by ω⁻², corrected in two directions so that the penalty is exactly diagonal.

    The penalty does not include the reflection at the ends. In coefficients r of the second differences it is
    |r|² - (b·r)² - (b'·r)², where b and b' are the values of the modes at the first and the last knot. The direction
    b+b' (even modes) is penalized 2/G times as much as all others, so it is rescaled. The direction b-b' (odd modes) is
    a straight line, which is not penalized at all, and a reflection turns it into a coordinate. The coefficients are a
    constant, a line, and G-2 others whose squares add up to the penalty.
    """
    modes, omega = cosine_modes(points)
    ends = modes[[0, -1], 1:] / math.sqrt(points)  # (2, G-1)
    correction = np.eye(points - 1)
    even = ends.sum(axis=0)
    if points > 2:  # with two points there is no even mode
        even /= np.linalg.norm(even)
        correction += (math.sqrt(points / 2) - 1) * np.outer(even, even)
    odd = (ends[0] - ends[1]) / math.sqrt(2)
    mirror = odd.copy()
    mirror[0] -= 1  # the reflection that maps the first mode's axis to `odd`
    if np.linalg.norm(mirror) > 1e-12:
        mirror /= np.linalg.norm(mirror)
        correction -= 2 * np.outer(mirror, mirror @ correction)
    basis = modes[:, 1:] * (2 * math.sin(math.pi / points) / omega[1:]) ** 2 @ correction
    basis[:, 0] = np.linspace(-1, 1, points)
    return np.column_stack((np.ones(points), basis))


def balanced_cosines(points: int) -> Array:
    """Cosine modes scaled by (1 + λω⁴)^(-1/2): well conditioned for data and penalty together.

    λ is chosen such that the scale falls off above mode PASSBAND for any number of knots.
    """
    modes, omega = cosine_modes(points)
    return modes / np.sqrt(1 + (omega * points / (math.pi * PASSBAND)) ** 4)


def gram_polynomials(points: int) -> Array:
    """Gram's polynomials: degrees 0 … G-1, orthogonal over the knots, root mean square one.

    Computed by Lanczos' recurrence with full orthogonalization. Legendre polynomials sampled at the knots will not do:
    they are almost dependent, with a condition number of 1e7 at G=32 and 2e16 at G=64.
    """
    x = np.linspace(-1, 1, points)
    basis = np.ones((points, points)) / math.sqrt(points)
    for k in range(1, points):
        column = x * basis[:, k - 1]
        for _ in range(2):
            column -= basis[:, :k] @ (basis[:, :k].T @ column)
        basis[:, k] = column / np.linalg.norm(column)
    return basis * math.sqrt(points)


def multilevel_hats(points: int) -> Array:
    """Hats of smaller and smaller intervals: each coefficient is a knot's deviation from the line between its parents.

    The ends come first, then the knot in the middle, then the knots in the middle of each half, and so on, for any G.
    A hat's height is the length of its interval to the power of DECAY.
    """
    basis = np.zeros((points, points))
    last = points - 1
    basis[:, last] = np.linspace(0, 1, points)
    basis[:, 0] = 1 - basis[:, last]
    intervals = [(0, last)]
    while intervals:
        left, right = intervals.pop()
        middle = (left + right) // 2
        if middle == left:
            continue
        height = ((right - left) / last) ** DECAY
        basis[:, middle] = np.interp(np.arange(points), [left, middle, right], [0, height, 0])
        intervals += [(left, middle), (middle, right)]
    return basis


BASES: dict[str, Callable[[int], Array]] = {
    "B-spline": hats,
    "parallel_scan": prefix_sums,
    "DCT": corrected_cosines,
    "linearDCT": corrected_cosines,
    "Legendre": gram_polynomials,
    "balanced": balanced_cosines,
    "hierarchical": multilevel_hats,
}
VARIANTS = tuple(BASES)
MIRRORED = ("DCT", "Legendre", "balanced")  # column k is even about the middle of the grid if k is even, else odd


@lru_cache
def basis(variant: str, points: int) -> Array:
    """S in float64, (G, G), which maps coefficients to control points. Read-only."""
    matrix = BASES[variant](points)
    matrix.setflags(write=False)
    return matrix


@lru_cache
def inverse_basis(variant: str, points: int) -> Array:
    """S⁻¹ in float64. Read-only."""
    matrix = np.linalg.inv(basis(variant, points))
    matrix.setflags(write=False)
    return matrix


def stored_basis(variant: str, points: int, zero_centred: bool) -> Array:
    """S for the coefficients that a layer stores: without the middle control point if zero_centred."""
    matrix = basis(variant, points)
    return np.delete(matrix, points // 2, axis=1) if zero_centred else matrix


class Parametrisation(Tables):
    """Converts stored weights to control points (I, G, O) and back.

    Weights have the same shape, or (I, G-1, O) if zero_centred: the middle control points are zero and not stored.
    """

    matrix: Tensor | None  # S, or None if it is the identity

    def __init__(self, variant: str, num_control_points: int, zero_centred: bool, like: Tensor) -> None:
        """`like` is a tensor with the device and dtype to compute in."""
        super().__init__()
        self.variant = variant
        self.num_control_points = num_control_points
        self.zero_centred = zero_centred
        self.register_buffer("matrix", None, persistent=False)
        self.register_tables(like.device, like.dtype)

    def compute_tables(self) -> dict[str, Tensor]:
        if self.variant == "B-spline":
            return {}
        return {"matrix": torch.from_numpy(np.array(basis(self.variant, self.num_control_points)))}

    def control_points(self, weight: Tensor) -> Tensor:
        """c = S p; differentiable."""
        if self.zero_centred:
            middle = weight.new_zeros(weight.shape[0], 1, weight.shape[2])
            left, right = weight.chunk(2, dim=1)
            return torch.cat((left, middle, right), dim=1)
        if self.matrix is None:
            return weight
        if self.variant in MIRRORED and self.num_control_points >= MIN_KNOTS_FOR_HALVES:
            return mirrored_product(self.matrix, weight)
        return product(self.matrix, weight)

    @torch.no_grad()
    def coefficients(self, control_points: Tensor) -> Tensor:
        """p = S⁻¹ c, in the dtype of the control points, computed in float64 where the device has it."""
        if self.zero_centred:
            left, _, right = control_points.tensor_split(
                (self.num_control_points // 2, self.num_control_points // 2 + 1), 1
            )
            return torch.cat((left, right), dim=1)
        if self.matrix is None:
            return control_points
        wide = widest_dtype(control_points.device)
        inverse = torch.from_numpy(np.array(inverse_basis(self.variant, self.num_control_points)))
        return torch.matmul(inverse.to(control_points.device, wide), control_points.to(wide)).to(control_points.dtype)

    def extra_repr(self) -> str:
        return f"{self.variant}, {self.num_control_points}"


def product(matrix: Tensor, weight: Tensor) -> Tensor:
    """matrix (H, G) times weight (…, G, O), never in TF32, nor are its derivatives.

    The layer computes with differences of control points, of which the ten bits of TF32 leave little. On CUDA, products
    of float32 are in TF32 if a global setting says so when they run, which for a gradient is long after this. Those of
    float64 never are, whatever transforms or compiles them. That costs little beside the layer, unless the grid is
    large and the card slow at float64.
    """
    if weight.is_cuda and weight.dtype is torch.float32:
        return torch.matmul(matrix.double(), weight.double()).to(weight.dtype)
    return torch.matmul(matrix, weight)


def mirrored_product(matrix: Tensor, weight: Tensor) -> Tensor:
    """matrix (G, G) times weight (I, G, O) with half the multiplications, for columns that are even and odd in turn.

    Even columns make a function's symmetric part and odd ones the antisymmetric part, so half of the grid determines
    both. This is the first step of a fast cosine transform. Its later steps would save less than their additions cost.
    """
    half = len(matrix) // 2
    middle = len(matrix) - half  # one more than `half` if there is a knot in the middle
    symmetric = product(matrix[:middle, ::2], weight[:, ::2])  # (I, middle, O)
    rest = product(matrix[:half, 1::2], weight[:, 1::2])  # (I, half, O)
    left, between = symmetric[:, :half], symmetric[:, half:]
    return torch.cat((left + rest, between, (left - rest).flip(1)), dim=1)


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which lack float64."""
    return torch.float32 if device.type == "mps" else torch.float64
