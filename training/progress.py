"""Measures how far a run is and how fast its steps are, and formats the progress line."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Progress:
    """The state of a run that changes from step to step, besides parameters and optimizer."""

    step: int = 0
    train_loss: float = math.nan
    grad_norm: float = math.nan
    val_loss: float | None = None
    is_best: bool = False
    best_val_loss: float = math.inf
    skipped_steps: int = 0
    """Number of them in a row, up to now."""
    saved_step: int = -1
    """The step of the newest checkpoint, which may still be being written."""

    def note_validation(self, val_loss: float) -> None:
        self.val_loss = val_loss
        self.is_best = val_loss < self.best_val_loss
        if self.is_best:  # never, if it is NaN
            self.best_val_loss = val_loss


class Stopwatch:
    """Measures training steps. Time in `pause` (evaluating, saving, drawing) does not count."""

    def __init__(
        self, tokens_per_step: int, elapsed_s: float = 0.0, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.tokens_per_step = tokens_per_step
        self._clock = clock
        self._earlier = elapsed_s  # seconds of the run before it was resumed
        self._start = clock()
        self.step_s = float("nan")
        self._last_step = 0.0
        self.restart()

    def step(self) -> float:
        """Count a step. Returns its seconds, from the end of the one before or the last lap."""
        trained = self._trained_s()
        self._steps += 1
        seconds, self._last_step = trained - self._last_step, trained
        return seconds

    def _trained_s(self) -> float:
        return self._clock() - self._window_start - self._paused

    @contextmanager
    def pause(self) -> Iterator[None]:
        start = self._clock()
        yield
        self._paused += self._clock() - start

    def restart(self) -> None:
        """Forget the steps since the last lap, because they include something else, such as compiling."""
        self._window_start, self._paused, self._last_step = self._clock(), 0.0, 0.0
        self._steps = 0

    def lap(self) -> None:
        """Set `step_s` to the mean over the steps since the last lap, and start the next lap."""
        if self._steps:
            self.step_s = self._trained_s() / self._steps
        self.restart()

    @property
    def usual_step_s(self) -> float:
        """Seconds of a step: the average of the last lap, or of the first one so far; NaN before that."""
        return self.step_s if self.step_s == self.step_s or not self._steps else self._last_step / self._steps

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step_s

    @property
    def elapsed_s(self) -> float:
        """Wall time of the run, with everything it did, before it was resumed too."""
        return self._earlier + self._clock() - self._start


def progress_line(
    progress: Progress,
    max_iters: int,
    evaluated: bool,
    learning_rate: float,
    stopwatch: Stopwatch,
    mfu: float | None = None,
) -> str:
    """A line like `step 1200/5000 24% | loss 1.612 | val 1.588* | lr 9.1e-04 | 41.2k tok/s | 398 ms | eta 00:25`.

    `evaluated`: whether the validation loss belongs to this step. If it is also the best so far, it gets a star.
    """
    step = progress.step
    parts = [f"step {step}/{max_iters} {100 * step // max(1, max_iters)}%", f"loss {progress.train_loss:.3f}"]
    if progress.val_loss is not None:
        parts.append(f"val {progress.val_loss:.3f}{'*' if evaluated and progress.is_best else ''}")
    parts.append(f"lr {learning_rate:.1e}")
    if stopwatch.step_s == stopwatch.step_s:  # not NaN: at least one step was timed
        parts.append(f"{_short(stopwatch.tokens_per_second)} tok/s")
        parts.append(f"{1000 * stopwatch.step_s:.{0 if stopwatch.step_s >= 0.1 else 1}f} ms")
        if mfu is not None:
            parts.append(f"mfu {100 * mfu:.1f}%")
        parts.append(f"eta {duration(stopwatch.step_s * (max_iters - step))}")
    return " | ".join(parts)


def _short(number: float) -> str:
    for divisor, suffix in ((1e6, "M"), (1e3, "k")):
        if number >= divisor:
            return f"{number / divisor:.1f}{suffix}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """mm:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
