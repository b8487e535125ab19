"""The statistics of layers for which they are known, and advice that removes what it warns about."""

import json

import numpy as np
import pytest
import torch

from kan_layer import KANLayer
from splines.statistics import (
    MAX_OUTSIDE,
    LayerStatistics,
    curve_advice,
    effective_rank,
    flat,
    grid_advice,
    layer_statistics,
)
from tests.layers import random_layer
from tests.report_runs import look_at


def test_straight_lines_are_linear_and_flat_ones_dead() -> None:
    layer = KANLayer(6, 8, "random_normal", 7)
    found = layer_statistics(look_at(layer))
    assert found.linear == 1 - found.dead and found.curved < 1e-9
    with torch.no_grad():
        layer.weight[:3] = 0.7  # constants: half of the splines into each output
    found = layer_statistics(look_at(layer))
    assert found.dead == pytest.approx(0.5, abs=0.05) and found.linear == pytest.approx(1 - found.dead)
    nothing = layer_statistics(look_at(KANLayer(6, 8, "zero", 7)))
    assert (nothing.dead, nothing.linear, nothing.effective_rank) == (1, 0, 0)


def test_curved_splines_are_not_linear() -> None:
    layer = KANLayer(4, 4, num_control_points=9)
    with torch.no_grad():
        layer.weight[:] = layer.knots().abs()[None, :, None]
    found = layer_statistics(layer.snapshot(torch.linspace(-2, 2, 401)[:, None].expand(-1, 4)))
    assert found.linear == found.dead == 0
    assert found.curved == pytest.approx(1) and found.curved_quantiles == pytest.approx([1] * 5)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_effective_rank_of_equal_directions_is_their_number(rank: int) -> None:
    generator = np.random.default_rng(0)
    left, _ = np.linalg.qr(generator.normal(size=(60, rank)))
    right, _ = np.linalg.qr(generator.normal(size=(8, rank)))
    slopes = (left @ right.T)[:, None, :] * np.array([-1, 0, 1])[None, :, None]  # lines, (I, G, O)
    assert effective_rank(slopes + generator.normal(size=(60, 1, 8))) == pytest.approx(rank)


def test_shares_of_activations_are_counted() -> None:
    x = torch.randn(3000, 5) * 2
    found = layer_statistics(random_layer(5, 3, 6).snapshot(x, number=2))
    assert found.layer == 2
    assert found.outside == pytest.approx(float((x.abs() > 2).float().mean()), abs=1e-6)
    assert found.used_cells == 5
    narrow = layer_statistics(random_layer(5, 3, 6).snapshot(0.45 + 0.7 * torch.rand(3000, 5)))
    assert narrow.used_cells == 1 and narrow.outside == 0
    unknown = layer_statistics(random_layer(5, 3, 6).snapshot())
    assert unknown.outside is unknown.used_cells is unknown.reach is None


def test_a_narrow_grid_is_warned_about_and_the_advice_mends_it() -> None:
    x = torch.randn(4000, 5) * 1.3
    found = [layer_statistics(random_layer(5, 3, 6, width=2.0).snapshot(x, number=3))]
    (sentence,) = grid_advice(found)
    assert sentence == "44 % of the activations of layer 3 lie outside the grid: consider --spline-width 7"
    assert found[0].outside > MAX_OUTSIDE
    mended = layer_statistics(random_layer(5, 3, 6, width=7.0).snapshot(x, number=3))
    assert mended.outside <= 0.01 and not grid_advice([mended])


def test_a_wide_grid_is_warned_about_and_the_advice_mends_it() -> None:
    x = torch.randn(4000, 5) * 0.2
    (sentence,) = grid_advice([layer_statistics(random_layer(5, 3, 9, width=8.0).snapshot(x))])
    assert "uses 2.0 of its 8 cells: consider --spline-width 2" in sentence
    assert not grid_advice([layer_statistics(random_layer(5, 3, 9, width=2.0).snapshot(x))])


def test_advice_names_the_worst_layer_once() -> None:
    layers = [
        layer_statistics(random_layer(5, 3, 6, width=w).snapshot(torch.randn(500, 5), number=k))
        for k, w in enumerate((1.0, 0.5, 1.5))
    ]
    assert len(grid_advice(layers)) == 1 and "layer 1" in grid_advice(layers)[0]
    assert grid_advice([]) == []
    (linear,) = curve_advice([layer_statistics(look_at(KANLayer(5, 5, num_control_points=4)))])
    assert "effectively linear" in linear


def test_statistics_are_plain_values() -> None:
    found = layer_statistics(look_at(random_layer(3, 4, 5)))
    values = json.loads(json.dumps(found.as_dict()))
    assert LayerStatistics(**{**values, "curved_quantiles": tuple(values["curved_quantiles"])}) == found
    assert flat([found])["splines/layer_0/linear"] == found.linear
