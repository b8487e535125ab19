"""Decides, for all tests, which of them this machine skips and why.

`@pytest.mark.needs("compiler", "kernel")` skips a test, or a module by its `pytestmark`; `require("compiler")` one that
is already running. Tests that compute with each backend in turn ask `why_not_impl`.
"""

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from backends import BACKENDS, Problem, instruction_set, native_build, semi_structured, triton
from bench.shared import chromium

WITHOUT_A_TRITON_GPU = "needs a CUDA GPU; test_triton.py repeats it in Triton's interpreter"


def why_not(need: str) -> str | None:
    """Why this machine cannot run tests that need this, or None."""
    return NEEDS[need]()


def require(need: str) -> None:
    """Skip the running test, or the module that is being imported, if this machine lacks `need`."""
    reason = why_not(need)
    if reason is not None:
        pytest.skip(reason, allow_module_level=True)


def why_not_impl(impl: str, device: str = "cpu") -> str | None:
    """Why this backend cannot compute layers here, or None."""
    if impl == "triton" and device == "cpu" and not triton.interpreted():
        return WITHOUT_A_TRITON_GPU
    return BACKENDS[impl].why_not(Problem(8, semi_structured.POINTS, 8, torch.device(device)))


def compiler() -> str | None:
    """The path of this machine's C++ compiler, whatever $CXX says, or None."""
    return next((path for name in native_build.COMPILERS if (path := shutil.which(name))), None)


def _unless(there: Callable[[], object], reason: str) -> Callable[[], str | None]:
    return lambda: None if there() else reason


def _program(name: str) -> Callable[[], str | None]:
    return _unless(lambda: shutil.which(name), f"needs {name}")


def _why_no_torch_compile() -> str | None:
    """Check the compiler that Inductor calls for CPUs: $CXX, else g++ (clang++ on macOS)."""
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    return None if shutil.which(name) else f"torch.compile needs the C++ compiler {name}"


def _why_not_instructions(name: str) -> Callable[[], str | None]:
    return lambda: instruction_set.why_not(name) and f"needs a CPU with {name}; this one is {platform.machine()}"


NEEDS: dict[str, Callable[[], str | None]] = {
    "linux": _unless(lambda: sys.platform == "linux", "needs Linux"),
    "terminal": _unless(lambda: importlib.util.find_spec("pty"), "needs pseudo-terminals"),
    "proc": _unless(Path("/proc/self/status").exists, "needs /proc"),
    "full device": _unless(Path("/dev/full").exists, "needs /dev/full"),
    "cuda": _unless(torch.cuda.is_available, "needs a CUDA GPU"),
    "compiler": _unless(compiler, "needs a C++ compiler"),
    "torch.compile": _why_no_torch_compile,
    "objdump": _program("objdump"),
    "kernel": lambda: native_build.why_not() and f"needs the C++ kernel: {native_build.why_not()}",
    "x86": _unless(instruction_set.is_x86, "needs an x86-64 CPU"),
    "amx": instruction_set.why_no_amx,
    "avx512": _why_not_instructions(instruction_set.AVX512),
    "avx2": _why_not_instructions(instruction_set.AVX2),
    "mkl": _unless(torch.backends.mkl.is_available, "needs a PyTorch with MKL"),
    "triton": _unless(lambda: importlib.util.find_spec("triton"), "triton is not installed"),
    "interpreter": _unless(triton.interpreted, "runs in Triton's interpreter, in another process"),
    "no interpreter": _unless(lambda: not triton.interpreted(), "Triton's interpreter runs anywhere"),
    "chromium": chromium.why_not,
}
