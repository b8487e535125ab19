"""AdamW as in PyTorch, without the second that its optimizers take to import a compiler that they do not use."""

from __future__ import annotations

import inspect
from typing import Any

import torch

_STEP = inspect.unwrap(torch.optim.AdamW.step)


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
