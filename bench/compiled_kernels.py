"""What the Triton kernels are worth by their compiled code, without a GPU. `python bench/compiled_kernels.py`

The kernels are compiled for Hopper (H100, sm_90), and the loop that multiplies is read from the machine code. Times are
calculated from that and from the assumptions below: nothing here is measured.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone, before this folder

import common.threads  # noqa: F401  before torch

from common.command_line import OptionParser
from common.errors import UserError, exit_on_user_error

if TYPE_CHECKING:
    from bench.shared.triton_compiler import Build, Compiled

USAGE = "python bench/compiled_kernels.py [--key value …]"


@dataclass(frozen=True)
class Options:
    grids: str = "8,5"
    """Control points per spline, separated by commas."""
    tokens: int = 65_536
    """Tokens N of a pass."""
    width: int = 768
    """Width of the layer, I = O."""
    output: str | None = None
    """Write the numbers to this file, as JSON."""
    before: str | None = None
    """Print those of this file, of another state of the kernels, beside them."""

    def __post_init__(self) -> None:
        if min(self.tokens, self.width, *self.grid_list()) < 2:
            raise ValueError("tokens, width and grids must be at least 2")

    def grid_list(self) -> list[int]:
        return [int(grid) for grid in self.grids.split(",")]


@dataclass(frozen=True)
class Gpu:
    """What is assumed of an H100 SXM."""

    processors: int = 132
    ghz: float = 1.7
    l2_bytes: float = 29  # a processor gets of level-2 cache in a cycle: 6.5 TB/s in all
    shared_rate: int = 128  # bytes a cycle of a processor's shared memory
    memory_tbps: float = 2.8
    registers: int = 65_536  # of a processor
    shared_bytes: int = 233_472
    latency: int = (
        150  # cycles of a wait that leaves nothing under way: barrier, fence, first product, chain of the sum
    )
    program: int = 4_500  # cycles before the first round and after the last
    refill: int = 1_000  # cycles until copies flow again, where a loop is entered anew within a program
    launch_us: float = 5  # until the next of several kernels runs


ASSUMED = Gpu()


@dataclass(frozen=True)
class Count:
    """A round of the loop that multiplies, for one program, and the time of the kernel that it gives."""

    kernel: str
    points: int
    instructions: int  # of a warp
    barriers: int
    waits: list[int]  # how many products each leaves under way
    registers: int
    spilled_bytes: int
    serialized: bool
    residents: int  # programs that share a processor
    issue_cycles: int
    tensor_cycles: int
    copied_per_tensor_cycle: float  # bytes, from level-2 cache
    shared_per_tensor_cycle: float  # bytes, through shared memory
    ms: float


def count(build: Build, compiled: Compiled, gpu: Gpu = ASSUMED) -> Count:
    assert compiled.code is not None
    loops = compiled.code.loops()
    inner, warps = loops[0], compiled.threads // 32
    issue = inner.issue_cycles() * warps // 4  # of a processor's four schedulers
    tensor = inner.tensor_cycles() * warps // 4
    copied = inner.copied_bytes(compiled.threads)
    residents = residents_of(compiled, gpu)
    programs, rounds, entries = trips(build)
    blocking = sum(left == 0 for left in inner.waits())
    alone = issue + tensor + blocking * gpu.latency if blocking else max(issue, tensor)
    shared = inner.shared_bytes(compiled.threads)
    busiest = max(issue, tensor, copied / gpu.l2_bytes, shared / gpu.shared_rate)
    again = 0.0  # that an outer loop adds each time
    if len(loops) > 1:
        again = (loops[1].issue_cycles() - inner.issue_cycles()) * warps / 4 + gpu.refill
    cycles = rounds * max(alone, busiest) + entries * again + gpu.program
    if residents > 1:  # each fills the other's pauses, up to what all of them need of the processor
        cycles = max(cycles, residents * rounds * busiest)
    waves = math.ceil(programs / (gpu.processors * residents))
    return Count(
        build.kernel,
        build.points,
        len(inner.instructions),
        inner.count("BAR"),
        inner.waits(),
        compiled.registers,
        compiled.spilled_bytes,
        compiled.serialized(),
        residents,
        issue,
        tensor,
        copied / tensor,
        shared / tensor,
        waves * cycles / gpu.ghz / 1e6,
    )


def residents_of(compiled: Compiled, gpu: Gpu) -> int:
    """How many programs fit a processor by their registers, given out by eights, and by shared memory."""
    registers = math.ceil(compiled.registers / 8) * 8 * compiled.threads
    return max(1, min(gpu.registers // registers, gpu.shared_bytes // (compiled.shared_bytes + 1024)))


def trips(build: Build) -> tuple[int, int, int]:
    """Programs, rounds of the innermost loop in each, and how often that loop is entered."""
    from backends import triton_tiles

    tile, (inputs, points, outputs) = build.tile(), build.shape
    token_blocks, input_blocks = -(-build.tokens // tile.tokens), -(-inputs // tile.inputs)
    output_blocks = -(-outputs // tile.outputs)
    if build.kernel == "forward":
        return token_blocks * output_blocks, input_blocks * -(-(points - 1) // tile.span), 1
    if build.kernel == "grad_x":
        return token_blocks * input_blocks, (points - 1) * output_blocks, points - 1
    hats = build.hats()
    programs = [one.groups * -(-inputs // one.tile.inputs) * -(-outputs // one.tile.outputs) for one in hats]
    largest = max(range(len(hats)), key=programs.__getitem__)
    seats = ASSUMED.processors * hats[largest].tile.residents
    splits = triton_tiles.token_splits(programs[largest], build.tokens, tile.tokens, seats)
    return programs[build.launch] * splits, -(-token_blocks // splits), 1


def around(build: Build, gpu: Gpu = ASSUMED) -> float:
    """Milliseconds of the elementwise work beside the three kernels, by the bytes it moves."""
    programs, _, _ = trips(build)
    inputs, points, outputs = build.shape
    hats = build.hats()[build.launch]
    splits = programs // (hats.groups * -(-inputs // hats.tile.inputs) * -(-outputs // hats.tile.outputs))
    weights = inputs * points * outputs
    tables = weights * (4 + 4 + 4 + 2)  # W read, differences written and read, rises written
    cells = build.tokens * inputs * (4 + 1)
    parts = weights * 4 * (splits + 1 if splits > 1 else 0)
    kernels = 4 + len(build.hats())  # two for the rises; first control points, cells and parts; more of grad_weight
    return (tables + cells + parts) / gpu.memory_tbps / 1e9 + kernels * gpu.launch_us / 1000


def compiled_for(options: Options) -> tuple[list[Count], dict[int, float]]:
    """The counts of each grid's kernels, and milliseconds around them."""
    from bench.shared.triton_compiler import KERNELS, Build, compiled

    counts, beside = [], {}
    for points in options.grid_list():
        for kernel in KERNELS:
            build = Build(kernel, points=points, tokens=options.tokens, inputs=options.width, outputs=options.width)
            for launch in range(len(build.hats()) if kernel == "grad_weight" else 1):
                build = replace(build, launch=launch)
                with tempfile.TemporaryDirectory(prefix="splinegpt-") as folder:
                    counts.append(count(build, compiled(build, Path(folder))))
        beside[points] = around(build)
    return counts, beside


HEADER = (
    "| G | kernel | instructions | barriers | waits (left under way) | registers | spilled | programs | "
    "issue / tensor cycles | loaded bytes per tensor cycle | in shared memory | ms, calculated |\n"
    "|---|---" + "|---:" * 10 + "|"
)


def row(one: Count) -> str:
    waits = f"{len(one.waits)} ({', '.join(map(str, sorted(set(one.waits))))})"
    serialized = ", serialized" if one.serialized else ""
    return (
        f"| {one.points} | {one.kernel} | {one.instructions} | {one.barriers} | {waits}{serialized} | {one.registers} "
        f"| {one.spilled_bytes} | {one.residents} | {one.issue_cycles} / {one.tensor_cycles} "
        f"| {one.copied_per_tensor_cycle:.0f} | {one.shared_per_tensor_cycle:.0f} | {one.ms:.2f} |"
    )


def totals(counts: list[Count], beside: dict[int, float]) -> list[str]:
    lines = []
    for points, ms in beside.items():
        kernels = [one.ms for one in counts if one.points == points]
        parts = " + ".join(f"{one:.2f}" for one in kernels)
        lines.append(f"G={points}: {parts} + {ms:.2f} around them = {sum(kernels) + ms:.2f} ms forward+backward")
    return lines


@exit_on_user_error
def main() -> None:
    options = OptionParser(Options, USAGE).parse(sys.argv[1:])
    if importlib.util.find_spec("triton") is None:
        raise UserError("the kernels are compiled by triton, which is not installed (pip install triton)")
    import triton

    print(
        f"Triton {triton.__version__}, sm_90, {options.tokens:,} tokens x {options.width}, bfloat16; nothing measured."
    )
    print(f"Assumed: {ASSUMED}\n")
    if options.before is not None:
        try:
            record = json.loads(Path(options.before).read_text())
        except (OSError, ValueError) as problem:
            raise UserError(
                f"before must be a file that --output has written; {options.before}: {problem}"
            ) from problem
        show(f"Before ({record['triton']})", [Count(**one) for one in record["counts"]], record["around_ms"])
    counts, beside = compiled_for(options)
    show("Now", counts, beside)
    if options.output is not None:
        record = {
            "triton": f"Triton {triton.__version__}",
            "assumed": asdict(ASSUMED),
            "counts": [asdict(one) for one in counts],
            "around_ms": beside,
        }
        Path(options.output).write_text(json.dumps(record, indent=1) + "\n")


def show(title: str, counts: list[Count], beside: dict[int, float]) -> None:
    print(
        f"{title}\n\n{HEADER}",
        *map(row, counts),
        "",
        *totals(counts, {int(g): ms for g, ms in beside.items()}),
        "",
        sep="\n",
    )


if __name__ == "__main__":
    main()
