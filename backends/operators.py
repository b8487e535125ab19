"""Operators of PyTorch that are made of a Python function, for compilers to take whole.

torch.library.custom_op would do, but what it makes imports torch._dynamo at its first call, which takes a second that
a run without compiling has no use for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from backends import standard


class Operator:
    """The operator `name`, "namespace::op", computed by `function` on devices of one type.

    The function must be annotated, and must neither change its arguments nor return them. What is registered lives as
    long as this object.
    """

    def __init__(self, name: str, function: Callable[..., Any], device: str) -> None:
        self.name = name
        namespace, op = name.split("::")
        self._library = torch.library.Library(namespace, "FRAGMENT")
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, lib=self._library, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(name, device, _without_forward_mode(name, function), lib=self._library)
        self.overload = getattr(getattr(torch.ops, namespace), op).default

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.overload(*arguments, **named)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` makes results of the right shape and type, for compilers."""
        torch.library.register_fake(self.name, function, lib=self._library)
        return function

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., Any] | None = None) -> None:
        torch.library.register_autograd(self.name, backward, setup_context=setup_context, lib=self._library)

    def refuse_autograd(self) -> None:
        """Make it an error to differentiate, where otherwise what goes through this operator would be left out."""

        def refuse(ctx: Any, *gradients: Any) -> None:
            raise RuntimeError(f"{self.name} has no derivative; those of KANLayer and of the backends' spline_sum have")

        self.register_autograd(refuse)


def _without_forward_mode(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def kernel(*arguments: Any) -> Any:
        standard.refuse_forward_mode(name)
        return function(*arguments)

    return kernel


def operator(name: str, device: str = "default") -> Callable[[Callable[..., Any]], Operator]:
    """Decorates the function that computes it, on devices of every type unless one is named."""
    return lambda function: Operator(name, function, device)
