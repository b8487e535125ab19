"""Causal self-attention and its cache of keys and values. Its layers take numbers and modules, never a config."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backends import fused_attention
from embeddings import RotaryEmbedding


class KVCache:
    """Keys and values of the tokens so far: one static buffer for each layer, (B, heads, block_size, head_dim).

    Also keeps the last token (for pair_rows) and its features at every feed-forward layer (for token_shift and
    pair_splines).
    """

    def __init__(
        self,
        layers: int,
        batch_size: int,
        heads: int,
        block_size: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (layers, batch_size, heads, block_size, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.last = torch.zeros(layers, batch_size, 1, heads * head_dim, device=device, dtype=dtype)
        self.last_token: Tensor | None = None  # (B, 1)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, heads, T, head_dim) to those of the first `length` tokens; return all of that layer."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def shift(self, layer: int, x: Tensor) -> Tensor:
        """Keep the last token of x (B, T, C) for this layer; return the one kept before, (B, 1, C), at first zeros."""
        before = self.last[layer].clone()
        self.last[layer] = x[:, -1:]
        return before


class FusedLinear(nn.Linear):
    """Several linear layers of the same input, computed as one; their outputs are concatenated."""

    def __init__(self, inputs: int, outputs: int, matrices: int, bias: bool) -> None:
        super().__init__(inputs, matrices * outputs, bias=bias)
        self.matrices = matrices


class CausalSelfAttention(nn.Module):
    """Causal multi-head attention, width → width; optionally with rotary positions, QK-norm and a gate."""

    def __init__(
        self,
        layer: int,
        width: int,
        heads: int,
        bias: bool,
        dropout: float,
        qk_norm: bool,
        rope: RotaryEmbedding | None = None,
        make_gate: Callable[[], nn.Module] | None = None,
    ) -> None:
        """`layer` is the layer's number, which finds its keys and values in a cache.

        `make_gate` makes a layer, width → width, whose output multiplies attention's output. It is called between the
        two projections, because the order of construction decides which random numbers each layer gets from a seed.
        """
        super().__init__()
        self.layer = layer
        self.heads = heads
        self.dropout = dropout
        self.qk_norm = qk_norm
        self.rope = rope
        self.c_attn = FusedLinear(width, width, matrices=3, bias=bias)
        self.gate = make_gate() if make_gate is not None else None
        self.c_proj = nn.Linear(width, width, bias=bias)
        self.resid_dropout = nn.Dropout(dropout)
        self.use_kernel(True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.use_kernel(True)

    def use_kernel(self, wanted: bool) -> None:
        """Whether to compute by the kernel where this machine has it, or by PyTorch's operators."""
        self._has_kernel = wanted and fused_attention.why_not() is None

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        qkv = self.c_attn(x)  # (B, T, 3·C)
        drops = self.training and self.dropout > 0
        if self._has_kernel and cache is None and not drops and fused_attention.can_compute(qkv):
            angles = self.rope.angles(0, x.shape[1]) if self.rope is not None else None
            y = fused_attention.attend(qkv, angles, self.heads, self.qk_norm)
        else:
            y = self._in_steps(qkv, cache)
        if self.gate is not None:
            y = y * self.gate(x)
        return self.resid_dropout(self.c_proj(y))

    def _in_steps(self, qkv: Tensor, cache: KVCache | None) -> Tensor:
        """qkv (B, T, 3·C) → (B, T, C) in PyTorch's operators."""
        B, T, width = qkv.shape
        q, k, v = (
            part.view(B, T, self.heads, -1).transpose(1, 2)  # (B, heads, T, head_dim)
            for part in qkv.split(width // 3, dim=2)
        )
        past = cache.length if cache is not None else 0
        if self.rope is not None:
            q, k = self.rope(q, past), self.rope(k, past)
        if self.qk_norm:
            q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        mask = causal_mask(T, past, qkv.device) if past and T > 1 else None
        y = self._attend(q, k, v, mask, is_causal=past == 0)
        return y.transpose(1, 2).reshape(B, T, width // 3)  # (B, heads, T, head_dim) → (B, T, C)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """Shapes (B, heads, T, head_dim). On CPUs in float32: bfloat16 is four times slower (bench/attention.py)."""
        on_cpu = v.device.type == "cpu"
        if on_cpu and v.dtype is not torch.float64:
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast("cpu", enabled=False) if on_cpu else contextlib.nullcontext():
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0, is_causal=is_causal
            )


def causal_mask(new: int, past: int, device: torch.device) -> Tensor:
    """Mask (new, past+new), True where a new query sees a key: all keys up to its own position."""
    return torch.ones(new, past + new, dtype=torch.bool, device=device).tril(past)
