"""Reads Hopper's machine code, as nvdisasm prints it: its loops, what a round of one does, and a hazard.

Hopper multiplies asynchronously. An instruction HGMMA starts a product, one marked gsb0 ends a group of them, and
WARPGROUP.DEPBAR waits until at most so many groups are under way. Until then a product still reads its left operand, if
that is in registers, and writes the registers of its sums.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# Of the instructions seen in these kernels, those of the arithmetic unit that takes two cycles for a warp (CUDA's
# programming guide, "Arithmetic Instructions": 64 results a cycle on a processor where multiply-adds are 128).
HALF_RATE: tuple[str, ...] = (
    "FMNMX",
    "F2FP",
    "FSEL",
    "FSETP",
    "I2FP",
    "IABS",
    "IADD3",
    "IMNMX",
    "ISETP",
    "LEA",
    "LOP3",
    "PLOP3",
)
HALF_RATE += ("PRMT", "SEL", "SGXT", "SHF", "VIADD", "VIMNMX")
WIDE = {"64": 2, "128": 4, "WIDE": 2}  # registers that an instruction with such a modifier writes
# Instructions that write none.
NOWHERE = (
    "BAR",
    "BRA",
    "DEPBAR",
    "EXIT",
    "LDGDEPBAR",
    "LDGSTS",
    "NOP",
    "RED",
    "STG",
    "STL",
    "STS",
    "STSM",
    "WARPGROUP",
)


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str

    @property
    def opcode(self) -> list[str]:
        """With its modifiers, without the predicate."""
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0].split(".")

    @property
    def operands(self) -> list[str]:
        parts = re.sub(r"^@!?U?P\w+\s+", "", self.text).split(None, 1)
        return [operand.strip() for operand in parts[1].split(",")] if len(parts) > 1 else []

    def written(self) -> set[int]:
        """Numbers of the registers that it writes. Products are not meant, whose time to write comes later."""
        name, *modifiers = self.opcode
        if name in NOWHERE or name == "HGMMA" or not self.operands:
            return set()
        first = register(self.operands[0])
        if first is None:
            return set()
        count = max([WIDE.get(modifier, 1) for modifier in modifiers]) if modifiers else 1
        if name == "CS2R" and "32" not in modifiers:
            count = 2
        if name == "LDSM":
            count = int(modifiers[-1]) if modifiers[-1].isdigit() else 1
        return set(range(first, first + count))

    def read(self) -> set[int]:
        """Numbers of the registers that it names as sources, without those that belong to a wide one."""
        sources = self.operands if self.opcode[0] in NOWHERE else self.operands[1:]
        return {int(number) for source in sources for number in re.findall(r"\bR(\d+)\b", source)}


@dataclass(frozen=True)
class Product:
    """One HGMMA: the registers of its left operand and of its sums, and whether a group ends with it."""

    left: frozenset[int]
    sums: frozenset[int]
    columns: int
    ends_group: bool

    @staticmethod
    def of(instruction: Instruction) -> Product | None:
        if instruction.opcode[0] != "HGMMA":
            return None
        columns = int(instruction.opcode[1].split("x")[1])
        first, left = (register(operand) for operand in instruction.operands[:2])
        sums = frozenset(range(first, first + columns // 2)) if first is not None else frozenset()
        taken = frozenset(range(left, left + 4)) if left is not None else frozenset()
        return Product(taken, sums, columns, "gsb0" in instruction.text)


class MachineCode:
    def __init__(self, text: str) -> None:
        self.instructions: list[Instruction] = []
        self._labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                self._labels[label[1]] = len(self.instructions)
            elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
                self.instructions.append(Instruction(int(found[1], 16), found[2]))

    def loops(self) -> list[Loop]:
        """Those that multiply, the inner before the outer."""
        found = []
        for end, instruction in enumerate(self.instructions):
            target = re.search(r"\.L_x_\d+", instruction.text) if instruction.opcode[0] == "BRA" else None
            if target and self._labels.get(target[0], end + 1) <= end:
                found.append(Loop(self.instructions[self._labels[target[0]] : end + 1]))
        return sorted((loop for loop in found if loop.products()), key=lambda loop: len(loop.instructions))

    def hazards(self) -> list[str]:
        """Instructions that touch what a product under way reads or writes, in two rounds of each loop and outside."""
        passes = [self.instructions, *(loop.instructions * 2 for loop in self.loops())]
        return sorted({conflict for instructions in passes for conflict in conflicts(instructions)})


@dataclass(frozen=True)
class Loop:
    instructions: list[Instruction]

    def count(self, *names: str) -> int:
        return sum(instruction.opcode[0] in names for instruction in self.instructions)

    def products(self) -> list[Product]:
        return [product for product in map(Product.of, self.instructions) if product is not None]

    def tensor_cycles(self) -> int:
        """In which a processor's tensor cores do one warp group's products of a round: two columns of 64 rows each."""
        return sum(product.columns // 2 for product in self.products())

    def waits(self) -> list[int]:
        """How many groups each wait leaves under way."""
        return [left for left in map(groups_left, self.instructions) if left is not None]

    def issue_cycles(self) -> int:
        """That a scheduler is busy with a warp's round: one an instruction, or two for each of the half-rate unit's."""
        return max(len(self.instructions), 2 * self.count(*HALF_RATE))

    def shared_bytes(self, threads: int) -> int:
        """Through shared memory: read by products, 64 rows or the columns of 32 bytes each, and moved by `threads`."""
        products = sum(32 * (product.columns + (0 if product.left else 64)) for product in self.products())
        moved = 0
        for instruction in self.instructions:
            name, *modifiers = instruction.opcode
            if name in ("LDS", "STS"):
                moved += 4 * max([WIDE.get(modifier, 1) for modifier in modifiers], default=1)
            elif name in ("LDSM", "STSM"):
                moved += 4 * int(modifiers[-1] if modifiers[-1].isdigit() else 1)
        return products * threads // 128 + moved * threads + self.copied_bytes(threads)

    def copied_bytes(self, threads: int) -> int:
        """From global to shared memory by `threads` threads, all of whose copies are of 16 bytes."""
        return 16 * threads * self.count("LDGSTS")


def conflicts(instructions: Iterable[Instruction]) -> Iterator[str]:
    """Instructions that write a left operand under way, or touch sums under way."""
    groups: list[list[Product]] = [[]]  # the last is not yet ended
    for instruction in instructions:
        left = groups_left(instruction)
        if left is not None:
            groups = [*groups[:-1][-left:], groups[-1]] if left else [groups[-1]]
        product = Product.of(instruction)
        if product is not None:
            groups[-1].append(product)
            if product.ends_group:
                groups.append([])
            continue
        operands = {number for group in groups for one in group for number in one.left}
        sums = {number for group in groups for one in group for number in one.sums}
        if instruction.written() & (operands | sums) or instruction.read() & sums:
            yield f"{instruction.address:04x} {instruction.text}"


def groups_left(instruction: Instruction) -> int | None:
    """How many groups of products may still be under way after this one, if it waits for any."""
    found = re.search(r"WARPGROUP\.DEPBAR\S* gsb0, (0x[0-9a-f]+)", instruction.text)
    return int(found[1], 16) if found else None


def register(operand: str) -> int | None:
    found = re.match(r"R(\d+)\b", operand)
    return int(found[1]) if found else None
