"""PairLayer: learnable piecewise-linear functions of two inputs, one for every pair of features and output."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backends.pairs import pair_sum
from common.tables import fill_tables
from splines.checks import check_choice, check_integer, check_width
from splines.grid import Grid
from splines.pair_basis import VARIANTS, PairBasis
from splines.parametrisation import widest_dtype

INITS = ("random_normal", "zero")


class PairLayer(nn.Module):
    """y[o] = Σ_i f_io(x[i], z[i]), each f_io linear on the triangles of a uniform G x G grid, and continuous.

    The knots lie evenly on [-spline_width/2, spline_width/2] along both axes, and a diagonal divides each cell of the
    grid into two triangles (Kuhn 1960). A value depends on three of the G² control points, so a token costs 3·I·O
    multiply-adds whatever G is. Beyond the grid, a function goes on straight from the nearest point of the grid, which
    takes a fourth control point.

    Shape: (*, in_features), (*, in_features) → (*, out_features), in the dtype of x (under autocast: its dtype).

    Args:
        in_features: size of each of both inputs, I.
        out_features: size of the output, O.
        init: "random_normal" (every function is linear in x and independent of z, the slopes into each output of unit
            norm), or "zero".
        num_control_points: knots along each axis, G ≥ 2.
        spline_width: width of the grid along each axis, in units of the input; > 0.
        variant: what `weight` (I, G², O) holds: control points ("B-spline"), or coefficients of products of cosine
            modes that fall off with their frequency ("balanced").

    Raises:
        ValueError: an argument is out of range; the message names it, its value and what is allowed.

    Source: interpolation on simplices as in lattice regression (Gupta et al. 2016), functions of two features as in
    lmKAN (Pozdnyakov and Schwaller, 2025), whose cells are bilinear and read four control points.
    """

    MACS: ClassVar[int] = 3  # multiply-adds of a token for each of its I·O functions

    def __init__(
        self,
        in_features: int,
        out_features: int,
        init: str = "random_normal",
        num_control_points: int = 5,
        spline_width: float = 4.0,
        variant: str = "balanced",
    ) -> None:
        super().__init__()
        check_integer("in_features", in_features, at_least=1)
        check_integer("out_features", out_features, at_least=1)
        check_integer("num_control_points", num_control_points, at_least=2)
        check_width(spline_width)
        check_choice("init", init, INITS)
        check_choice("variant", variant, VARIANTS)
        self.in_features = in_features
        self.out_features = out_features
        self.num_control_points = num_control_points
        self.spline_width = float(spline_width)
        self.init = init
        self.variant = variant
        self.weight = nn.Parameter(torch.empty(in_features, num_control_points**2, out_features))
        self.basis = PairBasis(variant, num_control_points, self.weight)
        self.reset_parameters()
        self.register_load_state_dict_post_hook(lambda layer, _: fill_tables(layer))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every function to the one that `init` describes."""
        slopes = torch.zeros_like(self.weight[:, 0])  # (I, O)
        if self.init == "random_normal":
            slopes = F.normalize(slopes.normal_(), dim=0)
        wide = slopes.to(widest_dtype(slopes.device))
        knots = torch.from_numpy(self.grid.knots()).to(wide)
        lines = torch.einsum("io,g->igo", wide, knots)  # (I, G, O)
        self.set_control_points(lines.unsqueeze(2).expand(-1, -1, self.num_control_points, -1))

    @property
    def grid(self) -> Grid:
        """The grid along each axis."""
        return Grid(self.num_control_points, self.spline_width)

    @property
    def matrices(self) -> int | None:
        """The number of matrices that `weight` is, as `KANLayer.matrices`."""
        return None if self.variant == "B-spline" else 1

    def control_points(self) -> Tensor:
        """The value of every function at every pair of knots, (I, G, G, O), x before z; differentiable."""
        return self.basis.control_points(self.weight)

    @torch.no_grad()
    def set_control_points(self, values: Tensor) -> None:
        """Set the values of the functions at their knots, (I, G, G, O), in any variant."""
        self.weight.copy_(self.basis.coefficients(values))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x and z (*, I) → (*, O). Raises ValueError if their shapes differ or do not end with in_features."""
        if x.shape != z.shape or x.shape[-1] != self.in_features:
            raise ValueError(
                f"both inputs must have the shape (*, in_features={self.in_features}); got {tuple(x.shape)} and "
                f"{tuple(z.shape)}"
            )
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        flat = (-1, self.in_features)
        y = pair_sum(x.reshape(flat), z.reshape(flat), self.control_points(), self.spline_width)
        return y.to(dtype).unflatten(0, x.shape[:-1]) if x.dim() != 1 else y[0].to(dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, num_control_points={self.num_control_points}, "
            f"spline_width={self.spline_width:g}, init={self.init!r}, variant={self.variant!r}"
        )
