"""The numbers that are shown of a layer (importance, curvature, histograms) are those of its functions."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kan_layer import KANLayer
from pictures import sheets
from splines import views
from splines.choice import ALL, chosen_splines
from tests.layers import random_layer


def slow_importance(layer: KANLayer, activations: torch.Tensor | None) -> np.ndarray:
    """Importance by its definition, token by token, in float64."""
    values = layer.weight.detach().double().numpy()
    knots = np.linspace(-layer.spline_width / 2, layer.spline_width / 2, layer.num_control_points)
    step = knots[1] - knots[0]
    result = np.zeros((layer.in_features, layer.out_features))
    for i in range(layer.in_features):
        use = np.full(len(knots), 1 / len(knots))
        if activations is not None:
            inside = np.clip(activations[:, i].double().numpy(), knots[0], knots[-1])
            use = np.maximum(0, 1 - np.abs(inside[:, None] - knots) / step).mean(0)
        bends = values[i, :-2] - 2 * values[i, 1:-1] + values[i, 2:]
        result[i] = np.sqrt((use[1:-1, None] * bends**2).sum(0))
    return result


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(2, 9)),
    width=st.floats(0.1, 20),
    tokens=st.integers(0, 30),
    spread=st.floats(0, 10),
    seed=st.integers(0, 1000),
)
def test_importance_is_that_of_the_definition(
    shape: tuple[int, int, int], width: float, tokens: int, spread: float, seed: int
) -> None:
    layer = random_layer(*shape, width, seed=seed)
    activations = torch.randn(tokens, shape[0], generator=torch.Generator().manual_seed(seed)) * spread
    snapshot = layer.snapshot(activations)
    expected = slow_importance(layer, activations if tokens else None)
    np.testing.assert_allclose(views.edge_importance(snapshot), expected, rtol=1e-3, atol=2e-3)
    np.testing.assert_allclose(snapshot.use.sum(1), 1, rtol=1e-5)
    assert (snapshot.use >= 0).all()


def test_straight_lines_have_no_importance_and_no_curved_variation() -> None:
    layer = KANLayer(5, 4, num_control_points=9)
    assert views.edge_importance(layer.snapshot(torch.randn(100, 5))).max() < 1e-6
    view = views.layer_view(layer.snapshot(torch.randn(100, 5)), 3)
    assert view.curved < 1e-9
    assert view.curved_shares[0] == 1


def test_a_kink_amid_symmetric_activations_is_all_curved_variation() -> None:
    layer = KANLayer(1, 1, num_control_points=5)
    with torch.no_grad():
        layer.weight[0, :, 0] = layer.knots().abs()
    view = views.layer_view(layer.snapshot(torch.linspace(-2, 2, 101)[:, None]), 1)
    assert view.curved == pytest.approx(1)
    assert view.curved_shares[-1] == 1


def test_the_view_and_its_continuation_are_the_layers_function() -> None:
    layer = random_layer(3, 2, 6, width=3.0)
    for view in views.most_curved(layer.snapshot(), 6):
        alone = KANLayer(3, 2, "zero", 6, 3.0)
        with torch.no_grad():
            alone.weight[view.input, :, view.output] = layer.weight[view.input, :, view.output]
        lines = sheets.extrapolations(view, x_end=2.25, limit=100)
        xs = np.concatenate([np.random.default_rng(0).uniform(-1.5, 1.5, 50), *(x for x, _ in lines)])
        ys = np.concatenate([np.interp(xs[:50], view.grid.knots(), view.control_points), *(y for _, y in lines)])
        x = torch.zeros(len(xs), 3)
        x[:, view.input] = torch.from_numpy(xs)
        np.testing.assert_allclose(alone(x)[:, view.output].detach(), ys, atol=1e-5)


def test_extrapolations_end_at_the_panel() -> None:
    view = views.most_curved(random_layer(1, 1, 2, seed=3).snapshot())[0]
    limit = float(np.abs(view.control_points).max())
    for x, y in sheets.extrapolations(view, 3.0, limit):
        assert np.abs(x).max() <= 3.0 + 1e-6
        assert np.abs(y).max() <= limit * (1 + 1e-6)


def test_the_most_curved_are_varied_until_nothing_else_is_left() -> None:
    importance = np.zeros((6, 6))
    importance[0] = 10 + np.arange(6)  # one feature dominates
    importance[1:, 1:] = 1
    top = views.varied_top(importance, 6)
    assert top[:2] == [(0, 5), (0, 4)]
    assert all(sum(edge[axis] == k for edge in top) <= 2 for axis in (0, 1) for k in range(6))
    everything = views.varied_top(importance, 100)
    assert len(everything) == len(set(everything)) == 36
    assert len(views.varied_top(np.ones((1, 5)), 4)) == 4


def test_the_histogram_accounts_for_all_activations() -> None:
    layer = random_layer(2, 2, 5)
    snapshot = layer.snapshot(torch.randn(2000, 2) * 3)
    np.testing.assert_allclose(snapshot.histogram.sum(1) + snapshot.below + snapshot.above, 1, atol=1e-5)
    assert (snapshot.below > 0).all() and (snapshot.above > 0).all()
    np.testing.assert_allclose(snapshot.cells.sum(1) + snapshot.outside, 1, atol=1e-5)


def test_a_wide_heat_map_keeps_its_maximum() -> None:
    values = np.random.default_rng(0).random((300, 50))
    pooled = views.max_pool(values, 128)
    assert pooled.shape == (128, 50)
    assert pooled.max() == np.float32(values.max())
    np.testing.assert_array_equal(pooled.max(0), values.max(0).astype(np.float32))


def test_a_wide_layer_is_looked_at_without_much_memory() -> None:
    layer = random_layer(384, 384, 8)
    activations = torch.randn(4096, 384)
    tracemalloc.start()
    view = views.layer_view(layer.snapshot(activations), 12)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert view.heat_map.shape == (128, 128)
    assert len(view.splines) == 12
    assert peak < 200e6  # tokens x I x O would be 2.4e9


@given(
    inputs=st.lists(st.integers(0, 5), min_size=1, unique=True),
    outputs=st.none() | st.lists(st.integers(0, 7), min_size=1, unique=True),
    count=st.integers(1, 60),
)
def test_splines_are_chosen_among_the_named_features(inputs: list[int], outputs: list[int] | None, count: int) -> None:
    snapshot = random_layer(6, 8, 5).snapshot()
    named = chosen_splines(snapshot, inputs, outputs)
    assert named == [(i, o) for i in inputs for o in outputs or range(8)]
    ranked = chosen_splines(snapshot, inputs, outputs, ALL)
    assert sorted(ranked) == sorted(named)
    importance = views.edge_importance(snapshot)
    assert importance[ranked[0]] == max(importance[edge] for edge in named)
    fewer = chosen_splines(snapshot, inputs, outputs, count)
    assert len(fewer) == min(count, len(named)) and set(fewer) <= set(named)
