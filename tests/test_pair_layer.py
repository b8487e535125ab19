"""PairLayer and the block of pair_splines: bases, planes, generation with a cache, a run from start to picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

import plot
import sample
from model import GPT, GPTConfig
from pair_layer import PairLayer
from pictures.maps import interaction, most_interacting, triangles
from splines.pair_basis import VARIANTS, mode_scales
from splines.parametrisation import balanced_cosines, cosine_modes
from tests.runs import assert_one_sentence, call, make_dataset, options, train_losses, train_until

PAIRS = {"ffn": "pair_splines", "kan_variant": "balanced", "num_control_points": 4, "attention_gate": False}


@settings(max_examples=30, deadline=None)
@given(points=st.integers(2, 9), inputs=st.integers(1, 5), outputs=st.integers(1, 5), variant=st.sampled_from(VARIANTS))
def test_control_points_can_be_set_and_read(points: int, inputs: int, outputs: int, variant: str) -> None:
    layer = PairLayer(inputs, outputs, num_control_points=points, variant=variant).double()
    values = torch.randn(inputs, points, points, outputs, dtype=torch.float64)
    layer.set_control_points(values)
    assert layer.weight.shape == (inputs, points**2, outputs)
    torch.testing.assert_close(layer.control_points(), values, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("points", [2, 3, 5, 8])
def test_balanced_control_points_are_a_sum_of_products_of_modes(points: int, dtype: torch.dtype) -> None:
    layer = PairLayer(2, 3, num_control_points=points).to(dtype)
    coefficients = torch.randn_like(layer.weight)
    layer.weight.data.copy_(coefficients)
    modes, scales = cosine_modes(points)[0], mode_scales(points)
    by_mode = coefficients.double().numpy().reshape(2, points, points, 3)
    expected = np.einsum("xa,zb,ab,iabo->ixzo", modes, modes, scales, by_mode)
    eps = 1e-12 if dtype is torch.float64 else 1e-4
    np.testing.assert_allclose(layer.control_points().detach().double().numpy(), expected, atol=eps)
    np.testing.assert_allclose(modes * scales[:, 0], balanced_cosines(points), atol=1e-12)


def test_weights_in_another_dtype_than_the_tables_are_taken() -> None:
    layer, other = PairLayer(2, 3).double(), PairLayer(2, 3)
    layer.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(layer.control_points().float(), other.control_points(), rtol=1e-5, atol=1e-5)


def test_a_gradient_has_a_forward_derivative() -> None:
    layer, direction = PairLayer(2, 3), torch.randn(4, 3)
    y = layer(torch.randn(4, 2), torch.randn(4, 2))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(4, 3), direction)
        (gradient,) = torch.autograd.grad(y, layer.weight, dual, retain_graph=True)
        tangent = forward_ad.unpack_dual(gradient).tangent
    (truth,) = torch.autograd.grad(y, layer.weight, direction)  # a gradient is linear in that of the output
    torch.testing.assert_close(tangent, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_at_first_functions_are_lines_in_x(variant: str) -> None:
    torch.manual_seed(0)
    layer = PairLayer(6, 5, num_control_points=4, variant=variant)
    x, z = torch.rand(9, 6) * 4 - 2, torch.rand(9, 6) * 4 - 2
    slopes = torch.linalg.lstsq(x.double(), layer(x, z).detach().double()).solution
    torch.testing.assert_close((x.double() @ slopes).float(), layer(x, z), rtol=0, atol=1e-5)
    torch.testing.assert_close(slopes.norm(dim=0), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-5)
    layer.init = "zero"
    layer.reset_parameters()
    assert not layer(x, z).any()


def test_shapes_and_dtypes_are_those_of_nn_linear() -> None:
    layer = PairLayer(4, 3)
    for shape in ((4,), (2, 4), (2, 5, 4), (0, 4)):
        x = torch.randn(shape)
        assert layer(x, x).shape == (*shape[:-1], 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x, x).dtype is torch.bfloat16
    with pytest.raises(ValueError, match="in_features=4"):
        layer(torch.randn(2, 4), torch.randn(2, 3))
    for wrong in ({"variant": "DCT"}, {"init": "identity"}, {"num_control_points": 1}, {"spline_width": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PairLayer(4, 3, **wrong)


def random_model(**changes: object) -> GPT:
    torch.manual_seed(1)
    architecture = {"n_layer": 2, "n_head": 2, "n_embd": 12, "block_size": 16, "vocab_size": 7, "token_shift": True}
    model = GPT(GPTConfig(**{**architecture, **PAIRS, **changes})).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("token_shift", [False, True])
def test_a_cache_gives_the_logits_of_the_whole_text(token_shift: bool) -> None:
    model = random_model(token_shift=token_shift)
    tokens = torch.randint(0, 7, (3, 11))
    whole, _ = model(tokens)
    cache = model.new_cache(3)
    parts = [model(part, cache=cache)[0] for part in tokens.split((4, 1, 1, 5), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-5)
    assert whole.std() > 0.1


def test_a_token_sees_itself_and_the_one_before_in_the_feed_forward_layer() -> None:
    ffn, x = random_model().blocks[0].ffn, torch.randn(1, 4, 12)
    previous = torch.cat((torch.zeros(1, 1, 12), x[:, :-1]), dim=1)
    alone = torch.stack([ffn(x[:, t], x[:, t], previous[:, t]) for t in range(4)], dim=1)
    torch.testing.assert_close(ffn(x, x, previous), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("gate", [False, True])
def test_the_usual_width_makes_the_multiply_adds_of_the_mlp(gate: bool) -> None:
    architecture = {"n_layer": 1, "n_head": 2, "n_embd": 128, "vocab_size": 7}
    twin = GPT(GPTConfig(**architecture, ffn="mlp"))
    model = GPT(GPTConfig(**{**architecture, **PAIRS, "attention_gate": gate}))
    assert model.flops_per_token() == pytest.approx(twin.flops_per_token(), rel=0.01)


def test_a_variant_that_pairs_do_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="kan_variant of pair_splines must be one of B-spline, balanced; got 'DCT'"):
        GPTConfig(ffn="pair_splines", kan_variant="DCT")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_resumes_and_is_sampled_and_drawn(optimizer: str, tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "words")
    changes = {**PAIRS, "optimizer": optimizer, "log_interval": 1, "eval_interval": 4, "decay_iters": 6}
    train_until(options(dataset, tmp_path / "whole", max_iters=8, **changes))
    train_until(options(dataset, tmp_path / "parts", max_iters=4, **changes))
    train_until(options(dataset, tmp_path / "parts", max_iters=8, **changes, resume=True))
    assert train_losses(tmp_path / "parts") == train_losses(tmp_path / "whole")
    assert call(sample.main, tmp_path / "whole", "--max_new_tokens=5", "--prompt=a").code == 0
    drawn = call(plot.main, tmp_path / "whole", "--maps", "True")
    assert drawn.code == 0 and all(Path(line).stat().st_size > 1000 for line in drawn.out.splitlines()), drawn
    assert_one_sentence(call(plot.main, tmp_path / "whole"), "--maps True")
    assert_one_sentence(call(plot.main, tmp_path / "whole", "--maps=True", "--layer=9"), "--layer must be from 0 to")


def test_maps_of_other_models_are_refused(tmp_path: Path) -> None:
    train_until(options(make_dataset(tmp_path / "words"), tmp_path / "run", max_iters=1))
    assert_one_sentence(call(plot.main, tmp_path / "run", "--maps", "True"), "not pair_splines")


def test_a_sum_has_no_interaction_and_the_strongest_come_first() -> None:
    across, up = np.random.default_rng(0).normal(size=(2, 5))
    values = np.zeros((2, 3, 5, 5))
    values[:] = across[:, None] + up
    np.testing.assert_allclose(interaction(values), 0, atol=1e-12)
    values[1, 2] += np.outer(across, up)
    values[0, 1] += 2 * np.outer(across, up)
    assert [(view.feature, view.output) for view in most_interacting(values, 2)] == [(0, 1), (1, 2)]


@pytest.mark.parametrize("points", [2, 3, 6])
def test_triangles_cover_the_grid_once(points: int) -> None:
    corners = np.stack(np.unravel_index(triangles(points), (points, points)), axis=-1)  # (triangles, 3, 2)
    sides = corners[:, 1:] - corners[:, :1]
    areas = np.abs(sides[:, 0, 0] * sides[:, 1, 1] - sides[:, 0, 1] * sides[:, 1, 0]) / 2
    assert (areas == 0.5).all() and areas.sum() == (points - 1) ** 2
