"""Training of splines beyond optimizer steps: fitting their grids, refining them, smoothing them."""

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
    """Applies the options kan_refine, kan_smoothness and kan_fit_grid to a model. Without splines it does nothing."""

    def __init__(self, model: GPT, config: Config) -> None:
        self.model, self.config = model, config
        self.stages = config.stages

    def begin(self, train_stream: TokenStream) -> None:
        """Fit each grid to the activations of some of the text, if asked to. Called before the first step of a new run.

        One pass is enough for all layers: splines start as straight lines, which fitting does not change, and so it
        does not change the activations of later layers either. ValueError if activations are all zero or not finite.
        """
        if self.config.fitted_share_outside:
            inputs, _ = layer_inputs(self.model, picture_batches(train_stream, self.config.block_size))
            for layer, activations in zip(self.model.spline_layers(), inputs, strict=True):
                layer.fit_grid(activations, self.config.fitted_share_outside)

    def refine(self, step: int, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Put more knots into the grids if kan_refine asks for it after `step` steps. Returns whether it did."""
        points = points_after(self.stages, step)
        refined = refine_model(self.model, points, optimizer)
        if refined and optimizer is not None:
            print(f"step {step}: the splines go on with {points} control points", flush=True)
        return refined

    def penalty(self) -> Tensor | float:
        """The smoothness penalty that is added to the loss, a differentiable scalar; 0 without kan_smoothness."""
        return self.config.kan_smoothness * self._smoothness() if self.config.kan_smoothness else 0.0

    def metrics(self) -> dict[str, float]:
        """The mean smoothness penalty, for metrics.jsonl, if it is part of the loss."""
        return {"smoothness": self._smoothness().item()} if self.config.kan_smoothness else {}

    def _smoothness(self) -> Tensor:
        penalties = [layer.smoothness_penalty() for layer in self.model.spline_layers()]
        return torch.stack(penalties).mean() if penalties else torch.zeros(())
