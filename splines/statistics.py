"""The numbers that sum up a spline layer, and what to do when they show a bad grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from splines.grid import Array
from splines.snapshot import Snapshot
from splines.views import Variation, edge_variation

LINEAR_SHARE = 0.05  # a spline is effectively linear if a straight line explains all but this of its variation …
DEAD_SHARE = 0.05  # … and dead if its standard deviation is below this part of a typical spline into the same output
USED_CELL = 0.01  # a cell is used if this share of a feature's activations lies in it
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
MOST_OUTSIDE = 0.15  # warn above
LEAST_USED = 0.5  # warn below, of the cells
ALL_LINEAR = 0.95  # warn above, of the living splines


@dataclass(frozen=True)
class LayerStatistics:
    """What the splines of one layer are like. Where activations are not known, `outside` and `used_cells` are None."""

    layer: int
    name: str
    num_control_points: int
    spline_width: float
    linear: float
    """Share of the splines that are effectively linear under use (`LINEAR_SHARE`) and not dead."""
    dead: float
    """Share of the splines that hardly vary under use (`DEAD_SHARE`)."""
    curved: float
    """Share of all variation that no straight line explains."""
    curved_quantiles: tuple[float, ...]
    """The same spline by spline: at the QUANTILES."""
    effective_rank: float
    """exp of the entropy of the singular values of the (I·G, O) control points about each spline's mean."""
    max_rank: int
    outside: float | None
    """Share of the activations outside the grid."""
    used_cells: float | None
    """Cells that a feature uses (`USED_CELL`), mean over features; of G - 1."""
    reach: float | None
    """Absolute value that 99 % of the activations stay within."""

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
    """Which splines hardly vary, (I, O): beside the root mean square over the splines into the same output."""
    typical = variation.total.mean(0)
    return (variation.total <= DEAD_SHARE**2 * typical) | (variation.total == 0)


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
    """One number a name, `splines/layer_0/linear` …, for trackers that plot by name."""
    return {
        f"splines/layer_{each.layer}/{name}": value
        for each in statistics
        for name, value in each.as_dict().items()
        if name not in ("layer", "name", "curved_quantiles") and value is not None
    }


def grid_advice(statistics: Sequence[LayerStatistics]) -> list[str]:
    """One sentence for each kind of bad grid, about the layer that has it worst, with what to try."""
    found = []
    known = [each for each in statistics if each.outside is not None]
    worst = max(known, key=lambda each: each.outside or 0, default=None)
    if worst and worst.outside is not None and worst.outside > MOST_OUTSIDE and worst.reach is not None:
        found.append(
            f"{100 * worst.outside:.0f} % of the activations of {worst.name} lie outside the grid: "
            f"consider --spline-width {wide_enough(worst.reach):g}"
        )
    emptiest = min(known, key=lambda each: (each.used_cells or 0) / (each.num_control_points - 1), default=None)
    if emptiest and emptiest.used_cells is not None:
        cells = emptiest.num_control_points - 1
        if emptiest.used_cells < LEAST_USED * cells and cells > 1 and emptiest.reach is not None:
            narrower = wide_enough(emptiest.reach)
            mend = (
                f"--spline-width {narrower:g}" if narrower < emptiest.spline_width else "a lower --num-control-points"
            )
            found.append(f"{emptiest.name} uses {emptiest.used_cells:.1f} of its {cells} cells: consider {mend}")
    return found


def curve_advice(statistics: Sequence[LayerStatistics]) -> list[str]:
    """A sentence if a layer has hardly any curves, for trained models: splines begin as straight lines."""
    straight = max(statistics, key=lambda each: each.linear, default=None)
    if straight is None or straight.linear <= ALL_LINEAR:
        return []
    return [
        f"{100 * straight.linear:.0f} % of the splines of {straight.name} are effectively linear: "
        f"consider a lower --num-control-points, or simplify.py"
    ]


def wide_enough(reach: float) -> float:
    """The least whole number that, as the grid's width, holds activations up to ±reach."""
    return float(max(1, math.ceil(2 * reach - 1e-6)))
