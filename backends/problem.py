"""The problem that a backend solves, and the record that describes a backend: its name, its function and its limits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

SplineSum = Callable[[Tensor, Tensor, float, torch.dtype], Tensor]
"""`spline_sum(x, control_points, spline_width, dtype)`: x (N, I), control_points (I, G, O) → y (N, O) in `dtype`."""

# Above this, backends that materialise the control points of every (token, feature) pair refuse.
LARGEST_GATHER_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Problem:
    """A layer's shape and device. `tokens` is the N of a step, where known."""

    in_features: int
    num_control_points: int
    out_features: int
    device: torch.device
    tokens: int | None = None


WhyNot = Callable[[Problem], str | None]


def runs_anywhere(problem: Problem) -> str | None:
    return None


def except_on_meta(why_not: WhyNot) -> WhyNot:
    """Decorate a check of the device so that it passes on PyTorch's meta device, where nothing is computed."""

    @functools.wraps(why_not)
    def check(problem: Problem) -> str | None:
        return None if problem.device.type == "meta" else why_not(problem)

    return check


@dataclass(frozen=True)
class Backend:
    """One way to compute the layer."""

    name: str
    spline_sum: SplineSum
    why_not: WhyNot = runs_anywhere
    """Why it cannot run here, or None."""
    caveat: WhyNot = runs_anywhere
    """A warning for a problem that it can run, or None."""


def why_no_gather(problem: Problem) -> str | None:
    """Why two rows of control points for each token and feature should not be materialised, or None."""
    needed = (problem.tokens or 0) * problem.in_features * problem.out_features * 4 * 2
    if needed <= LARGEST_GATHER_BYTES:
        return None
    return (
        f"it gathers two rows of {problem.out_features} values for each of {problem.tokens} tokens and "
        f"{problem.in_features} features, {needed / 2**30:.0f} GiB in all (at most "
        f"{LARGEST_GATHER_BYTES / 2**30:.0f} GiB is allowed)"
    )


def check_arguments(
    x: Tensor, control_points: Tensor, spline_width: float, allowed_dtypes: Collection[torch.dtype]
) -> None:
    """Check the arguments of an operator whose kernel trusts its caller: anybody can call an operator.

    Raises ValueError that says which shape, width or dtype does not fit.
    """
    if x.ndim != 2 or control_points.ndim != 3 or x.shape[1] != control_points.shape[0]:
        shapes = f"{tuple(x.shape)} and {tuple(control_points.shape)}"
        raise ValueError(f"x must be (N, I) and control_points (I, G, O); got {shapes}")
    inputs, points, outputs = control_points.shape
    if min(inputs, outputs) < 1 or points < 2 or not spline_width > 0:
        raise ValueError(
            f"I and O must be at least 1, G at least 2, spline_width positive; got {inputs}, {outputs}, "
            f"{points}, {spline_width}"
        )
    if not {x.dtype, control_points.dtype} <= set(allowed_dtypes):
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed_dtypes)
        raise ValueError(f"x and control_points must be {allowed}; got {x.dtype} and {control_points.dtype}")
