"""Paths as users write them, files that are written atomically, and hashes of files."""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

SECONDS_TO_WRITE = 3600  # no file that is written so takes as long


def remove_leftovers(*folders: Path) -> None:
    """Delete temporary files of killed processes. Only old ones, as other processes may be writing now."""
    for folder in folders:
        for leftover in folder.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - leftover.stat().st_mtime > SECONDS_TO_WRITE:
                    leftover.unlink()


def expand_home(path: str) -> str:
    """Replace a leading ~ or ~USER by the home directory, as a shell does. Other paths stay as they are."""
    try:
        return os.path.expanduser(path)
    except ValueError:  # a zero byte or a surrogate, which no path has
        return path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename that to `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
