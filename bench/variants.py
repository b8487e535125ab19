"""Time what a variant's change of basis costs in a training step: `python bench/variants.py --help`.

The first table has whole steps of a model (forward, backward and AdamW) by variant and number of control points. The
second has ways to compute the change of basis of one layer. Contestants take turns, and medians are compared.
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
from torch import Tensor

from bench.shared.machine import machine_name
from bench.shared.timing import take_turns
from common.command_line import OptionParser
from common.errors import UserError, exit_on_user_error
from model import GPT, GPTConfig
from splines.parametrisation import basis, mirrored_product

USAGE = "python bench/variants.py [--grids 8,16 --batch_size 12]"
# DCT stands for all variants that multiply by a matrix: each takes as long as the others.
VARIANTS = ("B-spline", "DCT", "parallel_scan")


@dataclass(frozen=True)
class Arguments:
    grids: str = "5,8,16,32,64"
    """Numbers of control points."""
    n_layer: int = 4
    """Blocks of the model."""
    n_embd: int = 128
    """Width of the model."""
    batch_size: int = 12
    """Sequences per step."""
    block_size: int = 64
    """Tokens per sequence."""
    threads: int = 2
    """CPU threads."""
    repeats: int = 15
    """Rounds, of which the median is reported."""

    def __post_init__(self) -> None:
        if min(self.n_layer, self.n_embd, self.batch_size, self.block_size, self.threads, self.repeats) < 1:
            raise ValueError("n_layer, n_embd, batch_size, block_size, threads and repeats must be at least 1")


@exit_on_user_error
def main() -> None:
    arguments = OptionParser(Arguments, USAGE).parse(sys.argv[1:])
    try:
        grids = [int(grid) for grid in arguments.grids.split(",")]
    except ValueError as error:
        raise UserError(f"grids must be integers separated by commas; {error}") from None
    if min(grids) < 2:
        raise UserError(f"grids must be at least 2; got {min(grids)}")
    torch.set_num_threads(arguments.threads)
    print(f"{machine_name('cpu')}, torch {torch.__version__}, {arguments.threads} threads")
    tokens = arguments.batch_size * arguments.block_size
    print(f"a step of {arguments.n_layer} layers of width {arguments.n_embd} on {tokens} tokens, milliseconds")
    print(f"{'G':>5}" + "".join(f"{variant:>20}" for variant in VARIANTS))
    for grid in grids:
        times = take_turns({v: training_step(arguments, v, grid) for v in VARIANTS}, arguments.repeats, "cpu")
        usual = times["B-spline"].ms
        print(f"{grid:>5}" + "".join(f"{times[v].ms:>11.1f} {times[v].ms / usual - 1:>+7.1%}" for v in VARIANTS))
    print("the change of basis of one layer alone, forward and backward, milliseconds")
    ways = change_of_basis(arguments.n_embd, grids[0])
    print(f"{'G':>5}" + "".join(f"{way:>20}" for way in ways))
    for grid in grids:
        times = take_turns(change_of_basis(arguments.n_embd, grid), arguments.repeats, "cpu")
        print(f"{grid:>5}" + "".join(f"{times[way].ms:>20.2f}" for way in ways))


def training_step(arguments: Arguments, variant: str, grid: int) -> Callable[[], None]:
    config = GPTConfig(
        n_layer=arguments.n_layer,
        n_embd=arguments.n_embd,
        block_size=arguments.block_size,
        vocab_size=65,
        num_control_points=grid,
        kan_variant=variant,
    )
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(65, (arguments.batch_size, arguments.block_size))

    def step() -> None:
        model(tokens, tokens)[1].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def change_of_basis(width: int, grid: int) -> dict[str, Callable[[], object]]:
    weight, dy = torch.randn(2, width, grid, width).unbind()
    weight.requires_grad_()
    matrix = torch.from_numpy(basis("DCT", grid).copy()).float()

    def gradient(product: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad(product(weight), weight, dy)[0]

    return {
        "one product": partial(gradient, lambda w: matrix @ w),
        "product by halves": partial(gradient, lambda w: mirrored_product(matrix, w)),
        "two prefix sums": partial(gradient, lambda w: w.cumsum(1).cumsum(1)),
    }


if __name__ == "__main__":
    main()
