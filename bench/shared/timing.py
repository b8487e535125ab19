"""Times the forward and backward passes of contestants, which take turns."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.shared.case import DTYPES, Case
from common.errors import UserError

SLOW_SECONDS, SLOW_ROUNDS = 2.0, 3  # a contestant slower than this runs in this many rounds only
QUEUED = 10  # runs in a row that the GPU's clock times


@dataclass(frozen=True)
class Median:
    ms: float
    rounds: int
    """The number of rounds."""
    queued_ms: float | None = None
    """By the GPU's clock, of one of QUEUED runs in its queue; None on a CPU and of slow contestants."""


class Passes:
    """The input of a case, and the two passes that are timed: forward, and forward+backward."""

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        self.device = device
        try:
            self.x, dy = torch.randn(2, case.tokens, case.width, device=device).unbind()
            self.dy = {
                dtype: dy.to(dtype) for dtype in DTYPES.values()
            }  # under autocast the contestant chooses its output's dtype
        except RuntimeError as error:
            raise UserError(f"the input of {case} cannot be allocated ({str(error).splitlines()[0]})") from error
        self.x.requires_grad_()

    def forward(self, module: nn.Module) -> None:
        with torch.no_grad():
            self._apply(module)

    def training(self, module: nn.Module) -> None:
        """Run forward and backward, with gradients of x and of all parameters."""
        y = self._apply(module)
        torch.autograd.grad(y, (self.x, *trained(module)), self.dy[y.dtype])

    def memory_of_training(self, module: nn.Module) -> int | None:
        """Bytes that forward+backward allocates at its peak; None except on CUDA, which alone counts them."""
        if self.device != "cuda":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.training(module)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _apply(self, module: nn.Module) -> Tensor:
        with self._autocast():
            return module(self.x)

    def _autocast(self) -> AbstractContextManager[None]:
        if self.case.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device, DTYPES[self.case.dtype])


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def take_turns(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: str, failed: dict[str, str] | None = None
) -> dict[str, Median]:
    """Median time of each run over up to `rounds` rounds, each in another order; on CUDA also of runs in its queue.

    A first round warms up and finds the runs that are too slow for all rounds. In its turn each runs twice, and only
    the second time counts, because the first still suffers from the state in which the contestant before left the
    caches and the allocator. If `failed` is given, a run that raises is left out and its reason noted there; otherwise
    its exception is raised.
    """

    def attempt(name: str, measure: Callable[[Callable[[], object]], float]) -> float:
        try:
            return measure(runs[name])
        except Exception as error:  # a peer may fail in any way
            if failed is None:
                raise
            failed[name] = in_one_line(error)  # not the error itself, which would keep the tensors of its frames alive
        release_memory(name, device)
        return float("nan")

    alone = partial(seconds, device=device)
    warm_up = {name: attempt(name, alone) for name in runs}
    wanted = {name: min(rounds, SLOW_ROUNDS) if warm_up[name] > SLOW_SECONDS else rounds for name in runs}
    times: dict[str, list[float]] = {name: [] for name in runs}
    queued: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for turn in range(rounds):
        shuffle(order)
        for name in order:
            if turn < wanted[name] and not (failed and name in failed):
                attempt(name, alone)
                times[name].append(attempt(name, alone))
                if device == "cuda" and not warm_up[name] > SLOW_SECONDS:
                    queued[name].append(attempt(name, queued_ms))
    return {
        name: Median(
            1000 * statistics.median(samples),
            len(samples),
            statistics.median(queued[name]) if queued[name] else None,
        )
        for name, samples in times.items()
        if not (failed and name in failed)
    }


def release_memory(name: str, device: str) -> None:
    """Free the GPU memory that contestant `name` has left, also in reference cycles. UserError if that fails."""
    if device != "cuda":
        return
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:  # after an illegal access this process cannot use the GPU any more
        raise UserError(
            f"{name} has left the GPU unusable ({in_one_line(error)}); leave it out and start again"
        ) from error


def in_one_line(error: BaseException, most: int = 160) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    text = f"{type(error).__name__}: {lines[0]}"
    return text if len(text) <= most else text[: most - 1] + "…"


def seconds(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def queued_ms(run: Callable[[], object], launches: int = QUEUED) -> float:
    """Milliseconds of one run by the GPU's clock, of many in its queue, as in training.

    A run by itself begins when the GPU has nothing to do, and Python's part before its first kernel counts. Here that
    part counts only if it is longer than the GPU's.
    """
    run()  # keeps the GPU busy until the first that counts is in the queue
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(launches):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / launches


def compile_without_limit() -> None:
    """Forget what was compiled, and lift the limit beyond which functions would silently no longer be compiled."""
    torch.compiler.reset()
    public = hasattr(torch.compiler.config, "recompile_limit")  # before PyTorch 2.14 it was private
    config: Any = torch.compiler.config if public else torch._dynamo.config
    config.recompile_limit = config.accumulated_recompile_limit = 1000
