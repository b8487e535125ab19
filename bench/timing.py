"""Timing: what runs of a layer are timed, and how the contestants take turns."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.case import DTYPES, Case
from training.errors import UserError

SLOW_SECONDS, SLOW_ROUNDS = 2.0, 3  # a contestant slower than this gets only so many rounds


@dataclass(frozen=True)
class Median:
    ms: float
    rounds: int
    """Of how many rounds."""


class Passes:
    """The input of a case, and the two things that are timed with it: forward, and forward+backward."""

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        self.device = device
        try:
            self.x, dy = torch.randn(2, case.tokens, case.width, device=device).unbind()
            self.dy = {dtype: dy.to(dtype) for dtype in DTYPES.values()}  # the contestant decides which, under autocast
        except RuntimeError as error:
            raise UserError(f"the input of {case} cannot be had ({str(error).splitlines()[0]})") from error
        self.x.requires_grad_()

    def forward(self, module: nn.Module) -> None:
        with torch.no_grad():
            self._apply(module)

    def training(self, module: nn.Module) -> None:
        """Forward and backward: the gradients of x and of all parameters."""
        y = self._apply(module)
        torch.autograd.grad(y, (self.x, *trained(module)), self.dy[y.dtype])

    def _apply(self, module: nn.Module) -> Tensor:
        with self._autocast():
            return module(self.x)

    def _autocast(self) -> AbstractContextManager[None]:
        if self.case.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device, DTYPES[self.case.dtype])


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def take_turns(runs: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, Median]:
    """Median time of each run over up to `rounds` rounds, in another order each, so that nobody has a fixed neighbour.

    A round before them warms up and finds those that are too slow for all rounds. In its turn each runs twice and the
    second run counts: the first finds the caches and the allocator as the one before has left them.
    """
    warm_up = {name: seconds(run, device) for name, run in runs.items()}
    wanted = {name: min(rounds, SLOW_ROUNDS) if warm_up[name] > SLOW_SECONDS else rounds for name in runs}
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for turn in range(rounds):
        shuffle(order)
        for name in order:
            if turn < wanted[name]:
                seconds(runs[name], device)
                times[name].append(seconds(runs[name], device))
    return {name: Median(1000 * statistics.median(samples), len(samples)) for name, samples in times.items()}


def seconds(run: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
