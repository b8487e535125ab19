"""A lock on a folder, so that only one process writes there: a run in training, a dataset in preparation.

The system releases the lock when the process ends, however it ends. The file of a killed process locks nothing. Where
the system has no such locks (Windows, some network file systems), nothing is locked and nothing fails.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
SECONDS_BETWEEN_TRIES = 0.2


class FolderLock:
    """A lock on `folder`, which is made if it does not exist. Acquire it; as a context it is released at the end."""

    def __init__(self, folder: Path, name: str = LOCK_FILE) -> None:
        self.folder = folder
        self.path = folder / name
        self.made: list[Path] = []
        """The folders that were made for the lock, innermost first."""
        self.is_sure = False
        """Whether the lock really keeps others out; False if the system has no locks."""
        self._file: IO[str] | None = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> bool:
        """Try to get the lock. Returns False if `holder` has it. OSError if nothing can be written there."""
        while self._file is None:
            self._make_folder()
            try:
                file = open(self.path, "r+" if self.path.exists() else "a+", encoding="utf-8")  # noqa: SIM115
            except FileNotFoundError:  # the former holder has just removed it
                continue
            if not self._lock(file):
                file.close()
                return False
            self._file = file
            if not self._is_in_place():
                self._file = None
                file.close()
        with contextlib.suppress(OSError):  # a full disk does not prevent locking
            self._file.truncate(0)
            self._file.write(f"{os.getpid()} {socket.gethostname()}\n")
            self._file.flush()
        return True

    def wait(self, tell: Callable[[], object]) -> None:
        """Wait until the lock is ours. Calls `tell` once if it is not at once."""
        if not self.acquire():
            tell()
            while not self.acquire():
                time.sleep(SECONDS_BETWEEN_TRIES)

    def reacquire(self) -> bool:
        """Get the lock again if somebody has deleted the folder. Returns as `acquire` does."""
        if self._file is not None and not self._is_in_place():
            self._file.close()
            self._file = None
        return self.acquire()

    def holder(self) -> str:
        """The process that holds the lock, in words."""
        try:
            pid, host = self.path.read_text(encoding="utf-8").split()
            return f"process {int(pid)} on {host}"
        except (OSError, ValueError):
            return "another process"

    def release(self) -> None:
        """Release the lock, and remove the folders that were made for it if they are empty."""
        if self._file is None:
            return
        if self._is_in_place():
            with contextlib.suppress(OSError):
                self.path.unlink()
        with contextlib.suppress(OSError):  # for example a full disk
            self._file.close()
        self._file = None
        with contextlib.suppress(OSError):
            for folder in self.made:
                folder.rmdir()

    def _make_folder(self) -> None:
        missing = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.made = missing or self.made

    def _lock(self, file: IO[str]) -> bool:
        if fcntl is None:
            return True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # this file system has no locks
            return True
        self.is_sure = True
        return True

    def _is_in_place(self) -> bool:
        """Whether the locked file still has its name, and was not deleted or replaced."""
        assert self._file is not None
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path))
        except OSError:
            return False


def is_unused(folder: Path) -> bool:
    """Whether the folder does not exist, or holds nothing except the lock file of a killed process."""
    return not folder.exists() or (folder.is_dir() and all(path.name == LOCK_FILE for path in folder.iterdir()))
