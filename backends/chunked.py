"""`chunked`: `dense` for a few thousand tokens at a time, so that the basis stays in the cache and memory stays small.

One elementwise kernel writes the ramps or hats of a chunk, and the library's matrix product (cuBLAS on NVIDIA's GPUs)
reads them while the L2 cache still holds them. Nothing of size N × I·G is ever kept; nothing is saved for the backward
but x and the control points. On a GPU torch.compile makes one kernel of each elementwise function here.

The whole is an operator, since a compiler would unroll the loop over the chunks, anew for every number of tokens.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from backends import dense, standard
from backends.cells import accumulation_dtype, find_cell, knot_units, rises
from backends.operators import operator
from backends.triton import cell_edges

CPU_CHUNK_BYTES = 2**21  # of the basis; about the L2 cache of a core
TILE = 128  # tokens: rows that a matrix product shares out, so chunks are multiples of them
FEWEST = 1024  # tokens of a chunk on a GPU, below which a product would leave processors idle


@standard.under_transforms
def spline_sum(x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
    """x (N, I), control_points (I, G, O) → (N, O)."""
    return spline_sum_op(x, control_points, spline_width, dtype)


def compute(x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
    y = x.new_empty(x.shape[0], control_points.shape[2], dtype=dtype)
    first = control_points[:, 0].sum(dim=0, dtype=accumulation_dtype(control_points.dtype)).to(dtype)  # (O,)
    slopes = rises(control_points, dtype).flatten(0, 1)  # ((G-1)·I, O)
    chunks = _Chunks(x, control_points, dtype)
    basis, bounds = chunks.buffer(chunks.points - 1), _bounds(chunks.points, x.device)
    write_ramps = elementwise("ramps", chunks)
    for rows in chunks:
        ramps = basis[: len(x[rows])]
        write_ramps(x[rows], bounds, chunks.points, spline_width, ramps)
        torch.addmm(first, ramps.flatten(1), slopes, out=y[rows])
    return y


spline_sum_op = operator("splinegpt::chunked")(compute)


@spline_sum_op.register_fake
def _(x: Tensor, control_points: Tensor, spline_width: float, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], control_points.shape[2], dtype=dtype)


def compute_gradients(
    grad: Tensor, x: Tensor, control_points: Tensor, spline_width: float, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the control points, in their types. One not wanted comes back empty."""
    inputs, points, outputs = control_points.shape
    dtype, chunks = grad.dtype, _Chunks(x, control_points, grad.dtype)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if wanted[0] else x.new_empty(0)
    total = x.new_zeros(points * inputs if wanted[1] else 0, outputs, dtype=accumulation_dtype(dtype))
    buffer, bounds = chunks.buffer(points), _bounds(points, x.device)
    slopes = rises(control_points, dtype).flatten(0, 1) if wanted[0] else None
    select, write_hats = (elementwise(name, chunks) for name in ("slopes", "hats"))
    product = torch.empty_like(total, dtype=dtype) if total.dtype is not dtype and not sums_wide(x.device) else None
    for rows in chunks:
        part, x_part = grad[rows], x[rows]
        if slopes is not None:
            along = buffer.flatten()[: len(part) * slopes.shape[0]].view(len(part), -1)
            torch.mm(part, slopes.t(), out=along)
            edges = _edges(x, points, spline_width)
            select(x_part, along.unflatten(1, (points - 1, inputs)), edges, points, spline_width, grad_x[rows])
        if wanted[1]:
            hats = buffer[: len(part)]
            write_hats(x_part, bounds, points, spline_width, hats)
            _add_product(total, hats.flatten(1).t(), part, product)
    if not wanted[1]:
        return grad_x, control_points.new_empty(0)
    grad_weight = torch.empty_like(control_points, memory_format=torch.contiguous_format)
    return grad_x, grad_weight.copy_(total.unflatten(0, (points, inputs)).transpose(0, 1))


spline_sum_backward = operator("splinegpt::chunked_backward")(compute_gradients)


@spline_sum_backward.register_fake
def _(
    grad: Tensor, x: Tensor, control_points: Tensor, spline_width: float, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    shapes = (tensor.shape if want else (0,) for tensor, want in zip((x, control_points), wanted, strict=True))
    grad_x_shape, grad_weight_shape = shapes
    return x.new_empty(grad_x_shape), control_points.new_empty(grad_weight_shape)


def _save_for_backward(ctx: Any, inputs: Any, output: Any) -> None:
    x, control_points, ctx.spline_width, _ = inputs
    ctx.save_for_backward(x, control_points)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    wanted = list(ctx.needs_input_grad[:2])
    x, control_points = ctx.saved_tensors
    if standard.is_wanted_in_backward():
        return *dense.gradients(grad, x, control_points, ctx.spline_width, grad.dtype, wanted), None, None
    gradients = spline_sum_backward(grad.contiguous(), x, control_points, ctx.spline_width, wanted)
    grad_x, grad_weight = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    return grad_x, grad_weight, None, None


spline_sum_op.register_autograd(_backward, setup_context=_save_for_backward)
spline_sum_backward.refuse_autograd()


# ---- the elementwise kernels -----------------------------------------------------------------------------------------


def _ramps(x: Tensor, bounds: Tensor, points: int, spline_width: float, out: Tensor) -> None:
    """The share of each cell that lies left of x: (n, I) → (n, G-1, I)."""
    cell, low, high = bounds[:, 1:-1]
    out.copy_((_position(x, points, spline_width) - cell).clamp(low, high))


def _hats(x: Tensor, bounds: Tensor, points: int, spline_width: float, out: Tensor) -> None:
    """The weight of each control point: (n, I) → (n, G, I), each the difference of the ramps beside its knot."""
    u = _position(x, points, spline_width)
    cell, low, high = bounds[:, :-1]
    rising = (u - cell).clamp(low, high)
    cell, low, high = bounds[:, 1:]
    out.copy_(rising - (u - cell).clamp(low, high))


def _slopes(x: Tensor, along: Tensor, edges: Tensor, points: int, spline_width: float, out: Tensor) -> None:
    """Of the gradients along all cells, (n, G-1, I), the one of the cell that x is in: (n, I)."""
    if x.dtype is torch.float64:
        cell = find_cell(knot_units(x, points, spline_width), points)
    else:  # in float32, which is off by at most one, and then as the edges say
        guess = find_cell(_position(x, points, spline_width).squeeze(1), points)
        wide = x.float()
        cell = guess + (wide >= edges[guess + 1]).long() - (wide < edges[guess]).long()
        cell = cell.clamp(max=points - 2)  # +Inf reaches the last edge
    rise = along.gather(1, cell.unsqueeze(1)).squeeze(1)
    out.copy_(rise.to(accumulation_dtype(x.dtype)) * ((points - 1) / spline_width))


def _position(x: Tensor, points: int, spline_width: float) -> Tensor:
    """In knot units, (n, 1, I). Ramps and hats do not jump at knots, so that float32 is exact enough for them."""
    wide = x.to(accumulation_dtype(x.dtype)).unsqueeze(1)
    return (wide + spline_width / 2) * ((points - 1) / spline_width)


@functools.lru_cache
def _bounds(points: int, device: torch.device) -> Tensor:
    """First knot, least and largest value of each ramp, (3, G+1, 1): a ramp that is always 1, G-1 ramps, one always 0.

    The first is unbounded below and the last above: outside the domain the outermost cells go on.
    """
    cell = torch.arange(-1, points, dtype=torch.float32)
    low, high = torch.zeros(points + 1), torch.ones(points + 1)
    low[0], high[-1] = 1, 0
    low[1], high[-2] = -torch.inf, torch.inf
    return torch.stack((cell, low, high)).unsqueeze(-1).to(device)


def _edges(x: Tensor, points: int, spline_width: float) -> Tensor:
    return cell_edges(points, spline_width, x.device)


ELEMENTWISE: dict[str, Callable[..., None]] = {"ramps": _ramps, "hats": _hats, "slopes": _slopes}


def elementwise(name: str, chunks: _Chunks) -> Callable[..., None]:
    """One of the functions above; on a GPU compiled at the first call, which warns and does without if that fails."""
    return compiled(name, *chunks.kind) if chunks.like.device.type == "cuda" else ELEMENTWISE[name]


@functools.cache
def compiled(name: str, *kind: object) -> Callable[..., None]:
    """As one kernel for any number of tokens and any width of the grid, by torch.compile.

    Each kind has a function of its own: to a compiler, a second grid in the same function would make G a variable.
    """
    plain: Any = ELEMENTWISE[name]
    own_name = "_".join((plain.__name__, *map(str, kind)))
    own = FunctionType(plain.__code__.replace(co_name=own_name), plain.__globals__, own_name)
    fused: Any = None

    def run(*arguments: Any) -> None:
        nonlocal fused
        try:
            fused = fused or torch.compile(own, fullgraph=True)
            with torch.no_grad():
                fused(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler may raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            what = "impl chunked is slower than it could be, as it could not be compiled"
            warnings.warn(f"{what}: {reason}", stacklevel=2)
            fused = plain
            plain(*arguments)

    return run


# ---- the products ----------------------------------------------------------------------------------------------------


def _add_product(total: Tensor, a: Tensor, b: Tensor, product: Tensor | None) -> None:
    """total += a @ b, where half precisions are summed over the chunks in float32, by way of `product` if need be."""
    if total.dtype is a.dtype:
        total.addmm_(a, b)
    elif product is None:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total.add_(torch.mm(a, b, out=product))


@functools.lru_cache
def sums_wide(device: torch.device) -> bool:
    """Whether products of bfloat16 on `device` can be added to float32: a small one is tried."""
    if device.type != "cuda":
        return False
    total, ones = torch.ones(16, 16, device=device), torch.ones(16, 16, device=device, dtype=torch.bfloat16)
    try:
        torch.ops.aten.addmm.dtype_out(total, ones, ones, torch.float32, out=total)
    except RuntimeError:
        return False
    return bool((total == 17).all())


class _Chunks:
    """Slices of the tokens whose basis, of I·G values in `dtype` a token, stays in the cache."""

    def __init__(self, x: Tensor, control_points: Tensor, dtype: torch.dtype) -> None:
        self.tokens, self.dtype, self.like = x.shape[0], dtype, x
        self.inputs, self.points, _ = control_points.shape
        self.kind = (self.points, self.inputs, x.dtype, dtype)  # of kernels: what they need to know
        self.size = chunk_tokens(self.tokens, self.inputs * self.points * dtype.itemsize, x.device)

    def buffer(self, functions: int) -> Tensor:
        """Room for the values of so many functions of each input: (size, functions, I)."""
        return self.like.new_empty(self.size, functions, self.inputs, dtype=self.dtype)

    def __iter__(self) -> Iterator[slice]:
        return (slice(start, start + self.size) for start in range(0, self.tokens, self.size))


def chunk_tokens(tokens: int, token_bytes: int, device: torch.device) -> int:
    """Tokens of a chunk: as many as the cache holds with `token_bytes` each, the same in all chunks but the last."""
    if device.type == "cuda":
        most = max(FEWEST, torch.cuda.get_device_properties(device).L2_cache_size // token_bytes)
    else:
        most = max(TILE, CPU_CHUNK_BYTES // token_bytes)
    if tokens <= most:
        return max(1, tokens)
    chunks = -(-tokens // (most // TILE * TILE))
    return -(-tokens // (chunks * TILE)) * TILE
