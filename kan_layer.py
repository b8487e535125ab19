"""KANLayer: a layer of learnable piecewise-linear splines, one for every pair of input and output feature."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def refuse_namesakes(*names: str) -> None:
    """ImportError if one of these modules would not be the one beside this file, before anything of it is run."""
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

Where = str | Callable[[str, nn.Module], bool]

INITS = ("random_normal", "identity", "zero")


class KANLayer(nn.Module):
    """y[o] = Σ_i f_io(x[i]), each f_io a linear interpolation between G control points on a uniform grid.

    The knots lie evenly on [-spline_width/2, spline_width/2]; outside, the outermost pieces go on as straight lines.
    Put a normalization in front, so that activations stay within the grid. Finding the cell takes O(1) and evaluating
    it two control points, so the arithmetic per token is 2·I·O multiply-adds whatever G is.

    Shape: (*, in_features) → (*, out_features), like nn.Linear, in the dtype of the input (under autocast: its dtype).

    Args:
        in_features: size of each input sample, I.
        out_features: size of each output sample, O.
        init: "random_normal" (every spline a straight line, the slopes into each output of unit norm), "identity"
            (output equals input; needs in_features == out_features), or "zero".
        num_control_points: knots per spline, G ≥ 2.
        spline_width: width of the grid, in units of the input; > 0.
        impl: how it is computed, a name from `backends.IMPLS`; "auto" takes the fastest that can run here.
        variant: the parametrisation of the control points, a name from `splines.parametrisation.VARIANTS`.
            "B-spline" stores them as they are; in the others `weight`, (I, G, O) too, holds coefficients of another
            basis along the grid.
        bias: add a learnable constant to each output. None, the default, means where zero_centred: other splines can
            represent it themselves.
        zero_centred: every spline is zero at the centre of the grid and its middle control point is not stored, which
            saves one of G: `weight` is (I, G-1, O). With the bias in place of the sum of all these, the layer can
            represent the same functions. Needs an odd G and the variant "B-spline".

    Raises:
        ValueError: an argument is out of range; the message names it, its value and what is allowed.

    Source: the layer and its arguments follow KANditioned (Bui, 2025).
    """

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
        self.register_load_state_dict_post_hook(_settle_after_loading)

    def reset_parameters(self) -> None:
        """Set every spline to its initial straight line (see `init`)."""
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
        """Where the control points lie on the input axis: (G,), from -spline_width/2 to spline_width/2."""
        half = self.spline_width / 2
        return torch.linspace(-half, half, self.num_control_points, device=self.weight.device, dtype=self.weight.dtype)

    def control_points(self) -> Tensor:
        """Values of every spline at its knots, (in_features, G, out_features); differentiable."""
        return self.parametrisation.control_points(self.weight)

    @torch.no_grad()
    def set_control_points(self, values: Tensor) -> None:
        """Give the splines these values at their knots, (I, G, O), whatever the layer stores for them.

        With zero_centred the values at the middle knot must be zero.
        """
        self.weight.copy_(self.parametrisation.coefficients(values.to(self.weight.device)))

    def smoothness_penalty(self) -> Tensor:
        """Mean squared second difference of the control points; differentiable. 0 where G is 2."""
        if self.num_control_points == 2:
            return self.weight.new_zeros(())
        return second_differences(self.control_points()).square().mean()

    def refine(self, num_control_points: int) -> None:
        """Put more knots into the grid. The function stays what it is, exactly.

        `weight` becomes a new parameter, which an optimizer has to be told (`training.refinement` does that).
        Raises ValueError unless every knot remains one: num_control_points - 1 must be a multiple of G - 1.
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
        """Add `cells` cells at each end of the grid, as wide as those there are. The function stays what it is."""
        check_integer("cells", cells, at_least=0)
        self.regrid(self.grid.widened(cells))

    def fit_grid(self, activations: Tensor, outside: float = 0.01) -> None:
        """Make the grid as narrow as leaves a share `outside` of the activations, (*, in_features), beyond its ends.

        The function stays what it is where it is made of straight lines, as it is at first; else it is interpolated.
        Raises ValueError if the activations are all zero, or not finite.
        """
        self.regrid(Grid(self.num_control_points, fitted_width(activations, outside)))

    @torch.no_grad()
    def regrid(self, grid: Grid) -> None:
        """Take the splines' values at the knots of another grid as control points.

        The function stays what it is if `self.grid.is_exact_on(grid)`. With another number of points `weight` becomes
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
        """The layer that computes what `linear` does, every spline a straight line, on its device and in its dtype.

        What is frozen there (requires_grad False), weight or bias, is so here.
        `linear`: an nn.Linear, or GPT-2's Conv1D of the transformers package, whose weight is transposed. `options`:
        num_control_points, spline_width, impl, variant, zero_centred. Raises ValueError for other modules and options.
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
        """What a state_dict holds beside parameters: the width of the grid, which may have been fitted."""
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
        """Under autocast its dtype, as nn.Linear would (which leaves float64 alone too); else the input's own."""
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype is not torch.float64:
            return torch.get_autocast_dtype(device)
        return x.dtype

    def _choose_backend(self) -> None:
        self._chosen_on = self.weight.device
        self._chosen, self._why_chosen = backends.choose(self.impl, self._problem(self.num_control_points))

    def _backend(self) -> backends.Backend:
        """The one for the device on which the weight is now, by whatever means it came there."""
        if self._chosen_on != self.weight.device:
            self._choose_backend()
        return self._chosen

    def __getstate__(self) -> dict[str, Any]:
        """All but the backend, which depends on the machine."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_backend", "why_this_impl")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        try:
            self._choose_backend()
        except ValueError as error:  # what was saved must be readable anywhere
            warnings.warn(f"{error}; auto is taken", stacklevel=2)
            self.impl = "auto"
            self._choose_backend()

    def _problem(self, num_control_points: int) -> backends.Problem:
        return backends.Problem(self.in_features, num_control_points, self.out_features, self.weight.device)

    @property
    def resolved_impl(self) -> str:
        """The backend that `impl` stands for on this device."""
        return self._backend().name

    @property
    def why_this_impl(self) -> str:
        """Why it is that one, in words."""
        self._backend()
        return self._why_chosen

    def snapshot(
        self, activations: Tensor | None = None, tokens: Tensor | None = None, number: int = 0, name: str = ""
    ) -> Snapshot:
        """This layer and what reaches it as plain arrays, which all that draws or sums up splines works on.

        `activations`: (*, in_features), and `tokens`, (*), those that they belong to. `number` and `name` tell the
        layer from others of its model. Raises ValueError for activations of another width or that are not finite.
        """
        seen = None if tokens is None else tokens.cpu().numpy()
        points = to_numpy(self.control_points())  # (I, G, O)
        return take(points, self.spline_width, self.rows(activations), seen, number, name)

    def rows(self, activations: Tensor | None) -> Array | None:
        """Activations (*, I) as an array (M, I); None when there are none. ValueError for a wrong width or NaN."""
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
        """Draw splines of this layer and return the matplotlib figure, which a notebook shows as it is.

        By default the most curved splines, one panel each. `inputs` and `outputs`, numbers or lists of them, restrict
        (or, with both given, name) the features; a single spline is drawn large; `everything` draws all as one sheet.
        `activations`, (*, in_features), puts the histogram of what reaches each spline behind it and weighs curvature
        with use. `style` is "light", "dark" or "print" (black ink alone). Saved to `save_path` if given, as pixels
        (.png) or vectors (.svg, .pdf); shown in a window only if `show`.

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


def _settle_after_loading(layer: KANLayer, _: object) -> None:
    """Parameters that were loaded with assign=True may be on another device."""
    fill_tables(layer)
    layer._choose_backend()


def to_numpy(values: Tensor) -> Array:
    return values.detach().float().cpu().numpy()
