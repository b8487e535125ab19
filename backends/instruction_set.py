"""The CPU instructions that the C++ kernel is built with: all that this CPU has, or the set that $SPLINEGPT_CPU names.

A named set serves clusters whose nodes differ, since it is built once for all nodes that have it. It also tests on one
machine what another one does:

    native    what this CPU has (the default)
    avx512    x86-64-v4: 16 floats at once, and no AMX
    avx2      x86-64-v3: 8 floats at once
    generic   what every CPU of this architecture has

Every set except `native` also rules out the backend `amx`. PyTorch's own kernels are not affected. They have variables
of their own: ATEN_CPU_CAPABILITY (default, avx2, avx512) and ONEDNN_MAX_CPU_ISA (AVX2, AVX512_CORE, …).
"""

import os
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

VARIABLE = "SPLINEGPT_CPU"
NATIVE, AVX512, AVX2, GENERIC = "native", "avx512", "avx2", "generic"

# Compiler flags, the best first, because not every compiler takes all of them. Without -mprefer-vector-width x86
# compilers use half of a 512-bit vector. Compilers from before 2020 do not know the levels of x86-64, but they know
# CPUs that have them.
FLAGS: dict[str, tuple[tuple[str, ...], ...]] = {
    NATIVE: (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ()),
    AVX512: (("-march=x86-64-v4", "-mprefer-vector-width=512"), ("-march=skylake-avx512", "-mprefer-vector-width=512")),
    AVX2: (("-march=x86-64-v3",), ("-march=haswell",)),
    GENERIC: ((),),
}


def chosen() -> str:
    """The name in $SPLINEGPT_CPU, which need not be a known set; `native` without one."""
    return os.environ.get(VARIABLE, "").strip().lower() or NATIVE


def why_not(name: str) -> str | None:
    """Why the kernel cannot be built with this set for this CPU, or None."""
    if name not in FLAGS:
        return f"{VARIABLE} is {name!r}, which must be one of {', '.join(FLAGS)}"
    if name in (NATIVE, GENERIC):
        return None
    if not is_x86():
        return (
            f"{VARIABLE} is {name!r}, which is for x86-64, and this CPU is {platform.machine()}; use native or generic"
        )
    if not _has_vectors(name):
        return f"{VARIABLE} is {name!r}, which this CPU does not have; use native or a smaller set"
    return None


def why_no_amx() -> str | None:
    """Why AMX does not multiply bfloat16 matrices here, or None."""
    has_amx: Callable[[], bool] = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)  # private to PyTorch
    if not has_amx():
        return "this CPU has no AMX, or this PyTorch cannot tell"
    return None if chosen() == NATIVE else f"{VARIABLE} is {chosen()!r}, which is without AMX"


def has_fast_bfloat16() -> bool:
    """Whether PyTorch multiplies bfloat16 matrices faster than float32 ones: by AMX, or by AVX-512 on AMD's CPUs.

    Intel's CPUs without AMX take twice as long for a vector of such products as AMD's (`python bench/cpu_limits.py`).
    """
    if why_no_amx() is None:
        return True
    has_products: Callable[[], bool] = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # private
    return chosen() == NATIVE and is_amd() and has_products()


@cache
def is_amd() -> bool:
    """Whether Linux says that the CPU is made by AMD; False on other systems."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _has_vectors(name: str) -> bool:
    """Whether this CPU has such vectors; True if this PyTorch lacks the private functions that tell."""
    has_avx512: Callable[[], bool] = getattr(torch.cpu, "_is_avx512_supported", lambda: True)
    has_avx2: Callable[[], bool] = getattr(torch.cpu, "_is_avx2_supported", lambda: True)
    return has_avx512() if name == AVX512 else has_avx2()
