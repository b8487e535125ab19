"""Causal attention in one pass on CPUs: rotary positions, QK-norm, scores and the mix of values, in float32.

PyTorch's own attention reaches a quarter of a core's arithmetic with heads of 32 features, and rotation, norms and
transposed copies around it take half as long again (docs/log.md). `CausalSelfAttention` says in PyTorch's operators
what is computed, and computes it wherever this kernel cannot run.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from backends import native_build, standard
from backends.native_shape import addresses
from backends.operators import operator


class Shape(ctypes.Structure):
    """`struct AttentionShape` of native.cpp."""

    _fields_ = tuple(
        (name, ctypes.c_int64) for name in ("batch", "tokens", "heads", "head_size", "threads", "rotary", "norm")
    )


def why_not() -> str | None:
    """Why the kernel cannot be used on this machine, or None. Builds it if necessary."""
    return native_build.why_not()


def can_compute(qkv: Tensor) -> bool:
    """Whether the kernel is for this tensor, and for the transforms that are active."""
    return qkv.device.type == "cpu" and qkv.dtype is not torch.float64 and not standard.is_wanted()


def attend(qkv: Tensor, angles: tuple[Tensor, Tensor] | None, heads: int, norm: bool) -> Tensor:
    """qkv (B, T, 3·C), queries before keys before values → (B, T, C), float32.

    `angles`: cosine and sine of each token's angles, (T, C / heads / 2), or None for no rotation. `norm`: divide
    queries and keys by their root mean square.
    """
    cosine, sine = (angle.float() for angle in angles) if angles is not None else (None, None)
    return attention(qkv.float(), cosine, sine, heads, norm)[0]


@operator("splinegpt::attention", "cpu")
def attention(qkv: Tensor, cosine: Tensor | None, sine: Tensor | None, heads: int, norm: bool) -> tuple[Tensor, Tensor]:
    """The mix, and for each query its largest score and 1 / its sum of exponentials: (B, heads, 2, T)."""
    check_arguments(qkv, cosine, sine, heads)
    B, T, width = qkv.shape
    qkv, cosine, sine = contiguous(qkv, cosine, sine)
    y, statistics = qkv.new_empty(B, T, width // 3), qkv.new_empty(B, heads, 2, T)
    shape = shape_of(qkv, cosine, heads, norm)
    native_build.load().splinegpt_attention(ctypes.byref(shape), *pointers(qkv, cosine, sine, y, statistics))
    return y, statistics


@attention.register_fake
def _(qkv: Tensor, cosine: Tensor | None, sine: Tensor | None, heads: int, norm: bool) -> tuple[Tensor, Tensor]:
    B, T, width = qkv.shape
    return qkv.new_empty(B, T, width // 3), qkv.new_empty(B, heads, 2, T)


@operator("splinegpt::attention_backward", "cpu")
def attention_backward(
    grad: Tensor, statistics: Tensor, qkv: Tensor, cosine: Tensor | None, sine: Tensor | None, heads: int, norm: bool
) -> Tensor:
    """The gradient of qkv from that of the mix."""
    check_arguments(qkv, cosine, sine, heads)
    B, T, width = qkv.shape
    if grad.shape != (B, T, width // 3) or statistics.shape != (B, heads, 2, T):
        raise ValueError(f"grad and statistics do not fit qkv; got {tuple(grad.shape)} and {tuple(statistics.shape)}")
    qkv, cosine, sine, grad, statistics = contiguous(qkv, cosine, sine, grad, statistics)
    grad_qkv = torch.empty_like(qkv)
    shape = shape_of(qkv, cosine, heads, norm)
    where = pointers(qkv, cosine, sine, grad, statistics, grad_qkv)
    native_build.load().splinegpt_attention_backward(ctypes.byref(shape), *where)
    return grad_qkv


@attention_backward.register_fake
def _(
    grad: Tensor, statistics: Tensor, qkv: Tensor, cosine: Tensor | None, sine: Tensor | None, heads: int, norm: bool
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cosine, sine, ctx.heads, ctx.norm = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, cosine, sine, output[1])


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
    if grad is None:
        return None, None, None, None, None
    qkv, cosine, sine, statistics = ctx.saved_tensors
    return attention_backward(grad, statistics, qkv, cosine, sine, ctx.heads, ctx.norm), None, None, None, None


attention.register_autograd(_backward, setup_context=_save_for_backward)
attention_backward.refuse_autograd()


def check_arguments(qkv: Tensor, cosine: Tensor | None, sine: Tensor | None, heads: int) -> None:
    """Raise ValueError for arguments that do not fit, since the kernel trusts its caller."""
    if qkv.ndim != 3 or heads < 1 or not qkv.shape[2] or qkv.shape[2] % (3 * heads):
        raise ValueError(f"qkv must be (B, T, 3·C) with C a multiple of heads={heads}; got {tuple(qkv.shape)}")
    size = qkv.shape[2] // 3 // heads
    shapes = {None if angle is None else tuple(angle.shape) for angle in (cosine, sine)}
    if shapes != {None} and (size % 2 or shapes != {(qkv.shape[1], size // 2)}):
        raise ValueError(f"cosine and sine must both be None or ({qkv.shape[1]}, {size / 2:g}); got {shapes}")
    if any(tensor is not None and tensor.dtype is not torch.float32 for tensor in (qkv, cosine, sine)):
        raise ValueError(f"qkv, cosine and sine must be float32; got {qkv.dtype}")


def shape_of(qkv: Tensor, cosine: Tensor | None, heads: int, norm: bool) -> Shape:
    B, T, width = qkv.shape
    return Shape(B, T, heads, width // 3 // heads, torch.get_num_threads(), cosine is not None, norm)


def contiguous(*tensors: Any) -> list[Any]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def pointers(*tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else addresses(tensor)[0] for tensor in tensors]
