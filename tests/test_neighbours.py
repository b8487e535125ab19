"""A run that other processes slow says so once and says what helps. A made-up clock tells the time."""

import math
import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.cores import Usage
from training.neighbours import Neighbours
from training.progress import Progress, Stopwatch, progress_line


class Machine:
    """A made-up clock and two cores, which a run with two threads shares with other processes."""

    def __init__(self, threads: int = 2, visible: bool = True, silent: bool = False) -> None:
        self.clock, self.own, self.all = 0.0, 0.0, 0.0
        self.visible = visible
        self.stopwatch = Stopwatch(1000, clock=lambda: self.clock)
        self.neighbours = Neighbours(threads, silent, cores=2, usage=self.usage)

    def usage(self) -> Usage:
        return Usage(self.clock, self.own, self.all if self.visible else math.nan)

    def spend(self, seconds: float, others: float, own: float) -> None:
        self.clock += seconds
        self.own += own * seconds
        self.all += (own + others) * seconds

    def steps(self, count: int, step_s: float, others: float = 0.0, own: float = 1.9) -> None:
        for _ in range(count):
            self.spend(step_s, others, own)
            self.neighbours.notice(self.stopwatch.step())

    def pause(self, seconds: float, others: float = 0.0) -> None:
        self.stopwatch.lap()
        with self.stopwatch.pause():
            self.spend(seconds, others, 1.9)


def test_it_says_once_who_takes_the_cores_and_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine()
    machine.steps(300, 0.04)
    assert capsys.readouterr().out == ""
    machine.steps(300, 0.08, others=1.0, own=1.0)
    said = capsys.readouterr().out
    assert said == (
        "steps take 80 ms, 2.0 times what was usual in this run, as other processes take 1.0 of 2 cores; training goes "
        "on. If they stay, stop it and go on with --resume True --num_threads 1: then no thread waits for one that has "
        "no core\n"
    )
    machine.steps(1000, 0.04)
    machine.steps(1000, 2.0, others=1.0, own=1.0)
    assert capsys.readouterr().out == ""


def test_it_says_so_within_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine()
    machine.steps(300, 0.04)
    before = machine.clock
    while "other processes" not in capsys.readouterr().out:
        machine.steps(1, 0.1, others=1.0, own=1.0)
        assert machine.clock < before + 6


def test_a_single_thread_is_told_to_wait(capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine(threads=1)
    machine.steps(300, 0.04, own=1.0)
    machine.steps(300, 0.08, others=1.5, own=0.5)
    assert "num_threads" not in (said := capsys.readouterr().out)
    assert said.count("other processes take 1.5 of 2 cores") == 1


@pytest.mark.parametrize(("step_s", "speaks"), [(0.1, False), (0.2, True)])
def test_where_others_cannot_be_seen_it_takes_more_and_says_probably(
    step_s: float, speaks: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine(visible=False)
    machine.steps(300, 0.04)
    machine.steps(300, step_s)
    said = capsys.readouterr().out
    assert ("probably because other processes take the cores" in said and "--num_threads 1" in said) == speaks
    assert bool(said) == speaks


def slower_by_itself(machine: Machine) -> None:
    machine.steps(300, 0.4)  # a hot or throttled CPU, a slow disk


def always_shared(machine: Machine) -> None:
    machine.neighbours.forget()
    machine.steps(300, 0.08, others=1.0, own=1.0)
    machine.steps(300, 0.2, others=1.1, own=0.9)  # for another reason, because the others were there before


def on_a_free_core(machine: Machine) -> None:
    machine.neighbours = Neighbours(1, cores=2, usage=machine.usage)
    machine.steps(300, 0.04, own=1.0)
    machine.steps(300, 0.1, others=1.0, own=1.0)  # one thread has the other core


def long_evaluations(machine: Machine) -> None:
    for _ in range(20):
        machine.pause(60.0, others=2.0)
        machine.steps(40, 0.04)


def a_hiccup(machine: Machine) -> None:
    machine.steps(1, 1.5, others=2.0, own=0.1)
    machine.steps(300, 0.04)


def refinement(machine: Machine) -> None:
    machine.spend(30.0, others=1.5, own=1.9)  # compiled by child processes
    machine.stopwatch.restart()
    machine.neighbours.forget()
    machine.steps(300, 0.2, others=1.0)  # a larger model


@pytest.mark.parametrize(
    "change", [slower_by_itself, always_shared, on_a_free_core, long_evaluations, a_hiccup, refinement]
)
def test_it_keeps_silent_about_all_else(change: Callable[[Machine], None], capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine()
    machine.steps(300, 0.04)
    change(machine)
    assert capsys.readouterr().out == ""


def test_it_keeps_silent_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine(silent=True)
    machine.steps(300, 0.04)
    machine.steps(300, 0.4, others=1.9, own=0.1)
    assert capsys.readouterr().out == ""


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(1e-4, 10), st.sampled_from(["step", "pause", "lap", "restart"])), min_size=1))
def test_a_stopwatch_gives_each_step_its_own_time(events: list[tuple[float, str]]) -> None:
    """Compare with a plain sum: the time since the last step, lap or restart, without pauses."""
    machine, since = Machine(), 0.0
    for seconds, event in events:
        machine.clock += seconds
        since += seconds
        if event == "step":
            assert machine.stopwatch.step() == pytest.approx(since, abs=1e-9)
        elif event == "pause":
            with machine.stopwatch.pause():
                machine.clock += 100.0
            continue
        else:
            getattr(machine.stopwatch, event)()
        since = 0.0


def test_the_rate_of_a_progress_line_is_that_of_the_steps_since_the_last_line() -> None:
    machine = Machine()
    lines = []
    for step_s in (0.04, 2.0, 0.04):
        machine.steps(50, step_s)
        machine.pause(7.0)
        lines.append(progress_line(Progress(step=1, train_loss=1.0), 10, False, 1e-3, machine.stopwatch))
    shown = [re.search(r"\| (\S+) tok/s \| (\S+) ms", line) for line in lines]
    assert [match and match.groups() for match in shown] == [("25.0k", "40.0"), ("500", "2000"), ("25.0k", "40.0")]
