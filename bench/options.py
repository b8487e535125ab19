"""Time alternative ways to look up control points in plain PyTorch: `python bench/options.py`.

Each line compares what a backend does with what it could do instead, by the medians of runs that take turns. Before
the two are timed, they must give the same result and the same gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone, before this folder

import common.threads  # noqa: F401  before torch

import torch
import torch.nn.functional as F
from torch import Tensor

from backends import BACKENDS, Problem, SplineSum
from backends.cells import flat_rows, interleave, locate
from bench.shared.machine import machine_name
from bench.shared.timing import Median, take_turns
from common.command_line import OptionParser
from common.errors import exit_on_user_error

USAGE = "python bench/options.py [--key value …]"
SPLINE_WIDTH = 4.0
# glibc returns freed blocks to the system until a block this large has been freed. Without that, the time of one and
# the same function differed threefold, depending on what had run before.
KEPT_BYTES = 31 * 2**20
RTOL, ATOL = 1e-4, 1e-3  # sums in float32 over all tokens or features, each in its own order


@dataclass(frozen=True)
class Options:
    tokens: int = 512
    """Tokens N."""
    width: int = 256
    """Width I = O."""
    grid: int = 8
    """Control points G."""
    threads: int = 2
    """CPU threads."""
    repeats: int = 9
    """Rounds in which each way runs once; the median is reported."""

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.width < 1 or self.grid < 2:
            raise ValueError("tokens and width must be at least 1, and grid at least 2")
        if self.repeats < 1 or not 1 <= self.threads <= 1024:
            raise ValueError("repeats must be at least 1, and threads from 1 to 1024")


@dataclass(frozen=True)
class Way:
    """A function of x (N, I) and the table of all control points (I·G, O), with the x to call it on."""

    name: str
    compute: Callable[[Tensor, Tensor], Tensor]
    x: Tensor

    def forward(self, table: Tensor) -> Tensor:
        with torch.no_grad():
            return self.compute(self.x, table)

    def training(self, table: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        """The gradients of x and of the table."""
        return torch.autograd.grad(self.compute(self.x, table), (self.x, table), dy)


@dataclass(frozen=True)
class Pair:
    usual: Way
    other: Way
    trains: bool = True
    needs: str = "embedding_bag"
    """The backend without which the pair is skipped. The gathers need as much memory as `embedding`."""


def pairs(x: Tensor, grid: int) -> list[Pair]:
    arithmetic = Way("arithmetic", partial(position, grid, locate), x)
    search, search32 = (partial(position, grid, partial(bucketize, dtype)) for dtype in (torch.float64, torch.float32))
    bag = Way("interleaved bags", partial(bags, grid, interleave, False), x)
    dense = Way("dense gradient", bag.compute, x)
    native = partial(backend, grid, BACKENDS["native"].spline_sum)
    by_feature = x.detach().t().contiguous().t().requires_grad_()
    gathers = Way("two gathers", partial(backend, grid, BACKENDS["embedding"].spline_sum), x)
    return [
        Pair(arithmetic, Way("bucketize, float64", search, x), trains=False),
        Pair(arithmetic, Way("bucketize, float32", search32, x), trains=False),
        Pair(bag, Way("stacked bags", partial(bags, grid, stack, False), x)),
        Pair(Way("tokens as they come", bag.compute, x), Way("tokens sorted", partial(sorted_bags, grid), x)),
        Pair(Way("native, x by token", native, x), Way("native, x by feature", native, by_feature), needs="native"),
        Pair(gathers, Way("one gather, as_strided", partial(one_gather, grid), x), needs="embedding"),
        Pair(dense, Way("sparse gradient", partial(bags, grid, interleave, True), x), needs="embedding"),
    ]


# ---- the ways --------------------------------------------------------------------------------------------------------


def position(grid: int, find: Callable[..., tuple[Tensor, Tensor]], x: Tensor, table: Tensor) -> Tensor:
    """Positions of x in knot units. At a knot two ways may choose different cells, but must give the same position."""
    cell, t = find(x, grid, SPLINE_WIDTH)
    return cell + t


def bucketize(dtype: torch.dtype, x: Tensor, grid: int, spline_width: float) -> tuple[Tensor, Tensor]:
    """Do the same as `locate`, but by a search among the knots."""
    knots = torch.linspace(-spline_width / 2, spline_width / 2, grid, dtype=dtype)
    wide = x.to(dtype)
    cell = (torch.bucketize(wide, knots, right=True) - 1).clamp_(0, grid - 2)
    return cell, ((wide - knots[cell]) * ((grid - 1) / spline_width)).to(x.dtype)


def bags(grid: int, join: Callable[[Tensor, Tensor], Tensor], sparse: bool, x: Tensor, table: Tensor) -> Tensor:
    """Compute as the backend `embedding_bag`, with `join` to put the lower and upper rows of a token in order."""
    cell, t = locate(x, grid, SPLINE_WIDTH)
    row = flat_rows(cell, grid)
    return F.embedding_bag(join(row, row + 1), table, per_sample_weights=join(1 - t, t), mode="sum", sparse=sparse)


def stack(lower: Tensor, upper: Tensor) -> Tensor:
    return torch.cat((lower, upper), dim=-1)


def sorted_bags(grid: int, x: Tensor, table: Tensor) -> Tensor:
    """Sort the tokens by the cell of their first feature, so that neighbours share at least its control points."""
    cell, _ = locate(x[:, 0], grid, SPLINE_WIDTH)
    order = cell.argsort()
    y = bags(grid, interleave, False, x.index_select(0, order), table)
    return y.index_select(0, order.argsort())


def one_gather(grid: int, x: Tensor, table: Tensor) -> Tensor:
    """Gather both rows at once, from a view of the table whose rows overlap."""
    rows, outputs = table.shape
    cell, t = locate(x, grid, SPLINE_WIDTH)
    overlapping = table.as_strided((rows - 1, 2 * outputs), (outputs, 1))
    lower, upper = F.embedding(flat_rows(cell, grid), overlapping).split(outputs, dim=-1)  # (N, I, O) each
    return torch.lerp(lower, upper, t.unsqueeze(-1)).sum(dim=1)


def backend(grid: int, spline_sum: SplineSum, x: Tensor, table: Tensor) -> Tensor:
    return spline_sum(x, table.unflatten(0, (-1, grid)), SPLINE_WIDTH, x.dtype)


# ---- the table -------------------------------------------------------------------------------------------------------


@exit_on_user_error
def main() -> None:
    options = OptionParser(Options, USAGE).parse(sys.argv[1:])
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    torch.empty(KEPT_BYTES, dtype=torch.uint8)
    x, dy = torch.randn(2, options.tokens, options.width).unbind()
    table = torch.randn(options.width * options.grid, options.width, requires_grad=True)
    print(f"{machine_name('cpu')}, torch {torch.__version__}, {options.threads} threads")
    print(f"{options.tokens} tokens x {options.width}, G={options.grid}, float32; ms, and other / usual")
    print(f"{'usual':<20} {'other':<23}{'forward':>24}{'forward + backward':>28}", flush=True)
    problem = Problem(options.width, options.grid, options.width, torch.device("cpu"), options.tokens)
    for pair in pairs(x.requires_grad_(), options.grid):
        reason = BACKENDS[pair.needs].why_not(problem)
        cells = f"  skipped: {reason}" if reason else compare(pair, table, dy, options.repeats)
        print(f"{pair.usual.name:<20} {pair.other.name:<23}{cells}", flush=True)


def compare(pair: Pair, table: Tensor, dy: Tensor, repeats: int) -> str:
    """The times of both ways, once they have been seen to agree."""
    ways = pair.usual, pair.other
    assert_same(*([way.forward(table)] for way in ways))
    cells = text_of(take_turns({way.name: partial(way.forward, table) for way in ways}, repeats, "cpu"))
    if not pair.trains:
        return cells
    assert_same(*(way.training(table, dy) for way in ways))
    return (
        cells + "  " + text_of(take_turns({way.name: partial(way.training, table, dy) for way in ways}, repeats, "cpu"))
    )


def assert_same(usual: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    for expected, actual in zip(usual, other, strict=True):
        torch.testing.assert_close(actual.to_dense() if actual.is_sparse else actual, expected, rtol=RTOL, atol=ATOL)


def text_of(times: dict[str, Median]) -> str:
    usual, other = (median.ms for median in times.values())
    return f"{usual:>9,.2f} {other:>9,.2f} {other / usual:>5.2f}x"


if __name__ == "__main__":
    main()
