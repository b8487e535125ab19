"""Small files, written whole or not at all."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

SECONDS_TO_WRITE = 3600  # no file of these takes as long


def remove_leftovers(*folders: Path) -> None:
    """Delete what killed processes had begun to write there. Others may be writing, so that is judged by its age."""
    for folder in folders:
        for leftover in folder.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - leftover.stat().st_mtime > SECONDS_TO_WRITE:
                    leftover.unlink()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
