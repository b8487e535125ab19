"""Stop requests: processes that ask together stop together, whenever the signal comes."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from training.distributed import World
from training.interrupt import StopRequest, must_stop


@dataclass(frozen=True)
class Meeting(World):
    """One of two processes. `during` runs while they ask each other; the other one has exit code `others`."""

    size: int = 2
    others: int = 0
    during: Callable[[], None] = field(default=lambda: None)

    def max(self, value: int) -> int:
        self.during()
        return max(value, self.others)


@pytest.mark.parametrize("comes", ["before", "meanwhile", "to the other"])
def test_no_process_stops_before_the_others_know(comes: str) -> None:
    with StopRequest() as stop:
        if comes == "before":
            signal.raise_signal(signal.SIGUSR1)
        during = (lambda: signal.raise_signal(signal.SIGUSR1)) if comes == "meanwhile" else lambda: None
        others = 128 + signal.SIGUSR1 if comes == "to the other" else 0
        assert must_stop(stop, Meeting(others=others, during=during)) == (comes != "meanwhile")
        assert must_stop(stop, Meeting()) and stop.signal_name == "SIGUSR1" and stop.exit_code == 128 + signal.SIGUSR1


@pytest.fixture
def _usual_hangup() -> Iterator[None]:
    """Restore SIGHUP, which nohup would ignore."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("_usual_hangup")
def test_a_closed_terminal_may_say_so_more_than_once() -> None:
    """The kernel, the shell and the session manager each send one. That must not count as a second signal."""
    with StopRequest() as stop:
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
        assert stop and stop.exit_code == 128 + signal.SIGHUP


@pytest.mark.usefixtures("_usual_hangup")
def test_nohup_is_respected() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
