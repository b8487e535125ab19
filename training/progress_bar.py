"""A progress bar below the progress lines, where a terminal reads them: how far, how long, and the loss as a curve.

It is redrawn in place a few times a second, from numbers that the step has on the CPU anyway. Carriage returns and
spaces are all that it needs of a terminal. Whatever else is printed takes its place, and it comes back below.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TextIO, cast

from training.progress import Progress, Stopwatch, duration

INTERVAL_S = 0.25
BLOCKS = "▁▂▃▄▅▆▇█"
FULL, EMPTY = "█", "░"
FULL_ASCII, EMPTY_ASCII = "#", "-"
MAX_CURVE, MAX_BAR, MIN_BAR = 32, 40, 5  # columns
USUAL_COLUMNS = 80  # where a terminal does not say


class Curve:
    """The losses of a run, as few numbers: means over so many steps as keeps them below a limit."""

    def __init__(self, limit: int = 8 * MAX_CURVE) -> None:
        self.limit = limit
        self.steps_each = 1
        self._means: list[float] = []
        self._sum, self._count = 0.0, 0

    def add(self, loss: float) -> None:
        if not math.isfinite(loss):
            return
        self._sum, self._count = self._sum + loss, self._count + 1
        if self._count == self.steps_each:
            self._means.append(self._sum / self._count)
            self._sum, self._count = 0.0, 0
        if len(self._means) == self.limit:
            self._means = resampled(self._means, self.limit // 2)
            self.steps_each *= 2

    def values(self, most: int) -> list[float]:
        """At most so many means, evenly over the run."""
        return resampled(self._means, most)


def resampled(values: Sequence[float], most: int) -> list[float]:
    """The means of at most `most` stretches of about equal length."""
    count = min(most, len(values))
    edges = [len(values) * k // count for k in range(count + 1)] if count else []
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]


def sparkline(values: Sequence[float]) -> str:
    """One block for each value, the lowest at the smallest."""
    if not values:
        return ""
    low, span = min(values), max(values) - min(values)
    return "".join(BLOCKS[round((value - low) / span * (len(BLOCKS) - 1)) if span else 0] for value in values)


def bar_line(columns: int, share: float, loss: float, curve: Curve, eta_s: float, blocks: bool) -> str:
    """`███████░░░░░  38%  loss 1.612 █▅▃▂▂▁▁  eta 00:25` in at most so many columns: what does not fit is left out."""
    percent, words = f"{math.floor(100 * share)}%", {"loss": f"loss {loss:.3f}", "eta": ""}
    if math.isfinite(eta_s):
        words["eta"] = f"eta {duration(eta_s)}"
    left = columns - len(percent)
    for name in ("eta", "loss"):
        if words[name] and len(words[name]) + 2 <= left:
            left -= len(words[name]) + 2
        else:
            words[name] = ""
    bar_width = min(MAX_BAR, left * 2 // 3 if blocks and words["loss"] else left) - 2
    full, empty = (FULL, EMPTY) if blocks else (FULL_ASCII, EMPTY_ASCII)
    bar = ""
    if bar_width >= MIN_BAR:
        bar = (full * math.floor(share * bar_width)).ljust(bar_width, empty)
        left -= bar_width + 2
    if blocks and words["loss"] and left > 1:
        words["loss"] = f"{words['loss']} {sparkline(curve.values(min(MAX_CURVE, left - 1)))}".rstrip()
    return "  ".join(part for part in (bar, percent, words["loss"], words["eta"]) if part)[: max(0, columns)]


class ProgressBar:
    """Context in which `update` draws the bar, and text for stdout or stderr is written in its place.

    Without a terminal it does nothing at all.
    """

    def __init__(
        self, stream: TextIO, max_iters: int, silent: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`silent`: on all processes of a run but one."""
        self.is_on = not silent and stream.isatty() and os.environ.get("TERM") != "dumb"
        self.at_line_start = True
        self._stream, self._max_iters, self._clock = stream, max_iters, clock
        self._blocks = can_write(BLOCKS + FULL + EMPTY, stream)
        self._curve = Curve()
        self._drawn_at, self._length = -math.inf, 0
        self._lock = threading.RLock()  # threads that save and track print too
        self._before = sys.stdout, sys.stderr

    def __enter__(self) -> ProgressBar:
        if self.is_on:
            self._before = sys.stdout, sys.stderr
            sys.stdout, sys.stderr = (cast(TextIO, InPlaceOfBar(stream, self)) for stream in self._before)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_on:
            self.erase()
            sys.stdout, sys.stderr = self._before

    def update(self, progress: Progress, stopwatch: Stopwatch) -> None:
        """A step is done. Draws if the last time is long enough ago."""
        if not self.is_on:
            return
        self._curve.add(progress.train_loss)
        now = self._clock()
        if now - self._drawn_at < INTERVAL_S:
            return
        self._drawn_at = now
        left = self._max_iters - progress.step
        share = progress.step / max(1, self._max_iters)
        columns = self._columns() - 1  # a full line would wrap
        line = bar_line(
            columns, min(share, 1.0), progress.train_loss, self._curve, stopwatch.usual_step_s * left, self._blocks
        )
        with self._lock:
            if self.at_line_start and is_in_foreground(self._stream):
                self._write(self._erasing(columns) + line)
                self._length = len(line)

    def erase(self) -> None:
        """Make room for other text."""
        with self._lock:
            if self._length:
                self._write(self._erasing(self._columns() - 1))
                self._length = 0

    def writing(self, text: str, write: Callable[[str], int]) -> int:
        """Write other text."""
        with self._lock:
            self.erase()
            self.at_line_start = text.endswith("\n") if text else self.at_line_start
            return write(text)

    def _erasing(self, columns: int) -> str:
        return "\r" + " " * min(self._length, columns) + "\r" if self._length else ""

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def _columns(self) -> int:
        """The terminal's width now, which its user may change."""
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or USUAL_COLUMNS
        except (OSError, ValueError):
            return USUAL_COLUMNS


class InPlaceOfBar:
    """A text stream whose text is written where the bar is, which comes back below."""

    def __init__(self, stream: TextIO, bar: ProgressBar) -> None:
        self._stream, self._bar = stream, bar

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._bar.writing(text, self._stream.write)


def can_write(text: str, stream: TextIO) -> bool:
    """Whether a stream's encoding has all these characters."""
    try:
        text.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def is_in_foreground(stream: TextIO) -> bool:
    """Whether a terminal's keyboard is this process's too: after `&` the line that is typed is the shell's."""
    try:
        return os.tcgetpgrp(stream.fileno()) == os.getpgrp()
    except (OSError, ValueError, AttributeError):  # not its own terminal, or a system without such groups
        return True
