"""Time a layer's training step with and without sparse gradients: `python bench/sparse_gradients.py`.

Sparse gradients leave out the rows of the table of control points that no token of the step reached. The optimizer
(torch.optim.SparseAdam) leaves them out as well. They are compared with dense gradients and fused Adam, by the same
backend and by the one that the layer chooses. Contestants take turns, and medians are compared.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone, before this folder

import common.threads  # noqa: F401  before torch

import torch
import torch.nn.functional as F
from torch import Tensor

import backends
from backends.cells import flat_rows, interleave, locate
from bench.shared.machine import machine_name
from bench.shared.timing import take_turns
from common.command_line import OptionParser
from common.errors import UserError, exit_on_user_error

USAGE = "python bench/sparse_gradients.py [--tokens 16,768 --grids 8,64]"
SPLINE_WIDTH = 4.0


@dataclass(frozen=True)
class Arguments:
    tokens: str = "1,16,128,768"
    """Tokens per step."""
    grids: str = "8,64,512"
    """Numbers of control points."""
    width: int = 128
    """Width I = O."""
    threads: int = 2
    """CPU threads."""
    repeats: int = 15
    """Rounds, of which the median is reported."""

    def __post_init__(self) -> None:
        if min(self.width, self.threads, self.repeats) < 1:
            raise ValueError("width, threads and repeats must be at least 1")


@exit_on_user_error
def main() -> None:
    arguments = OptionParser(Arguments, USAGE).parse(sys.argv[1:])
    try:
        tokens = [int(count) for count in arguments.tokens.split(",")]
        grids = [int(grid) for grid in arguments.grids.split(",")]
    except ValueError as error:
        raise UserError(f"tokens and grids must be integers separated by commas; {error}") from None
    if min(tokens) < 1 or min(grids) < 2:
        raise UserError("tokens must be at least 1 and grids at least 2")
    torch.set_num_threads(arguments.threads)
    print(f"{machine_name('cpu')}, torch {torch.__version__}, {arguments.threads} threads, width {arguments.width}")
    print(
        "forward, backward and Adam's step of one layer, milliseconds; rows: the share that the tokens of a step reach"
    )
    names = ("sparse", "dense, same backend", "dense, as used")
    print(f"{'tokens':>7} {'G':>5} {'rows':>7}" + "".join(f"{name:>21}" for name in names))
    for count in tokens:
        for grid in grids:
            x = torch.randn(count, arguments.width)
            steps = (sparse_step(x, grid), dense_step(x, grid, "embedding_bag"), dense_step(x, grid, "auto"))
            times = take_turns(dict(zip(names, steps, strict=True)), arguments.repeats, "cpu")
            reached = rows_and_weights(x, grid)[0].unique().numel() / (arguments.width * grid)
            row = f"{count:>7} {grid:>5} {reached:>7.1%}"
            print(row + "".join(f"{times[name].ms:>21.2f}" for name in names), flush=True)


def rows_and_weights(x: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """The rows of the (I·G, O) table that each token reads, and their weights, both (N, 2·I)."""
    cell, t = locate(x, grid, SPLINE_WIDTH)
    rows = flat_rows(cell, grid)
    return interleave(rows, rows + 1), interleave(1 - t, t)


def sparse_step(x: Tensor, grid: int) -> Callable[[], None]:
    width = x.shape[1]
    table = torch.zeros(width * grid, width, requires_grad=True)
    optimizer = torch.optim.SparseAdam([table])

    def step() -> None:
        rows, weights = rows_and_weights(x, grid)
        F.embedding_bag(rows, table, per_sample_weights=weights, mode="sum", sparse=True).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def dense_step(x: Tensor, grid: int, impl: str) -> Callable[[], None]:
    width = x.shape[1]
    table = torch.zeros(width, grid, width, requires_grad=True)
    optimizer = torch.optim.Adam([table], fused=True)
    backend, _ = backends.choose(impl, backends.Problem(width, grid, width, x.device))

    def step() -> None:
        backend.spline_sum(x, table, SPLINE_WIDTH, torch.float32).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
