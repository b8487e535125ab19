"""KANLayer: a layer of learnable piecewise-linear splines, one for every pair of input and output feature."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def refuse_namesakes(*names: str) -> None:
    """Raise ImportError if Python would import another module than the one beside this file, before it is run."""
    here = Path(__file__).resolve().parent
    for name in names:
        spec = find_spec(name)
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if spec is None or found is None or here != found.parents[spec.submodule_search_locations is not None]:
            raise ImportError(
                f"kan_layer needs its own {name}, in {here}, but Python finds {found or 'another'} first; "
                f"rename that one, or put {here} first on sys.path"
            )


refuse_namesakes("backends", "splines", "pictures", "common")

import backends  # noqa: E402
from common.linear_layers import linear_slopes  # noqa: E402
from common.tables import fill_tables  # noqa: E402
from pictures.page import chosen_style, matplotlib_defaults  # noqa: E402
from pictures.sheets import DPI, draw_snapshot  # noqa: E402
from splines.checks import check_choice, check_integer, check_middle, check_width  # noqa: E402
from splines.grid import Array, Grid, fitted_width, second_differences  # noqa: E402
from splines.parametrisation import VARIANTS, Parametrisation, widest_dtype  # noqa: E402
from splines.snapshot import Snapshot, take  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INITS = ("random_normal", "identity", "zero")
CHOICE = ("_chosen", "_chosen_on", "_why_chosen")  # attributes of a layer that are the choice of its backend


class KANLayer(nn.Module):
    """y[o] = Σ_i f_io(x[i]), each f_io a linear interpolation between G control points on a uniform grid.

    The knots lie evenly on [-spline_width/2, spline_width/2]; beyond them the outermost pieces continue as straight
    lines. Put a normalization in front, so that activations stay within the grid. Finding the cell of an input takes
    O(1), and a spline's value depends on two control points, so a token costs 2·I·O multiply-adds whatever G is.

    Shape: (*, in_features) → (*, out_features), like nn.Linear, in the dtype of the input (under autocast: its dtype).

    Args:
        in_features: size of each input sample, I.
        out_features: size of each output sample, O.
        init: "random_normal" (every spline a straight line, the slopes into each output of unit norm), "identity"
            (output equals input; needs in_features == out_features), or "zero".
        num_control_points: knots per spline, G ≥ 2.
        spline_width: width of the grid, in units of the input; > 0.
        impl: the backend, a name from `backends.IMPLS`; "auto" takes the fastest that can run here.
        variant: the parametrisation of the control points, a name from `splines.parametrisation.VARIANTS`.
            "B-spline" stores the control points; in the other variants `weight`, also (I, G, O), holds coefficients of
            another basis along the grid.
        bias: add a learnable constant to each output. None, the default, adds one only if zero_centred: other splines
            can represent it themselves.
        zero_centred: keep every spline at zero at the centre of the grid, without storing its middle control point:
            `weight` is (I, G-1, O). The bias replaces the sum of the middle control points, so the layer can represent
            the same functions. Needs an odd G and the variant "B-spline".

    Raises:
        ValueError: an argument is out of range; the message names it, its value and what is allowed.

    Source: the layer and its arguments follow KANditioned (Bui, 2025).
    """

    MACS: ClassVar[int] = 2  # multiply-adds of a token for each of its I·O splines

    def __init__(
        self,
        in_features: int,
        out_features: int,
        init: str = "random_normal",
        num_control_points: int = 32,
        spline_width: float = 4.0,
        impl: str = "auto",
        variant: str = "B-spline",
        bias: bool | None = None,
        zero_centred: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("in_features", in_features, at_least=1)
        check_integer("out_features", out_features, at_least=1)
        check_integer("num_control_points", num_control_points, at_least=2)
        check_width(spline_width)
        check_choice("init", init, INITS)
        check_choice("variant", variant, VARIANTS)
        check_choice("impl", impl, backends.IMPLS)
        if init == "identity" and in_features != out_features:
            raise ValueError(f"init 'identity' needs in_features == out_features; got {in_features} and {out_features}")
        check_middle("zero_centred", zero_centred, num_control_points, variant)
        self.in_features = in_features
        self.out_features = out_features
        self.num_control_points = num_control_points
        self.spline_width = float(spline_width)
        self.init = init
        self.impl = impl
        self.variant = variant
        self.zero_centred = zero_centred
        shape = (in_features, num_control_points - zero_centred, out_features)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        with_bias = zero_centred if bias is None else bias
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if with_bias else None
        self.parametrisation = Parametrisation(variant, num_control_points, zero_centred, self.weight)
        self.reset_parameters()
        self._choose_backend()
        self.register_load_state_dict_post_hook(_adapt_to_loaded_parameters)

    def reset_parameters(self) -> None:
        """Set every spline to the straight line that `init` describes, and the bias to zero."""
        self._set_lines(self._initial_slopes())
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def _set_lines(self, slopes: Tensor) -> None:
        """Make every spline a straight line through 0. slopes: (I, O)."""
        wide = slopes.to(widest_dtype(slopes.device))
        knots = torch.from_numpy(self.grid.knots()).to(wide)
        self.set_control_points(wide.unsqueeze(1) * knots.unsqueeze(1))

    @property
    def matrices(self) -> int | None:
        """The number of matrices that `weight` is, for optimizers that treat matrices as wholes; None: one a point.

        An input is mixed from two neighbouring control points, so the weights of each B-spline are a matrix (I, O) of
        their own. The functions of other variants act all at once: the layer is linear in I·G features, one matrix.
        """
        return None if self.variant == "B-spline" else 1

    @property
    def grid(self) -> Grid:
        return Grid(self.num_control_points, self.spline_width)

    def _initial_slopes(self) -> Tensor:
        slopes = torch.zeros_like(self.weight[:, 0])  # (I, O)
        if self.init == "identity":
            return slopes.fill_diagonal_(1.0)
        if self.init == "random_normal":
            return F.normalize(slopes.normal_(), dim=0)
        return slopes

    def knots(self) -> Tensor:
        """Positions of the control points on the input axis: (G,), from -spline_width/2 to spline_width/2."""
        half = self.spline_width / 2
        return torch.linspace(-half, half, self.num_control_points, device=self.weight.device, dtype=self.weight.dtype)

    def control_points(self) -> Tensor:
        """The value of every spline at every knot, (in_features, G, out_features); differentiable."""
        return self.parametrisation.control_points(self.weight)

    @torch.no_grad()
    def set_control_points(self, values: Tensor) -> None:
        """Set the values of the splines at their knots, (I, G, O), in any parametrisation.

        If zero_centred, the values at the middle knot must be zero.
        """
        self.weight.copy_(self.parametrisation.coefficients(values.to(self.weight.device)))

    def smoothness_penalty(self) -> Tensor:
        """Mean squared second difference of the control points; differentiable. 0 if G is 2."""
        if self.num_control_points == 2:
            return self.weight.new_zeros(())
        return second_differences(self.control_points()).square().mean()

    def refine(self, num_control_points: int) -> None:
        """Add knots to the grid without changing the function.

        `weight` becomes a new parameter, which the optimizer must be given (`training.refinement` does that).
        Raises ValueError unless all knots are kept: num_control_points - 1 must be a multiple of G - 1.
        """
        check_integer("num_control_points", num_control_points, at_least=2)
        cells, now = num_control_points - 1, self.num_control_points - 1
        if cells % now:
            below = max(1, cells // now)
            near = (below * now + 1, (below + 1) * now + 1)
            raise ValueError(
                f"refining {self.num_control_points} control points to {num_control_points} would change the function; "
                f"num_control_points - 1 must be a multiple of {now}, as with {' or '.join(map(str, near))}"
            )
        self.regrid(Grid(num_control_points, self.spline_width))

    def widen(self, cells: int) -> None:
        """Add `cells` cells of the same width at each end of the grid, without changing the function."""
        check_integer("cells", cells, at_least=0)
        self.regrid(self.grid.widened(cells))

    def fit_grid(self, activations: Tensor, outside: float = 0.01) -> None:
        """Shrink or widen the grid so that only a share `outside` of the activations lies beyond its ends.

        `activations` are (*, in_features). Splines that are straight lines, as they are at first, do not change; others
        are interpolated at the new knots. Raises ValueError if the activations are all zero, or not finite.
        """
        self.regrid(Grid(self.num_control_points, fitted_width(activations, outside)))

    @torch.no_grad()
    def regrid(self, grid: Grid) -> None:
        """Interpolate the splines on another grid: their values at its knots become the control points.

        The function does not change if `self.grid.is_exact_on(grid)`. If the number of points changes, `weight` becomes
        a new parameter. Raises ValueError, and changes nothing, if the layer cannot be computed on that grid.
        """
        check_width(grid.width)
        check_middle("zero_centred", self.zero_centred, grid.points, self.variant)
        backends.choose(self.impl, self._problem(grid.points))
        values = self.control_points().to(widest_dtype(self.weight.device))
        values = torch.matmul(torch.from_numpy(self.grid.interpolation(grid)).to(values), values)
        resized = grid.points != self.num_control_points
        self.num_control_points, self.spline_width = grid.points, float(grid.width)
        self.parametrisation = Parametrisation(self.variant, grid.points, self.zero_centred, self.weight)
        weight = self.parametrisation.coefficients(values).to(self.weight.dtype)
        if resized:
            self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
            self._choose_backend()
        else:
            self.weight.copy_(weight)

    @classmethod
    def from_linear(cls, linear: nn.Module, **options: Any) -> KANLayer:
        """A layer that computes the same as `linear`, with straight lines as splines, on its device and in its dtype.

        `linear` is an nn.Linear, or GPT-2's Conv1D from the transformers package, whose weight is transposed. A frozen
        weight or bias (requires_grad False) stays frozen. `options` may be num_control_points, spline_width, impl,
        variant and zero_centred. Raises ValueError for other modules and options.
        """
        slopes = linear_slopes(linear)
        bias = getattr(linear, "bias", None)
        inputs, outputs = slopes.shape
        made: dict[str, Any] = {
            "init": "zero",
            "bias": bias is not None,
            "device": slopes.device,
            "dtype": slopes.dtype,
        }
        layer = cls(inputs, outputs, **made, **options)
        layer._set_lines(slopes)
        layer.weight.requires_grad_(linear.get_parameter("weight").requires_grad)
        if layer.bias is not None and bias is not None:
            with torch.no_grad():
                layer.bias.copy_(bias)
            layer.bias.requires_grad_(bias.requires_grad)
        return layer.train(linear.training)

    def get_extra_state(self) -> Tensor:
        """The width of the grid, which may have been fitted, for the state_dict."""
        return torch.tensor(self.spline_width, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        width = float(state)
        check_width(width)
        self.spline_width = width

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"the last dimension of the input must be in_features={self.in_features}; got shape {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise ValueError(f"the input must be of a floating dtype; got {x.dtype}")
        dtype = self._compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, self.in_features)  # (*, I) → (N, I)
            y = self._backend().spline_sum(rows, self.control_points(), self.spline_width, dtype)  # (N, O)
            if self.bias is not None:
                y = y + self.bias.to(dtype)
            return y.reshape(*x.shape[:-1], self.out_features)

    @staticmethod
    def _compute_dtype(x: Tensor) -> torch.dtype:
        """The dtype of the output, as for nn.Linear: under autocast autocast's, unless x is float64; else that of x."""
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype is not torch.float64:
            return torch.get_autocast_dtype(device)
        return x.dtype

    def _choose_backend(self) -> None:
        self._chosen_on = self.weight.device
        self._chosen, self._why_chosen = backends.choose(self.impl, self._problem(self.num_control_points))

    def _backend(self) -> backends.Backend:
        """The backend for the device of the weight, chosen again if the weight has been moved."""
        if self._chosen_on != self.weight.device:
            self._choose_backend()
        return self._chosen

    def __getstate__(self) -> dict[str, Any]:
        """All attributes except the chosen backend, which depends on the machine."""
        return {name: value for name, value in self.__dict__.items() if name not in CHOICE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        try:
            self._choose_backend()
        except ValueError as error:  # a saved layer must load on any machine
            warnings.warn(f"{error}; auto is used instead", stacklevel=2)
            self.impl = "auto"
            self._choose_backend()

    def _problem(self, num_control_points: int) -> backends.Problem:
        return backends.Problem(self.in_features, num_control_points, self.out_features, self.weight.device)

    @property
    def resolved_impl(self) -> str:
        """The name of the backend that `impl` selects on this device."""
        return self._backend().name

    @property
    def why_this_impl(self) -> str:
        """The reason for this backend, in words."""
        self._backend()
        return self._why_chosen

    def snapshot(
        self, activations: Tensor | None = None, tokens: Tensor | None = None, number: int = 0, name: str = ""
    ) -> Snapshot:
        """This layer and its activations as plain arrays, the input of everything that draws or sums up splines.

        `activations` are (*, in_features); `tokens`, (*), are the tokens that they belong to. `number` and `name`
        identify the layer in its model. Raises ValueError for activations of another width or that are not finite.
        """
        seen = None if tokens is None else tokens.cpu().numpy()
        points = to_numpy(self.control_points())  # (I, G, O)
        return take(points, self.spline_width, self.rows(activations), seen, number, name)

    def rows(self, activations: Tensor | None) -> Array | None:
        """Activations (*, I) as an array (M, I), or None without any. Raises ValueError for a wrong width or NaN."""
        if activations is None or activations.numel() == 0:
            return None
        if activations.shape[-1] != self.in_features:
            raise ValueError(
                f"the last dimension of activations must be in_features={self.in_features}; "
                f"got shape {tuple(activations.shape)}"
            )
        rows = to_numpy(activations).reshape(-1, self.in_features)  # (*, I) → (M, I)
        if not np.isfinite(rows).all():
            raise ValueError("activations must be finite; got NaN or infinity")
        return rows

    @matplotlib_defaults()
    def plot(
        self,
        inputs: int | Sequence[int] | None = None,
        outputs: int | Sequence[int] | None = None,
        *,
        everything: bool = False,
        activations: Tensor | None = None,
        save_path: str | PathLike[str] | None = None,
        show: bool = False,
        style: str = "light",
    ) -> Figure:
        """Draw splines of this layer and return the matplotlib figure, which a notebook displays.

        By default it draws the most curved splines, one panel each. `inputs` or `outputs`, numbers or lists of them,
        restrict the features; with both given they name the splines. A single spline is drawn large. `everything` draws
        all splines as one sheet. `activations`, (*, in_features), add the histogram of its inputs behind each spline
        and weigh curvature by use. `style` is "light", "dark" or "print" (only black ink). The figure is saved to
        `save_path` if given, as pixels (.png) or vectors (.svg, .pdf), and shown in a window if `show`.

        Raises ValueError for a feature that is not there, for more named splines than fit on a sheet, for activations
        that are not finite or not (*, in_features), and for an unknown style.
        """
        colors = chosen_style(style)
        figure = draw_snapshot(self.snapshot(activations), inputs, outputs, everything, style=colors, show=show)
        if save_path is not None:
            figure.savefig(save_path, dpi=DPI)
        if show:
            import matplotlib.pyplot as plt

            plt.show()
        return figure

    def visualize_all_mappings(self, save_path: str | PathLike[str] | None = None) -> Figure:
        """Draw every spline of the layer as one sheet, inputs down and outputs across."""
        return self.plot(everything=True, save_path=save_path)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, num_control_points={self.num_control_points}, "
            f"spline_width={self.spline_width:g}, init={self.init!r}, variant={self.variant!r}, "
            f"impl={self.impl!r} ({self.resolved_impl}), bias={self.bias is not None}, zero_centred={self.zero_centred}"
        )


def _adapt_to_loaded_parameters(layer: KANLayer, _: object) -> None:
    """Choose the backend again, because parameters that were loaded with assign=True may be on another device."""
    fill_tables(layer)
    layer._choose_backend()


def to_numpy(values: Tensor) -> Array:
    return values.detach().float().cpu().numpy()
