"""`triton`: fused matrix products on tensor cores, whose spline operand is built on the way (triton_kernels.py).

A gather reads two rows of W for every token and feature, which on a GPU is far slower than tensor cores are at
multiplying a G times larger, mostly zero operand. Nothing is saved for the backward but x, W and the rises of W, which
take the place of the copy of W in half precision that autocast would make.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backends import dense, embedding_bag, standard, triton_tiles
from backends.cells import knot_units
from backends.problem import Problem, except_on_meta
from backends.triton_tiles import Hats

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
    return spline_sum_op(x, control_points, *tables(control_points.detach(), dtype), spline_width)


def tables(control_points: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the kernels read in place of the control points (I, G, O): the rises over each cell (G-1, I', O') in `dtype`
    and the sum over the inputs of the first control points (O',) in float32. Zeros fill up I' and O'.

    Outside the operator, where a compiler can fuse it and the backward shares it.
    """
    missing_inputs, missing_outputs = (-control_points.shape[axis] % triton_tiles.ROW for axis in (0, 2))
    if missing_inputs or missing_outputs:
        control_points = F.pad(control_points, (0, missing_outputs, 0, 0, 0, missing_inputs))
    rises = control_points.transpose(0, 1).diff(dim=0).to(dtype, copy=True, memory_format=torch.contiguous_format)
    return rises, control_points[:, 0].sum(0, dtype=torch.float32)


def compute(x: Tensor, control_points: Tensor, rises: Tensor, first: Tensor, spline_width: float) -> Tensor:
    """`spline_sum` with the `tables` of the control points, in the type of `rises`: float32, bfloat16 or float16 as are
    those of x and the control points, in any mixture. Raises ValueError for what does not fit.
    """
    standard.refuse_forward_mode("splinegpt::triton")
    check(x, control_points, rises)
    y = x.new_empty(x.shape[0], first.shape[0], dtype=rises.dtype)  # (N, O')
    if y.numel():
        _launch(x, control_points, rises, spline_width).forward(padded(x), rises, first, y)
    return without_padding(y, control_points.shape[2])


spline_sum_op = torch.library.custom_op("splinegpt::triton", compute, mutates_args=())


@spline_sum_op.register_fake
def _(x: Tensor, control_points: Tensor, rises: Tensor, first: Tensor, spline_width: float) -> Tensor:
    return x.new_empty(x.shape[0], control_points.shape[2], dtype=rises.dtype)


def compute_gradients(
    grad: Tensor, x: Tensor, control_points: Tensor, rises: Tensor, spline_width: float, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the control points, in their types; sums are float32. One not wanted comes back empty."""
    standard.refuse_forward_mode("splinegpt::triton_backward")
    check(x, control_points, rises)
    launch = _launch(x, control_points, rises, spline_width)
    grad, padded_x = padded(grad), padded(x)
    grad_x, grad_weight = x.new_empty(0), control_points.new_empty(0)
    if wanted[1]:  # first, as its parts are gone before the gradient of x takes memory
        grad_weight = launch.grad_weight(grad, padded_x)[: x.shape[1]]
        grad_weight = without_padding(grad_weight, control_points.shape[2]).to(control_points.dtype)
    if wanted[0]:
        grad_x = torch.empty_like(padded_x)
        if x.shape[0]:
            launch.grad_x(grad, padded_x, rises, grad_x)
        grad_x = without_padding(grad_x, x.shape[1])
    return grad_x, grad_weight


spline_sum_backward = torch.library.custom_op("splinegpt::triton_backward", compute_gradients, mutates_args=())


@spline_sum_backward.register_fake
def _(
    grad: Tensor, x: Tensor, control_points: Tensor, rises: Tensor, spline_width: float, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    shapes = (tensor.shape if want else (0,) for tensor, want in zip((x, control_points), wanted, strict=True))
    grad_x_shape, grad_weight_shape = shapes
    return x.new_empty(grad_x_shape), control_points.new_empty(grad_weight_shape)


def _save_for_backward(ctx, inputs, output) -> None:
    x, control_points, rises, _, ctx.spline_width = inputs
    ctx.save_for_backward(x, control_points, rises)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    wanted = list(ctx.needs_input_grad[:2])
    x, control_points, rises = ctx.saved_tensors
    if standard.is_wanted_in_backward():
        return *dense.gradients(grad, x, control_points, ctx.spline_width, grad.dtype, wanted), None, None, None
    gradients = spline_sum_backward(grad, x, control_points, rises, ctx.spline_width, wanted)
    grad_x, grad_weight = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    return grad_x, grad_weight, None, None, None


spline_sum_op.register_autograd(_backward, setup_context=_save_for_backward)


def padded(matrix: Tensor) -> Tensor:
    """(N, M) → (N, M'), contiguous, with rows of the length that the kernels need."""
    missing = -matrix.shape[1] % triton_tiles.ROW
    return F.pad(matrix, (0, missing)) if missing else matrix.contiguous()


def without_padding(tensor: Tensor, size: int) -> Tensor:
    """The first `size` of the last dimension, contiguous."""
    return tensor if tensor.shape[-1] == size else tensor[..., :size].contiguous()


def check(x: Tensor, control_points: Tensor, rises: Tensor) -> None:
    """The kernels trust their caller; operators can be called by anyone."""
    if x.ndim != 2 or control_points.ndim != 3 or x.shape[1] != control_points.shape[0]:
        shapes = f"{tuple(x.shape)} and {tuple(control_points.shape)}"
        raise ValueError(f"x must be (N, I) and control_points (I, G, O); got {shapes}")
    if control_points.shape[1] < 2 or x.device != control_points.device:
        raise ValueError("triton needs at least 2 control points and all on one device")
    dtypes = (x.dtype, control_points.dtype, rises.dtype)
    if not set(dtypes) <= set(DTYPES):
        raise ValueError(f"triton computes in float32, bfloat16 or float16; got {', '.join(map(str, dtypes))}")
    if interpreted() and torch.bfloat16 in dtypes:
        raise ValueError("Triton's interpreter computes bfloat16 wrongly; use float32 or float16 there")


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


def _launch(x: Tensor, control_points: Tensor, rises: Tensor, spline_width: float) -> Launch:
    exact = rises.dtype is not torch.float32 or torch.get_float32_matmul_precision() == "highest"
    precision = "ieee" if exact else "tf32"
    shape = (rises.shape[1], control_points.shape[1], rises.shape[2])
    return Launch.of(x.shape[0], shape, spline_width, rises.dtype, precision, x.device)


def card(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and number of processors; small ones for the interpreter."""
    if device.type != "cuda":
        return triton_tiles.OLDEST, 8
    return torch.cuda.get_device_capability(device), torch.cuda.get_device_properties(device).multi_processor_count


class Launch:
    """The kernels, with what their launches for problems of one size have in common. `shape` is (I', G, O')."""

    def __init__(
        self,
        tokens: int,
        shape: tuple[int, int, int],
        spline_width: float,
        dtype: torch.dtype,
        precision: str,
        device: torch.device,
    ) -> None:
        if not spline_width > 0:
            raise ValueError(f"triton needs a positive spline_width; got {spline_width}")
        reason = why_not_on(device)
        if reason is not None:
            raise ValueError(f"triton cannot be used here: {reason}")
        self.tokens = tokens
        self.inputs, self.points, self.outputs = shape
        self.width, self.inverse_spacing = spline_width, (self.points - 1) / spline_width
        self.precision, self.device = precision, device
        capability, self.processors = card(device)
        self.tiles = triton_tiles.tiles(capability, dtype, precision, tokens, shape)
        self.hats = triton_tiles.launches_of_hats(self.tiles, self.points, self.inputs)
        self.split_tokens, self.splits = self._split()

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def of(*arguments: Any) -> Launch:
        """Made once for each size: a step of a small model is over before all this is looked up again."""
        return Launch(*arguments)

    def _split(self) -> tuple[int, int]:
        """Into parts of how many tokens, and how many, the sum of the gradient of W is cut."""
        hats = max(self.hats, key=self._programs)
        most = max(1, min(16, MOST_PARTIAL_BYTES // (4 * self.inputs * self.points * self.outputs)))
        seats, block = self.processors * hats.tile.residents, max(one.tile.tokens for one in self.hats)
        splits = triton_tiles.token_splits(self._programs(hats), self.tokens, block, seats, most)
        return blocks(self.tokens, splits * block) * block, splits

    def _programs(self, hats: Hats) -> int:
        return blocks(self.inputs, hats.tile.inputs) * hats.groups * blocks(self.outputs, hats.tile.outputs)

    def forward(self, x: Tensor, rises: Tensor, first: Tensor, y: Tensor) -> None:
        tile = self.tiles.forward
        programs = blocks(self.tokens, tile.tokens) * blocks(self.outputs, tile.outputs)
        sizes = (self.tokens, self.inputs, self.outputs)
        options = {"PRECISION": self.precision, "GROUP": tile.group, "SPAN": tile.span, **tile.options()}
        self._run("forward_kernel", (programs,), (x, rises, first, y), sizes, options)

    def grad_x(self, grad: Tensor, x: Tensor, rises: Tensor, grad_x: Tensor) -> None:
        tile = self.tiles.grad_x
        grid = (blocks(self.tokens, tile.tokens) * blocks(self.inputs, tile.inputs),)
        cells = self._cells(x, grid)
        sizes = (self.tokens, self.inputs, self.outputs)
        options = {"PRECISION": self.precision, "INTERPRETED": interpreted(), **tile.options()}
        self._run("grad_x_kernel", grid, (grad, cells, rises, grad_x), sizes, options)

    def _cells(self, x: Tensor, grid: tuple[int]) -> Tensor:
        """Which cell each input is in, laid out as the tiles of the gradient of x read it."""
        tile = self.tiles.grad_x
        pair = torch.uint16 if self.points - 1 <= triton_tiles.BYTE_CELLS else torch.uint32
        cells = x.new_empty(grid[0] * tile.tokens * tile.inputs // 2, dtype=pair)
        edges = cell_edges(self.points, self.width, x.device)
        options = {"BLOCK_N": tile.tokens, "BLOCK_I": tile.inputs, "num_warps": 8}
        self._run("cell_kernel", grid, (x, edges, cells), (self.tokens, self.inputs), options)
        return cells

    def grad_weight(self, grad: Tensor, x: Tensor) -> Tensor:
        """float32, (I', G, O'). The tokens are summed in parts, and these in a fixed order."""
        parts = x.new_empty((self.splits, self.inputs, self.points, self.outputs), dtype=torch.float32)
        sizes = (self.tokens, self.inputs, self.outputs)
        for hats in self.hats:
            groups = {"FIRST": hats.first, "GROUPS": hats.groups, "GROUP": hats.tile.group}
            options = {"PRECISION": self.precision, **groups, **hats.tile.options(), "split_tokens": self.split_tokens}
            self._run("grad_weight_kernel", (self._programs(hats), self.splits), (grad, x, parts), sizes, options)
        return parts.sum(0) if self.splits > 1 else parts[0]

    def _run(
        self,
        name: str,
        grid: tuple[int, ...],
        tensors: tuple[Tensor, ...],
        sizes: tuple[int, ...],
        options: dict[str, Any],
    ) -> None:
        with torch.cuda.device_of(tensors[0]):
            kernel = getattr(_kernels(), name)[grid]
            kernel(*tensors, *sizes, self.inverse_spacing, CELLS=self.points - 1, **options)


@functools.cache
def _kernels() -> ModuleType:
    from backends import triton_kernels  # Triton is optional, and importing it takes a moment

    return triton_kernels


def blocks(size: int, block: int) -> int:
    return -(-size // block)
