"""A training run in processes of its own, started to be interrupted."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Victim:
    """train.py in one process, or in several that meet without torchrun; all they print goes to `log`."""

    def __init__(self, arguments: Sequence[str], log: Path, processes: int = 1, **popen: Any) -> None:
        self.log = log
        self._file = open(log, "w")  # noqa: SIM115  for as long as the processes live
        command = [sys.executable, str(ROOT / "train.py"), *arguments]
        port = free_port()
        self.processes = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=self._file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(rank_environment(rank, processes, port) if processes > 1 else {})},
                **popen,
            )
            for rank in range(processes)
        ]

    def __enter__(self) -> Victim:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._file.close()

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 250.0) -> bool:
        """Whether `condition` became true while the processes lived."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if condition():
                return True
            if any(process.poll() is not None for process in self.processes):
                return condition()
            time.sleep(0.002)
        return False

    def signal(self, number: int, rank: int | None = None) -> None:
        """To one process, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.poll() is None:
                process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self, timeout_s: float = 250.0) -> list[int]:
        """Exit codes. subprocess.TimeoutExpired if they do not end."""
        deadline = time.monotonic() + timeout_s
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]


def rank_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun would set, all on this machine."""
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
