"""Replaces linear layers of a trained network by spline layers that at first compute the same outputs."""

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
    """Replace linear layers within `module` by spline layers that compute the same; return their names.

    `where` is a pattern of names like "blocks.*.ffn.c_fc" (or several, separated by commas), or a function of name and
    layer that says whether to replace the layer. `options` are those of `KANLayer.from_linear`. The new layers keep
    hooks and frozen parameters. A weight that several layers shared is no longer shared. An optimizer that was made
    before must be made again. Layers that compute more than a linear one, or whose weight nn.MultiheadAttention reads,
    are not replaced, and a warning names them.

    Raises ValueError, and changes nothing, if no layer matches, if none of those can be replaced, or if the options are
    impossible.
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
    """The layers that can be replaced; a warning names the others. Raises ValueError if none can be replaced."""
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


# The attributes in which nn.Module keeps hooks on inputs, outputs and their gradients.
HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook"),
)


def _move_hooks(linear: nn.Module, layer: KANLayer) -> None:
    """Move the dictionaries themselves, so that the handles of hooks can still remove them."""
    for name in HOOKS:
        if name in vars(linear):
            setattr(layer, name, vars(linear)[name])


def _leave_fast_paths(module: nn.Module) -> None:
    """Turn off the fast paths of PyTorch's encoder layers, which read the weights of linear layers directly."""
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoderLayer) and _has_splines(part):
            part.activation_relu_or_gelu = 0  # 0 is neither, which rules out the fused computation
        if isinstance(part, nn.TransformerEncoder) and _has_splines(part):
            part.use_nested_tensor = False


def _has_splines(module: nn.Module) -> bool:
    return any(isinstance(part, KANLayer) for part in module.modules())
