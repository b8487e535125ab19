"""Decides where a run computes, in which precision, and whether compiled; and says why."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from common.threads import why_fewer

import torch

from common.errors import UserError
from common.memory import keep_freed_memory
from training.config import Config
from training.distributed import ALONE, World

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Dense bf16 peak in TFLOP/s, from the makers' data sheets, by a part of the device's name. Others have no MFU.
PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}

# On a CPU, compiling takes about 25 s and saves up to two fifths of each step (docs/log.md).
CPU_COMPILE_STEPS = 2000


@dataclass(frozen=True)
class Device:
    """The device, the precision of matrix products, and whether to compile, each with its reason."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    why_compile: str
    why_fewer_threads: str = ""
    """Why there are fewer threads than cores; empty if there are not."""

    def autocast(self) -> AbstractContextManager[None]:
        if self.dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """A scaler for float16, in which small gradients would become 0. In other precisions it does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def uncompiled(self, why: str) -> Device:
        """The same device without compilation, and without the deterministic algorithms that compiling needs."""
        use_deterministic_algorithms(False)
        return replace(self, compile=False, why_compile=why)

    def peak_flops(self) -> float | None:
        """Peak FLOP/s of this GPU in bf16; None if it is not in the table, or computes in float32."""
        if self.device.type != "cuda" or self.dtype is torch.float32:
            return None
        name = torch.cuda.get_device_name(self.device)
        return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)
        threads = f", {self._threads()}" if self.device.type == "cpu" else ""
        dtype = str(self.dtype).removeprefix("torch.")
        if self.device.type == "cuda" and self.dtype is torch.float32:
            dtype += " (products in TF32)"
        compiled = "compiled" if self.compile else "not compiled"
        return f"{name}{threads}, {dtype}, {compiled} ({self.why_compile})"

    def _threads(self) -> str:
        count = torch.get_num_threads()
        reason = f" ({self.why_fewer_threads})" if self.why_fewer_threads else ""
        return f"{count} thread{'s' * (count > 1)}{reason}"


def choose_device(config: Config, world: World = ALONE) -> Device:
    """The device that the configuration asks for, or the best one. UserError if this machine lacks it.

    With several processes, each takes the GPU of its local rank. Also sets PyTorch's number of threads, and its modes.
    """
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    device = _find_device(config.device)
    if world.size > 1:
        device = _own_device(device, world)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # tf32
    if device.type == "cpu":
        keep_freed_memory()
    compiled, why = _decide_compile(config, device)
    if compiled and device.type == "cpu":
        # Inductor's scatters add in the order in which threads arrive, but a resumed run must equal the original one.
        use_deterministic_algorithms(True)
    fewer = why_fewer(torch.get_num_threads(), config.num_threads)
    return Device(device, _find_dtype(config.dtype, device), compiled, why, fewer)


def use_deterministic_algorithms(on: bool) -> None:
    """Switch PyTorch's deterministic algorithms on or off, but never fill new tensors with NaN, as they would.

    The filling shows reads of memory that nobody wrote. It changes no result where there are none, and takes 1 ms in a
    step of 20 (docs/log.md).
    """
    torch.use_deterministic_algorithms(on, warn_only=True)
    pytorch: Any = torch.utils.deterministic  # whose attribute type checkers do not see
    pytorch.fill_uninitialized_memory = not on  # its default, for whoever uses PyTorch after us


def _find_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device must be auto, cpu, cuda, cuda:N or mps; got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but this PyTorch finds no CUDA GPU; use --device cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name} was asked for, but there are only {torch.cuda.device_count()} GPUs")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps was asked for, but this machine has none; use --device cpu or auto")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device must be auto, cpu, cuda, cuda:N or mps; got {name!r}")
    return device


def _own_device(device: torch.device, world: World) -> torch.device:
    if device.type == "mps":
        raise UserError(
            f"{world.size} processes cannot share mps; start train.py without torchrun, or use --device cpu"
        )
    if device.type == "cpu":
        return device
    if device.index is not None:
        raise UserError(
            f"device {device} is one GPU for {world.size} processes; use --device cuda, so each has its own"
        )
    if world.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"there are {torch.cuda.device_count()} GPUs for more processes; give torchrun an --nproc-per-node of that"
        )
    own = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(own)
    return own


def _find_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.float32  # on CPUs bfloat16 gains little with splines (docs/benchmarks.md, "A whole step")
    if name == "float16" and device.type != "cuda":
        raise UserError(f"dtype float16 needs a CUDA GPU, not {device.type}; use --dtype bfloat16 or float32")
    return DTYPES[name]


def _decide_compile(config: Config, device: torch.device) -> tuple[bool, str]:
    if device.type == "mps":
        if config.compile is True:
            print("compile: off, although asked for: torch.compile is not used on mps", flush=True)
        return False, "torch.compile is not used on mps"
    if config.compile != "auto":
        return config.compile, "asked for"
    if device.type != "cuda" and config.max_iters < CPU_COMPILE_STEPS:
        return False, f"pays on {device.type} from {CPU_COMPILE_STEPS} steps on"
    return True, "pays on GPUs" if device.type == "cuda" else "pays in a run of this length"
