"""The processes of a run: one, or several started by torchrun or SLURM. How they talk, and how they share a step."""

from __future__ import annotations

import datetime
import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from common.errors import UserError

# Longer than a process ever keeps the others waiting, while it draws, samples or reads data. A machine that loses its
# power sends no sign, and is noticed only after this time.
TIMEOUT = datetime.timedelta(minutes=10)


class LostProcess(UserError):
    """Another process of the run has ended. Every process that notices prints it."""

    everywhere = True


class NoWorld(UserError):
    """The processes of a run could not connect to each other."""

    everywhere = True


@dataclass(frozen=True)
class World:
    """This process's place among the processes of a run. `World()` is a run in a single process.

    Losses, signals and errors are exchanged over gloo on the CPU; gradients that are on GPUs, over NCCL.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    group: Any = None
    """The torch process group they talk in; None for the default one."""

    @property
    def is_main(self) -> bool:
        """Whether this process prints, logs and writes everything that is not sharded."""
        return self.rank == 0

    def mean(self, value: float) -> float:
        """The mean over all processes, the same on each."""
        return self.sum(value)[0] / self.size if self.size > 1 else value

    def sum(self, *values: float) -> list[float]:
        """Each value's sum over all processes, in float64, the same on each."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, value: int) -> int:
        """The largest over all processes."""
        return int(self._reduce((value,), dist.ReduceOp.MAX)[0])

    def _reduce(self, values: tuple[float, ...], operation: Any) -> list[float]:
        if self.size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64)
        with detecting_lost_processes():
            dist.all_reduce(tensor, operation, group=self.group)
        return [float(value) for value in tensor]

    def broadcast(self, value: Any) -> Any:
        """The main process's `value`, which JSON can hold. (Torch's own broadcast of objects would unpickle it.)"""
        return self.gather(value)[0] if self.size > 1 else value

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank. JSON must be able to hold them."""
        if self.size == 1:
            return [value]
        text = json.dumps(value).encode()
        with detecting_lost_processes():
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(lengths, torch.tensor([len(text)]), group=self.group)
            longest = max(int(length) for length in lengths)
            texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            padded = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)
            dist.all_gather(texts, padded, group=self.group)
        return [json.loads(bytes(text.tolist())) for text in texts]

    def with_own_connections(self) -> World:
        """The same processes with new connections, for use by another thread. Every process must call it."""
        return replace(self, group=dist.new_group(backend="gloo")) if self.size > 1 else self

    @contextmanager
    def together(self) -> Iterator[None]:
        """Surrounds work that every process does. If one fails with UserError or OSError, all raise UserError."""
        failure = None
        try:
            yield
        except LostProcess:
            raise
        except UserError as error:
            failure = str(error)
        except OSError as error:
            failure = f"{error.filename or 'a file'} cannot be used ({error.strerror or error})"
        failures = self.gather([failure, socket.gethostname()])
        for rank, (text, host) in enumerate(failures):
            if text is not None:
                raise UserError(text if rank == 0 else f"process {rank} on {host}: {text}")


ALONE = World()


@contextmanager
def join_world() -> Iterator[World]:
    """Connect to the other processes, as the environment says (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).

    Only the main process prints from then on; the others print errors alone. NoWorld if they cannot be reached.
    """
    world = World(*(_number(name, usual) for name, usual in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))
    if not 0 <= world.rank < world.size:
        raise NoWorld(f"RANK must be from 0 to WORLD_SIZE - 1; got {world.rank} of {world.size}: use torchrun")
    if world.size == 1:
        yield world
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise NoWorld(
            f"the {world.size} processes of the run could not meet ({reason}); start them with torchrun, as "
            f"docs/scaling.md shows"
        ) from error
    if not world.is_main:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for the rest of the process
    try:
        yield world
    finally:
        if sys.exc_info()[0] is None:  # after an error the others may have ended, and this would wait for them for ever
            dist.destroy_process_group()


def _number(name: str, usual: int) -> int:
    text = os.environ.get(name, str(usual))
    try:
        return int(text)
    except ValueError:
        raise NoWorld(f"the environment variable {name} must be a number; got {text!r}: use torchrun") from None


@contextmanager
def detecting_lost_processes() -> Iterator[None]:
    """Turns the various errors of a broken connection into LostProcess."""
    try:
        yield
    except RuntimeError as error:  # torch's DistError is one, and so are gloo's own
        if not is_connection_error(error):
            raise
        found = re.search(r"connection (reset|closed|refused)[^.:\n]*|timed out[^.:\n]*", str(error), re.IGNORECASE)
        # NCCL's other errors, as two processes on one GPU, are told in their own words.
        reason = found[0].lower() if found else (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LostProcess(f"another process of this run has ended or cannot be reached ({reason})") from error


def is_connection_error(error: RuntimeError) -> bool:
    """Whether a collective operation failed because another process did not take part."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "nccl", "connection closed"))


def share_of_step(sequences: int, batch_size: int, world_size: int) -> tuple[int, int]:
    """Divide a step. Returns how many of its sequences each process takes, and how many of these in one forward pass.

    A process's passes are equally large, and at most `batch_size`. UserError if the step cannot be divided evenly.
    """
    share, rest = divmod(sequences, world_size)
    if rest:
        raise UserError(
            f"a step of {sequences} sequences (batch_size times gradient_accumulation_steps) cannot be shared evenly "
            f"by {world_size} processes; make it a multiple of {world_size}"
        )
    passes = next(count for count in range(1, share + 1) if share % count == 0 and share // count <= batch_size)
    return share, share // passes
