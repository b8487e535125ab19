"""The options that define a GPT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

SPLINES = ("splines", "gated_splines")  # the values of ffn that make spline layers
PAIRS = "pair_splines"  # the one that makes layers of functions of two inputs
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "modern": {"position": "rope", "norm": "rmsnorm", "qk_norm": True, "zero_init_projections": True},
    "nanogpt": {"position": "learned", "norm": "layernorm", "qk_norm": False, "zero_init_projections": False},
}


@dataclass(frozen=True)
class ModelOptions:
    """The options of the GPT, except those of its splines."""

    heading: ClassVar[str] = "model"

    n_layer: int = 4
    """Number of Transformer blocks."""
    n_head: int = 4
    """Attention heads per block; must divide n_embd."""
    n_embd: int = 128
    """Width of the model: size of the residual stream."""
    block_size: int = 64
    """Context length in tokens."""
    vocab_size: int = 0
    """Rows of the token embedding; 0 takes the size of the dataset's vocabulary, a larger number pads it."""
    architecture: Literal["modern", "nanogpt"] = "modern"
    """Sets the next four options: modern (RoPE, RMSNorm, QK-norm, projections that start at zero), or nanogpt (as
    GPT-2). Each of the four can still be set on its own."""
    position: Literal["auto", "rope", "learned"] = "auto"
    """Rotary position embedding (Su et al. 2021), or learned positions as in GPT-2."""
    norm: Literal["auto", "rmsnorm", "layernorm"] = "auto"
    """Normalization before attention, before the feed-forward layer and before the head."""
    qk_norm: Literal["auto"] | bool = "auto"
    """Normalize queries and keys (Henry et al. 2020); keeps attention stable at high learning rates."""
    zero_init_projections: Literal["auto"] | bool = "auto"
    """Start the output projections of attention and MLP at zero instead of GPT-2's small random values."""
    ffn: str = "splines"
    """Feed-forward layer of each block: splines (one spline layer), gated_splines (splines times a linear layer,
    projected back), pair_splines (the same with functions of a feature now and one token before), or the layers to
    compare with: mlp (GELU), relu2, swiglu, mlp_tanh (GELU as GPT-2 approximates it)."""
    ffn_hidden: int = 0
    """Hidden size of the MLPs and gated splines; 0 gives the layer as many parameters as the 4x MLP has (pair_splines:
    as many multiply-adds)."""
    ffn_norm: bool = False
    """Normalize the hidden values of the MLPs and gated splines before the projection back (no parameters)."""
    attention_gate: bool = False
    """Multiply attention's output by a gate, computed from the block's input by splines or a linear layer. The
    feed-forward layer gets narrower, so that the number of parameters stays the same."""
    token_shift: bool = False
    """Mix the previous token, by learnt shares, into the input of the feed-forward layer; in gated layers only into the
    input of the gate."""
    pair_rows: int = 0
    """Rows of an embedding for pairs of a token and the previous one; 0 for none. With fewer rows than pairs, pairs
    share rows."""
    tie_embeddings: bool = True
    """Share the weights of the token embedding with the head, as GPT-2 does."""
    bias: bool = False
    """Biases in linear layers and LayerNorms, as in GPT-2."""
    dropout: float = 0.0
    """Dropout on embeddings, attention and residual branches (0 on small budgets, 0.1-0.2 when data repeats)."""


@dataclass(frozen=True)
class SplineOptions:
    """The options of the spline layers."""

    heading: ClassVar[str] = "splines"

    num_control_points: int = 5
    """Control points per spline (G); at 8 a spline layer has as many parameters as the 4x MLP."""
    spline_width: float = 4.0
    """Width of the splines' grid in standard deviations of the normalized activations."""
    kan_impl: str = "auto"
    """Backend of the spline layers: auto, native, triton, semi_structured, dense, embedding_bag, csr …"""
    kan_variant: str = "B-spline"
    """Parametrisation of the control points: B-spline stores them; balanced suits large grids (docs/splines.md)."""
    kan_init: Literal["auto", "zero", "random_normal", "identity"] = "auto"
    """Function that the splines start from. auto takes zero for splines, so that blocks start as attention alone, and
    random_normal for gated_splines."""
    kan_zero_centred: bool = False
    """Keep every spline at zero in the middle of an odd grid and add a bias; G-1 control points are stored."""
    kan_swap: str = ""
    """Pattern of names of linear layers to replace by splines that compute the same, as in "blocks.*.ffn.c_fc"."""


@dataclass(frozen=True)
class GPTOptions(SplineOptions, ModelOptions):
    """All of them; `model.GPTConfig` also checks them."""
