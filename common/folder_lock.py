"""A folder in which one process at a time writes: a run while it trains, a dataset while it is prepared.

The lock is the process's own, and the system lets it go whatever ends the process: a file that a killed one left
behind locks nothing. Where there are no such locks (Windows, some network file systems) nothing is locked, nor fails.
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
SECONDS_BETWEEN_LOOKS = 0.2


class FolderLock:
    """The right to write in `folder`, which is made if need be. Not yet taken; as a context it is let go at the end."""

    def __init__(self, folder: Path, name: str = LOCK_FILE) -> None:
        self.folder = folder
        self.path = folder / name
        self.made: list[Path] = []
        """The folders that were made for it, the innermost first."""
        self.is_sure = False
        """Whether others are kept out; False where the system has no locks."""
        self._file: IO[str] | None = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self) -> bool:
        """Whether it is ours now; if not, `holder` has it. OSError if nothing can be written there."""
        while self._file is None:
            self._make_folder()
            try:
                file = open(self.path, "r+" if self.path.exists() else "a+", encoding="utf-8")  # noqa: SIM115
            except FileNotFoundError:  # the one who held it has just removed it
                continue
            if not self._lock(file):
                file.close()
                return False
            self._file = file
            if not self._is_the_one_in_place():
                self._file = None
                file.close()
        with contextlib.suppress(OSError):  # a full disk: it is locked all the same
            self._file.truncate(0)
            self._file.write(f"{os.getpid()} {socket.gethostname()}\n")
            self._file.flush()
        return True

    def wait(self, tell: Callable[[], object]) -> None:
        """Until it is ours; `tell` is called once if that is not at once."""
        if not self.take():
            tell()
            while not self.take():
                time.sleep(SECONDS_BETWEEN_LOOKS)

    def renew(self) -> bool:
        """As `take`, where somebody may have deleted the folder."""
        if self._file is not None and not self._is_the_one_in_place():
            self._file.close()
            self._file = None
        return self.take()

    def holder(self) -> str:
        """Who has it, in words."""
        try:
            pid, host = self.path.read_text(encoding="utf-8").split()
            return f"process {int(pid)} on {host}"
        except (OSError, ValueError):
            return "another process"

    def release(self) -> None:
        """Let it go, and remove the folders that were made for it if nothing is in them."""
        if self._file is None:
            return
        if self._is_the_one_in_place():
            with contextlib.suppress(OSError):
                self.path.unlink()
        with contextlib.suppress(OSError):  # of a full disk
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

    def _is_the_one_in_place(self) -> bool:
        """Whether the file that is locked is still the one by that name."""
        assert self._file is not None
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path))
        except OSError:
            return False


def is_unused(folder: Path) -> bool:
    """Whether it is not there, or holds nothing but what a process that was killed early left of its lock."""
    return not folder.exists() or (folder.is_dir() and all(path.name == LOCK_FILE for path in folder.iterdir()))
