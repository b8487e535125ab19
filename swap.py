"""Spline layers in place of a trained network's linear layers: the same outputs at first, more capacity from there."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from kan_layer import KANLayer, is_linear

Where = str | Callable[[str, nn.Module], bool]


def swap_linears(module: nn.Module, where: Where = "*", **options: Any) -> list[str]:
    """Replace linear layers within `module` by spline layers that compute the same; returns their names.

    `where`: a pattern of names like "blocks.*.ffn.c_fc" (several with commas between), or a function of name and layer
    that says whether to replace it. `options` are those of `KANLayer.from_linear`. A weight that a layer shares with
    others is not shared any more. An optimizer made before has to be made again.

    Raises ValueError, and changes nothing, if no layer matches or the options are not possible.
    """
    linears = [(name, part) for name, part in module.named_modules(remove_duplicate=False) if is_linear(part)]
    chosen = [(name, linear) for name, linear in linears if name and _matches(where, name, linear)]
    if not chosen:
        there = ", ".join(name or "the module itself" for name, _ in linears[:8]) or "none"
        raise ValueError(f"no linear layer matches {where!r}; there are {there}{' …' if len(linears) > 8 else ''}")
    made: dict[nn.Module, KANLayer] = {}  # a layer that is used twice stays one layer
    for _, linear in chosen:
        if linear not in made:
            made[linear] = KANLayer.from_linear(linear, **options)
    for name, linear in chosen:
        module.set_submodule(name, made[linear])
    return [name for name, _ in chosen]


def _matches(where: Where, name: str, linear: nn.Module) -> bool:
    if callable(where):
        return where(name, linear)
    return any(fnmatchcase(name, pattern.strip()) for pattern in where.split(","))
