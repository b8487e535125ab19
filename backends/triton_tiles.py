"""Into what tiles the Triton kernels cut a problem: a small, fixed table by GPU generation, nothing tuned at start.

Chosen from compiled code (tests/test_triton_compiled.py repeats it for each entry): tensor-core instructions, no
spilled registers, shared memory that the generation has, and as large an output tile as that allows, since the operand
that is built in registers is built anew for each of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

OLDEST = (8, 0)  # compute capability: bfloat16 tensor cores and asynchronous copies
FEW_TOKENS = 64  # up to so many, as in sampling, narrow tiles keep more of the GPU busy
SMALLEST = 16  # that tensor cores multiply


@dataclass(frozen=True)
class Tile:
    """Sizes in tokens, inputs and outputs; warps that share it; copies in flight; see GROUP in the kernels."""

    tokens: int
    inputs: int
    outputs: int
    warps: int = 8
    stages: int = 3
    group: int = 1

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
    forward: Tile
    grad_x: Tile
    grad_weight: Tile


# Names of generations as in NVIDIA's manuals; the consumer cards have 99 KiB of shared memory where others have more.
HALF = {
    "ampere": Tiles(Tile(128, 16, 128, group=7), Tile(128, 64, 64), Tile(64, 128, 128)),
    "consumer": Tiles(Tile(128, 16, 128, group=7), Tile(128, 64, 64), Tile(32, 128, 128)),
    "hopper": Tiles(Tile(128, 16, 256, group=7), Tile(128, 64, 64), Tile(64, 128, 256)),
    # Triton 3.7.1 compiles a forward of several cells to a step into an empty kernel here.
    "blackwell": Tiles(Tile(128, 64, 128), Tile(128, 64, 64), Tile(64, 128, 128)),
}
TF32 = Tiles(Tile(64, 16, 64, 4, 2, group=4), Tile(64, 32, 32, 4, 2), Tile(32, 64, 64, 4, 2))
IEEE = Tiles(Tile(32, 16, 32, 4, 2), Tile(32, 32, 16, 4, 2), Tile(16, 32, 32, 4, 2))


def generation(capability: tuple[int, int]) -> str:
    """Which of the tables' columns a compute capability belongs to."""
    if capability[0] >= 12 or capability in ((8, 6), (8, 7), (8, 9)):
        return "consumer"
    return "ampere" if capability[0] == 8 else "hopper" if capability[0] == 9 else "blackwell"


def tiles(
    capability: tuple[int, int], dtype: torch.dtype, precision: str, tokens: int, shape: tuple[int, int, int]
) -> Tiles:
    """For operands of `dtype`, if float32 of `precision` "tf32" or "ieee"; `shape` is (I, G, O)."""
    table = HALF[generation(capability)] if dtype.itemsize == 2 else TF32 if precision == "tf32" else IEEE
    inputs, points, outputs = shape
    fitted = (fit(tile, tokens, inputs, outputs) for tile in (table.forward, table.grad_x, table.grad_weight))
    forward, grad_x, grad_weight = fitted
    return Tiles(replace(forward, group=largest_divisor(points - 1, forward.group)), grad_x, grad_weight)


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


def power_of_two(size: int) -> int:
    """The next, from the smallest that tensor cores multiply."""
    return max(SMALLEST, 1 << (size - 1).bit_length())


def largest_divisor(number: int, most: int) -> int:
    return next(divisor for divisor in range(min(number, most), 0, -1) if number % divisor == 0)


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
