"""What the layer costs a GPU's user beside its kernels, without a GPU: `python bench/beside_kernels.py`

Memory: the most that forward and backward hold beside x and the control points, counted while the host's code runs on
tensors without data. Time: what a call takes on the host, in Python, PyTorch and Triton, while the launches themselves
are imitated. No kernel runs, so neither says how fast a GPU is.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone, before this folder

import common.threads  # noqa: F401  before torch

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

try:
    from torch.utils._python_dispatch import TorchDispatchMode
except ImportError:
    sys.exit("error: this PyTorch has no torch.utils._python_dispatch, by which memory is counted; use 2.11 to 2.13")

import backends
from backends import chunked, triton
from bench.shared.machine import machine_name
from common.command_line import OptionParser
from common.errors import UserError, exit_on_user_error

USAGE = "python bench/beside_kernels.py [--key value …]"
WIDTH = 4.0  # of the grid
HOPPER, PROCESSORS, L2_BYTES = (9, 0), 132, 50 * 2**20  # of an H100
ROADS = ("triton", "chunked", "dense")


@dataclass(frozen=True)
class Options:
    grids: str = "8,5"
    """Control points per spline, separated by commas."""
    tokens: int = 65_536
    """Tokens N of the pass whose memory is counted."""
    width: int = 768
    """Width of that layer, I = O."""
    calls: int = 2000
    """Calls of the layer whose time on the host is measured; its shape is small, 64 x 32."""

    def __post_init__(self) -> None:
        if min(self.tokens, self.width, self.calls) < 1 or min(self.grid_list()) < 2:
            raise ValueError("tokens, width and calls must be at least 1, and grids at least 2")

    def grid_list(self) -> list[int]:
        return [int(grid) for grid in self.grids.split(",")]


# ---- memory ----------------------------------------------------------------------------------------------------------


class Memory(TorchDispatchMode):
    """The most bytes that tensors hold at a time which are made while it is active, also within our operators."""

    def __init__(self, *not_counted: Tensor) -> None:
        super().__init__()
        self.most = 0
        self._not_counted = {StorageWeakRef(tensor.untyped_storage()) for tensor in not_counted}
        self._held: dict[StorageWeakRef, int] = {}
        ops = torch.ops.splinegpt
        self._within: dict[Any, Callable[..., Any]] = {
            ops.triton.default: triton.compute,
            ops.triton_backward.default: triton.compute_gradients,
            ops.chunked.default: chunked.compute,
            ops.chunked_backward.default: chunked.compute_gradients,
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._within:
            with self:
                return self._within[func](*args, **(kwargs or {}))
        made = func(*args, **(kwargs or {}))
        self._held = {storage: size for storage, size in self._held.items() if not storage.expired()}
        for tensor in made if isinstance(made, tuple) else (made,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if (reference := StorageWeakRef(storage)) not in self._not_counted:
                    self._held[reference] = storage.nbytes()
        self.most = max(self.most, sum(self._held.values()))
        return made


def memory_of_training(impl: str, tokens: int, shape: tuple[int, int, int]) -> int:
    """Bytes of a forward and backward pass in bfloat16, uncompiled, of float32 x and control points (I, G, O)."""
    x = torch.empty(tokens, shape[0], device="meta", requires_grad=True)
    control_points = torch.empty(shape, device="meta", requires_grad=True)
    dy = torch.empty(tokens, shape[2], device="meta", dtype=torch.bfloat16)
    with imitated_hopper(), mock.patch.object(triton.Launch, "_run", nothing), Memory(x, control_points, dy) as memory:
        y = backends.BACKENDS[impl].spline_sum(x, control_points, WIDTH, torch.bfloat16)
        torch.autograd.grad(y, (x, control_points), dy)
    return memory.most


def least_memory(tokens: int, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Bytes of what any way returns, y in bfloat16 and the gradients in float32; and these with one basis of `dense`.

    What `dense` takes compiled depends on the compiler, but it writes hats of all tokens at some time.
    """
    inputs, points, outputs = shape
    returned = tokens * (2 * outputs + 4 * inputs) + 4 * inputs * points * outputs
    return returned, returned + 2 * tokens * inputs * points


# ---- the host's time -------------------------------------------------------------------------------------------------


def host_us(points: int, calls: int) -> tuple[float, float]:
    """Microseconds of a forward pass of `triton`, and of a forward and backward pass."""
    x = torch.randn(64, 32, requires_grad=True)
    control_points = torch.randn(32, points, 32, requires_grad=True)
    forward = partial(triton.spline_sum, x, control_points, WIDTH, torch.bfloat16)
    dy = torch.randn_like(forward())

    def training() -> None:
        torch.autograd.grad(forward(), (x, control_points), dy)

    training()
    return microseconds(forward, calls), microseconds(training, calls)


def microseconds(run: Callable[[], object], calls: int) -> float:
    """The median of single calls."""
    samples = []
    for _ in range(calls):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return 1e6 * median(samples)


def nothing(*_: object) -> None:
    """Takes the place of a launch."""


# ---- what is imitated ------------------------------------------------------------------------------------------------


@contextmanager
def imitated_hopper() -> Iterator[None]:
    """Our code takes any device for an H100."""
    triton.Launch.of.cache_clear()
    with (
        mock.patch.object(triton, "why_not_on", lambda device: None),
        mock.patch.object(triton, "card", lambda device: (HOPPER, PROCESSORS)),
        mock.patch.object(chunked, "CPU_CHUNK_BYTES", L2_BYTES),
        mock.patch.object(chunked, "elementwise", lambda name, chunks: nothing),  # each is one kernel, if compiled
    ):
        yield
    triton.Launch.of.cache_clear()


@contextmanager
def imitated_launches() -> Iterator[None]:
    """Triton compiles kernels for an H100, and finds them again at each call; only the driver's launch does nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    utils = SimpleNamespace(
        load_binary=lambda *_: (None, 0, 0, 0, 1024), get_device_properties=lambda _: {"max_shared_mem": 227 * 1024}
    )
    active = SimpleNamespace(
        utils=utils,
        launcher_cls=lambda source, metadata: nothing,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    with mock.patch.object(driver, "_active", active):
        yield


@exit_on_user_error
def main() -> None:
    options = OptionParser(Options, USAGE).parse(sys.argv[1:])
    if importlib.util.find_spec("triton") is None:
        raise UserError("the kernels are launched by triton, which is not installed (pip install triton)")
    import triton as installed

    torch.set_num_threads(1)
    print(
        f"{machine_name('cpu')}, torch {torch.__version__}, Triton {installed.__version__}, one thread. No kernel runs."
    )
    for points in options.grid_list():
        shape = (options.width, points, options.width)
        found = {impl: memory_of_training(impl, options.tokens, shape) for impl in ROADS}
        returned, compiled = (size / 1e6 for size in least_memory(options.tokens, shape))
        words = ", ".join(f"{impl} {size / 1e6:,.0f} MB" for impl, size in found.items())
        print(f"memory of both passes, {options.tokens:,} x {options.width}, G={points}: {words}")
        print(f"  dense compiled at least {compiled:,.0f} MB; of each, y and the gradients are {returned:,.0f} MB")
    for points in options.grid_list():
        with imitated_hopper(), imitated_launches():
            times = host_us(points, options.calls)
            with mock.patch.object(triton.Launch, "_run", nothing):
                without = host_us(points, options.calls)
        forward, both = (
            f"{whole:.0f} µs ({whole - rest:.0f} in Triton)" for whole, rest in zip(times, without, strict=True)
        )
        print(f"host, triton, 64 x 32, G={points}: forward {forward}, both passes {both}")


if __name__ == "__main__":
    main()
