"""Feed-forward layers that follow attention in a block: gated splines, and the MLPs they are compared with.

Each maps width → width. A class with `takes_gate_input` has a gate and takes the input of that gate as a second
argument. With token shift, gated layers show the mix of this and the previous token to their gate only; other layers
see nothing but the mix. A layer with `takes_previous` takes the previous token's features as a third.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
