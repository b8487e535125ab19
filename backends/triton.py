"""`triton`: fused matrix products on tensor cores, whose spline operand is built in registers (triton_kernels.py).

A gather reads two rows of W for every token and feature, which on a GPU is far slower than tensor cores are at
multiplying a G times larger, mostly zero operand. Nothing is saved for the backward but x and W.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from backends import dense, embedding_bag, standard, triton_tiles
from backends.cells import knot_units
from backends.problem import Problem, except_on_meta

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_PARTIAL_BYTES = 2**28  # of gradients of W that are summed over parts of the tokens


@except_on_meta
def why_not(problem: Problem) -> str | None:
    return why_not_on(problem.device)


def why_not_on(device: torch.device) -> str | None:
    """The reason why the kernels cannot run on `device`, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if interpreted():
        return None
    if device.type != "cuda":
        return f"it is for CUDA GPUs, and the layer is on {device.type}"
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA's GPUs, and this one is AMD's"
    capability = torch.cuda.get_device_capability(device)
    if capability < triton_tiles.OLDEST:
        have, need = (".".join(map(str, version)) for version in (capability, triton_tiles.OLDEST))
        return f"its kernels need a GPU of compute capability {need} (Ampere) or newer, and this one has {have}"
    return None


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on any device; for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@standard.under_transforms
def spline_sum(x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
    """x (N, I), control_points (I, G, O) → (N, O). float64, which tensor cores of few GPUs have, by embedding_bag."""
    if torch.float64 in (x.dtype, control_points.dtype, dtype):
        return embedding_bag.spline_sum(x, control_points, spline_width, dtype)
    return spline_sum_op(x, control_points, spline_width, dtype)


@torch.library.custom_op("splinegpt::triton", mutates_args=())
def spline_sum_op(x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
    """As `spline_sum`, for float32, bfloat16 and float16 in any mixture. Raises ValueError for what does not fit."""
    standard.refuse_forward_mode("splinegpt::triton")
    problem = _Launch(x, control_points, spline_width, dtype)
    y = x.new_empty(x.shape[0], control_points.shape[2], dtype=dtype)
    if y.numel():
        first = control_points[:, 0].float().sum(0)  # (O,)
        problem.forward(x.contiguous(), _rises(control_points, dtype), first, y)
    return y


@spline_sum_op.register_fake
def _(x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], control_points.shape[2], dtype=dtype)


@torch.library.custom_op("splinegpt::triton_backward", mutates_args=())
def spline_sum_backward(
    grad: Tensor, x: Tensor, control_points: Tensor, spline_width: float, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the control points, in their types; sums are float32. One not wanted comes back empty."""
    standard.refuse_forward_mode("splinegpt::triton_backward")
    problem = _Launch(x, control_points, spline_width, grad.dtype)
    grad, x = grad.contiguous(), x.contiguous()
    grad_x = torch.zeros_like(x) if wanted[0] else x.new_empty(0)
    grad_weight = control_points.new_empty(0)
    if wanted[0] and x.shape[0]:
        problem.grad_x(grad, x, _rises(control_points, grad.dtype), grad_x)
    if wanted[1]:
        grad_weight = problem.grad_weight(grad, x).to(control_points.dtype)
    return grad_x, grad_weight


@spline_sum_backward.register_fake
def _(
    grad: Tensor, x: Tensor, control_points: Tensor, spline_width: float, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    shapes = (tensor.shape if want else (0,) for tensor, want in zip((x, control_points), wanted, strict=True))
    grad_x_shape, grad_weight_shape = shapes
    return x.new_empty(grad_x_shape), control_points.new_empty(grad_weight_shape)


def _save_for_backward(ctx, inputs, output) -> None:
    x, control_points, ctx.spline_width, _ = inputs
    ctx.save_for_backward(x, control_points)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    wanted = list(ctx.needs_input_grad[:2])
    x, control_points = ctx.saved_tensors
    if standard.is_wanted_in_backward():
        return *dense.gradients(grad, x, control_points, ctx.spline_width, grad.dtype, wanted), None, None
    gradients = spline_sum_backward(grad, x, control_points, ctx.spline_width, wanted)
    grad_x, grad_weight = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    return grad_x, grad_weight, None, None


spline_sum_op.register_autograd(_backward, setup_context=_save_for_backward)


def _rises(control_points: Tensor, dtype: torch.dtype) -> Tensor:
    """Over each cell, cells first: (I, G, O) → (G-1, I, O). In place of the copy of W that autocast would make."""
    return control_points.transpose(0, 1).diff(dim=0).to(dtype).contiguous()


@functools.lru_cache
def cell_edges(num_control_points: int, spline_width: float, device: torch.device) -> Tensor:
    """The smallest float32 in each cell, then +Inf: (G,). The first, which goes on to the left, begins at -Inf.

    Comparing x with these gives the same cell as locating it in float64, at one float32 comparison.
    """
    cells = torch.arange(1, num_control_points - 1)
    below, edges = (torch.full_like(cells, sign * LARGEST_FLOAT) for sign in (-1, 1))
    while (edges - below > 1).any():  # bisect the float32 numbers in their order
        middle = (below + edges) // 2
        beyond = knot_units(_nth_float(middle), num_control_points, spline_width) >= cells
        below, edges = torch.where(beyond, below, middle), torch.where(beyond, middle, edges)
    ends = torch.tensor([torch.inf])
    return torch.cat((-ends, _nth_float(edges), ends)).to(device)


LARGEST_FLOAT = 0x7F7F_FFFF  # the number, above zero, of the largest finite float32


def _nth_float(n: Tensor) -> Tensor:
    """The n-th float32 above zero, or below if n is negative. Floats are ordered as their bits, but for the sign."""
    return n.abs().to(torch.int32).view(torch.float32).copysign(n.sign().float())


class _Launch:
    """The kernels, with what their launches for one problem have in common."""

    def __init__(self, x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> None:
        self._check(x, control_points, spline_width, dtype)
        self.tokens = x.shape[0]
        self.inputs, self.points, self.outputs = control_points.shape
        self.width = spline_width
        self.inverse_spacing = (self.points - 1) / spline_width
        exact = dtype is not torch.float32 or torch.get_float32_matmul_precision() == "highest"
        self.precision = "ieee" if exact else "tf32"
        on_gpu = x.device.type == "cuda"
        capability = torch.cuda.get_device_capability(x.device) if on_gpu else triton_tiles.OLDEST
        self.processors = torch.cuda.get_device_properties(x.device).multi_processor_count if on_gpu else 8
        shape = (self.inputs, self.points, self.outputs)
        self.tiles = triton_tiles.tiles(capability, dtype, self.precision, self.tokens, shape)

    @staticmethod
    def _check(x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> None:
        """The kernels trust their caller; operators can be called by anyone."""
        if x.ndim != 2 or control_points.ndim != 3 or x.shape[1] != control_points.shape[0]:
            shapes = f"{tuple(x.shape)} and {tuple(control_points.shape)}"
            raise ValueError(f"x must be (N, I) and control_points (I, G, O); got {shapes}")
        if control_points.shape[1] < 2 or not spline_width > 0 or x.device != control_points.device:
            raise ValueError("triton needs at least 2 control points, a positive spline_width and all on one device")
        dtypes = (x.dtype, control_points.dtype, dtype)
        if not set(dtypes) <= set(DTYPES):
            raise ValueError(f"triton computes in float32, bfloat16 or float16; got {', '.join(map(str, dtypes))}")
        if interpreted() and torch.bfloat16 in dtypes:
            raise ValueError("Triton's interpreter computes bfloat16 wrongly; use float32 or float16 there")
        reason = why_not_on(x.device)
        if reason is not None:
            raise ValueError(f"triton cannot be used here: {reason}")

    def forward(self, x: Tensor, rises: Tensor, first: Tensor, y: Tensor) -> None:
        tile = self.tiles.forward
        grid = (blocks(self.tokens, tile.tokens) * blocks(self.outputs, tile.outputs),)
        self._run("forward_kernel", grid, (x, rises, first, y), GROUP=tile.group, **tile.options())

    def grad_x(self, grad: Tensor, x: Tensor, rises: Tensor, grad_x: Tensor) -> None:
        tile = self.tiles.grad_x
        grid = (blocks(self.tokens, tile.tokens) * blocks(self.inputs, tile.inputs),)
        edges = cell_edges(self.points, self.width, x.device)
        self._run("grad_x_kernel", grid, (grad, x, rises, edges, grad_x), **tile.options())

    def grad_weight(self, grad: Tensor, x: Tensor) -> Tensor:
        """float32, (I, G, O). The tokens are summed in parts, and these in a fixed order."""
        tile = self.tiles.grad_weight
        programs = blocks(self.inputs, tile.inputs) * self.points * blocks(self.outputs, tile.outputs)
        shape = (self.inputs, self.points, self.outputs)
        most = max(1, min(16, MOST_PARTIAL_BYTES // (4 * self.inputs * self.points * self.outputs)))
        splits = triton_tiles.token_splits(programs, self.tokens, tile.tokens, self.processors, most)
        split_tokens = blocks(self.tokens, splits * tile.tokens) * tile.tokens
        parts = x.new_empty((splits, *shape), dtype=torch.float32)
        tensors = (grad, x, parts)
        self._run("grad_weight_kernel", (programs, splits), tensors, split_tokens=split_tokens, **tile.options())
        return parts.sum(0) if splits > 1 else parts[0]

    def _run(self, name: str, grid: tuple[int, ...], tensors: tuple[Tensor, ...], **options: Any) -> None:
        sizes = (self.tokens, self.inputs, self.outputs, self.inverse_spacing)
        with torch.cuda.device_of(tensors[0]):
            kernel = getattr(_kernels(), name)[grid]
            kernel(*tensors, *sizes, CELLS=self.points - 1, PRECISION=self.precision, **options)


def _kernels() -> ModuleType:
    from backends import triton_kernels  # Triton is optional, and importing it takes a moment

    return triton_kernels


def blocks(size: int, block: int) -> int:
    return -(-size // block)
