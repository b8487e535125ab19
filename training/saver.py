"""Saving beside training: the state is copied in the foreground and written by a thread."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from training.shards import local


class SaveFailed(OSError):
    """A checkpoint could not be written."""

    def __init__(self, step: int, error: OSError) -> None:
        super().__init__(error.errno, error.strerror or str(error), error.filename)
        self.step = step


class Saver:
    """Writes one checkpoint at a time; a second one waits for the first.

    `held_up_s` is how long training stood still for it, `written_s` how long the writing took in all.
    """

    def __init__(self) -> None:
        self.count = 0
        self.held_up_s = 0.0
        self.written_s = 0.0
        self._thread: threading.Thread | None = None
        self._failure: SaveFailed | None = None
        self._crash: BaseException | None = None

    def save(self, step: int, state: Any, write: Callable[[Any], object]) -> None:
        """Copy `state` and let `write(copy)` run in a thread. Raises SaveFailed if the one before failed."""
        self.wait()
        start = time.perf_counter()
        copy = on_cpu(state)
        self._thread = threading.Thread(target=self._write, args=(step, copy, write), name="saver")
        self._thread.start()
        self.held_up_s += time.perf_counter() - start
        self.count += 1

    def _write(self, step: int, copy: Any, write: Callable[[Any], object]) -> None:
        start = time.perf_counter()
        try:
            write(copy)
        except OSError as error:
            self._failure = SaveFailed(step, error)
        except BaseException as error:
            self._crash = error
        self.written_s += time.perf_counter() - start

    def wait(self) -> None:
        """Until all is on the disk. Raises SaveFailed if it is not."""
        start = time.perf_counter()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.held_up_s += time.perf_counter() - start
        self.check()

    def check(self) -> None:
        """Raise SaveFailed, once, if a write has failed by now."""
        failure, self._failure = self._failure, None
        crash, self._crash = self._crash, None
        if failure is not None:
            raise failure
        if crash is not None:
            raise crash

    def wait_regardless(self, forget: bool = False) -> None:
        """Wait for the write without raising its failure; `forget` the failure, or raise it at the next occasion."""
        if self._thread is not None:
            self._thread.join()
        if forget:
            self._failure = self._crash = None


def on_cpu(value: Any, copies: dict[Any, torch.Tensor] | None = None) -> Any:
    """A copy of all tensors, in the CPU's memory; those that shared their memory still do."""
    copies = {} if copies is None else copies
    if isinstance(value, torch.Tensor):
        part = local(value)  # a DTensor has no address of its own
        key = (part.data_ptr(), value.shape, value.stride(), value.dtype) if part.numel() else id(value)
        if key not in copies:
            copies[key] = value.detach().to("cpu", copy=True)
        return copies[key]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: on_cpu(getattr(value, field.name), copies) for field in dataclasses.fields(value)}
        return type(value)(**fields)
    if isinstance(value, dict):
        return {name: on_cpu(item, copies) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_cpu(item, copies) for item in value)
    return value
