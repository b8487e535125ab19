"""Operators of PyTorch that are made of a Python function, for compilers to take whole.

torch.library.custom_op would do, but what it makes imports torch._dynamo at its first call, which takes a second that
a run without compiling has no use for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def operator(name: str, device: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorates the function that computes the operator `name`, "namespace::op", on devices of that type.

    The function must be annotated, must not change its arguments nor return them. It becomes torch.ops'; give it a fake
    and a gradient by torch.library.register_fake and register_autograd.
    """

    def define(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(name, device, function)
        namespace, op = name.split("::")
        return getattr(getattr(torch.ops, namespace), op).default

    return define


def refuse_gradient(name: str) -> None:
    """Let differentiating through the operator `name` fail, which otherwise would leave its part out."""

    def backward(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(f"{name} has no derivative")

    torch.library.register_autograd(name, backward)
