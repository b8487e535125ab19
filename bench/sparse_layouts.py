"""Time the spline layer's sparse product in every sparse layout of PyTorch: `python bench/sparse_layouts.py`.

The products are y = B @ W and dW = Bᵀ @ dy, where B (N, I·G) has two non-zeros per feature. The time includes making B
in its layout, because B changes at each step.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone, before this folder

import common.threads  # noqa: F401  before torch

import torch
from torch import Tensor

from backends.cells import flat_rows, interleave, locate
from bench.shared.machine import machine_name
from bench.shared.timing import in_one_line, take_turns
from common.command_line import OptionParser
from common.errors import exit_on_user_error

USAGE = "python bench/sparse_layouts.py [--key value …]"
SPLINE_WIDTH = 4.0
RTOL = ATOL = 1e-3


@dataclass(frozen=True)
class Options:
    tokens: int = 4096
    """Tokens N."""
    width: int = 384
    """Width I = O."""
    grid: int = 8
    """Control points G."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: int = 2
    """CPU threads."""
    repeats: int = 9
    """Rounds in which each layout is used once; the median is reported."""

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda") or (self.device == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"device must be cpu, or cuda where there is a GPU; got {self.device!r}")
        for name in ("tokens", "width", "threads", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.grid < 2:
            raise ValueError(f"grid must be at least 2; got {self.grid}")


@dataclass(frozen=True)
class Basis:
    """The non-zeros of B, row by row: their `columns` and `values`, (N·I·2,)."""

    columns: Tensor
    values: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, x: Tensor, grid: int) -> Basis:
        cell, t = locate(x, grid, SPLINE_WIDTH)
        row = flat_rows(cell, grid)
        columns, values = interleave(row, row + 1), interleave(1 - t, t)
        return cls(columns.flatten().int(), values.flatten(), (x.shape[0], x.shape[1] * grid))

    @property
    def row_starts(self) -> Tensor:
        step = len(self.values) // self.shape[0]
        return torch.arange(0, len(self.values) + 1, step, dtype=torch.int32, device=self.values.device)

    def csr(self) -> Tensor:
        return torch.sparse_csr_tensor(self.row_starts, self.columns, self.values, self.shape, check_invariants=False)

    def coo(self) -> Tensor:
        rows = torch.arange(self.shape[0], device=self.values.device)
        rows = rows.repeat_interleave(len(self.values) // self.shape[0])
        indices = torch.stack((rows, self.columns.long()))
        return torch.sparse_coo_tensor(indices, self.values, self.shape, is_coalesced=True, check_invariants=False)

    def csc(self) -> Tensor:
        return self.csr().to_sparse_csc()

    def bsr(self) -> Tensor:
        """B in blocks of one row and two columns. A pair of non-zeros that begins at an odd column takes two blocks."""
        return self.csr().to_sparse_bsr((1, 2))

    def transposed_csr(self) -> Tensor:
        return self.csr().t().to_sparse_csr()

    def transposed_csc(self) -> Tensor:
        """The transpose of B: the CSR arrays of B read as CSC, without moving anything."""
        shape = self.shape[::-1]
        return torch.sparse_csc_tensor(self.row_starts, self.columns, self.values, shape, check_invariants=False)

    def transposed_coo(self) -> Tensor:
        return self.coo().t()


@exit_on_user_error
def main() -> None:
    options = OptionParser(Options, USAGE).parse(sys.argv[1:])
    warnings.simplefilter("ignore", UserWarning)  # "Sparse CSR tensor support is in beta state"
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    x, dy = torch.randn(2, options.tokens, options.width, device=options.device).unbind()
    table = torch.randn(options.width * options.grid, options.width, device=options.device)
    basis = Basis.of(x, options.grid)
    print(f"{machine_name(options.device)}, torch {torch.__version__}, {options.threads} threads")
    print(
        f"{options.tokens} tokens x {options.width}, G={options.grid}, float32; ms with making B, and relative to CSR"
    )
    compare("y = B @ W", {"CSR": basis.csr, "COO": basis.coo, "CSC": basis.csc, "BSR": basis.bsr}, table, options)
    transposes = {"CSR": basis.transposed_csr, "CSC": basis.transposed_csc, "COO": basis.transposed_coo}
    compare("dW = Bᵀ @ dy", transposes, dy, options)


def compare(title: str, layouts: dict[str, Callable[[], Tensor]], dense: Tensor, options: Options) -> None:
    """Print the time of each layout, or why PyTorch has no product for it."""
    runs: dict[str, Callable[[], Tensor]] = {}
    print(title)
    for name, make in layouts.items():
        run = partial(product, make, dense)
        try:
            result = run()
        except (RuntimeError, NotImplementedError) as error:
            print(f"  {name}: {in_one_line(error)}")
            continue
        runs[name] = run
        torch.testing.assert_close(result, runs["CSR"](), rtol=RTOL, atol=ATOL)
    times = take_turns(runs, options.repeats, options.device)
    for name, median in times.items():
        print(f"  {name}: {median.ms:>9.2f} ms {median.ms / times['CSR'].ms:>6.2f}x")


def product(make: Callable[[], Tensor], dense: Tensor) -> Tensor:
    return make() @ dense


if __name__ == "__main__":
    main()
