"""Sealed files: a file of tensors followed by its SHA-256, so that no byte of it can change unnoticed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch

FORMAT = "splinegpt-checkpoint-2"
"""The format of a checkpoint's state, whether it is in one file or in shards."""
# It follows the zip archive of torch.save. torch.load finds the archive all the same, as it looks for its end.
SEAL = b"\nsplinegpt sha256 "
SEAL_LENGTH = len(SEAL) + 64 + 1
PIECE = 1 << 20


class NotSealed(Exception):
    """The file is incomplete, changed, or never was a sealed file; the message is a clause that says which."""


class _Hashing:
    """A file that hashes everything written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write_sealed(value: Any, path: Path) -> None:
    """Write `value` and its seal atomically: under a temporary name, flushed to the disk, then renamed.

    Raises OSError if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            hashing = _Hashing(file)
            torch.save(value, hashing)  # type: ignore[arg-type]
            file.write(SEAL + hashing.digest.hexdigest().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except RuntimeError as error:  # how torch.save reports a write that failed
        raise OSError(str(error).split("\n")[0]) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_sealed(path: Path) -> Any:
    """The value that was written. Nothing in the file is executed. Raises NotSealed or OSError."""
    check_seal(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # a good seal around foreign content; unpicklers fail in many ways
        if isinstance(error, MemoryError):
            raise
        raise NotSealed("it holds something else than tensors and plain values") from error


def check_seal(path: Path) -> None:
    """Read the whole file (1-2 GB per second) and compare its hash. Raises NotSealed or OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - SEAL_LENGTH
        if left < 0:
            raise NotSealed("it is too short")
        while left:
            piece = file.read(min(PIECE, left))
            if not piece:
                raise NotSealed("it became shorter while it was read")
            digest.update(piece)
            left -= len(piece)
        if file.read() != SEAL + digest.hexdigest().encode() + b"\n":
            raise NotSealed("it is incomplete or changed, for its checksum does not fit")


def replace(source: Path, target: Path) -> None:
    """Rename, and flush the folder, so that the new name survives a power failure."""
    os.replace(source, target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
