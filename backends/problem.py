"""The problem that a backend solves, and the description of one: its name, its function and its limits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SplineSum = Callable[[Tensor, Tensor, float, torch.dtype], Tensor]
"""`spline_sum(x, control_points, spline_width, dtype)`: x (N, I), control_points (I, G, O) → y (N, O) in `dtype`."""

# Backends that write out the control points of every (token, feature) pair stop being a good idea above this.
LARGEST_GATHER_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Problem:
    """A layer's shape and where it runs. `tokens` is the N of a step, where known."""

    in_features: int
    num_control_points: int
    out_features: int
    device: torch.device
    tokens: int | None = None


WhyNot = Callable[[Problem], str | None]


def runs_anywhere(problem: Problem) -> str | None:
    return None


def except_on_meta(why_not: WhyNot) -> WhyNot:
    """Decorates a check of the device: on PyTorch's meta device nothing is computed, so anything can be there."""

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
    """The reason why it cannot run here, or None."""
    caveat: WhyNot = runs_anywhere
    """A sentence to know where it can run, or None."""


def why_no_gather(problem: Problem) -> str | None:
    """The reason why two rows of control points for each token and feature should not be written out, or None."""
    needed = (problem.tokens or 0) * problem.in_features * problem.out_features * 4 * 2
    if needed <= LARGEST_GATHER_BYTES:
        return None
    return (
        f"it gathers two rows of {problem.out_features} values for each of {problem.tokens} tokens and "
        f"{problem.in_features} features, {needed / 2**30:.0f} GiB in all (at most "
        f"{LARGEST_GATHER_BYTES / 2**30:.0f} GiB is allowed)"
    )
