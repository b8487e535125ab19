"""How control points follow from what a layer stores: c = S p along the grid, one matrix S for each variant.

S depends on the number of control points alone. The functions that a layer can be are the same in every variant; what
differs is which of them are close to each other, and so what an optimizer learns first. Columns of S are scaled such
that a coefficient's effect does not depend on the grid: doubling the knots leaves a learning rate as good as it was.

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

PASSBAND = 4  # balanced: cosine modes up to this are learnt at full speed, higher ones at a rate that falls as k⁻²
FROM_HALVES = 400  # knots from which on two products of half the size beat one: `python bench/variants.py`, on a CPU
DECAY = 1.0  # hierarchical: what halving an interval does to its hat's height, as an exponent of two


def hats(points: int) -> Array:
    """The control points themselves."""
    return np.eye(points)


def prefix_sums(points: int) -> Array:
    """Second differences summed twice, and the line through both ends: tents with one kink each.

    Coefficients: value at the first knot, G-2 second differences, value at the last knot. All second differences equal
    to one make a parabola of height one, on any grid.
    """
    u = np.linspace(0, 1, points)
    inner = u[1:-1]
    tents = np.minimum(np.outer(u, 1 - inner), np.outer(1 - u, inner)) * (points - 1)  # (G, G-2)
    return np.column_stack((1 - u, -8 / (points - 1) ** 2 * tents, u))


def cosine_modes(points: int) -> tuple[Array, Array]:
    """The DCT-II modes, columns of root mean square one, (G, G); and ω_k = 2 sin(πk/2G), (G,).

    Reflected at its ends, mode k has second differences of -ω_k² times itself.
    """
    k = np.arange(points)
    modes = np.cos(np.pi / points * np.outer(k + 0.5, k)) * np.sqrt(2)
    modes[:, 0] = 1
    return modes, 2 * np.sin(np.pi * k / (2 * points))


def corrected_cosines(points: int) -> Array:
    """Cosine modes scaled by ω⁻², corrected in two directions so that the penalty is exactly diagonal.

    The reflection at the ends is not part of the penalty: in coefficients r of the second differences it leaves
    |r|² - (b·r)² - (b'·r)², b and b' being the modes' values at the first and the last knot. Both directions are known:
    b+b' (even modes) is penalized 2/G times as much as all others, and is rescaled; b-b' (odd modes) is a straight
    line, not penalized at all, and a reflection turns it into a coordinate. Coefficients: constant, line, and G-2 with
    a penalty of their squares.
    """
    modes, omega = cosine_modes(points)
    ends = modes[[0, -1], 1:] / math.sqrt(points)  # (2, G-1)
    correction = np.eye(points - 1)
    even = ends.sum(axis=0)
    if points > 2:  # else there is no even mode
        even /= np.linalg.norm(even)
        correction += (math.sqrt(points / 2) - 1) * np.outer(even, even)
    odd = (ends[0] - ends[1]) / math.sqrt(2)
    mirror = odd.copy()
    mirror[0] -= 1  # takes the first mode's axis to `odd`
    if np.linalg.norm(mirror) > 1e-12:
        mirror /= np.linalg.norm(mirror)
        correction -= 2 * np.outer(mirror, mirror @ correction)
    basis = modes[:, 1:] * (2 * math.sin(math.pi / points) / omega[1:]) ** 2 @ correction
    basis[:, 0] = np.linspace(-1, 1, points)
    return np.column_stack((np.ones(points), basis))


def balanced_cosines(points: int) -> Array:
    """Cosine modes scaled by (1 + λω⁴)^(-1/2): well conditioned for data and penalty together.

    λ is such that the scale falls off above mode PASSBAND, wherever the knots are.
    """
    modes, omega = cosine_modes(points)
    return modes / np.sqrt(1 + (omega * points / (math.pi * PASSBAND)) ** 4)


def gram_polynomials(points: int) -> Array:
    """Legendre polynomials of the grid: of degree 0 … G-1, orthogonal over the knots (Gram's), root mean square one.

    By Lanczos' recurrence with full orthogonalization: Legendre polynomials sampled at the knots are almost dependent,
    with a condition number of 1e7 at G=32 and 2e16 at G=64.
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
    """Hats of ever smaller intervals: each coefficient is a knot's deviation from the line between its parents.

    The ends come first, then the knot in the middle, then those in the middle of each half … (any G). A hat's height
    falls with the length of its interval, to the power of DECAY.
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
MIRRORED = ("DCT", "Legendre", "balanced")  # column k is even or odd about the middle of the grid, as k is


@lru_cache
def basis(variant: str, points: int) -> Array:
    """S in float64, (G, G): control points by coefficients. Read-only."""
    matrix = BASES[variant](points)
    matrix.setflags(write=False)
    return matrix


@lru_cache
def inverse_basis(variant: str, points: int) -> Array:
    """S⁻¹ in float64."""
    matrix = np.linalg.inv(basis(variant, points))
    matrix.setflags(write=False)
    return matrix


def stored_basis(variant: str, points: int, zero_centred: bool) -> Array:
    """S of what a layer stores: without the middle control point where that is always zero."""
    matrix = basis(variant, points)
    return np.delete(matrix, points // 2, axis=1) if zero_centred else matrix


class Parametrisation(Tables):
    """Control points, (I, G, O), from what a layer stores, and back.

    That has the same shape, or (I, G-1, O) where zero_centred: without the middle control points, which are zero.
    """

    matrix: Tensor | None  # S, unless that is the identity

    def __init__(self, variant: str, num_control_points: int, zero_centred: bool, like: Tensor) -> None:
        """`like`: a tensor of the device and dtype to compute in."""
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
        if self.variant in MIRRORED and self.num_control_points >= FROM_HALVES:
            return mirrored_product(self.matrix, weight)
        return torch.matmul(self.matrix, weight)

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


def mirrored_product(matrix: Tensor, weight: Tensor) -> Tensor:
    """matrix (G, G) times weight (I, G, O) with half the multiplications, for columns that are even and odd in turn.

    The even ones make a function's symmetric part, the odd ones the rest; both are known from half of the grid. This is
    the first step of a fast cosine transform; the steps after it would save less than their additions cost.
    """
    half = len(matrix) // 2
    middle = len(matrix) - half  # one more than half where there is a knot in the middle
    symmetric = torch.matmul(matrix[:middle, ::2], weight[:, ::2])  # (I, middle, O)
    rest = torch.matmul(matrix[:half, 1::2], weight[:, 1::2])  # (I, half, O)
    left, between = symmetric[:, :half], symmetric[:, half:]
    return torch.cat((left + rest, between, (left - rest).flip(1)), dim=1)


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no other."""
    return torch.float32 if device.type == "mps" else torch.float64
