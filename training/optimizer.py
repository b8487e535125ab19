"""The optimizer: AdamW, or Muon for the matrices of the blocks; weight decay on what multiplies, none on the rest.

Muon is momentum whose update is made orthogonal (Jordan et al. 2024). For a matrix in hidden layers the gradient is
dominated by a few directions; with all of its singular values set to about one, the rare directions are learnt as
fast. A spline layer is a stack of matrices, one for each control point, and a fused query-key-value matrix is three:
each is made orthogonal on its own.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from backends import amx
from training.config import Config
from training.shards import like

MOMENTUM = 0.95
ITERATIONS = 5
# Of the quintic a·s + b·s³ + c·s⁵ that drives singular values towards one: steep at 0 and within 0.3 of 1 after five
# rounds, which serves as well as exactness (Jordan's figures).
QUINTIC = (3.4445, -4.7750, 2.0315)
_STEP = inspect.unwrap(torch.optim.AdamW.step)


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
                "muon_pieces": [getattr(model.get_submodule(owner(name)), "matrices", 1) for name, _ in by_muon],
                "weight_decay": config.muon_weight_decay,
                "rate": config.muon_learning_rate / config.learning_rate,
            }
        )
    groups = [group for group in groups if group["params"]]
    kind = MuonAdamW if by_muon else AdamW
    # Fused is faster than the default loop on CPUs too.
    return kind(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def owner(name: str) -> str:
    """The name of the module that has the parameter `name`."""
    return name.rpartition(".")[0]


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


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW, bit for bit, but its first call does not import torch._dynamo (0.9 s).

    PyTorch decorates these methods of optimizers to keep its compiler away from them, which imports it. The functions
    below are those without the decorators; where a release of PyTorch has none, they are the methods themselves.
    """

    add_param_group: Any = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad: Any = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict: Any = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict: Any = inspect.unwrap(torch.optim.Optimizer.load_state_dict)

    def step(self, closure: Any = None) -> Any:
        return self.adamw_step(closure)

    @torch.no_grad()  # as the decorator of PyTorch's own has it
    def adamw_step(self, closure: Any = None) -> Any:
        """A step without the hooks of `step`, for classes that add to it."""
        return _STEP(self, closure)


class MuonAdamW(AdamW):
    """AdamW, but Muon for groups that have `muon_pieces`.

    `muon_pieces` lists, for each parameter of its group, into how many matrices its rows are cut if it has two
    dimensions; one of three dimensions is a stack (rows, stack, columns), as the weight of a spline layer is.
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(groups, **options)
        self._step_supports_amp_scaling = False  # the fused AdamW would skip overflown steps itself, Muon would not

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        every = self.param_groups
        self.param_groups = [group for group in every if "muon_pieces" not in group]
        try:
            loss = self.adamw_step(closure)
        finally:
            self.param_groups = every
        for group in every:
            if "muon_pieces" in group:
                self._muon_step(group)
        return loss

    def _muon_step(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        decay = 1 - group["lr"] * group["weight_decay"]
        sharded: list[tuple[Tensor, Tensor]] = []  # parameters in pieces, and their whole steps
        for parameter, pieces in zip(group["params"], group["muon_pieces"], strict=True):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
                state["step"] = torch.zeros(())  # AdamW looks for it in every state that it loads
            state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
            update = parameter.grad.lerp(state["momentum"], MOMENTUM)  # Nesterov's look ahead
            target = parameter
            if hasattr(update, "full_tensor"):  # a singular value is one of the whole matrix
                update = update.full_tensor()
                target = torch.zeros_like(update)
                sharded.append((parameter, target))
            weights, updates = matrices(target, pieces), matrices(update, pieces)
            by_shape[tuple(weights.shape[1:])].append((weights, updates))
        for (rows, columns), stacks in by_shape.items():
            updates = orthogonalize(torch.cat([update for _, update in stacks]))  # (stack, rows, columns)
            rate = group["lr"] * max(1.0, columns / rows) ** 0.5  # columns are outputs here: Jordan's rows
            parts = updates.split([len(weights) for weights, _ in stacks])
            for (weights, _), update in zip(stacks, parts, strict=True):
                weights.mul_(decay).sub_(rate * update.to(weights.dtype))
        for parameter, whole in sharded:
            parameter.mul_(decay).add_(like(parameter, whole))


def matrices(tensor: Tensor, pieces: int) -> Tensor:
    """A view as (stack, inputs, outputs): of a linear weight (outputs, inputs), or of (inputs, stack, outputs)."""
    if tensor.dim() == 3:
        return tensor.transpose(0, 1)
    return tensor.unflatten(0, (pieces, -1)).transpose(1, 2)


def orthogonalize(stack: Tensor) -> Tensor:
    """The nearest matrices whose singular values are all about one (0.7 … 1.2): (stack, rows, columns).

    By Newton-Schulz iterations: matrix products only, whose precision matters little here.
    """
    a, b, c = QUINTIC
    tall = stack.shape[1] > stack.shape[2]
    x = stack.transpose(1, 2) if tall else stack
    x = x.to(fast_dtype(x.device))
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    for _ in range(ITERATIONS):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # a·x + (b·g + c·g²) x
    return x.transpose(1, 2) if tall else x


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where matrix units multiply it: GPUs, and CPUs with AMX, on which it takes half the time of float32."""
    has_units = device.type == "cuda" or (device.type == "cpu" and amx.is_supported())
    return torch.bfloat16 if has_units else torch.float32
