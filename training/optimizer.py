"""The optimizer: AdamW, or Muon for the matrices of the blocks; weight decay on what multiplies, none on the rest."""

from typing import Any

import torch
from torch import nn

from training.adamw import AdamW
from training.config import Config
from training.muon import MuonAdamW


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [(name, p) for name, p in named if p.dim() >= 2]
    by_muon = [(name, p) for name, p in matrices if config.optimizer == "muon" and name.startswith("blocks.")]
    chosen = {name for name, _ in by_muon}
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in matrices if name not in chosen], "weight_decay": config.weight_decay},
        {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    if by_muon:
        groups.append(
            {
                "params": [p for _, p in by_muon],
                "muon_pieces": [3 if name.endswith("c_attn.weight") else 1 for name, _ in by_muon],
                "weight_decay": config.muon_weight_decay,
                "rate": config.muon_learning_rate / config.learning_rate,
            }
        )
    groups = [group for group in groups if group["params"]]
    kind = MuonAdamW if by_muon else AdamW
    # Fused is faster than the default loop on CPUs too.
    return kind(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take over moments and step counts from a checkpoint, but keep the options (betas, weight decay) of now."""
    options = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, now in zip(optimizer.param_groups, options, strict=True):
        group.update(now)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """`learning_rate` is AdamW's; groups with a `rate` of their own keep that many times as much."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("rate", 1.0)
