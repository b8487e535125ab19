"""Into what tiles the Triton kernels cut a problem: a small, fixed table by GPU generation, nothing tuned at start.

Chosen from compiled code (tests/test_triton_compiled.py repeats it for each entry, docs/gpu.md says what it is worth):
tensor-core instructions, no spilled registers, shared memory that the generation has. On Hopper the gradient of W
leaves room for two programs on a processor, of which one builds its operand while the other multiplies. The gradient of
x, which builds nothing, takes the largest tile, as it waits for memory; so does the forward, as it waits for shared
memory, of which larger products need less.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

OLDEST = (8, 0)  # compute capability: bfloat16 tensor cores and asynchronous copies
FEW_TOKENS = 64  # up to so many, as in sampling, narrow tiles keep more of the GPU busy
SMALLEST = 16  # that tensor cores multiply
ROW = 32  # of so many values the rows of all matrices are a multiple; see triton_kernels.py
BYTE_CELLS = 256  # up to so many, a cell's number is kept in a byte


@dataclass(frozen=True)
class Tile:
    """Sizes in tokens, inputs and outputs; warps that share it; copies in flight; programs that share a processor.

    GROUP and SPAN, in the kernels: how many ramps or hats make one operand, and for how many ramps x is fetched once.
    """

    tokens: int
    inputs: int
    outputs: int
    warps: int = 8
    stages: int = 3
    group: int = 1
    span: int = 1
    residents: int = 1

    def options(self) -> dict[str, int]:
        """As arguments of a kernel's launch."""
        return {
            "BLOCK_N": self.tokens,
            "BLOCK_I": self.inputs,
            "BLOCK_O": self.outputs,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


@dataclass(frozen=True)
class Tiles:
    """By kernel; the gradient of W also for a single control point, which is what is left of grids such as 5 and 9."""

    forward: Tile
    grad_x: Tile
    grad_weight: Tile
    single_weight: Tile


@dataclass(frozen=True)
class Hats:
    """`groups` times `tile.group` hats from number `first` on, for which the gradient of W is one launch."""

    first: int
    groups: int
    tile: Tile


# Names of generations as in NVIDIA's manuals; the consumer cards have 99 KiB of shared memory where others have more.
HALF = {
    "ampere": Tiles(
        Tile(128, 16, 128, group=4, span=8), Tile(128, 128, 32), Tile(32, 16, 128, group=8), Tile(64, 128, 64)
    ),
    "consumer": Tiles(
        Tile(128, 16, 64, group=4, span=8), Tile(128, 128, 32), Tile(32, 16, 128, group=8), Tile(64, 128, 64)
    ),
    "hopper": Tiles(
        Tile(128, 16, 256, stages=2, group=8, span=8),
        Tile(128, 256, 32, stages=4),
        Tile(64, 16, 128, 4, group=8, residents=2),
        Tile(64, 128, 256),
    ),
    "blackwell": Tiles(
        Tile(128, 16, 128, group=4, span=8), Tile(128, 128, 64), Tile(64, 16, 128, group=8), Tile(64, 128, 128)
    ),
}
TF32 = Tiles(
    Tile(64, 16, 64, 4, 2, group=2, span=4),
    Tile(64, 32, 32, 4, 2),
    Tile(32, 16, 64, 4, 2, group=4),
    Tile(32, 64, 64, 4, 2),
)
IEEE = Tiles(
    Tile(32, 16, 32, 4, 2, group=1, span=4),
    Tile(32, 32, 16, 4, 2),
    Tile(16, 16, 32, 4, 2, group=2),
    Tile(16, 32, 32, 4, 2),
)


def generation(capability: tuple[int, int]) -> str:
    """Which of the tables' columns a compute capability belongs to."""
    if capability[0] >= 12 or capability in ((8, 6), (8, 7), (8, 9)):
        return "consumer"
    return "ampere" if capability[0] == 8 else "hopper" if capability[0] == 9 else "blackwell"


def tiles(
    capability: tuple[int, int], dtype: torch.dtype, precision: str, tokens: int, shape: tuple[int, int, int]
) -> Tiles:
    """For operands of `dtype`, if float32 of `precision` "tf32" or "ieee"; `shape` is (I, G, O), I and O padded."""
    table = HALF[generation(capability)] if dtype.itemsize == 2 else TF32 if precision == "tf32" else IEEE
    inputs, points, outputs = shape
    forward, grad_x, *weights = (
        fit(tile, tokens, inputs, outputs)
        for tile in (table.forward, table.grad_x, table.grad_weight, table.single_weight)
    )
    if points - 1 > BYTE_CELLS or tokens <= FEW_TOKENS:  # as numbers of cells, and fewer warps, take more registers
        grad_x = replace(grad_x, inputs=min(grad_x.inputs, 128))
    return Tiles(with_ramps(forward, points - 1, inputs), grad_x, *weights)


def fit(tile: Tile, tokens: int, inputs: int, outputs: int) -> Tile:
    """No larger than the problem."""
    most_outputs = 64 if tokens <= FEW_TOKENS else tile.outputs
    return replace(
        tile,
        tokens=min(tile.tokens, power_of_two(tokens)),
        inputs=min(tile.inputs, power_of_two(inputs)),
        outputs=min(most_outputs, tile.outputs, power_of_two(outputs)),
        warps=4 if tokens <= FEW_TOKENS else tile.warps,
    )


def with_ramps(tile: Tile, cells: int, inputs: int) -> Tile:
    """No more ramps to an operand than there are, and of two spans the one that wastes less: whole, or half of it.

    A tile whose span is one operand takes more inputs in place of ramps, so that as much is multiplied between waits.
    """
    group, span = (min(size, power_of_two(cells, 1)) for size in (tile.group, tile.span))
    one_operand = tile.span == tile.group
    least = 1 if one_operand else group
    span = min((span, max(least, span // 2)), key=lambda span: (-(-cells // span) * span, -span))
    if not one_operand:
        return replace(tile, group=group, span=span)
    wider = min(tile.inputs * tile.span // span, power_of_two(inputs), ROW)  # of which all rows are a multiple
    return replace(tile, inputs=wider, group=span, span=span)


def launches_of_hats(tiles: Tiles, points: int, inputs: int) -> list[Hats]:
    """All hats, in groups of powers of two with few zeros to fill them up; one that is left over is by itself."""
    most = tiles.grad_weight.group
    single = points % 4 == 1
    rest = points - single
    whole, remaining = divmod(rest, most)
    launches = [Hats(0, whole, tiles.grad_weight)] if whole else []
    if remaining:
        group = power_of_two(remaining, 1)
        wider = min(tiles.grad_weight.inputs * most // group, power_of_two(inputs))  # so that as much is multiplied
        launches.append(Hats(whole * most, 1, replace(tiles.grad_weight, group=group, inputs=wider)))
    if single:
        launches.append(Hats(rest, 1, tiles.single_weight))
    return launches


def power_of_two(size: int, least: int = SMALLEST) -> int:
    """The next, from the smallest that tensor cores multiply."""
    return max(least, 1 << (size - 1).bit_length())


def token_splits(programs: int, tokens: int, block: int, processors: int, most: int = 16) -> int:
    """Into how many parts, each a program, to cut the sum over tokens, so that they fill the processors evenly.

    Few programs leave processors idle, and so does a last round of them that is nearly empty; a part should still have
    some blocks of tokens. The least number of parts that comes within 5 % of the best use.
    """
    largest = max(1, min(most, tokens // (4 * block)))

    def use(splits: int) -> float:
        rounds = -(-programs * splits // processors)
        return programs * splits / (rounds * processors)

    best = max(use(splits) for splits in range(1, largest + 1))
    return next(splits for splits in range(1, largest + 1) if use(splits) >= 0.95 * best)
