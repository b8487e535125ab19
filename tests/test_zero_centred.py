"""Zero-centred splines represent the plain layer's functions with a bias and one control point fewer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kan_layer import INITS, KANLayer
from model import GPT, GPTConfig
from tests import spline_reference
from tests.layers import random_layer
from tests.test_backends import every_impl, relative_error


@every_impl
def test_values_and_gradients_are_those_of_the_definition(impl: str, device: torch.device) -> None:
    layer = random_layer(6, 7, 5, impl=impl, zero_centred=True, device=device)
    x, dy = torch.randn(40, 6, device=device) * 2, torch.randn(40, 7, device=device)
    x.requires_grad_()
    y = layer(x)
    dx, dw, db = torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)
    x64, w64, dy64 = (t.detach().double().cpu().numpy() for t in (x, layer.control_points(), dy))
    assert (w64[:, 2] == 0).all()
    truth_dx, truth_dw = spline_reference.gradients(x64, w64, 4.0, dy64)
    truth_y = spline_reference.spline_sum(x64, w64, 4.0) + layer.bias.detach().double().cpu().numpy()
    pairs = ((y, truth_y), (dx, truth_dx), (dw, truth_dw[:, [0, 1, 3, 4]]), (db, dy64.sum(0)))
    assert all(relative_error(value, truth) < 1e-5 for value, truth in pairs)


@settings(max_examples=30, deadline=None)
@given(half_grid=st.integers(1, 12), features=st.integers(1, 5), outputs=st.integers(1, 5), seed=st.integers(0, 999))
def test_it_can_be_any_plain_layer(half_grid: int, features: int, outputs: int, seed: int) -> None:
    torch.manual_seed(seed)
    grid = 2 * half_grid + 1
    plain = KANLayer(features, outputs, num_control_points=grid, dtype=torch.float64)
    torch.nn.init.normal_(plain.weight)
    middle = plain.weight.data[:, half_grid]  # (I, O)
    centred = random_layer(features, outputs, grid, zero_centred=True, dtype=torch.float64)
    others = [g for g in range(grid) if g != half_grid]
    centred.weight.data = plain.weight.data[:, others] - middle.unsqueeze(1)
    centred.bias.data = middle.sum(0)
    x = torch.randn(20, features, dtype=torch.float64) * 3
    torch.testing.assert_close(centred(x), plain(x))
    assert not centred.control_points()[:, half_grid].any()


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("width", [4.0, 0.7, 3.3])
def test_every_init_is_exact(init: str, width: float) -> None:
    options = {"num_control_points": 7, "spline_width": width, "init": init, "dtype": torch.float64}
    torch.manual_seed(1)
    plain = KANLayer(5, 5, **options)
    torch.manual_seed(1)
    centred = KANLayer(5, 5, zero_centred=True, **options)
    x = torch.randn(30, 5, dtype=torch.float64) * width
    torch.testing.assert_close(centred(x), plain(x))


def test_the_bias_comes_with_it_unless_refused() -> None:
    assert KANLayer(3, 3, num_control_points=5, zero_centred=True).bias is not None
    assert KANLayer(3, 3, num_control_points=5, zero_centred=True, bias=False).bias is None
    assert KANLayer(3, 3, num_control_points=5).bias is None
    assert KANLayer(3, 3, num_control_points=5, bias=True).bias is not None


def test_an_even_grid_has_no_middle() -> None:
    with pytest.raises(ValueError, match=r"zero_centred needs an odd num_control_points.*got 8"):
        KANLayer(3, 3, num_control_points=8, zero_centred=True)
    with pytest.raises(ValueError, match=r"kan_zero_centred needs an odd num_control_points.*got 8"):
        GPTConfig(vocab_size=5, num_control_points=8, kan_zero_centred=True)


@pytest.mark.needs("torch.compile")
def test_compiles_whole() -> None:
    torch.compiler.reset()
    layer = random_layer(6, 5, 5, zero_centred=True)
    x = torch.randn(9, 6)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_parameters_are_counted_as_stored() -> None:
    config = {"vocab_size": 11, "n_embd": 32, "kan_zero_centred": True}
    model = GPT(GPTConfig(**config, n_layer=2))
    assert model.num_ffn_parameters() == 2 * (32 * 4 * 32 + 32)


def test_saved_and_loaded_it_is_the_same() -> None:
    layer, other = (random_layer(4, 3, 5, zero_centred=True) for _ in range(2))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(8, 4)
    assert torch.equal(layer(x), other(x)) and "zero_centred=True" in repr(layer)
