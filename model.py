"""The GPT: token embedding, blocks of attention and feed-forward (splines or MLP), language-model head.

With `position="learned"`, `norm="layernorm"` and `ffn="mlp"` it is nanoGPT's model, weight for weight. The other
options are common in today's small models. Every block is pre-normalized: x + attention(norm(x)), x + ffn(norm(x)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import CausalSelfAttention, KVCache
from backends import IMPLS
from common.tables import fill_tables
from embeddings import PairEmbedding, RotaryEmbedding
from feed_forward import FEED_FORWARDS, AttentionGate, TokenShift, spline_layer, spline_options
from kan_layer import KANLayer
from model_options import ARCHITECTURES, PAIRS, SPLINES, GPTOptions
from pair_layer import PairLayer
from splines.checks import check_choice, check_integer, check_literals, check_middle, check_width
from splines.pair_basis import VARIANTS as PAIR_VARIANTS
from splines.parametrisation import VARIANTS
from swap import swap_linears

MULTIPLY_ADD_FLOPS = 2
TRAINING_PASSES = 3  # forward, gradient of the input, gradient of the weights


@dataclass(frozen=True)
class GPTConfig(GPTOptions):
    """Everything that defines the model. Raises ValueError for an option that is out of range."""

    def __post_init__(self) -> None:
        check_choice("architecture", self.architecture, tuple(ARCHITECTURES))
        for name, value in ARCHITECTURES[self.architecture].items():
            if getattr(self, name) == "auto":
                object.__setattr__(self, name, value)
        for name in ("n_layer", "n_head", "n_embd", "block_size"):
            check_integer(name, getattr(self, name), at_least=1)
        for name in ("vocab_size", "ffn_hidden", "pair_rows"):
            check_integer(name, getattr(self, name), at_least=0)
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head; got n_embd={self.n_embd} and n_head={self.n_head}")
        if self.position == "rope" and (self.n_embd // self.n_head) % 2:
            raise ValueError(
                f"position 'rope' rotates pairs, so n_embd / n_head must be even; "
                f"got {self.n_embd // self.n_head}: change n_head or use --position learned"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1; got {self.dropout}")
        check_integer("num_control_points", self.num_control_points, at_least=2)
        check_width(self.spline_width)
        check_choice("kan_variant", self.kan_variant, VARIANTS)
        check_middle("kan_zero_centred", self.kan_zero_centred, self.num_control_points, self.kan_variant)
        if self.ffn == PAIRS:
            check_choice("kan_variant of pair_splines", self.kan_variant, PAIR_VARIANTS)
        check_choice("kan_impl", self.kan_impl, IMPLS)
        check_choice("ffn", self.ffn, tuple(FEED_FORWARDS))
        check_literals(self)

    @property
    def has_splines(self) -> bool:
        """Whether the model has spline layers: as feed-forward layers, in gates, or in place of linear layers."""
        return self.ffn in SPLINES or (self.ffn == PAIRS and self.attention_gate) or bool(self.kan_swap)


def normalization(config: GPTConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=1e-5)
    return nn.LayerNorm(config.n_embd, bias=config.bias)


def attention(config: GPTConfig, layer: int) -> CausalSelfAttention:
    return CausalSelfAttention(
        layer,
        config.n_embd,
        config.n_head,
        config.bias,
        config.dropout,
        bool(config.qk_norm),
        rope=RotaryEmbedding(config.n_embd // config.n_head, config.block_size) if config.position == "rope" else None,
        make_gate=partial(attention_gate, config) if config.attention_gate else None,
    )


def attention_gate(config: GPTConfig) -> AttentionGate:
    """A gate made of splines if the feed-forward layer has splines, else of a linear layer."""
    if config.ffn in (*SPLINES, PAIRS):
        return AttentionGate(splines=spline_layer(config, config.n_embd, "zero"))
    return AttentionGate(linear=nn.Linear(config.n_embd, config.n_embd, bias=config.bias))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.norm_1 = normalization(config)
        self.attn = attention(config, layer)
        self.norm_2 = normalization(config)
        self.ffn = FEED_FORWARDS[config.ffn](config)
        self.shifts_gate_alone = getattr(self.ffn, "takes_gate_input", False)
        self.takes_previous = getattr(self.ffn, "takes_previous", False)
        self.token_shift = TokenShift(config.n_embd) if config.token_shift else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.norm_1(x), cache)
        h = self.norm_2(x)
        if self.token_shift is None and not self.takes_previous:
            return x + self.dropout(self.ffn(h))
        first = cache.shift(self.layer, h) if cache is not None else torch.zeros_like(h[:, :1])
        previous = torch.cat((first, h[:, :-1]), dim=1)
        mixed = self.token_shift(h, previous) if self.token_shift is not None else h
        if self.takes_previous:
            return x + self.dropout(self.ffn(h, mixed, previous))
        return x + self.dropout(self.ffn(h, mixed) if self.shifts_gate_alone else self.ffn(mixed))

    def output_projections(self) -> list[nn.Module]:
        """The layers that project back to the residual stream; spline layers and layers of others may lack one."""
        found = (getattr(part, "c_proj", None) for part in (self.attn, self.ffn))
        return [projection for projection in found if projection is not None]


class GPT(nn.Module):
    """The language model. `config.vocab_size` must be set; the trainer takes it from the dataset."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError("vocab_size must be at least 1 to build the model; got 0: give the dataset's")
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = (
            nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        )
        self.pair_embedding = (
            PairEmbedding(config.vocab_size, config.pair_rows, config.n_embd) if config.pair_rows else None
        )
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = normalization(config)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.token_embedding.weight
        self.reset_parameters()
        if config.kan_swap:
            self.swap_linears()
        self.register_load_state_dict_post_hook(fill_tables)

    def swap_linears(self) -> None:
        """Replace the linear layers that `config.kan_swap` names by spline layers that compute the same."""
        swap_linears(self, self.config.kan_swap, **spline_options(self.config))

    def reset_parameters(self) -> None:
        """Set all parameters to their initial values.

        linear layers, embeddings     N(0, 0.02), biases 0, as in GPT-2
        output projections            N(0, 0.02 / √(2·n_layer)), or 0 with zero_init_projections
        spline layers                 kan_init
        normalizations, token shift   their own reset_parameters
        """
        projections = {projection for block in self._blocks() for projection in block.output_projections()}
        projection_std = 0.0 if self.config.zero_init_projections else 0.02 / math.sqrt(2 * self.config.n_layer)
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, KANLayer | PairLayer | TokenShift | nn.LayerNorm | nn.RMSNorm):
                module.reset_parameters()
            if module in projections:
                nn.init.normal_(module.get_parameter("weight"), std=projection_std)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, vocab_size) and, with targets (B, T), the mean cross entropy in nats.

        With a cache, `tokens` continue the cached ones and are added to the cache.
        Raises ValueError if the context would become longer than block_size.
        """
        past = cache.length if cache is not None else 0
        T = tokens.shape[1]
        if past + T > self.config.block_size:
            raise ValueError(f"context of {past + T} tokens is longer than block_size={self.config.block_size}")
        x = self.token_embedding(tokens)  # (B, T, C)
        if self.position_embedding is not None:
            x = x + self.position_embedding(torch.arange(past, past + T, device=tokens.device))
        if self.pair_embedding is not None:
            x = x + self.pair_embedding(tokens, cache.last_token if cache is not None else None)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, cache)
        if cache is not None:
            cache.length += T
            cache.last_token = tokens[:, -1:].clone()
        logits = self.head(self.norm(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())  # (B·T, V), (B·T,)

    def new_cache(self, batch_size: int = 1) -> KVCache:
        weight = self.token_embedding.weight
        config = self.config
        head_dim = config.n_embd // config.n_head
        return KVCache(
            config.n_layer, batch_size, config.n_head, config.block_size, head_dim, weight.device, weight.dtype
        )

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def spline_layers(self) -> list[KANLayer]:
        """All spline layers, in the order of the blocks."""
        return [module for module in self.modules() if isinstance(module, KANLayer)]

    def pair_layers(self) -> list[PairLayer]:
        """All layers of functions of two inputs, in the order of the blocks."""
        return [module for module in self.modules() if isinstance(module, PairLayer)]

    def num_parameters(self) -> int:
        """Number of parameters without learned positions, as nanoGPT counts them."""
        positions = self.position_embedding.weight.numel() if self.position_embedding is not None else 0
        return sum(parameter.numel() for parameter in self.parameters()) - positions

    def num_ffn_parameters(self) -> int:
        """Number of parameters of the feed-forward layers, in which a model with splines and one with MLPs differ."""
        return sum(parameter.numel() for block in self._blocks() for parameter in block.ffn.parameters())

    def flops_per_token(self) -> int:
        """Floating-point operations of one training step, per token (PaLM's count: matmuls and attention).

        A spline uses two of its control points for an input, so a KANLayer counts 2·I·O multiply-adds; a
        PairLayer counts 3·I·O.
        """
        macs = self.config.n_layer * 2 * self.config.block_size * self.config.n_embd // 2  # causal attention
        for module in self.modules():
            if isinstance(module, nn.Linear):
                macs += module.in_features * module.out_features
            elif isinstance(module, KANLayer | PairLayer):
                macs += module.MACS * module.in_features * module.out_features
        return TRAINING_PASSES * MULTIPLY_ADD_FLOPS * macs
