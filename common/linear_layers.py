"""Linear layers of PyTorch and transformers: which modules are one, and their weight as a matrix of slopes."""

from __future__ import annotations

from torch import Tensor, nn


def is_linear(module: nn.Module) -> bool:
    """Whether it is an nn.Linear, or the Conv1D of transformers (which need not be installed)."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def why_not_linear(module: nn.Module) -> str | None:
    """Why a module that `is_linear` need not compute x Wᵀ + b with a weight of its own, or None."""
    is_subclass = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    if is_subclass or "forward" in vars(module):
        return "it has a forward of its own"
    for name in ("weight", "bias"):
        if getattr(module, name, None) is not None and name not in module._parameters:
            return f"its {name} is computed from other parameters"
    weight = module.get_parameter("weight")
    if nn.parameter.is_lazy(weight):
        return "its weight has no shape before the first input"
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return "its weight has hooks, which see gradients of the weight's shape"
    if any("state_dict" in name and hooks for name, hooks in vars(module).items()):
        return "it has hooks for saving or loading, which know the parameters of a linear layer"
    return None


def linear_slopes(linear: nn.Module) -> Tensor:
    """The weight of a linear layer as (inputs, outputs). ValueError if it is none, or more than one."""
    if not is_linear(linear):
        raise ValueError(f"from_linear takes an nn.Linear or a Conv1D of transformers; got {type(linear).__name__}")
    reason = why_not_linear(linear)
    if reason is not None:
        raise ValueError(f"this {type(linear).__name__} cannot be replaced by splines: {reason}")
    weight = linear.get_parameter("weight").detach()
    return weight.t() if isinstance(linear, nn.Linear) else weight
