"""What follows attention in a block: splines, or the MLPs they are compared with. Each maps n_embd → n_embd.

With `token_shift` the gates of gated ones see a mix of the token and the one before; the others see only that mix.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kan_layer import KANLayer

if TYPE_CHECKING:
    from model import GPTConfig


class MLP(nn.Module):
    """Linear → activation → Linear."""

    def __init__(
        self,
        width: int,
        hidden: int,
        bias: bool,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] = F.gelu,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.c_fc = nn.Linear(width, hidden, bias=bias)
        self.norm = norm or nn.Identity()
        self.c_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.norm(self.activation(self.c_fc(x))))


def relu_squared(x: Tensor) -> Tensor:
    """ReLU² (So et al. 2021)."""
    return F.relu(x).square()


class SwiGLU(nn.Module):
    """Linear(SiLU(Linear(x)) ⊙ Linear(x)) (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int, bias: bool, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.c_gate = nn.Linear(width, hidden, bias=bias)
        self.c_fc = nn.Linear(width, hidden, bias=bias)
        self.norm = norm or nn.Identity()
        self.c_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor, gate_input: Tensor | None = None) -> Tensor:
        gate = self.c_gate(x if gate_input is None else gate_input)
        return self.c_proj(self.norm(F.silu(gate) * self.c_fc(x)))


class GatedSplines(nn.Module):
    """Linear(KANLayer(x) ⊙ Linear(x)): learnt directions beside the learnt functions of given ones."""

    def __init__(self, config: GPTConfig, hidden: int) -> None:
        super().__init__()
        self.splines = spline_layer(config, hidden, "random_normal")
        self.c_gate = nn.Linear(config.n_embd, hidden, bias=config.bias)
        self.norm = hidden_norm(config, hidden)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, gate_input: Tensor | None = None) -> Tensor:
        gate = self.c_gate(x if gate_input is None else gate_input)
        return self.c_proj(self.norm(self.splines(x) * gate))


class TokenShift(nn.Module):
    """Mixes each token's features with those of the token before it, each by a learnt share (Peng et al. 2023)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.share, 0.5)

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        """x (B, T, C), with `first` (B, 1, C) before its first token → (B, T, C)."""
        return torch.lerp(x, torch.cat((first, x[:, :-1]), dim=1), self.share)


def spline_layer(config: GPTConfig, outputs: int, usual_init: str) -> KANLayer:
    """n_embd → `outputs`."""
    return KANLayer(
        config.n_embd,
        outputs,
        init=usual_init if config.kan_init == "auto" else config.kan_init,
        **spline_options(config),
    )


def spline_options(config: GPTConfig) -> dict[str, Any]:
    """What all spline layers of a model have in common, as keyword arguments of KANLayer."""
    return {
        "num_control_points": config.num_control_points,
        "spline_width": config.spline_width,
        "impl": config.kan_impl,
        "variant": config.kan_variant,
        "zero_centred": config.kan_zero_centred,
    }


def hidden_norm(config: GPTConfig, hidden: int) -> nn.Module:
    return nn.RMSNorm(hidden, eps=1e-5, elementwise_affine=False) if config.ffn_norm else nn.Identity()


class AttentionGate(nn.Module):
    """A factor for each feature of attention's output, from the block's input; at the start 1, or about 1.

    Splines where the feed-forward layer is made of them, else twice the sigmoid of a linear layer (Qiu et al. 2025).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.n_embd
        self.splines = spline_layer(config, width, "zero") if config.ffn == "kan" else None
        self.c_gate = nn.Linear(width, width, bias=config.bias) if config.ffn != "kan" else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        if self.splines is not None:
            return 1 + self.splines(x)
        assert self.c_gate is not None
        return 2 * self.c_gate(x).sigmoid()


def stored_points(config: GPTConfig) -> int:
    """Parameters of one spline."""
    return config.num_control_points - config.kan_zero_centred


def hidden_width(config: GPTConfig, matrices: int) -> int:
    """Of a layer with that many matrices of n_embd x hidden parameters: as config says, or equal parameters.

    Equal to those of the 4x MLP (or, for ffn_match, of plain splines), less what an attention gate has.
    """
    multiple = stored_points(config) if config.ffn_match else 8  # of n_embd² parameters in all
    if config.attention_gate:
        multiple -= stored_points(config) if config.ffn == "kan" else 1
    return config.ffn_hidden or max(1, round(multiple * config.n_embd / matrices))


def kan(config: GPTConfig) -> nn.Module:
    if config.kan_block == "plain":
        return spline_layer(config, config.n_embd, "zero")
    return GatedSplines(config, hidden_width(config, matrices=stored_points(config) + 2))


def mlp(config: GPTConfig, activation: Callable[[Tensor], Tensor] = F.gelu) -> nn.Module:
    hidden = hidden_width(config, matrices=2)
    return MLP(config.n_embd, hidden, config.bias, hidden_norm(config, hidden), activation)


def swiglu(config: GPTConfig) -> nn.Module:
    hidden = hidden_width(config, matrices=3)
    return SwiGLU(config.n_embd, hidden, config.bias, hidden_norm(config, hidden))


# By the name that `--ffn` takes. A benchmark may add the layers of others.
FEED_FORWARDS: dict[str, Callable[[GPTConfig], nn.Module]] = {
    "kan": kan,
    "mlp": mlp,
    "mlp_tanh": partial(mlp, activation=partial(F.gelu, approximate="tanh")),  # as in GPT-2
    "relu2": partial(mlp, activation=relu_squared),
    "swiglu": swiglu,
}
