"""Time causal attention on a CPU: `python bench/attention.py`.

PyTorch's attention alone in float32 and in bfloat16, which is why attention.py computes in float32 on CPUs. Then the
whole layer with rotary positions and QK-norm, by PyTorch's operators and by one of ours (backends/fused_attention.py).
Ways take turns, and their medians are compared.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone, before this folder

import common.threads  # noqa: F401  before torch

import torch
import torch.nn.functional as F
from torch import Tensor

from attention import CausalSelfAttention
from bench.shared.machine import machine_name
from bench.shared.timing import take_turns
from common.command_line import OptionParser
from common.errors import exit_on_user_error
from embeddings import RotaryEmbedding

USAGE = "python bench/attention.py [--key value …]"


@dataclass(frozen=True)
class Options:
    batch_size: int = 12
    """Sequences."""
    n_head: int = 4
    """Attention heads."""
    block_size: int = 64
    """Tokens per sequence."""
    n_embd: int = 128
    """Width of all heads together."""
    threads: int = 1
    """CPU threads."""
    repeats: int = 31
    """Rounds. Each dtype runs once a round, and the median is reported."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "n_head", "block_size", "n_embd", "threads", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head; got {self.n_embd} and {self.n_head}")


@exit_on_user_error
def main() -> None:
    options = OptionParser(Options, USAGE).parse(sys.argv[1:])
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = (4, options.batch_size, options.n_head, options.block_size, options.n_embd // options.n_head)
    tensors = torch.randn(shape)
    print(f"{machine_name('cpu')}, torch {torch.__version__}, {options.threads} threads; {shape[1:]}, milliseconds")
    for heading, by_pass in (
        ("attention alone", {"forward": dtypes(attend, tensors), "forward+backward": dtypes(gradients, tensors)}),
        ("the layer", {"forward": layers(options, False), "forward+backward": layers(options, True)}),
    ):
        first, second = by_pass["forward"]
        print(f"{heading:>18}{first:>22}{second:>22}{'ratio':>8}")
        for name, ways in by_pass.items():
            times = take_turns(ways, options.repeats, "cpu")
            print(
                f"{name:>18}{times[first].ms:>22.2f}{times[second].ms:>22.2f}{times[second].ms / times[first].ms:>8.2f}"
            )


def dtypes(compute: Callable[[Tensor], object], tensors: Tensor) -> dict[str, Callable[[], object]]:
    narrow = tensors.bfloat16()
    return {"float32": partial(compute, tensors), "bfloat16": partial(compute, narrow)}


def layers(options: Options, with_backward: bool) -> dict[str, Callable[[], object]]:
    """A pass through the layer, its projections included, by either way."""
    rope = RotaryEmbedding(options.n_embd // options.n_head, options.block_size)
    layer = CausalSelfAttention(0, options.n_embd, options.n_head, bias=False, dropout=0.0, qk_norm=True, rope=rope)
    x, grad = torch.randn(2, options.batch_size, options.block_size, options.n_embd)
    x.requires_grad_()
    trained = [x, *layer.parameters()]

    def run(by_kernel: bool) -> object:
        layer.use_kernel(by_kernel)
        y = layer(x, None)
        return torch.autograd.grad(y, trained, grad) if with_backward else y

    return {"PyTorch's operators": partial(run, False), "one operator": partial(run, True)}


def attend(tensors: Tensor) -> Tensor:
    """Attention of the first three of `tensors`: q, k, v and the gradient of the result, (B, heads, T, head_dim)."""
    q, k, v, _ = tensors
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def gradients(tensors: Tensor) -> tuple[Tensor, ...]:
    q, k, v, grad = tensors
    q, k, v = (part.detach().requires_grad_() for part in (q, k, v))
    return torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), grad)


if __name__ == "__main__":
    main()
