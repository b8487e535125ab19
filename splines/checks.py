"""Checks of arguments that layers and options share. Each error names the argument, its value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args, get_origin, get_type_hints


def check_integer(name: str, value: object, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}; got {value!r}")


def check_width(value: object) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:  # type: ignore[operator]
        raise ValueError(f"spline_width must be a finite number above 0; got {value!r}")


def check_middle(name: str, zero_centred: bool, num_control_points: int, variant: str) -> None:
    if zero_centred and num_control_points % 2 == 0:
        raise ValueError(
            f"{name} needs an odd num_control_points, so that one is in the middle; got {num_control_points}"
        )
    if zero_centred and variant != "B-spline":
        raise ValueError(f"{name} needs the variant B-spline, which has a middle control point; got {variant!r}")


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def check_literals(options: object) -> None:
    """Check each field of a dataclass whose type lists its values: Literal["a", "b"], or Literal["auto"] | bool."""
    for name, kind in get_type_hints(type(options)).items():
        allowed = [value for part in (kind, *get_args(kind)) if get_origin(part) is Literal for value in get_args(part)]
        if bool in get_args(kind):
            allowed += [True, False]
        if allowed and getattr(options, name) not in allowed:
            choices = ", ".join(map(str, allowed))
            raise ValueError(f"{name} must be one of {choices}; got {getattr(options, name)!r}")
