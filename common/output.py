"""Output that may fail: its reader has gone, its disk is full, its terminal is closed. The work goes on without it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

from common.streams import mend_streams


class Lenient:
    """A text stream that drops what cannot be written, and tells so once. What comes later is tried again."""

    def __init__(self, stream: TextIO, tell: Callable[[Exception], object]) -> None:
        self._stream = stream
        self._tell = tell
        self._told = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._noting():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._noting():
            self._stream.flush()

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._told:
                self._told = True
                self._tell(error)

    def settle(self) -> None:
        """Flush for the last time; where that fails the interpreter's own last flush must not fail again."""
        try:
            self._stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextlib.contextmanager
def output_may_fail() -> Iterator[None]:
    """A stretch, or by decoration a function, whose work is worth more than its lines on stdout and stderr."""
    mend_streams()
    before = sys.stdout, sys.stderr
    lines = Lenient(sys.stdout, lambda error: print(_sentence(error), file=sys.stderr, flush=True))
    errors = Lenient(sys.stderr, lambda error: None)
    sys.stdout, sys.stderr = cast(TextIO, lines), cast(TextIO, errors)
    try:
        yield
    finally:
        lines.settle()
        errors.settle()
        sys.stdout, sys.stderr = before


def _sentence(error: Exception) -> str:
    reason = getattr(error, "strerror", None) or error
    return f"standard output cannot be written ({reason}); the work goes on without it"
