"""Runs train.py in processes of its own, so that a benchmark or test can watch, signal and kill them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]


class ForkedProcess:
    """A fork of this process that runs train.py. It starts in a moment, because PyTorch is imported already."""

    def __init__(self, arguments: Sequence[str], log: IO[str], environment: dict[str, str]) -> None:
        self.pid = os.fork()
        self.returncode: int | None = None
        if self.pid:
            return
        try:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            os.environ.update(environment)
            os.chdir(ROOT)
            sys.argv = ["train.py", *arguments]
            import train

            train.main()
            os._exit(0)
        except SystemExit as ended:
            sys.stdout.flush()
            os._exit(ended.code if isinstance(ended.code, int) else 1)
        finally:
            traceback.print_exc()
            os._exit(1)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("train.py", timeout)
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


class TrainProcesses:
    """train.py in one process, or in several that find each other without torchrun. Their output goes to `log`.

    `fork` forks them from this process instead of starting them afresh. This process must have imported train, and must
    not have trained anything.
    """

    def __init__(
        self, arguments: Sequence[str], log: Path, processes: int = 1, fork: bool = False, **popen: Any
    ) -> None:
        self.log = log
        self._file = open(log, "w")  # noqa: SIM115  open as long as the processes live
        port = free_port()
        environments = [rank_environment(rank, processes, port) if processes > 1 else {} for rank in range(processes)]
        self.processes: list[Any] = []
        for environment in environments:
            if fork:
                self.processes.append(ForkedProcess(arguments, self._file, environment))
                continue
            command = [sys.executable, str(ROOT / "train.py"), *arguments]
            whole = {**os.environ, **environment}
            self.processes.append(
                subprocess.Popen(command, cwd=ROOT, stdout=self._file, stderr=subprocess.STDOUT, env=whole, **popen)
            )

    def __enter__(self) -> TrainProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._file.close()

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 250.0) -> bool:
        """Wait for `condition`. False if a process ends or the time is over before it is true."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if condition():
                return True
            if any(process.poll() is not None for process in self.processes):
                return condition()
            time.sleep(0.002)
        return False

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one process, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.poll() is None:
                process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self, timeout_s: float = 250.0) -> list[int]:
        """Wait for the processes and return their exit codes. Raises subprocess.TimeoutExpired if they do not end."""
        deadline = time.monotonic() + timeout_s
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]


def rank_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """The variables that torchrun would set for a process, with all processes on this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
