"""Formulas for splines: a known function is found again, and R² is the share of the variance that it explains."""

import numpy as np
import pytest

from splines.formulas import AS_GOOD, LIBRARY, best_fit, fit, sampled
from splines.snapshot import HISTOGRAM_BINS
from splines.views import SplineView


def view_of(function, points: int = 65, width: float = 4.0, histogram: np.ndarray | None = None) -> SplineView:
    knots = np.linspace(-width / 2, width / 2, points)
    shares = np.zeros(HISTOGRAM_BINS) if histogram is None else histogram
    return SplineView(0, 0, 0, function(knots).astype(np.float32), width, shares, 0.0)


@pytest.mark.parametrize("family", LIBRARY, ids=lambda family: family.name)
def test_a_function_of_the_library_is_found_again(family) -> None:
    a, b, c, d = 0.4, 1.7, 0.6, -0.2
    view = view_of(lambda x: a * family.function(b * x + c) + d, points=257)
    found = best_fit(view)
    x, y, _ = sampled(view)
    assert found.r2 > 0.9995 - AS_GOOD, "a simpler one is taken if it is about as good"
    np.testing.assert_allclose(found(x), y, atol=0.1 * np.ptp(y))
    own = fit(family, *sampled(view))
    assert own.r2 > 0.9995, "its own family fits at least as well as a simpler one"


def test_r2_is_the_share_of_variation_under_the_activations() -> None:
    histogram = np.exp(-(np.linspace(-3, 3, HISTOGRAM_BINS) ** 2))
    view = view_of(lambda x: np.sin(4 * x) + 0.3 * x, points=9, histogram=histogram / histogram.sum())
    found = best_fit(view)
    x, y, weights = sampled(view)
    mean = weights @ y
    assert found.r2 == pytest.approx(1 - weights @ (y - found(x)) ** 2 / (weights @ (y - mean) ** 2), abs=1e-9)
    assert 0.3 < found.r2 < 1


def test_a_straight_line_is_called_one_and_a_constant_too() -> None:
    assert str(best_fit(view_of(lambda x: 0.5 * x - 1))) == "0.5 x − 1"
    assert str(best_fit(view_of(lambda x: 0 * x + 2))).endswith("+ 2")


def test_what_does_not_occur_does_not_count() -> None:
    histogram = np.zeros(HISTOGRAM_BINS)
    histogram[HISTOGRAM_BINS // 2 + 1 :] = 1  # only positive activations
    found = best_fit(view_of(np.abs, histogram=histogram / histogram.sum()))
    assert found.family.name == "{}" and found.r2 > 0.999
