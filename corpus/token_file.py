"""Reads the tokens of a shard piece by piece, and notices if the file changes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError


class DataChanged(UserError):
    """A data file has changed since it was opened."""

    everywhere = True


class TokenFile:
    """A flat file of unsigned integers, indexed like a read-only 1-D array.

    It is not memory-mapped. The pages of a map count as memory of the process, which would grow to the size of the
    data; and if somebody truncated the file, a bus error would end the process.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        """Raises OSError, and ValueError for an empty file."""
        self.path = path
        self.dtype = dtype
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  open as long as the tokens are in use
        self._opened = self._identity()
        self._length = os.fstat(self._file.fileno()).st_size // dtype.itemsize
        if not self._length:
            raise ValueError(f"{path} is empty")

    def _identity(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, key: int | slice) -> Any:
        """One token, or a copy of a slice without a step. DataChanged if the file has changed."""
        if isinstance(key, slice):
            start, stop, step = key.indices(self._length)
            if step != 1:
                raise IndexError("tokens are read in order, without a step")
            return self._read(start, max(0, stop - start))
        index = key + self._length if key < 0 else key
        if not 0 <= index < self._length:
            raise IndexError(f"token {key} of {self._length}")
        return self._read(index, 1)[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype)

    def _read(self, start: int, count: int) -> np.ndarray:
        tokens = np.empty(count, dtype=self.dtype)
        view = memoryview(tokens.view(np.uint8))  # type: ignore[arg-type]
        self._file.seek(start * self.dtype.itemsize)
        done = 0
        while done < len(view):
            got = self._file.readinto(view[done:])
            if not got:
                break
            done += got
        if done < len(view) or self._identity() != self._opened:
            raise DataChanged(f"{self.path} was changed while it was in use; leave it alone, or prepare the data again")
        return tokens
