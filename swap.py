"""Spline layers in place of a trained network's linear layers: the same outputs at first, more capacity from there."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from common.linear_layers import is_linear, why_not_linear
from kan_layer import KANLayer

Where = str | Callable[[str, nn.Module], bool]


def swap_linears(module: nn.Module, where: Where = "*", **options: Any) -> list[str]:
    """Replace linear layers within `module` by spline layers that compute the same; returns their names.

    `where`: a pattern of names like "blocks.*.ffn.c_fc" (several with commas between), or a function of name and layer
    that says whether to replace it. `options` are those of `KANLayer.from_linear`. Hooks of a layer, and what is frozen
    in it, stay. A weight that a layer shares with others is not shared any more. An optimizer made before has to be
    made again. Layers that compute more than a linear one, or whose weight nn.MultiheadAttention reads, are left as
    they are, with a warning that names them.

    Raises ValueError, and changes nothing, if no layer matches, if none of those can be replaced, or if the options are
    not possible.
    """
    linears = [(name, part) for name, part in module.named_modules(remove_duplicate=False) if is_linear(part)]
    chosen = [(name, linear) for name, linear in linears if name and _matches(where, name, linear)]
    if not chosen:
        there = ", ".join(name or "the module itself" for name, _ in linears[:8]) or "none"
        raise ValueError(f"no linear layer matches {where!r}; there are {there}{' …' if len(linears) > 8 else ''}")
    chosen = _replaceable(module, chosen)
    made: dict[nn.Module, KANLayer] = {}  # a layer that is used twice stays one layer
    for _, linear in chosen:
        if linear not in made:
            made[linear] = KANLayer.from_linear(linear, **options)
    for name, linear in chosen:
        _move_hooks(linear, made[linear])
        module.set_submodule(name, made[linear])
    _leave_fast_paths(module)
    return [name for name, _ in chosen]


def _matches(where: Where, name: str, linear: nn.Module) -> bool:
    if callable(where):
        return where(name, linear)
    return any(fnmatchcase(name, pattern.strip()) for pattern in where.split(","))


def _replaceable(module: nn.Module, chosen: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """The layers that can be replaced, with a warning that names the others; ValueError if there are no more."""
    kept = {name: reason for name, linear in chosen if (reason := _why_not(module, linear)) is not None}
    if kept:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in kept.items())
        if len(kept) == len(chosen):
            raise ValueError(f"none of the layers can be replaced by splines ({reasons})")
        warnings.warn(f"left as they are: {reasons}", stacklevel=3)
    return [(name, linear) for name, linear in chosen if name not in kept]


def _why_not(module: nn.Module, linear: nn.Module) -> str | None:
    if any(isinstance(part, nn.MultiheadAttention) and part.out_proj is linear for part in module.modules()):
        return "nn.MultiheadAttention reads its weight and never calls it"
    return why_not_linear(linear)


# Where nn.Module keeps the hooks that see inputs, outputs and their gradients, and what it notes about them.
HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook"),
)


def _move_hooks(linear: nn.Module, layer: KANLayer) -> None:
    """The very dictionaries, so that the handles of hooks still remove them."""
    for name in HOOKS:
        if name in vars(linear):
            setattr(layer, name, vars(linear)[name])


def _leave_fast_paths(module: nn.Module) -> None:
    """Keep PyTorch's encoder layers from reading the weights of linear layers that are none any more."""
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoderLayer) and _has_splines(part):
            part.activation_relu_or_gelu = 0  # "neither": what the fused computation asks first
        if isinstance(part, nn.TransformerEncoder) and _has_splines(part):
            part.use_nested_tensor = False


def _has_splines(module: nn.Module) -> bool:
    return any(isinstance(part, KANLayer) for part in module.modules())
