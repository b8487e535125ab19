"""Stopping on request: SIGINT and SIGTERM let the step finish and be saved; a second one ends the process at once."""

from __future__ import annotations

import os
import signal
from types import FrameType


class StopRequest:
    """Context in which SIGINT and SIGTERM set `signal_name` instead of killing the process."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.exit_code = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None:
            os._exit(128 + number)
        self.signal_name = signal.Signals(number).name
        self.exit_code = 128 + number  # what a shell reports for a process ended by this signal
        os.write(2, f"\n{self.signal_name}: finishing the step, then saving; again to stop at once\n".encode())
