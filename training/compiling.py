"""Going on uncompiled where torch.compile fails.

That happens on machines that have a compiler too: Python.h is missing, the disk is full, or execution is forbidden.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from common.errors import UserError
from training.device import Device
from training.distributed import World

MAX_REASON_LENGTH = 200


class CompileFailed(UserError):
    """A step could not be compiled, or the compiled code not be run. The step has changed nothing."""

    everywhere = True

    def __init__(self, reason: str) -> None:
        super().__init__(f"torch.compile failed ({reason}); go on with --compile False")
        self.reason = reason


@contextmanager
def detecting_failures(compiling: bool, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Surrounds the passes of a step. While `compiling`, any error becomes CompileFailed and gradients are dropped."""
    try:
        yield
    except Exception as error:  # compilers, loaders and file systems raise many kinds
        if not compiling:
            raise
        optimizer.zero_grad(set_to_none=True)
        raise CompileFailed(reason(error)) from error


def check_together(device: Device, world: World) -> Device:
    """Compile something small on every process. Returns `device`, without compilation if that failed on any of them.

    The processes must all compile or none: they exchange gradients while computing them, so one process alone cannot
    repeat a step. A single process needs no trial, as it can repeat its first step.
    """
    if world.size == 1 or not device.compile:
        return device
    failure = None
    try:
        _compile_something(device.device)
    except Exception as error:
        failure = reason(error)
    failures = [each for each in world.gather(failure) if each is not None]
    return do_without(device, failures[0]) if failures else device


def do_without(device: Device, why: str) -> Device:
    """Returns `device` without compilation, and prints why."""
    print(f"compile: off, training goes on uncompiled ({why}); --compile False leaves the attempt out", flush=True)
    return device.uncompiled("torch.compile fails here")


def reason(error: BaseException) -> str:
    """The compiler's complaint in an error's text, or else its first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    complaints = [line for line in lines if re.search(r"\berror: ", line)]
    return (complaints or lines)[0][:MAX_REASON_LENGTH]


def _compile_something(device: torch.device) -> None:
    """Compile and run a function and its gradient. Raises whatever goes wrong."""
    x = torch.ones(64, device=device, requires_grad=True)
    torch.compile(lambda x: (x.sin() * x.cos()).sum())(x).backward()
