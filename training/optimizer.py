"""The optimizer: AdamW, with weight decay on what multiplies (matrices, splines) and none on norms and biases."""

from typing import Any

import torch
from torch import nn

from training.config import Config


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    # Fused is faster than the default loop on CPUs too.
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take over moments and step counts from a checkpoint, but keep the options (betas, weight decay) of now."""
    options = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, now in zip(optimizer.param_groups, options, strict=True):
        group.update(now)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
