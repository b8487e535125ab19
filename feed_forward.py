"""Feed-forward layers that follow attention in a block: splines, gated splines, and the MLPs they are compared with.

Each maps width → width, and `FEED_FORWARDS` says how each is made from the options of a model. A class with
`takes_gate_input` has a gate and takes the input of that gate as a second argument. With token shift, gated layers show
the mix of this and the previous token to their gate only; other layers see nothing but the mix. A layer with
`takes_previous` takes the previous token's features as a third.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kan_layer import KANLayer
from model_options import PAIRS, SPLINES, GPTOptions
from pair_layer import PairLayer


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

    takes_gate_input: ClassVar[bool] = True

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
    """Linear(KANLayer(x) ⊙ Linear(x)): splines of the features, gated by learnt directions.

    With `takes_previous` they are functions of each feature now and one token before: PairLayer(x, previous).
    """

    takes_gate_input: ClassVar[bool] = True

    def __init__(
        self,
        splines: nn.Module,
        width: int,
        hidden: int,
        bias: bool,
        norm: nn.Module | None = None,
        takes_previous: bool = False,
    ) -> None:
        """`splines` maps width, or width and width, → hidden."""
        super().__init__()
        self.takes_previous = takes_previous
        self.splines = splines
        self.c_gate = nn.Linear(width, hidden, bias=bias)
        self.norm = norm or nn.Identity()
        self.c_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor, gate_input: Tensor | None = None, previous: Tensor | None = None) -> Tensor:
        gate = self.c_gate(x if gate_input is None else gate_input)
        functions = self.splines(x, previous) if self.takes_previous else self.splines(x)
        return self.c_proj(self.norm(functions * gate))


class TokenShift(nn.Module):
    """Mixes each token's features with those of the previous one, by a learnt share per feature (Peng et al. 2023)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.share, 0.5)

    def forward(self, x: Tensor, previous: Tensor) -> Tensor:
        """x and the features of the tokens before, (B, T, C) each → (B, T, C)."""
        return torch.lerp(x, previous, self.share)


class AttentionGate(nn.Module):
    """A factor for each feature of attention's output, computed from the block's input; about 1 at the start.

    It is 1 + splines(x), or 2·sigmoid(linear(x)) (Qiu et al. 2025).
    """

    def __init__(self, splines: nn.Module | None = None, linear: nn.Linear | None = None) -> None:
        """Give one of the two, width → width."""
        super().__init__()
        self.splines = splines
        self.c_gate = linear

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        if self.splines is not None:
            return 1 + self.splines(x)
        assert self.c_gate is not None
        return 2 * self.c_gate(x).sigmoid()


def spline_layer(config: GPTOptions, outputs: int, usual_init: str) -> KANLayer:
    """A spline layer, n_embd → `outputs`, which starts from `usual_init` unless the config names another init."""
    return KANLayer(
        config.n_embd,
        outputs,
        init=usual_init if config.kan_init == "auto" else config.kan_init,
        **spline_options(config),
    )


def spline_options(config: GPTOptions) -> dict[str, Any]:
    """The keyword arguments of KANLayer that all spline layers of a model share."""
    return {
        "num_control_points": config.num_control_points,
        "spline_width": config.spline_width,
        "impl": config.kan_impl,
        "variant": config.kan_variant,
        "zero_centred": config.kan_zero_centred,
    }


def hidden_norm(config: GPTOptions, hidden: int) -> nn.Module:
    return nn.RMSNorm(hidden, eps=1e-5, elementwise_affine=False) if config.ffn_norm else nn.Identity()


def stored_points(config: GPTOptions) -> int:
    """Number of parameters of one spline."""
    return config.num_control_points - config.kan_zero_centred


def hidden_width(config: GPTOptions, matrices: int) -> int:
    """Hidden size for a layer of `matrices` weight matrices, n_embd x hidden each.

    It is config.ffn_hidden, or the size that gives the layer as many parameters as the 4x MLP has (8·n_embd²), minus
    those of an attention gate.
    """
    budget = 8  # in units of n_embd² parameters
    if config.attention_gate:
        budget -= stored_points(config) if config.ffn in SPLINES else 1
    return config.ffn_hidden or max(1, round(budget * config.n_embd / matrices))


def splines(config: GPTOptions) -> nn.Module:
    return spline_layer(config, config.n_embd, "zero")


def gated_splines(config: GPTOptions) -> nn.Module:
    hidden = hidden_width(config, matrices=stored_points(config) + 2)
    functions = spline_layer(config, hidden, "random_normal")
    return GatedSplines(functions, config.n_embd, hidden, config.bias, hidden_norm(config, hidden))


def pair_splines(config: GPTOptions) -> nn.Module:
    """Unless ffn_hidden is given, as wide as makes 8·n_embd² multiply-adds with those of an attention gate."""
    budget = 8 - KANLayer.MACS * config.attention_gate
    hidden = config.ffn_hidden or max(1, round(budget * config.n_embd / (PairLayer.MACS + 2)))
    init = "random_normal" if config.kan_init == "auto" else config.kan_init
    points, width, variant = config.num_control_points, config.spline_width, config.kan_variant
    pairs = PairLayer(config.n_embd, hidden, init, points, width, variant)
    norm = hidden_norm(config, hidden)
    return GatedSplines(pairs, config.n_embd, hidden, config.bias, norm, takes_previous=True)


def mlp(config: GPTOptions, activation: Callable[[Tensor], Tensor] = F.gelu) -> nn.Module:
    hidden = hidden_width(config, matrices=2)
    return MLP(config.n_embd, hidden, config.bias, hidden_norm(config, hidden), activation)


def swiglu(config: GPTOptions) -> nn.Module:
    hidden = hidden_width(config, matrices=3)
    return SwiGLU(config.n_embd, hidden, config.bias, hidden_norm(config, hidden))


# The feed-forward layers by the name that `--ffn` takes. Benchmarks add layers of other projects.
FEED_FORWARDS: dict[str, Callable[[GPTOptions], nn.Module]] = {
    "splines": splines,
    "gated_splines": gated_splines,
    PAIRS: pair_splines,
    "mlp": mlp,
    "mlp_tanh": partial(mlp, activation=partial(F.gelu, approximate="tanh")),  # as in GPT-2
    "relu2": partial(mlp, activation=relu_squared),
    "swiglu": swiglu,
}
