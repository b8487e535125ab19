"""The other processes on this machine's cores: notice when steps are slow because of them, and say so once."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable

from common.cores import Usage, affine_cores

WINDOW_S, WINDOW_STEPS = 2.0, 3
"""Steps are judged by windows of at least so many seconds and steps: a hiccup is no neighbour."""
WINDOWS_BEFORE, WINDOWS_KEPT = 3, 1000
SLOWER = 1.6
"""So many times a run's median is slow if others can be seen to take more than before,"""
MUCH_SLOWER = 3.0
"""and so many where that cannot be seen."""
TAKEN = 0.4
"""Cores that must be taken, more than before and from the run's own threads."""


class Neighbours:
    """Watches the steps of a run on the CPU. Their times must be those of training alone, evaluations left out."""

    def __init__(
        self, threads: int, silent: bool = False, cores: int | None = None, usage: Callable[[], Usage] = Usage.now
    ) -> None:
        """`silent`: for a run on a GPU; `cores`: those that this process is bound to; `usage`: how busy they were."""
        self._threads, self._cores, self._usage = threads, cores or affine_cores(), usage
        self._has_nothing_to_say = silent
        self.forget()

    def forget(self) -> None:
        """Begin anew: from now on steps are different ones."""
        self._medians: deque[float] = deque(maxlen=WINDOWS_KEPT)  # of the steps of each window
        self._taken: deque[float] = deque(maxlen=WINDOWS_KEPT)  # cores that others took in it
        self._begin()

    def _begin(self) -> None:
        self._steps: list[float] = []
        self._start = self._usage()

    def notice(self, step_s: float) -> None:
        """Take note of a step of so many seconds. The first time that a window is slow, print why and what helps."""
        if self._has_nothing_to_say:
            return
        self._steps.append(step_s)
        if len(self._steps) < WINDOW_STEPS or sum(self._steps) < WINDOW_S:
            return
        median, now = statistics.median(self._steps), self._usage()
        taken = now.others_since(self._start)
        if len(self._medians) >= WINDOWS_BEFORE:
            usual = statistics.median(self._medians)
            if self._is_slow(median / usual, taken):
                self._has_nothing_to_say = True
                print(self._sentence(median, usual, taken), flush=True)
        self._medians.append(median)
        self._taken.append(taken)
        self._begin()

    def _is_slow(self, ratio: float, taken: float) -> bool:
        if math.isnan(taken):
            return ratio >= MUCH_SLOWER
        wanted = self._threads + taken - self._cores  # cores more than there are
        more = taken - statistics.median(self._taken)
        return ratio >= SLOWER and min(wanted, more) >= TAKEN

    def _sentence(self, median: float, usual: float, taken: float) -> str:
        slow = f"steps take {1000 * median:.3g} ms, {median / usual:.1f} times what was usual in this run"
        if math.isnan(taken):
            why, left = "probably because other processes take the cores", self._threads - 1
        else:
            why = f"as other processes take {taken:.1f} of {self._cores} core{'s' * (self._cores > 1)}"
            left = min(self._threads - 1, round(self._cores - taken))
        if self._threads == 1:
            return f"{slow}, {why}; training goes on, and is as fast as before when they have ended"
        return (
            f"{slow}, {why}; training goes on. If they stay, stop it and go on with --resume True --num_threads "
            f"{max(1, left)}: then no thread waits for one that has no core"
        )
