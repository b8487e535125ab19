"""This machine: its name, and its measured peaks of arithmetic and memory traffic."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.shared.case import DTYPES, Work
from bench.shared.timing import seconds

ATTEMPTS = {"cpu": 6, "cuda": 20}  # the best counts; the first ones warm up caches and, on a GPU, its clock
MATRIX = {"cpu": 2048, "cuda": 8192}  # rows and columns of a product large enough to reach the peak
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**30}  # more than fits in any cache


@dataclass(frozen=True)
class Peaks:
    """GFLOP/s of a matrix product for each dtype, and GB/s of a copy, counting reads and writes."""

    gflops: dict[str, float]
    gbps: float

    def usable_gflops(self, dtype: str) -> float:
        """The peak that a layer can use. Under autocast it may still use float32, which is faster on some CPUs."""
        return self.gflops["float32"] if dtype == "float32" else max(self.gflops.values())

    def limit_ms(self, work: Work, dtype: str) -> float:
        """Milliseconds that `work` takes at the peak of arithmetic or of memory, whichever is longer."""
        return max(work.flops / self.usable_gflops(dtype), work.bytes / self.gbps) / 1e6

    def __str__(self) -> str:
        arithmetic = ", ".join(f"{gflops:,.0f} GFLOP/s in {dtype}" for dtype, gflops in self.gflops.items())
        return f"{arithmetic} (matrix product), {self.gbps:,.1f} GB/s (copy)"


def measure_peaks(dtypes: Sequence[str], device: str) -> Peaks:
    """Measure the peaks in float32 and in `dtypes`."""
    every = dict.fromkeys(("float32", *dtypes))
    return Peaks({dtype: peak_gflops(dtype, device) for dtype in every}, peak_gbps(device))


def peak_gflops(dtype: str, device: str) -> float:
    size = MATRIX[device]
    a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    best = min(seconds(lambda: torch.mm(a, b), device) for _ in range(ATTEMPTS[device]))
    return 2 * size**3 / best / 1e9


def peak_gbps(device: str) -> float:
    source = torch.zeros(COPIED_BYTES[device] // 4, device=device).fill_(1.0)
    target = torch.empty_like(source)
    best = min(seconds(lambda: target.copy_(source), device) for _ in range(ATTEMPTS[device]))
    return 2 * COPIED_BYTES[device] / best / 1e9


def machine_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"


def gpu_record() -> dict[str, object]:
    """The card, its driver, and the versions of the libraries that compute on it, for the record."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "triton": triton_version(),
        "float32_products": "TF32" if torch.get_float32_matmul_precision() != "highest" else "float32",
    }


def driver_version() -> str | None:
    """The version that nvidia-smi reports, or None without that tool."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def triton_version() -> str | None:
    try:
        import triton  # importlib.metadata would need its distribution's name, of which there are several
    except ImportError:
        return None
    return triton.__version__


def cpu_name() -> str:
    """The model name that Linux reports; on other systems what Python reports."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
