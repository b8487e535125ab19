"""Formulas for splines: the closest function of a small library, scaled and shifted, with its R²."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from splines.grid import Array
from splines.snapshot import VISIBLE
from splines.views import SplineView

POINTS = 161
SCALES = 13  # tried values of |b|, on a logarithmic grid; negative b too where they give another function
SHIFTS = 25  # tried values of c
ZOOMS = 6  # each makes the grids around the best values three times finer
AS_GOOD = 0.005  # a simpler function is preferred if its R² is at most this much lower


@dataclass(frozen=True)
class Family:
    """y = a f(b x + c) + d."""

    name: str
    """The formula, with {} for b x + c."""
    function: Callable[[Array], Array]
    is_odd_or_even: bool
    """f(-u) = ±f(u), so that negative b give nothing new."""
    shifts: bool = True
    """Whether c makes another function: it does not for a straight line."""
    plain_scale: bool = False
    """|b| = 1 suffices: a does the same."""


LIBRARY = (  # the simplest first
    Family("{}", lambda u: u, True, shifts=False, plain_scale=True),
    Family("|{}|", np.abs, True, plain_scale=True),
    Family("relu({})", lambda u: np.maximum(u, 0), False, plain_scale=True),
    Family("({})²", np.square, True, plain_scale=True),
    Family("({})³", lambda u: u**3, True, plain_scale=True),
    Family("sin({})", np.sin, True),
    Family("tanh({})", np.tanh, True),
    Family("exp({})", lambda u: np.exp(np.clip(u, -40, 40)), False),
    Family("exp(−({})²)", lambda u: np.exp(-np.minimum(u * u, 80)), True),
    Family("silu({})", lambda u: u / (1 + np.exp(-np.clip(u, -40, 40))), False),
)


@dataclass(frozen=True)
class Fit:
    """A formula and how much of the spline's variation it explains."""

    family: Family
    a: float
    b: float
    c: float
    d: float
    r2: float

    def __call__(self, x: Array) -> Array:
        return self.a * self.family.function(self.b * np.asarray(x) + self.c) + self.d

    def __str__(self) -> str:
        inner = f"{_times(self.b)}x{_plus(self.c)}" if self.family.shifts else f"{_times(self.b)}x"
        body = self.family.name.format(inner)
        return f"{_times(self.a)}{body}{_plus(self.d)}".replace("-", "−")


def best_fit(view: SplineView) -> Fit:
    """The simplest function of the library that fits about as well as the best (`AS_GOOD`), weighted by activations."""
    fits = [fit(family, *sampled(view)) for family in LIBRARY]
    best = max(each.r2 for each in fits)
    return next(each for each in fits if each.r2 >= best - AS_GOOD)


def sampled(view: SplineView) -> tuple[Array, Array, Array]:
    """Points x, the spline's values there, and weights: the shares of the activations, or even ones if not known."""
    known = view.histogram.any()
    end = (VISIBLE if known else 0.5) * view.spline_width
    x = np.linspace(-end, end, POINTS)
    y = view.grid.values(view.control_points, x)
    if not known:
        return x, y, np.full(POINTS, 1 / POINTS)
    bins = np.minimum((np.arange(POINTS) * len(view.histogram)) // POINTS, len(view.histogram) - 1)
    weights = view.histogram[bins].astype(np.float64)
    return x, y, weights / weights.sum()


def fit(family: Family, x: Array, y: Array, weights: Array) -> Fit:
    """The least-squares fit: a and d exactly, b and c by a grid search that is refined around the best."""
    width = float(np.ptp(x))
    mean = float(weights @ y)
    variance = float(weights @ (y - mean) ** 2)
    if variance <= 1e-30:
        return Fit(family, 0.0, 1.0, 0.0, mean, 1.0)
    signs = np.array([1.0]) if family.is_odd_or_even else np.array([1.0, -1.0])
    center = (0.0, 0.0)
    reach = (0.0 if family.plain_scale else np.log(8.0), width / 2 if family.shifts else 0.0)
    best: tuple[float, Fit] | None = None
    for _ in range(1 + ZOOMS):
        scales = np.unique(np.linspace(-1, 1, SCALES) * reach[0] + center[0])
        shifts = np.unique(np.linspace(-1, 1, SHIFTS) * reach[1] + center[1])
        s, at, sign = (part.ravel() for part in np.meshgrid(scales, shifts, signs, indexing="ij"))
        b = sign * np.exp(s)
        c = -b * at  # `at` is the x where the argument is 0
        f = family.function(b[:, None] * x + c[:, None])  # (tries, POINTS)
        f_mean = f @ weights
        around = f - f_mean[:, None]
        spread = around**2 @ weights
        a = np.where(spread > 1e-30, around @ (weights * (y - mean)) / np.maximum(spread, 1e-30), 0.0)
        r2 = a**2 * spread / variance
        k = int(r2.argmax())
        if best is None or r2[k] > best[0]:
            found = Fit(family, float(a[k]), float(b[k]), float(c[k]), mean - float(a[k] * f_mean[k]), float(r2[k]))
            best, center, signs = (float(r2[k]), found), (float(s[k]), float(at[k])), np.array([sign[k]])
        reach = (reach[0] / 3, reach[1] / 3)
    assert best is not None
    return best[1]


def _times(value: float) -> str:
    text = f"{value:.3g}"
    return {"1": "", "-1": "-"}.get(text, f"{text} ")


def _plus(value: float) -> str:
    text = f"{abs(value):.3g}"
    return "" if text == "0" else f" {'+' if value > 0 else '-'} {text}"
