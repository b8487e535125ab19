"""Grids change and functions stay: refined and widened exactly, fitted to activations, made from linear layers."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kan_layer import KANLayer
from splines.grid import Grid, fitted_width
from splines.parametrisation import VARIANTS
from tests.layers import random_layer

every_variant = pytest.mark.parametrize("variant", VARIANTS)
DOUBLE = {"rtol": 1e-9, "atol": 1e-9, "check_dtype": False}


double_layer = partial(random_layer, 3, 4, dtype=torch.float64)


def probes(width: float) -> torch.Tensor:
    return torch.randn(200, 3, dtype=torch.float64) * width


@every_variant
@settings(max_examples=15, deadline=None)
@given(grid=st.integers(2, 12), times=st.integers(1, 5), width=st.floats(0.5, 9), seed=st.integers(0, 999))
def test_refining_leaves_the_function(variant: str, grid: int, times: int, width: float, seed: int) -> None:
    torch.manual_seed(seed)
    layer, x = double_layer(grid, width, variant=variant), probes(width)
    y = layer(x)
    layer.refine((grid - 1) * times + 1)
    assert layer.num_control_points == layer.weight.shape[1] == (grid - 1) * times + 1
    torch.testing.assert_close(layer(x), y, **DOUBLE)


def test_refining_halves_intervals() -> None:
    """Check c[2i] = c[i] and c[2i+1] = (c[i] + c[i+1]) / 2."""
    layer = double_layer(5)
    before = layer.control_points().detach().clone()
    layer.refine(9)
    torch.testing.assert_close(layer.control_points()[:, ::2], before)
    torch.testing.assert_close(layer.control_points()[:, 1::2], (before[:, 1:] + before[:, :-1]) / 2)


@settings(max_examples=15, deadline=None)
@given(grid=st.integers(2, 9), cells=st.integers(0, 4), width=st.floats(0.5, 9), seed=st.integers(0, 999))
def test_widening_leaves_the_function(grid: int, cells: int, width: float, seed: int) -> None:
    torch.manual_seed(seed)
    layer, x = double_layer(grid, width), probes(width)
    y = layer(x)
    layer.widen(cells)
    assert layer.num_control_points == grid + 2 * cells
    assert layer.spline_width == pytest.approx(width * (grid - 1 + 2 * cells) / (grid - 1))
    torch.testing.assert_close(layer(x), y, **DOUBLE)


@settings(max_examples=100, deadline=None)
@given(
    old=st.tuples(st.integers(2, 9), st.sampled_from([2.0, 4.0, 6.0, 3.3])),
    new=st.tuples(st.integers(2, 20), st.sampled_from([2.0, 4.0, 6.0, 8.0, 3.3])),
)
def test_a_grid_is_called_exact_where_random_splines_survive_it(old: tuple[int, float], new: tuple[int, float]) -> None:
    torch.manual_seed(0)
    layer, x = double_layer(*old), probes(4.0)
    y = layer(x)
    exact = Grid(*old).is_exact_on(Grid(*new))
    layer.regrid(Grid(*new))
    assert torch.allclose(layer(x), y, rtol=1e-9, atol=1e-9) == exact


def test_zero_centred_splines_refine() -> None:
    layer, x = double_layer(5, zero_centred=True), probes(4.0)
    y = layer(x)
    layer.refine(9)
    assert layer.weight.shape == (3, 8, 4)
    torch.testing.assert_close(layer(x), y, **DOUBLE)


@pytest.mark.parametrize(
    ("before", "after", "near"), [(5, 8, "5 or 9"), (5, 3, "5 or 9"), (8, 64 + 3, "64 or 71"), (5, 10, "9 or 13")]
)
def test_a_grid_that_would_change_the_function_is_refused(before: int, after: int, near: str) -> None:
    layer = double_layer(before)
    with pytest.raises(ValueError, match=f"multiple of {before - 1}, as with {near}"):
        layer.refine(after)
    assert layer.num_control_points == before


def test_what_cannot_be_computed_is_refused_and_changes_nothing() -> None:
    layer, x = KANLayer(16, 16, num_control_points=5, impl="semi_structured"), torch.randn(4, 16)
    y = layer(x)
    with pytest.raises(ValueError, match="semi_structured"):
        layer.refine(9)
    torch.testing.assert_close(layer(x), y)


@settings(max_examples=30, deadline=None)
@given(outside=st.floats(0, 0.5), scale=st.floats(0.01, 100), seed=st.integers(0, 999))
def test_the_fitted_grid_is_the_narrowest_that_leaves_so_many_outside(outside: float, scale: float, seed: int) -> None:
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((200, 3)) * scale).float()
    width = fitted_width(x, outside)
    may = outside * x.numel() + 1e-6
    assert (x.abs() > width / 2).sum() <= may, "too many are outside"
    assert (x.abs() >= width / 2).sum() > may - 1, "it could be narrower"


@every_variant
def test_fitting_straight_lines_is_exact_and_survives_saving(variant: str) -> None:
    layer, x = KANLayer(3, 4, num_control_points=9, variant=variant, dtype=torch.float64), probes(2.0)
    weight, y = layer.weight, layer(x)
    layer.fit_grid(x, outside=0.05)
    assert layer.weight is weight and (x.abs() > layer.spline_width / 2).double().mean() <= 0.05
    torch.testing.assert_close(layer(x), y, **DOUBLE)
    other = KANLayer(3, 4, num_control_points=9, variant=variant, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    assert other.spline_width == layer.spline_width and torch.equal(other(x), layer(x))


@pytest.mark.parametrize("bad", [torch.zeros(5), torch.zeros(0), torch.full((5,), torch.nan)])
def test_a_grid_cannot_be_fitted_to_nothing(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="a grid cannot be fitted"):
        fitted_width(bad, 0.01)


@every_variant
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grid", [2, 5, 8, 33])
def test_from_linear_is_the_linear_layer_inside_and_outside(variant: str, bias: bool, grid: int) -> None:
    linear = nn.Linear(40, 30, bias=bias)
    layer = KANLayer.from_linear(linear, num_control_points=grid, spline_width=3.0, variant=variant)
    x = torch.randn(50, 40) * 3
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-5)
    assert (layer.bias is not None) is bias
    exact = KANLayer.from_linear(linear.double(), num_control_points=grid, spline_width=3.0, variant=variant)
    torch.testing.assert_close(exact(x.double()), linear(x.double()), rtol=1e-11, atol=1e-11)


def test_from_linear_refuses_what_is_not_linear() -> None:
    with pytest.raises(ValueError, match=r"takes an nn\.Linear .*got Embedding"):
        KANLayer.from_linear(nn.Embedding(3, 4))
