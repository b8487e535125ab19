"""AdamW as in PyTorch, without the second that its optimizers take to import a compiler that they do not use."""

from __future__ import annotations

import inspect
from typing import Any

import torch


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW, bit for bit, but its first call does not import torch._dynamo (0.9 s).

    PyTorch imports it there only to keep it away from optimizers. Its decorators leave the function they are for as
    `__wrapped__`, and those of torch/_compile.py look for what to call instead in `__dynamo_disable` (2.11 to 2.13).
    Should another release do it otherwise, that second is spent again, and nothing else changes.
    """

    @torch.no_grad()  # one of the decorators left out below
    def step(self, closure: Any = None) -> Any:
        return inspect.unwrap(torch.optim.AdamW.step)(self, closure)


def keep_compiler_unloaded() -> None:
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        function: Any = inspect.unwrap(getattr(torch.optim.Optimizer, name))
        if not hasattr(function, "__dynamo_disable"):
            function.__dynamo_disable = function


keep_compiler_unloaded()
