"""KANLayer itself: its inits, its errors for bad arguments, and autocast as in nn.Linear."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kan_layer import KANLayer


@given(grid=st.integers(2, 64), width=st.floats(0.5, 20.0), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_identity_is_the_identity_inside_and_outside(grid: int, width: float, scale: float) -> None:
    layer = KANLayer(6, 6, init="identity", num_control_points=grid, spline_width=width)
    x = torch.randn(50, 6) * scale * width
    torch.testing.assert_close(layer(x), x, rtol=1e-5, atol=1e-5 * width)


@given(grid=st.integers(2, 64), width=st.floats(0.5, 20.0))
def test_random_normal_is_a_linear_layer_with_unit_norm_columns(grid: int, width: float) -> None:
    layer = KANLayer(5, 7, num_control_points=grid, spline_width=width).double()
    x = torch.randn(40, 5, dtype=torch.float64) * width
    slopes = torch.linalg.lstsq(x, layer(x)).solution  # (5, 7)
    torch.testing.assert_close(x @ slopes, layer(x), rtol=1e-5, atol=1e-5 * width)
    torch.testing.assert_close(slopes.norm(dim=0), torch.ones(7, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_zero_is_zero_and_bias_is_added() -> None:
    layer = KANLayer(3, 4, init="zero", bias=True)
    torch.nn.init.normal_(layer.bias)
    torch.testing.assert_close(layer(torch.randn(5, 3)), layer.bias.expand(5, 4))


def test_defaults_are_those_of_the_documented_signature() -> None:
    layer = KANLayer(3, 4)
    assert (layer.num_control_points, layer.spline_width, layer.init, layer.variant) == (
        32,
        4.0,
        "random_normal",
        "B-spline",
    )
    assert layer.control_points().shape == (3, 32, 4) and layer.bias is None


def test_control_points_are_the_values_at_the_knots() -> None:
    layer = KANLayer(1, 3, num_control_points=9, spline_width=5.0)
    torch.nn.init.normal_(layer.weight)
    torch.testing.assert_close(layer(layer.knots().unsqueeze(1)), layer.control_points()[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": 0}, "in_features must be an integer of at least 1; got 0"),
        ({"out_features": 2.0}, "out_features must be an integer of at least 1; got 2.0"),
        ({"num_control_points": 1}, "num_control_points must be an integer of at least 2; got 1"),
        ({"num_control_points": True}, "num_control_points must be .*got True"),
        ({"spline_width": 0}, "spline_width must be a finite number above 0; got 0"),
        ({"spline_width": -1.0}, "spline_width must be .*got -1.0"),
        ({"spline_width": float("nan")}, "spline_width must be .*got nan"),
        ({"spline_width": float("inf")}, "spline_width must be .*got inf"),
        ({"spline_width": "4"}, "spline_width must be .*got '4'"),
        ({"init": "xavier"}, "init must be one of random_normal, identity, zero; got 'xavier'"),
        ({"init": "identity"}, "init 'identity' needs in_features == out_features; got 3 and 4"),
        ({"impl": "cuda"}, "impl must be one of auto, .*sparse_matmul_csr; got 'cuda'"),
        ({"variant": "spline"}, "variant must be one of B-spline, .*balanced, hierarchical; got 'spline'"),
    ],
)
def test_bad_arguments_name_the_argument_the_value_and_what_is_allowed(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KANLayer(**{"in_features": 3, "out_features": 4, **arguments})


def test_wrong_input_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"in_features=3; got shape \(2, 4\)"):
        KANLayer(3, 4)(torch.randn(2, 4))


def test_state_dict_round_trip_and_deepcopy() -> None:
    import copy

    layer = KANLayer(3, 4, bias=True)
    other = KANLayer(3, 4, init="zero", bias=True)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 3)
    torch.testing.assert_close(other(x), layer(x))
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.needs("mkl")
def test_the_spelling_of_the_upstream_package_is_accepted() -> None:
    assert KANLayer(2, 2, impl="sparse_matmul_csr").resolved_impl == "csr"


def test_integers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"floating dtype; got torch\.int64"):
        KANLayer(3, 4)(torch.ones(2, 3, dtype=torch.long))
