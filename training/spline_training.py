"""What training does to the spline layers besides its steps: fit their grids, refine them, smooth them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from corpus.dataset import TokenStream
from training.activations import layer_inputs, picture_batches
from training.config import Config
from training.refinement import points_after, refine_model

if TYPE_CHECKING:
    from model import GPT


class SplineTraining:
    """The options kan_refine, kan_smoothness and kan_fit_grid at work on a model, splines or not."""

    def __init__(self, model: GPT, config: Config) -> None:
        self.model, self.config = model, config
        self.stages = config.stages()

    def begin(self, train_stream: TokenStream) -> None:
        """Before the first step of all: fit each grid to the activations of some of the text.

        One pass does for all layers: while splines are straight lines no function changes, and so no activations do.
        ValueError where activations are all zero, or not finite.
        """
        if self.config.fitted_share_outside:
            inputs, _ = layer_inputs(self.model, picture_batches(train_stream, self.config.block_size))
            for layer, activations in zip(self.model.spline_layers(), inputs, strict=True):
                layer.fit_grid(activations, self.config.fitted_share_outside)

    def refine(self, step: int, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Put more knots into the grids if, after `step` steps, there are to be more; whether there were."""
        points = points_after(self.stages, step)
        refined = refine_model(self.model, points, optimizer)
        if refined and optimizer is not None:
            print(f"step {step}: the splines go on with {points} control points", flush=True)
        return refined

    def penalty(self) -> Tensor | float:
        """What is added to the loss; differentiable."""
        return self.config.kan_smoothness * self._smoothness() if self.config.kan_smoothness else 0.0

    def metrics(self) -> dict[str, float]:
        """What metrics.jsonl has of the splines: their mean smoothness penalty if it is part of the loss."""
        return {"smoothness": self._smoothness().item()} if self.config.kan_smoothness else {}

    def _smoothness(self) -> Tensor:
        penalties = [layer.smoothness_penalty() for layer in self.model.spline_layers()]
        return torch.stack(penalties).mean() if penalties else torch.zeros(())
