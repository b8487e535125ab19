"""Stopping on request: a signal lets the step finish and be saved; a second one ends the process at once."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType

from training.distributed import LostProcess, World

# SIGUSR1 is what SLURM sends ahead of a time limit (sbatch --signal), SIGHUP comes when a terminal is closed or its
# connection drops. Windows has neither.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]

# Ctrl-C reaches the processes of a run twice: from the terminal, and from torchrun, which passes it on.
ECHO_S = 1.0


class StopRequest:
    """Context in which these signals set `signal_name` instead of killing the process."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.exit_code = 0
        self._received_at: float | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            if _is_hangup(number) and signal.getsignal(number) is signal.SIG_IGN:  # nohup
                continue
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # torchrun ends all processes as soon as one is lost; what the others have to say of it comes first.
        last_words = isinstance(error, LostProcess)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if last_words else handler)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def agree(self, world: World) -> bool:
        """Whether to stop after this step; every process must ask, and all of them hear of a signal that one got.

        One that comes while they are asking counts the next time: the others do not know of it yet.
        """
        number = world.max(self.exit_code)
        if number and not self:
            self._note(number - 128)
        return number > 0

    def _note(self, number: int) -> None:
        self.signal_name = signal.Signals(number).name
        self.exit_code = 128 + number  # what a shell reports for a process ended by this signal

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if _is_hangup(number):  # nobody's wish to end at once: kernel, shell and session manager may each send one
            if not self:
                self._note(number)
            return
        now = time.monotonic()
        if self._received_at is not None:
            if now - self._received_at > (ECHO_S if "TORCHELASTIC_RUN_ID" in os.environ else 0.0):
                os._exit(128 + number)
            return
        self._received_at = now
        if self:  # told of it by another process
            return
        self._note(number)
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):  # raised from here it would end the step
                os.write(2, f"\n{self.signal_name}: finishing the step, then saving; again to stop at once\n".encode())


def _is_hangup(number: int) -> bool:
    return number == getattr(signal, "SIGHUP", None)


def must_stop(stop: StopRequest, world: World) -> bool:
    """Whether training should end after this step, the same on every process."""
    return stop.agree(world) if world.size > 1 else bool(stop)
