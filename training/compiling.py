"""torch.compile, tried: a compiler that is there may still not do, for want of Python.h, of room, of leave to execute.

Where it fails a run goes on uncompiled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from common.errors import UserError
from training.device import Device
from training.distributed import World

LONGEST_REASON = 200


class CompileFailed(UserError):
    """The passes of a step could not be compiled, or what was built not run; the step has changed nothing."""

    everywhere = True

    def __init__(self, reason: str) -> None:
        super().__init__(f"torch.compile failed ({reason}); go on with --compile False")
        self.reason = reason


@contextmanager
def noticing_failures(compiling: bool, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Around the passes of a step: turns errors of one that is `compiling` into CompileFailed, without gradients."""
    try:
        yield
    except Exception as error:  # of compilers, loaders and file systems: as many kinds as things can go wrong
        if not compiling:
            raise
        optimizer.zero_grad(set_to_none=True)
        raise CompileFailed(reason(error)) from error


def check_together(device: Device, world: World) -> Device:
    """For several processes, which must all compile or none: `device`, without compilation if a small trial fails.

    Gradients are exchanged while they are computed, so that one process could not repeat a step without the others.
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
    """`device` without compilation, which is said."""
    print(f"compile: off, training goes on uncompiled ({why}); --compile False leaves the attempt out", flush=True)
    return device.uncompiled("torch.compile fails here")


def reason(error: BaseException) -> str:
    """What a compiler complains of, or else the first line of the error, as a phrase."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    complaints = [line for line in lines if re.search(r"\berror: ", line)]
    return (complaints or lines)[0][:LONGEST_REASON]


def _compile_something(device: torch.device) -> None:
    """Compile and run a function and its gradient. Raises whatever goes wrong."""
    x = torch.ones(64, device=device, requires_grad=True)
    torch.compile(lambda x: (x.sin() * x.cos()).sum())(x).backward()
