"""The Triton kernels, compiled for each GPU generation: tensor cores used, nothing spilled, nothing overwritten."""

from pathlib import Path

import pytest
import torch

from backends import triton_tiles
from bench.shared.machine_code import MachineCode

pytest.importorskip("triton", reason="the kernels are compiled by triton, which is not installed")
pytest.importorskip("bench.shared.triton_compiler", reason="Triton has moved its compiler", exc_type=ImportError)
from bench import compiled_kernels
from bench.shared.triton_compiler import KERNELS, Build, Compiled, compiled

KIB = 1024
SHARED_BYTES = {80: 163 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}  # CUDA's programming guide
INSTRUCTION = {80: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}

BUILDS = [
    *(Build(kernel, arch) for arch in SHARED_BYTES for kernel in KERNELS),
    *(Build("forward", arch, points=points) for arch in SHARED_BYTES for points in (5, 64)),
    *(Build("grad_weight", 90, points=points) for points in (2, 3, 5, 7, 9, 32)),  # one group of hats, or several
    *(Build("grad_weight", arch, points=5, launch=1) for arch in SHARED_BYTES),  # a single hat
    Build("grad_weight", 90, torch.float32, "tf32", points=5, launch=1),
    *(Build("forward", 90, points=points) for points in (2, 3, 12, 32)),
    *(Build("grad_x", 90, points=points) for points in (2, 300)),
    *(Build(kernel, 90, torch.float16, points=5) for kernel in KERNELS),
    *(Build(kernel, arch, torch.float32, "tf32") for arch in (80, 90, 100) for kernel in KERNELS),
    *(Build("forward", 90, torch.float32, "tf32", outputs=width) for width in (16, 32)),
    *(Build(kernel, 90, tokens=1) for kernel in KERNELS),
    *(Build(kernel, 90, inputs=770, outputs=766) for kernel in KERNELS),
    *(Build(kernel, 90, inputs=17, outputs=130) for kernel in KERNELS),
]


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("build", BUILDS, ids=str)
def test_kernels_multiply_on_tensor_cores_and_spill_nothing(build: Build, tmp_path: Path) -> None:
    made = compiled(build, tmp_path)
    instructions = made.tensor_core_instructions()
    assert instructions, "an empty or scalar kernel"
    if on_whole_warp_groups(build):
        assert all(instruction.startswith(INSTRUCTION[build.arch]) for instruction in instructions)
        if build.precision == "tf32":
            assert all("tf32" in instruction or "tcgen05" in instruction for instruction in instructions)
    assert made.spilled_bytes == 0
    assert made.shared_bytes <= SHARED_BYTES[build.arch]
    if build.arch == 90:
        assert_products_are_left_alone(made, build)


def on_whole_warp_groups(build: Build) -> bool:
    """Smaller problems are multiplied by instructions of the generations before."""
    return build.tokens > 64 and build.outputs >= 64


def assert_products_are_left_alone(made: Compiled, build: Build) -> None:
    """Neither waited for one by one, as the assembler does if it must, nor robbed of registers while under way."""
    assert made.code is not None and not made.serialized()
    if on_whole_warp_groups(build):
        assert made.code.loops(), "no loop multiplies"
    assert made.code.hazards() == []
    programs = build.tile().residents
    assert compiled_kernels.residents_of(made, compiled_kernels.ASSUMED) >= programs, "fewer fit a processor"


@pytest.mark.parametrize("kernel", KERNELS)
def test_full_float32_precision_keeps_off_tensor_cores(kernel: str, tmp_path: Path) -> None:
    made = compiled(Build(kernel, 80, torch.float32, "ieee"), tmp_path)
    assert not made.tensor_core_instructions() and "fma.rn.f32" in made.ptx
    assert made.spilled_bytes == 0 and made.shared_bytes <= SHARED_BYTES[89]


ROUND = """
        .L_x_1:
        /*0010*/                   {write} ;
        /*0020*/                   HGMMA.64x16x8.F32.TF32 R24, R40, gdesc[UR4], R24, gsb0 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, {left} ;
        /*0040*/                   {after} ;
        /*0050*/               @P0 BRA `(.L_x_1) ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/                   STG.E desc[UR6][R2.64], R24 ;
"""


@pytest.mark.parametrize(
    ("write", "left", "after", "conflict"),
    [
        ("FADD R43, R9, R8", "0x1", "NOP", "FADD R43"),  # the left operand, in the next round
        ("FADD R43, R9, R8", "0x0", "NOP", None),
        ("FADD R44, R9, R8", "0x1", "NOP", None),
        ("LDS.128 R40, [R9]", "0x1", "NOP", "LDS.128"),
        ("NOP", "0x1", "LDS.64 R42, [R9]", "LDS.64"),
        ("NOP", "0x1", "FADD R5, R31, R4", "FADD R5"),  # a sum read too early
        ("NOP", "0x1", "STS [R5], R31", "STS"),
        ("NOP", "0x0", "FADD R31, R31, R4", None),
        ("CS2R R38, SRZ", "0x1", "NOP", None),
        ("@!P0 IMAD.WIDE R38, R1, R2, R40", "0x1", "@P1 LDSM.16.M88.2 R39, [R9]", "LDSM"),
    ],
)
def test_registers_of_a_product_under_way_are_watched(write: str, left: str, after: str, conflict: str | None) -> None:
    code = MachineCode(ROUND.format(write=write, left=left, after=after))
    assert [len(loop.instructions) for loop in code.loops()] == [5]
    found = code.hazards()
    assert len(found) == (conflict is not None) and all(str(conflict) in one for one in found)


def test_what_the_compiled_code_is_worth(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["compiled_kernels.py", "--grids", "5"])
    compiled_kernels.main()
    printed = capsys.readouterr().out
    assert "nothing measured" in printed and "Assumed" in printed
    rows = [line.split("|") for line in printed.splitlines() if line.startswith("| 5 |")]
    assert [row[2].strip() for row in rows] == [*KERNELS, "grad_weight"]  # in two launches
    peak = 132 * 4096 * 1.7e9  # of the tensor cores assumed: multiplications and additions a second
    for row, products in zip(rows, (4, 4, 4, 1), strict=True):  # of 65,536 x 768 x 768
        least_ms = 1000 * products * 2 * 65_536 * 768**2 / peak
        assert least_ms < float(row[-2]) < 4 * least_ms


def test_padded_widths_have_whole_rows() -> None:
    for width in (1, 17, 130, 766, 770):
        inputs, _, outputs = Build("forward", inputs=width, outputs=width).shape
        assert inputs == outputs >= width and inputs % triton_tiles.ROW == 0 and inputs - width < triton_tiles.ROW
