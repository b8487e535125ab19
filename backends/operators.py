"""PyTorch operators made of Python functions, which compilers treat as one opaque call.

torch.library.custom_op does the same, but what it makes imports torch._dynamo at its first call. That takes a second,
for nothing in a run that does not compile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from backends import standard

P = ParamSpec("P")
R = TypeVar("R")
Fake = TypeVar("Fake", bound=Callable[..., Any])


class Operator(Generic[P, R]):
    """The operator `name`, "namespace::op", computed by `function` on devices of one type.

    The function must be annotated, and must neither change its arguments nor return them. The registrations last as
    long as this object.
    """

    def __init__(self, name: str, function: Callable[P, R], device: str) -> None:
        self.name = name
        namespace, op = name.split("::")
        self._library = torch.library.Library(namespace, "FRAGMENT")
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, lib=self._library, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(name, device, _without_forward_mode(name, function), lib=self._library)
        self.overload: Callable[P, R] = getattr(getattr(torch.ops, namespace), op).default

    def __call__(self, *arguments: P.args, **named: P.kwargs) -> R:
        return self.overload(*arguments, **named)

    def register_fake(self, function: Fake) -> Fake:
        """Decorate the function that tells compilers the shape and dtype of the results."""
        torch.library.register_fake(self.name, function, lib=self._library)
        return function

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., Any] | None = None) -> None:
        torch.library.register_autograd(self.name, backward, setup_context=setup_context, lib=self._library)

    def refuse_autograd(self) -> None:
        """Make it an error to differentiate this operator, whose gradient would otherwise be left out silently."""

        def refuse(ctx: Any, *gradients: Any) -> None:
            raise RuntimeError(f"{self.name} has no derivative; those of KANLayer and of the backends' spline_sum have")

        self.register_autograd(refuse)


def _without_forward_mode(name: str, function: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(function)
    def kernel(*arguments: P.args, **named: P.kwargs) -> R:
        standard.refuse_forward_mode(name)
        return function(*arguments, **named)

    return kernel


def operator(name: str, device: str = "default") -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Decorate the function that computes the operator, on devices of every type unless one is named."""
    return lambda function: Operator(name, function, device)
