"""Paths as users write them, and small files, written whole or not at all."""

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


def expand_home(path: str) -> str:
    """`path` with the home directory in place of a leading ~ or ~USER, as a shell has it; as it is if there is none."""
    try:
        return os.path.expanduser(path)
    except ValueError:  # a zero byte or half a character, which no path has
        return path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
