"""Going on without output that cannot be written: its reader has ended, its disk is full, its terminal closed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

from common.streams import repair_streams


class Lenient:
    """A text stream that drops what cannot be written, and reports the first failure. Later writes are tried again."""

    def __init__(self, stream: TextIO, tell: Callable[[Exception], object]) -> None:
        """`tell` is called with the first failure."""
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

    def flush_at_end(self) -> None:
        """Flush for the last time. If that fails, redirect the stream, or the flush at exit would fail too."""
        try:
            self._stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextlib.contextmanager
def output_may_fail() -> Iterator[None]:
    """Surrounds (or decorates) work that must go on if stdout or stderr cannot be written."""
    repair_streams()
    before = sys.stdout, sys.stderr
    lines = Lenient(sys.stdout, lambda error: print(_sentence(error), file=sys.stderr, flush=True))
    errors = Lenient(sys.stderr, lambda error: None)
    sys.stdout, sys.stderr = cast(TextIO, lines), cast(TextIO, errors)
    try:
        yield
    finally:
        lines.flush_at_end()
        errors.flush_at_end()
        sys.stdout, sys.stderr = before


def _sentence(error: Exception) -> str:
    reason = getattr(error, "strerror", None) or error
    return f"standard output cannot be written ({reason}); the work goes on without it"
