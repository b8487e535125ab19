"""Compiles the Triton kernels for GPUs that need not be there, with the tiles and constants of a launch."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from backends import triton_kernels, triton_tiles
from backends.triton_tiles import Hats, Tile, Tiles
from bench.shared.machine_code import MachineCode

KERNELS = ("forward", "grad_x", "grad_weight")  # the last in one launch or several, see triton_tiles.launches_of_hats
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
# A tensor-core instruction of any generation: mma.sync (Ampere), wgmma (Hopper), tcgen05 (Blackwell).
TENSOR_CORE = re.compile(r"\bmma\.sync\.\S+|\bwgmma\.mma_async\.\S+|\btcgen05\.mma\.\S+")
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Build:
    """A kernel for one problem and compute capability `arch`/10."""

    kernel: str
    arch: int = 90
    dtype: torch.dtype = torch.bfloat16
    precision: str = "ieee"
    points: int = 8
    tokens: int = 65_536
    inputs: int = 768
    outputs: int = 768
    launch: int = 0  # of the gradient of W

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"{self.inputs}x{self.outputs}-N{self.tokens}"
        launch = f"-launch{self.launch}" if self.launch else ""
        return f"{self.kernel}{launch}-sm_{self.arch}-{dtype}-{self.precision}-G{self.points}-{shape}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(I', G, O'), padded as the backend pads it."""
        inputs, outputs = (size + -size % triton_tiles.ROW for size in (self.inputs, self.outputs))
        return inputs, self.points, outputs

    def tiles(self) -> Tiles:
        capability = divmod(self.arch, 10)
        return triton_tiles.tiles(capability, self.dtype, self.precision, self.tokens, self.shape)

    def hats(self) -> list[Hats]:
        return triton_tiles.launches_of_hats(self.tiles(), self.points, self.shape[0])

    def tile(self) -> Tile:
        return self.hats()[self.launch].tile if self.kernel == "grad_weight" else getattr(self.tiles(), self.kernel)

    def constants(self) -> dict[str, Any]:
        tile, hats = self.tile(), self.hats()[self.launch]
        groups: dict[str, dict[str, Any]] = {
            "forward": {"GROUP": tile.group, "SPAN": tile.span},
            "grad_x": {"INTERPRETED": False},
            "grad_weight": {"FIRST": hats.first, "GROUPS": hats.groups, "GROUP": tile.group},
        }
        return {"CELLS": self.points - 1, "PRECISION": self.precision, **groups[self.kernel], **tile.options()}

    def types(self) -> dict[str, str]:
        """Of the arguments that are neither int32 nor pointers to float32, which x, the sums and the results are."""
        operand = dict.fromkeys(("rise_pointer", "y_pointer", "grad_y_pointer"), TYPES[self.dtype])
        pair = "*u16" if self.points - 1 <= triton_tiles.BYTE_CELLS else "*u32"
        return {**operand, "cell_pointer": pair, "inverse_spacing": "fp32"}


@dataclass(frozen=True)
class Compiled:
    ptx: str
    report: str  # of the assembler
    code: MachineCode | None  # Hopper's
    threads: int
    shared_bytes: int
    spilled_bytes: int
    registers: int

    def tensor_core_instructions(self) -> list[str]:
        return TENSOR_CORE.findall(self.ptx)

    def serialized(self) -> bool:
        """Whether the assembler made asynchronous products wait for each other: its warnings C7510 to C7519."""
        return re.search(r"\bC751\d\b", self.report) is not None


def compiled(build: Build, folder: Path) -> Compiled:
    kernel = getattr(triton_kernels, f"{build.kernel}_kernel")
    return compile_kernel(kernel, build.arch, build.types(), build.constants(), folder)


def compile_kernel(kernel: Any, arch: int, types: dict[str, str], constants: dict[str, Any], folder: Path) -> Compiled:
    """`types` as `Build.types`; files go to `folder`."""
    constants = dict(constants)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = types.get(name, "*fp32" if name.endswith("pointer") else "i32")
        if signature[name] != "fp32":
            attributes[(index,)] = ALIGNED
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = made.asm["ptx"]
    report = assemble(ptx, arch, folder)
    spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill", report))
    registers = int(re.search(r"Used (\d+) registers", report)[1])  # type: ignore[index]
    code = MachineCode(disassemble(folder)) if arch // 10 == 9 else None
    return Compiled(ptx, report, code, 32 * options["num_warps"], made.metadata.shared, spilled, registers)


def assemble(ptx: str, arch: int, folder: Path) -> str:
    """What the assembler says of registers, spills and serialized products."""
    target = re.search(r"\.target (sm_\w+)", ptx)[1]  # type: ignore[index]
    path = folder / "kernel.ptx"
    path.write_text(ptx)
    command = [get_ptxas(arch).path, "-v", f"--gpu-name={target}", str(path), "-o", str(folder / "kernel.cubin")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def disassemble(folder: Path) -> str:
    """The machine code of what `assemble` left there, by the tool that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    command = [str(tool), "-c", str(folder / "kernel.cubin")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
