"""Numbers that sum up a spline layer, and advice if they show a bad grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from splines.grid import Array
from splines.snapshot import Snapshot
from splines.views import Variation, edge_variation

LINEAR_SHARE = 0.05  # a spline is effectively linear if a straight line leaves at most this share of its variation
DEAD_SHARE = 0.05  # a spline is dead if its standard deviation is below this part of a typical one into the same output
USED_CELL = 0.01  # a cell is used if this share of a feature's activations lies in it
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
MAX_OUTSIDE = 0.15  # share of activations outside the grid above which advice is given
MIN_USED = 0.5  # share of used cells below which advice is given
MAX_LINEAR = 0.95  # share of effectively linear splines above which advice is given


@dataclass(frozen=True)
class LayerStatistics:
    """Numbers that describe the splines of one layer. Those about activations are None if activations are not known."""

    layer: int
    name: str
    num_control_points: int
    spline_width: float
    linear: float
    """Share of the splines that are effectively linear under use (`LINEAR_SHARE`) but not dead."""
    dead: float
    """Share of the splines that hardly vary under use (`DEAD_SHARE`)."""
    curved: float
    """Share of all variation that no straight line explains."""
    curved_quantiles: tuple[float, ...]
    """The same share for each spline: its QUANTILES over the splines."""
    effective_rank: float
    """exp of the entropy of the singular values of the (I·G, O) control points about each spline's mean."""
    max_rank: int
    outside: float | None
    """Share of the activations outside the grid."""
    used_cells: float | None
    """Number of the G - 1 cells that a feature uses (`USED_CELL`), mean over features."""
    reach: float | None
    """Absolute value that 99 % of the activations do not exceed."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = asdict(self)
        return {**values, "curved_quantiles": list(self.curved_quantiles)}


def layer_statistics(snapshot: Snapshot) -> LayerStatistics:
    variation = edge_variation(snapshot)
    share, dead = variation.curved_share, dead_splines(variation)
    known = snapshot.has_activations
    inputs, knots, outputs = snapshot.control_points.shape
    return LayerStatistics(
        layer=snapshot.layer,
        name=snapshot.name,
        num_control_points=knots,
        spline_width=snapshot.spline_width,
        linear=float(np.mean((share <= LINEAR_SHARE) & ~dead)),
        dead=float(np.mean(dead)),
        curved=float(variation.curved.sum() / (variation.total.sum() or 1.0)),
        curved_quantiles=tuple(float(value) for value in np.quantile(share, QUANTILES)),
        effective_rank=effective_rank(snapshot.control_points),
        max_rank=min(inputs * (knots - 1), outputs),
        outside=float(snapshot.outside.mean()) if known else None,
        used_cells=float((snapshot.cells >= USED_CELL).sum(1).mean()) if known else None,
        reach=snapshot.reach if known else None,
    )


def dead_splines(variation: Variation) -> Array:
    """Whether each spline hardly varies, (I, O), compared to the root mean square of those into the same output."""
    typical = variation.total.mean(0)
    dead: Array = (variation.total <= DEAD_SHARE**2 * typical) | (variation.total == 0)
    return dead


def effective_rank(control_points: Array) -> float:
    """exp(H(σ / Σσ)) of the singular values σ of (I·G, O) without constants (Roy & Vetterli 2007); 0 if it is flat."""
    values = control_points - control_points.mean(1, keepdims=True)
    matrix = values.reshape(-1, values.shape[2]).astype(np.float64)  # (I, G, O) → (I·G, O)
    squares = np.linalg.eigvalsh(matrix.T @ matrix)
    sizes = np.sqrt(np.maximum(squares, 0))
    if not sizes.sum() > 0:
        return 0.0
    shares = sizes / sizes.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def flat(statistics: Sequence[LayerStatistics]) -> dict[str, float]:
    """The numbers by names like `splines/layer_0/linear`, for trackers that plot each name."""
    return {
        f"splines/layer_{each.layer}/{name}": value
        for each in statistics
        for name, value in each.as_dict().items()
        if name not in ("layer", "name", "curved_quantiles") and value is not None
    }


def grid_advice(statistics: Sequence[LayerStatistics]) -> list[str]:
    """One sentence for each kind of bad grid: the layer where it is worst, and what to try."""
    found = []
    known = [each for each in statistics if each.outside is not None]
    worst = max(known, key=lambda each: each.outside or 0, default=None)
    if worst and worst.outside is not None and worst.outside > MAX_OUTSIDE and worst.reach is not None:
        found.append(
            f"{100 * worst.outside:.0f} % of the activations of {worst.name} lie outside the grid: "
            f"consider --spline-width {wide_enough(worst.reach):g}"
        )
    emptiest = min(known, key=lambda each: (each.used_cells or 0) / (each.num_control_points - 1), default=None)
    if emptiest and emptiest.used_cells is not None:
        cells = emptiest.num_control_points - 1
        if emptiest.used_cells < MIN_USED * cells and cells > 1 and emptiest.reach is not None:
            narrower = wide_enough(emptiest.reach)
            advice = (
                f"--spline-width {narrower:g}" if narrower < emptiest.spline_width else "a lower --num-control-points"
            )
            found.append(f"{emptiest.name} uses {emptiest.used_cells:.1f} of its {cells} cells: consider {advice}")
    return found


def curve_advice(statistics: Sequence[LayerStatistics]) -> list[str]:
    """A sentence if a layer has hardly any curves; for trained models, since splines begin as straight lines."""
    straight = max(statistics, key=lambda each: each.linear, default=None)
    if straight is None or straight.linear <= MAX_LINEAR:
        return []
    return [
        f"{100 * straight.linear:.0f} % of the splines of {straight.name} are effectively linear: "
        f"consider a lower --num-control-points, or simplify.py"
    ]


def wide_enough(reach: float) -> float:
    """The smallest whole number that is wide enough for a grid to hold activations up to ±reach."""
    return float(max(1, math.ceil(2 * reach - 1e-6)))
