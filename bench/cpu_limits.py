"""Measure the limits of a CPU core, to which the C++ kernel is compared: `python bench/cpu_limits.py`.

One thread runs simple loops, and the best of several attempts counts. A layer needs two multiply-adds for each token,
input and output, each with an operand from memory. So it cannot be faster than the loop that does nothing else.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone, before this folder

import common.threads  # noqa: F401  before torch

import torch

from backends import native_build
from bench.shared.machine import machine_name
from bench.shared.timing import seconds
from common.command_line import OptionParser
from common.errors import UserError, exit_on_user_error

USAGE = "python bench/cpu_limits.py [--key value …]"
SOURCE = Path(__file__).with_suffix(".cpp")
ATTEMPTS = 7


@dataclass(frozen=True)
class Options:
    tokens: int = 4096
    """Tokens N of the layer whose minimum times are derived."""
    width: int = 384
    """Width I = O of that layer."""
    threads: int = 2
    """Threads of that layer, each on its own core."""
    millions: int = 500
    """Millions of vector operations per attempt."""

    def __post_init__(self) -> None:
        if min(self.tokens, self.width, self.threads, self.millions) < 1:
            raise ValueError("tokens, width, threads and millions must be at least 1")


@dataclass(frozen=True)
class Limit:
    what: str
    function: str  # in cpu_limits.cpp
    kib: int = 0  # size of the memory that the loop goes through


REGISTERS = Limit("multiply-adds of registers", "registers")
FROM_L1 = Limit("multiply-adds, one operand loaded from 16 KiB", "loaded", 16)
FROM_L2 = Limit("multiply-adds, one operand loaded from 512 KiB", "loaded", 512)
UPDATES = Limit("load, two multiply-adds, store, in 16 KiB", "updated", 16)
DOTS = Limit("bfloat16 dot products of pairs (vdpbf16ps), of registers", "bfloat16_dots")


@exit_on_user_error
def main() -> None:
    options = OptionParser(Options, USAGE).parse(sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="splinegpt-") as folder:
        library = build(Path(folder))
    lanes = library.lanes()
    print(f"{machine_name('cpu')}, vectors of {lanes} floats, one thread; billions a second")
    rates = {}
    for limit in (REGISTERS, FROM_L1, FROM_L2, UPDATES, DOTS):
        if hasattr(library, limit.function):
            rates[limit] = billions_a_second(library, limit, options.millions)
        print(f"{limit.what:<58}{rates[limit]:6.2f}" if limit in rates else f"{limit.what:<58}  none", flush=True)
    print(f"minimum time of a forward pass, {options.tokens} tokens x {options.width}, {options.threads} threads; ms")
    pairs = options.tokens * options.width**2 / lanes  # vectors of outputs, each the sum of two products
    billions = {name: count / 1e9 / options.threads for name, count in (("float32", 2 * pairs), ("bfloat16", pairs))}
    for limit, dtype in ((FROM_L1, "float32"), (DOTS, "bfloat16")):
        if limit in rates:
            print(f"{f'{dtype}, {limit.what}':<70}{1000 * billions[dtype] / rates[limit]:6.2f}")


def build(folder: Path) -> ctypes.CDLL:
    """Compile cpu_limits.cpp with the kernel's flags and load it. Raises UserError if that fails."""
    try:
        compiler, instructions = native_build.find_compiler(), native_build.find_instructions()
    except native_build.NativeUnavailable as reason:
        raise UserError(f"the limits cannot be measured: {reason}") from reason
    built = folder / "cpu_limits.so"
    for optional in native_build.optional_flags(instructions):
        command = [compiler, *native_build.FLAGS, *optional, str(SOURCE), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=native_build.SECONDS_TO_BUILD)
        if done.returncode == 0:
            library = ctypes.CDLL(str(built))
            library.lanes.restype = ctypes.c_int64
            return library
    raise UserError(f"{compiler} failed to build {SOURCE.name} ({done.stderr.strip().splitlines()[0]})")


def billions_a_second(library: ctypes.CDLL, limit: Limit, millions: int) -> float:
    function = getattr(library, limit.function)
    function.restype = ctypes.c_int64
    values = torch.rand(limit.kib * 256)
    arguments = ctypes.c_void_p(values.data_ptr()), ctypes.c_int64(values.numel()), ctypes.c_int64(millions * 10**6)
    done = function(*arguments)  # warms up
    return done / min(seconds(lambda: function(*arguments), "cpu") for _ in range(ATTEMPTS)) / 1e9


if __name__ == "__main__":
    main()
