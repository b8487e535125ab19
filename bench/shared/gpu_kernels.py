"""Steps of `bench/gpu.py` about single kernels: the card's peaks, whether results are right, and how long they take."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import backends
from backends import triton, triton_tiles
from bench.shared import timing
from bench.shared.case import Case
from bench.shared.contestants import line_up
from bench.shared.gpu_setting import Setting
from bench.shared.machine import measure_peaks
from bench.shared.timing import Passes, in_one_line, seconds

WIDTH = 4.0  # of the grid; inputs are normally distributed, so some lie outside
REPEATABLE = ("triton", "chunked", "dense")  # the others may add by atomics on a GPU, in any order
PRECISIONS = {  # operands, float32 products, largest error allowed over the largest value
    "bfloat16": (torch.bfloat16, "high", 3 * 2**-8),
    "float16": (torch.float16, "high", 3 * 2**-11),
    "tf32": (torch.float32, "high", 3 * 2**-10),
    "float32": (torch.float32, "highest", 3e-5),
}
# N, I, G, O: odd widths, a prime number of cells, few tokens, the goals' shapes, and a million tokens.
SHAPES = (
    (1, 17, 5, 130),
    (131, 130, 8, 17),
    (1000, 128, 32, 128),
    (4096, 384, 9, 384),
    (65_536, 768, 8, 768),
    (65_536, 768, 5, 768),
    (1_000_000, 768, 8, 768),
)
TINY_SHAPES = ((1, 3, 5, 4), (40, 17, 8, 18))
LARGEST_GATHERED = 65_536  # tokens, for those whose memory or time would burst the step


# ---- peaks -----------------------------------------------------------------------------------------------------------


def peaks(setting: Setting) -> None:
    if setting.rehearse:
        measured = {"copy of 1 MB, GB/s": copy_gbps(2**20, "cpu", launches=2)}
        setting.keep(**measured, summary="none of a rehearsal")
        return
    torch.set_float32_matmul_precision("high")
    found = measure_peaks(["bfloat16"], "cuda")
    setting.keep(gflops=found.gflops, gbps=found.gbps, summary=str(found))
    for inputs, outputs in ((768, 3072), (768 * 7, 768)):
        a, b = (
            torch.randn(*size, device="cuda", dtype=torch.bfloat16) for size in ((65_536, inputs), (inputs, outputs))
        )
        ms = queued_ms(partial(torch.mm, a, b), "cuda")
        setting.add(
            "products", {"shape": [65_536, inputs, outputs], "ms": ms, "tflops": 2e-9 * a.numel() * outputs / ms}
        )
    for size in (4, 8, 16, 32, 64, 256):
        setting.add("copies", {"mb": size, "gbps": copy_gbps(size * 2**20, "cuda", launches=100)})


def copy_gbps(size: int, device: str, launches: int) -> float:
    """Read and written, of a copy of so many bytes again and again: from the L2 cache if it holds them."""
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / queued_ms(lambda: target.copy_(source), device, launches) / 1e6


def queued_ms(run: Callable[[], object], device: str, launches: int = 20) -> float:
    """Milliseconds of one run, warmed up, of many in the GPU's queue; in a rehearsal the least of two."""
    run()
    if device == "cpu":
        return 1000 * min(seconds(run, device) for _ in range(min(launches, 2)))
    for _ in range(2):
        run()
    return timing.queued_ms(run, launches)


# ---- right -----------------------------------------------------------------------------------------------------------


def right(setting: Setting) -> None:
    """Forward and both gradients of each backend. RuntimeError, at the end, if one is wrong or not repeatable."""
    wrong: list[str] = []
    impls = (
        ("triton", "chunked", "dense") if setting.rehearse else (*REPEATABLE, "semi_structured", "csr", "embedding_bag")
    )
    precisions = ("float16", "float32") if setting.rehearse else tuple(PRECISIONS)
    for shape in TINY_SHAPES if setting.rehearse else SHAPES:
        problem = Arguments(shape, setting.device)
        truth = problem.truth()
        for precision in precisions:
            torch.set_float32_matmul_precision(PRECISIONS[precision][1])
            for impl in impls:
                if setting.left() < 5:
                    setting.keep(summary="not all, as the time was up")
                    raise_if(wrong)
                    return
                row = {"impl": impl, "shape": list(shape), "precision": precision}
                row |= check(problem, impl, precision, truth, launches=3 if setting.rehearse else 20)
                setting.add("checks", row)
                if row.get("wrong"):
                    wrong.append(f"{impl} {precision} {shape}: {row['wrong']}")
    raise_if(wrong)
    setting.keep(summary=f"{sum('errors' in row for row in setting.result['checks'])} comparisons agree")


def raise_if(wrong: list[str]) -> None:
    if wrong:
        raise RuntimeError("; ".join(wrong))


class Arguments:
    """Of one problem: x (N, I), control points (I, G, O), and the gradient of y (N, O); all float32."""

    def __init__(self, shape: tuple[int, int, int, int], device: str) -> None:
        tokens, inputs, self.points, outputs = shape
        generator = torch.Generator(device).manual_seed(0)
        self.x, self.weight, self.grad = (
            torch.randn(*size, device=device, generator=generator)
            for size in ((tokens, inputs), (inputs, self.points, outputs), (tokens, outputs))
        )
        self.device = torch.device(device)

    def run(self, impl: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """y, and the gradients of x and of the control points."""
        x, weight = self.x.detach().requires_grad_(), self.weight.detach().requires_grad_()
        y = backends.BACKENDS[impl].spline_sum(x, weight, WIDTH, dtype)
        return (y.detach(), *torch.autograd.grad(y, (x, weight), self.grad.to(dtype)))

    def why_not(self, impl: str) -> str | None:
        inputs, points, outputs = self.weight.shape
        problem = backends.Problem(inputs, points, outputs, self.device, len(self.x))
        if impl in ("csr", "embedding_bag") and len(self.x) > LARGEST_GATHERED:
            return f"takes too long for {len(self.x):,} tokens"
        return backends.BACKENDS[impl].why_not(problem)

    def truth(self) -> tuple[Tensor, ...]:
        """`run` in float64, by the definition: between two knots the line through their control points."""
        (inputs, points, outputs), spacing = self.weight.shape, WIDTH / (self.points - 1)
        table = self.weight.double().flatten(0, 1)
        y, grad_x = self.grad.double(), self.x.double()  # of the shapes that are wanted; every value is replaced
        grad_weight = torch.zeros_like(table)
        for rows in torch.arange(len(self.x), device=self.device).split(4096):
            u = (self.x[rows].double() + WIDTH / 2) / spacing
            cell = u.floor().clamp(0, points - 2)
            right = torch.arange(points, device=self.device) - cell.unsqueeze(-1)  # knots right of the cell's first
            t = (u - cell).unsqueeze(-1)
            basis = ((right == 0) * (1 - t) + (right == 1) * t).flatten(1)
            slope = ((right == 1).double() - (right == 0).double()) / spacing
            grad = self.grad[rows].double()
            y[rows] = basis @ table
            grad_x[rows] = ((grad @ table.t()).view(-1, inputs, points) * slope).sum(-1)
            grad_weight += basis.t() @ grad
        return y, grad_x, grad_weight.view(inputs, points, outputs)


def check(problem: Arguments, impl: str, precision: str, truth: tuple[Tensor, ...], launches: int) -> dict[str, Any]:
    """Errors of y, dx and dW over their largest values, and whether all launches gave the same bits."""
    dtype, _, most = PRECISIONS[precision]
    reason = problem.why_not(impl)
    if reason is not None:
        return {"skipped": reason}
    try:
        first = problem.run(impl, dtype)
        same = all(
            all(torch.equal(a, b) for a, b in zip(first, problem.run(impl, dtype), strict=True))
            for _ in range(launches - 1)
        )
    except RuntimeError as error:
        return {"wrong": in_one_line(error)}
    errors = [
        float((value.double() - exact).abs().max() / exact.abs().max())
        for value, exact in zip(first, truth, strict=True)
    ]
    bad = [f"error of {name} {e:.1e}" for name, e in zip(("y", "dx", "dW"), errors, strict=True) if not e <= most]
    if not same and impl in REPEATABLE:
        bad.append(f"{launches} launches differ")
    finite = [error if error == error and error != float("inf") else None for error in errors]
    return {"errors": finite, "same_bits": same, **({"wrong": ", ".join(bad)} if bad else {})}


# ---- times -----------------------------------------------------------------------------------------------------------


def times(setting: Setting) -> None:
    """Each pass by itself; whole layers beside the MLP; and Triton's kernels with other tiles than its table's."""
    torch.set_float32_matmul_precision("high")
    tokens, width, dtype = (32, 16, torch.float16) if setting.rehearse else (65_536, 768, torch.bfloat16)
    launches = 1 if setting.rehearse else 20
    grids = (5,) if setting.rehearse else (8, 5, 32)
    for part in (time_passes, time_layers, time_tiles):
        part(setting, tokens, width, grids, dtype, launches)
    counts = (f"{len(setting.result.get(name, ()))} {name}" for name in ("kernels", "layers", "tiles"))
    setting.keep(summary=", ".join(counts))


def time_passes(
    setting: Setting, tokens: int, width: int, grids: tuple[int, ...], dtype: torch.dtype, launches: int
) -> None:
    for grid in grids:
        problem = Arguments((tokens, width, grid, width), setting.device)
        for impl in REPEATABLE:
            for name, run in () if problem.why_not(impl) else passes(problem, impl, dtype):
                if setting.left() < 5:
                    return
                ms = queued_ms(run, setting.device, launches)
                tflops = (2 if name == "grad_x" else 4) * tokens * width**2 / ms / 1e9
                setting.add("kernels", {"impl": impl, "grid": grid, "pass": name, "ms": ms, "useful_tflops": tflops})


def time_layers(
    setting: Setting, tokens: int, width: int, grids: tuple[int, ...], dtype: torch.dtype, launches: int
) -> None:
    """Forward and backward as in bench/layer.py, but queued, so that what the host does before a pass counts less."""
    impls = ("chunked", "dense") if setting.rehearse else REPEATABLE
    for grid in grids[:2]:
        if setting.left() < 30 and not setting.rehearse:
            return
        turn = Passes(Case(tokens, width, grid, "bfloat16"), setting.device)
        able, unable = line_up(turn, impls, {}, compiled=not setting.rehearse)
        for contestant in able:
            ms = queued_ms(partial(turn.training, contestant.module), setting.device, launches)
            setting.add("layers", {"contestant": contestant.name, "grid": grid, "ms": ms})
        for name, reason in unable.items():
            setting.add("layers", {"contestant": name, "grid": grid, "cannot": reason})


def time_tiles(
    setting: Setting, tokens: int, width: int, grids: tuple[int, ...], dtype: torch.dtype, launches: int
) -> None:
    problem = Arguments((tokens, width, grids[0], width), setting.device)
    if problem.why_not("triton") is None:
        for kernel, tile in other_tiles(setting):
            if setting.left() < 8:
                return
            setting.add("tiles", time_tile(setting, problem, kernel, tile, dtype, launches))


def passes(problem: Arguments, impl: str, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    x, weight = problem.x.detach().requires_grad_(), problem.weight.detach().requires_grad_()
    compute, grad = backends.BACKENDS[impl].spline_sum, problem.grad.to(dtype)

    def forward() -> Tensor:
        with torch.no_grad():
            return compute(x, weight, WIDTH, dtype)

    yield "forward", forward
    for name, a, b in (("grad_x", x, weight.detach()), ("grad_weight", x.detach(), weight)):
        wanted = a if name == "grad_x" else b
        y = compute(a, b, WIDTH, dtype)
        yield name, partial(torch.autograd.grad, y, wanted, grad, retain_graph=True)


def other_tiles(setting: Setting) -> Iterator[tuple[str, triton_tiles.Tile]]:
    """The table's own tile of each kernel, and those that differ from it in one number."""
    for kernel in ("forward", "grad_x", "grad_weight"):
        own = getattr(triton_tiles.HALF[generation(setting)], kernel)
        yield kernel, own
        for name in ("outputs",) if setting.rehearse else ("tokens", "inputs", "outputs", "warps"):
            least, most = (4, 8) if name == "warps" else (triton_tiles.SMALLEST, 256)
            for size in (getattr(own, name) // 2, getattr(own, name) * 2):
                if least <= size <= most:
                    yield kernel, dataclasses.replace(own, **{name: size})
        if not setting.rehearse:
            yield from ((kernel, dataclasses.replace(own, stages=stages)) for stages in (2, 4) if stages != own.stages)


def generation(setting: Setting) -> str:
    return triton_tiles.generation(triton_tiles.OLDEST if setting.rehearse else torch.cuda.get_device_capability())


def time_tile(
    setting: Setting, problem: Arguments, kernel: str, tile: triton_tiles.Tile, dtype: torch.dtype, launches: int
) -> dict[str, Any]:
    """Its time and its largest error against the table's own tile, or why it cannot run."""
    row = {"kernel": kernel, **dataclasses.asdict(tile)}
    try:
        with tile_in_table(generation(setting), kernel, tile):
            run = dict(passes(problem, "triton", dtype))[kernel]
            value: Any = run()
            ms = queued_ms(run, setting.device, launches)
    except Exception as error:  # too much shared memory, or whatever a compiler may raise
        return {**row, "cannot": in_one_line(error)}
    own: Any = dict(passes(problem, "triton", dtype))[kernel]()
    value, own = (one[0] if isinstance(one, tuple) else one for one in (value, own))
    error_of = (value.float() - own.float()).abs().max() / own.float().abs().max()
    return {**row, "ms": ms, "differs_by": float(error_of.nan_to_num(1.0, 1.0, 1.0))}


@contextlib.contextmanager
def tile_in_table(generation: str, kernel: str, tile: triton_tiles.Tile) -> Iterator[None]:
    table, own = triton_tiles.HALF, triton_tiles.HALF[generation]
    table[generation] = dataclasses.replace(own, **{kernel: tile})
    triton.Launch.of.cache_clear()  # a launch keeps its tiles
    try:
        yield
    finally:
        table[generation] = own
        triton.Launch.of.cache_clear()  # a launch keeps its tiles
