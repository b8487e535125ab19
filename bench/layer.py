"""Time the spline layer, every backend, beside the MLP of equal parameters: `python bench/layer.py`.

All contestants take turns in one process, so that a machine that slows down slows all of them; medians are compared.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this runs as a plain script

import torch
from torch import Tensor, nn

from kan_layer import KANLayer
from training.errors import UserError, exit_on_user_error
from training.options import OptionParser

USAGE = "python bench/layer.py [--key value …]"


@dataclass(frozen=True)
class Options:
    tokens: str = "768,4096"
    """Tokens N of each case, comma-separated; as many as there are widths."""
    widths: str = "128,384"
    """Width I = O of each case, comma-separated."""
    grids: str = "5,8,16,32,64"
    """Control points G, comma-separated; the MLP has G·width/2 hidden units, hence equal parameters."""
    impls: str = "dense,embedding_bag,csr"
    """Backends to time, comma-separated."""
    compiled: bool = False
    """Time each contestant compiled as well."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: int = 2
    """CPU threads."""
    repeats: int = 9
    """Rounds in which each contestant runs once; the median is reported."""
    output: str = ""
    """A JSON file for the results."""

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda") or (self.device == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"device must be cpu, or cuda where there is a GPU; got {self.device!r}")
        if self.repeats < 1 or self.threads < 1:
            raise ValueError("repeats and threads must be at least 1")


@dataclass(frozen=True)
class Timing:
    tokens: int
    width: int
    grid: int
    contestant: str
    forward_ms: float
    training_ms: float
    """Forward and backward."""


@exit_on_user_error
def main() -> None:
    options = OptionParser(Options, USAGE).parse(sys.argv[1:])
    torch.set_num_threads(options.threads)
    tokens, widths, grids = (integers(text) for text in (options.tokens, options.widths, options.grids))
    if len(tokens) != len(widths):
        raise UserError(f"tokens and widths make pairs, but there are {len(tokens)} and {len(widths)} of them")
    print(f"{machine(options.device)}, torch {torch.__version__}, {options.threads} threads, float32")
    print(f"{'N x width':>12} {'G':>4}  {'contestant':24} {'forward':>10} {'fwd+bwd':>10} {'MLP / it':>9}")
    results = []
    for n, width in zip(tokens, widths, strict=True):
        for grid in grids:
            results += time_case(n, width, grid, options)
    if options.output:
        record = {"machine": machine(options.device), "torch": torch.__version__, "options": asdict(options)}
        Path(options.output).write_text(json.dumps({**record, "results": [asdict(r) for r in results]}, indent=1))


def time_case(tokens: int, width: int, grid: int, options: Options) -> list[Timing]:
    modules = contestants(width, grid, options)
    x = torch.randn(tokens, width, device=options.device, requires_grad=True)
    dy = torch.randn(tokens, width, device=options.device)
    forward = interleave({name: partial(module, x) for name, module in modules.items()}, options)
    training = interleave({name: partial(step, module, x, dy) for name, module in modules.items()}, options)
    timings = [Timing(tokens, width, grid, name, forward[name], training[name]) for name in modules]
    for timing in timings:
        mlp = "mlp compiled" if timing.contestant.endswith(" compiled") else "mlp"
        ratio = training[mlp] / timing.training_ms
        print(
            f"{f'{tokens}x{width}':>12} {grid:>4}  {timing.contestant:24} {timing.forward_ms:>7.2f} ms "
            f"{timing.training_ms:>7.2f} ms {ratio:>8.2f}x"
        )
    return timings


def contestants(width: int, grid: int, options: Options) -> dict[str, nn.Module]:
    hidden = grid * width // 2
    modules: dict[str, nn.Module] = {
        "mlp": nn.Sequential(nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False))
    }
    for impl in options.impls.split(","):
        try:
            modules[impl] = KANLayer(width, width, num_control_points=grid, impl=impl)
        except ValueError as error:
            raise UserError(str(error)) from error
    if options.compiled:
        modules |= {f"{name} compiled": torch.compile(module) for name, module in modules.items()}  # type: ignore[misc]
    return {name: module.to(options.device) for name, module in modules.items()}


def step(module: nn.Module, x: Tensor, dy: Tensor) -> None:
    torch.autograd.grad(module(x), (x, *module.parameters()), dy)


def interleave(runs: dict[str, Callable[[], object]], options: Options) -> dict[str, float]:
    """Median milliseconds of each, after two rounds of warming up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(2 + options.repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if options.device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(samples[2:]) for name, samples in times.items()}


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"


def integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{text!r} is not a list of whole numbers; write them like 5,8,16") from None


if __name__ == "__main__":
    main()
