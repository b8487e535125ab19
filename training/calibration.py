"""Do the activations lie on the grids of the splines? Fitting the grids before training, and a warning later."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from regrid import fitted_width, share_outside
from spline_views import layer_inputs

if TYPE_CHECKING:
    from model import GPT

    Batches = Iterable[Tensor | Sequence[Tensor]]

MANY = 0.2  # of the activations: with a tenth outside, training goes as well as with none (docs/log.md)
SUGGESTED = 0.05


def fit_grids(model: GPT, batches: Batches, outside: float) -> list[float]:
    """Fit each spline layer's grid to leave a share `outside` of its activations beyond it; returns the widths.

    One pass for all layers: where splines are straight lines, as before the first step, no function changes, and so
    none of the activations either. Raises ValueError where activations are all zero, or not finite.
    """
    layers = model.spline_layers()
    for layer, inputs in zip(layers, layer_inputs(model, batches), strict=True):
        layer.fit_grid(inputs, outside)
    return [layer.spline_width for layer in layers]


def warning_of_activations_outside(model: GPT, batches: Batches) -> str | None:
    """A sentence if many activations lie outside the grid of some layer, else None."""
    layers = model.spline_layers()
    inputs = layer_inputs(model, batches)
    shares = [share_outside(x, layer.spline_width) for layer, x in zip(layers, inputs, strict=True)]
    too_many = [index for index, share in enumerate(shares) if share > MANY]
    if not too_many:
        return None
    worst = max(too_many, key=lambda index: shares[index])
    width = max(fitted_width(inputs[index], SUGGESTED) for index in too_many)
    return (
        f"{len(too_many)} of {len(layers)} spline layers have more than {MANY:.0%} of their activations outside the "
        f"grid, where splines are straight (number {worst}: {shares[worst]:.0%} beyond "
        f"±{layers[worst].spline_width / 2:.3g}); --spline_width {width:.2g} or --kan_fit_grid {SUGGESTED} mends it"
    )
