"""The Triton kernels, compiled for each GPU generation: tensor cores used, nothing spilled, memory enough."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from backends import triton_tiles
from backends.triton_tiles import Tile

pytest.importorskip("triton", reason="the kernels are compiled by triton, which is not installed")
from backends import triton_kernels

compiler = pytest.importorskip("tests.triton_compiler", reason="Triton has moved its compiler", exc_type=ImportError)

KIB = 1024
SHARED_BYTES = {80: 163 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}  # CUDA's programming guide
INSTRUCTION = {80: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}
KERNELS = ("forward", "grad_x", "grad_weight")
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


@dataclass(frozen=True)
class Build:
    kernel: str
    arch: int
    dtype: torch.dtype = torch.bfloat16
    precision: str = "ieee"
    points: int = 8
    tokens: int = 65_536

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kernel}-sm_{self.arch}-{dtype}-{self.precision}-G{self.points}-N{self.tokens}"


BUILDS = [
    *(Build(kernel, arch) for arch in SHARED_BYTES for kernel in KERNELS),
    *(Build("forward", arch, points=points) for arch in SHARED_BYTES for points in (5, 64)),
    *(Build(kernel, 90, torch.float16, points=5) for kernel in KERNELS),
    *(Build(kernel, arch, torch.float32, "tf32") for arch in (80, 90, 100) for kernel in KERNELS),
    *(Build(kernel, 90, tokens=1) for kernel in KERNELS),
]


def constants(build: Build) -> dict[str, Any]:
    tiles = triton_tiles.tiles(
        divmod(build.arch, 10), build.dtype, build.precision, build.tokens, (768, build.points, 768)
    )
    tile: Tile = getattr(tiles, build.kernel)
    group = {"GROUP": tile.group} if build.kernel == "forward" else {}
    return {"CELLS": build.points - 1, "PRECISION": build.precision, **group, **tile.options()}


def built(build: Build, folder: Path) -> Any:
    operand = TYPES[build.dtype]
    types = {**dict.fromkeys(("rise_pointer", "y_pointer", "grad_y_pointer"), operand), "inverse_spacing": "fp32"}
    kernel = getattr(triton_kernels, f"{build.kernel}_kernel")
    return compiler.compile_kernel(kernel, build.arch, types, constants(build), folder)


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("build", BUILDS, ids=str)
def test_kernels_multiply_on_tensor_cores_and_spill_nothing(build: Build, tmp_path: Path) -> None:
    compiled = built(build, tmp_path)
    instructions = compiled.tensor_core_instructions()
    assert instructions, "an empty or scalar kernel"
    if build.tokens > 64:
        assert all(instruction.startswith(INSTRUCTION[build.arch]) for instruction in instructions)
        if build.precision == "tf32":
            assert all("tf32" in instruction or "tcgen05" in instruction for instruction in instructions)
    assert compiled.spilled_bytes == 0
    assert compiled.shared_bytes <= SHARED_BYTES[build.arch]


@pytest.mark.parametrize("kernel", KERNELS)
def test_full_float32_precision_keeps_off_tensor_cores(kernel: str, tmp_path: Path) -> None:
    compiled = built(Build(kernel, 80, torch.float32, "ieee"), tmp_path)
    assert not compiled.tensor_core_instructions() and "fma.rn.f32" in compiled.ptx
    assert compiled.spilled_bytes == 0 and compiled.shared_bytes <= SHARED_BYTES[89]
