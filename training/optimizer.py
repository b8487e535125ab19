"""The optimizer: AdamW, or Muon for the matrices of the blocks. Only matrices and splines get weight decay.

Muon is momentum with an orthogonalized update (Jordan et al. 2024). A few directions dominate the gradient of a hidden
layer's matrix. Once all its singular values are about one, the rare directions are learnt as fast. A fused
query-key-value matrix is three matrices, and each is orthogonalized on its own; a spline layer is one or a stack
(`KANLayer.matrices`).
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from backends import instruction_set
from training.config import Config
from training.sharded_tensors import like

MOMENTUM = 0.95
ITERATIONS = 5
# Coefficients a, b, c of the quintic a·s + b·s³ + c·s⁵ that moves a singular value s towards one. It is steep at 0 and
# ends within 0.3 of 1 after five iterations, which trains as well as exact ones (Jordan's figures).
QUINTIC = (3.4445, -4.7750, 2.0315)
LONG = 2  # a matrix this many times as long as it is wide is iterated through its Gram matrix on CPUs
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
    """The name of the module that owns the parameter `name`."""
    return name.rpartition(".")[0]


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load moments and step counts from a checkpoint, but keep the present options (betas, weight decay)."""
    options = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, now in zip(optimizer.param_groups, options, strict=True):
        group.update(now)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set AdamW's learning rate; groups with a `rate` get that many times as much."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("rate", 1.0)


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW, bit for bit, but its first call does not import torch._dynamo, which takes 0.9 s.

    PyTorch decorates these methods to keep its compiler out of them, and the decorators import it. The functions below
    are the undecorated methods. In a release without decorators, `unwrap` returns the methods themselves.
    """

    add_param_group: Any = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad: Any = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict: Any = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict: Any = inspect.unwrap(torch.optim.Optimizer.load_state_dict)

    def step(self, closure: Any = None) -> Any:
        return self.adamw_step(closure)

    @torch.no_grad()  # which PyTorch's decorator also does
    def adamw_step(self, closure: Any = None) -> Any:
        """Take a step without the hooks of `step`, for subclasses that extend it."""
        return _STEP(self, closure)


class MuonAdamW(AdamW):
    """Muon for parameter groups that have `muon_pieces`, AdamW for the others.

    `muon_pieces` gives, for each parameter of the group, the number of matrices that it consists of (see `matrices`).
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(groups, **options)
        self._step_supports_amp_scaling = False  # else fused AdamW skips overflown steps itself, and Muon does not

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
        sharded: list[tuple[Tensor, Tensor]] = []  # sharded parameters, and their whole updates
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
            if hasattr(update, "full_tensor"):  # singular values belong to the whole matrix
                update = update.full_tensor()
                target = torch.zeros_like(update)
                sharded.append((parameter, target))
            weights, updates = matrices(target, pieces), matrices(update, pieces)
            by_shape[tuple(weights.shape[1:])].append((weights, updates))
        for (rows, columns), stacks in by_shape.items():
            rate = group["lr"] * max(1.0, columns / rows) ** 0.5  # columns are outputs here: Jordan's rows
            if is_long(rows, columns) and stacks[0][0].device.type == "cpu":
                for weights, update in stacks:
                    step_through_gram(weights, update, decay, rate)
                continue
            updates = orthogonalize(torch.cat([update for _, update in stacks]))  # (stack, rows, columns)
            parts = updates.split([len(weights) for weights, _ in stacks])
            for (weights, _), update in zip(stacks, parts, strict=True):
                weights.mul_(decay).sub_(rate * update.to(weights.dtype))
        for parameter, whole in sharded:
            parameter.mul_(decay).add_(like(parameter, whole))


def matrices(tensor: Tensor, pieces: int | None) -> Tensor:
    """View a linear weight (outputs, inputs), or one of splines (inputs, points, outputs), as its matrices.

    They are (pieces, rows, outputs). A linear weight has `inputs` rows, and its outputs are divided among the pieces.
    One of splines is a single matrix of inputs·points rows, or one for each point if `pieces` is None.
    """
    if tensor.dim() == 2:
        return tensor.unflatten(0, (pieces or 1, -1)).transpose(1, 2)
    return tensor.transpose(0, 1) if pieces is None else tensor.flatten(0, 1).unsqueeze(0)


def orthogonalize(stack: Tensor) -> Tensor:
    """Move the singular values of each matrix of `stack` (stack, rows, columns) close to one (0.7 … 1.2).

    Newton-Schulz iterations need only matrix products, whose precision matters little here.
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


def is_long(rows: int, columns: int) -> bool:
    """Whether iterations through the Gram matrix of a matrix take less arithmetic than those of the matrix itself."""
    return max(rows, columns) >= LONG * min(rows, columns)


def step_through_gram(weights: Tensor, update: Tensor, decay: float, rate: float) -> None:
    """weights = decay · weights - rate · orthogonalize(update), all (stack, rows, columns), in few passes over them."""
    if update.shape[1] > update.shape[2]:
        weights.baddbmm_(update, orthogonalizer(update.transpose(1, 2)).transpose(1, 2), beta=decay, alpha=-rate)
    else:
        weights.baddbmm_(orthogonalizer(update), update, beta=decay, alpha=-rate)


def orthogonalizer(x: Tensor) -> Tensor:
    """The (stack, short, short) matrices whose products with x (stack, short, long) are `orthogonalize(x)`.

    An iteration multiplies x by z = a + b·g + c·g², a polynomial of its Gram matrix g = x xᵀ, which becomes z g z. So
    the matrices are products of z. Squaring halves the digits of small singular values: float32 can afford that.
    Rounding the matrices themselves to bfloat16 would multiply its error by the condition number of x.
    """
    a, b, c = QUINTIC
    gram = x @ x.transpose(1, 2)
    squared_norm = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp_min(1e-24)
    gram /= squared_norm
    product: Tensor | None = None
    for _ in range(ITERATIONS):
        z = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        z.diagonal(dim1=1, dim2=2).add_(a)
        product = z if product is None else z @ product
        gram = z @ gram @ z
    assert product is not None
    return product / squared_norm.sqrt()


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on GPUs and on CPUs that multiply it faster, where it takes less than half the time; else float32."""
    is_fast = device.type == "cuda" or (device.type == "cpu" and instruction_set.has_fast_bfloat16())
    return torch.bfloat16 if is_fast else torch.float32
