"""Compiles Triton kernels for GPUs that need not be there, and reads what became of them."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

# A tensor-core instruction of any generation: mma.sync (Ampere), wgmma (Hopper), tcgen05 (Blackwell).
TENSOR_CORE = re.compile(r"\bmma\.sync\.\S+|\bwgmma\.mma_async\.\S+|\btcgen05\.mma\.\S+")
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Compiled:
    ptx: str
    shared_bytes: int
    spilled_bytes: int
    registers: int

    def tensor_core_instructions(self) -> list[str]:
        return TENSOR_CORE.findall(self.ptx)


def compile_kernel(kernel: Any, arch: int, types: dict[str, str], constants: dict[str, Any], folder: Path) -> Compiled:
    """For compute capability `arch`/10. `types` of arguments that are neither int32 nor pointers to float32."""
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
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    report = assemble(ptx, arch, folder)
    spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill", report))
    registers = int(re.search(r"Used (\d+) registers", report)[1])  # type: ignore[index]
    return Compiled(ptx, compiled.metadata.shared, spilled, registers)


def assemble(ptx: str, arch: int, folder: Path) -> str:
    """What the assembler says of registers and spills."""
    target = re.search(r"\.target (sm_\w+)", ptx)[1]  # type: ignore[index]
    path = folder / "kernel.ptx"
    path.write_text(ptx)
    command = [get_ptxas(arch).path, "-v", f"--gpu-name={target}", str(path), "-o", str(folder / "kernel.cubin")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr
