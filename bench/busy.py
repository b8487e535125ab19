"""Time training and sampling while another process keeps a core busy: `python bench/busy.py`.

The script starts that other process itself. It compares settings of how OpenMP's threads wait for each other. Each
setting gets a process of its own, which trains and samples by nanoGPT's CPU recipe. They take turns, with all cores
free and with one core busy, and medians are compared. A turn that further processes disturb is repeated (only Linux
tells). To measure another OpenMP runtime, preload it: `LD_PRELOAD=…/libiomp5.so python bench/busy.py`.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone, before this folder

import common.threads  # noqa: F401  before torch
from common.threads import CHOOSE_NUMBER, CHOOSE_SPIN

import numpy as np
import torch

from bench.shared.machine import machine_name
from common.command_line import OptionParser
from common.cores import busy_seconds
from common.errors import UserError, exit_on_user_error
from corpus.dataset import Dataset
from corpus.tokenizer import CharTokenizer
from corpus.writer import DatasetWriter
from sample import generate
from train import Trainer
from training.device import choose_device
from training.neighbours import Neighbours
from training.run import open_run

USAGE = "python bench/busy.py [--key value …]"
ROOT = Path(__file__).resolve().parents[1]
OWN = {"libgomp": "GOMP_SPINCOUNT=300000", "libomp": "KMP_BLOCKTIME=200", "libiomp5": "KMP_BLOCKTIME=200"}
"""The setting that equals each runtime's own default."""
WORK = {"train": "train.py, a step", "sample": "sample.py, a token"}
DISTURBING_CORES = 0.1
CHARACTERS = "".join(map(chr, range(58, 58 + 65)))  # as many as Shakespeare has


@dataclass(frozen=True)
class Options:
    settings: str = ""
    """Settings to compare, as in "GOMP_SPINCOUNT=100,OMP_WAIT_POLICY=passive"; by default those the runtime knows."""
    threads: int = 2
    """CPU threads. One thread is timed as well."""
    rounds: int = 5
    """Turns of each setting; the median is reported."""
    seconds: float = 0.5
    """Minimum length of a turn."""
    attempts: int = 12
    """Maximum number of tries of a turn that is disturbed."""
    work: str = ""
    """Set only for the processes that this script starts: their working directory."""

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= 1024 or not 0 < self.seconds < 60:
            raise ValueError("threads must be from 1 to 1024, and seconds above 0 and below 60")
        if self.rounds < 1 or self.attempts < 1:
            raise ValueError("rounds and attempts must be at least 1")
        if any("=" not in setting for setting in self.settings.split(",") if setting):
            raise ValueError(f"settings must be NAME=VALUE,NAME=VALUE; got {self.settings!r}")


@dataclass(frozen=True)
class Way:
    """A number of threads and the setting of how they wait; an empty setting leaves it to our programs."""

    threads: int
    setting: str = ""

    def environment(self) -> dict[str, str]:
        """The environment of a user who has set this variable and no other one for threads."""
        rest = {name: value for name, value in os.environ.items() if name not in (*CHOOSE_SPIN, *CHOOSE_NUMBER)}
        return {**rest, **dict([self.setting.split("=", 1)] if self.setting else [])}


Times = dict[tuple[Way, str, bool], float]
"""Milliseconds by way, work, and whether a core was busy."""


class Worker:
    """A process that trains or samples with one setting, a turn at a time."""

    def __init__(self, way: Way, work: Path, seconds: float) -> None:
        command = [sys.executable, __file__, f"--threads={way.threads}", f"--seconds={seconds}", f"--work={work}"]
        self.process = subprocess.Popen(
            command, env=way.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def turn(self, what: str) -> float:
        """Mean milliseconds of `what`, a key of `WORK`, over one turn. Raises UserError if the process has died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(what, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise UserError("a timed process has ended; its messages are above")
        return float(answer)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class Observer:
    """Watches what processes outside the benchmark use of the CPU, and repeats turns that they disturb."""

    def __init__(self, attempts: int) -> None:
        self.attempts = attempts
        self.turns = self.disturbed = 0

    def undisturbed(self, worker: Worker, what: str, taker: subprocess.Popen[bytes]) -> float:
        """Milliseconds of the first turn that nothing disturbs, or else of the least disturbed one."""
        found = []
        for _ in range(self.attempts):
            before, start = self._of_strangers(worker.process.pid, taker.pid), time.perf_counter()
            milliseconds = worker.turn(what)
            strangers = self._of_strangers(worker.process.pid, taker.pid) - before
            found.append((strangers / (time.perf_counter() - start), milliseconds))
            if not found[-1][0] > DISTURBING_CORES:
                break
        self.turns += 1
        self.disturbed += min(found)[0] > DISTURBING_CORES
        return min(found)[1]

    @staticmethod
    def _of_strangers(*processes: int) -> float:
        """Core-seconds used by all processes except these; NaN if the system does not tell."""
        used = busy_seconds()
        return used if used != used else used - sum(map(Observer._seconds_of, processes))

    @staticmethod
    def _seconds_of(process: int) -> float:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # proc(5): utime and stime


@contextlib.contextmanager
def core_taker() -> Iterator[subprocess.Popen[bytes]]:
    """A process that keeps one core busy. It starts stopped; SIGCONT sets it going."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    process.send_signal(signal.SIGSTOP)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@exit_on_user_error
def main() -> None:
    options = OptionParser(Options, USAGE).parse(sys.argv[1:])
    torch.set_num_threads(options.threads)
    if options.work:
        answer(options)
        return
    runtime = openmp_runtime()
    print(
        f"{machine_name('cpu')}, {os.cpu_count()} cores, torch {torch.__version__}, {runtime}; one core taken, "
        f"medians of {options.rounds} rounds",
        flush=True,
    )
    ways = ways_to_wait(options, runtime)
    print_table(measure(ways, options), ways)


def openmp_runtime() -> str:
    """The OpenMP runtime of this process. A preloaded one takes precedence over PyTorch's own."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return "libomp" if sys.platform == "darwin" else "OpenMP"
    return next((name for name in ("libiomp5", "libomp", "libgomp") if f"/{name}" in maps), "OpenMP")


def ways_to_wait(options: Options, runtime: str) -> list[Way]:
    """One thread; then all threads with the runtime's default, with the other settings, and with our programs' own."""
    own = OWN.get(runtime, OWN["libgomp"])
    name = own.split("=")[0]
    values = ("100", "1000", "2000", "10000") if name == "GOMP_SPINCOUNT" else ("0", "1", "10")
    settings = [setting for setting in options.settings.split(",") if setting]
    settings = settings or [*(f"{name}={value}" for value in values), "OMP_WAIT_POLICY=passive"]
    return [Way(1, own), *(Way(options.threads, setting) for setting in dict.fromkeys((own, *settings, "")))]


def measure(ways: list[Way], options: Options) -> Times:
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_dataset(work / "data")
        taker = stack.enter_context(core_taker())
        workers = {}
        for way in ways:
            workers[way] = Worker(way, work, options.seconds)
            stack.callback(workers[way].end)
        turns = list(product(ways, WORK, (False, True)))
        found: dict[tuple[Way, str, bool], list[float]] = {turn: [] for turn in turns}
        for way, what, _ in turns:  # to start and warm up
            workers[way].turn(what)
        shuffle, observer = random.Random(0).shuffle, Observer(options.attempts)
        for _ in range(options.rounds):
            shuffle(turns)  # or each turn would always follow the same one
            for way, what, busy in turns:
                if busy:
                    taker.send_signal(signal.SIGCONT)
                found[way, what, busy].append(observer.undisturbed(workers[way], what, taker))
                taker.send_signal(signal.SIGSTOP)
    print(f"{observer.disturbed} of {observer.turns} turns were disturbed by other processes")
    return {turn: statistics.median(times) for turn, times in found.items()}


def print_table(times: Times, ways: list[Way]) -> None:
    today = ways[1]
    for what, title in WORK.items():
        print(f"\n{title:37} {'quiet, ms':>9} {'busy, ms':>9} {'busy/quiet':>10} {'quiet/own':>9}")
        for way in ways:
            quiet, busy = (times[way, what, taken] for taken in (False, True))
            name = f"{way.threads} thread{'s' * (way.threads > 1)}, {way.setting or 'as the programs set it'}"
            name += " (its own)" if way == today else ""
            print(f"{name:37} {quiet:9.2f} {busy:9.2f} {busy / quiet:10.2f} {quiet / times[today, what, False]:9.3f}")


def answer(options: Options) -> None:
    """Serve as a worker: read the name of some work from stdin, do it for one turn, print its mean time, repeat."""
    work = Path(options.work)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory(dir=work) as folder:
        trainer = recipe(work / "data", Path(folder) / "run", options.threads)
        units = {"train": trainer.step, "sample": token_of(trainer)}
        for line in sys.stdin:
            unit, count = units[line.strip()], 0
            start = time.perf_counter()
            while time.perf_counter() - start < options.seconds:
                unit()
                count += 1
            print(1000 * (time.perf_counter() - start) / count, file=answers, flush=True)


def recipe(data: Path, run: Path, num_threads: int) -> Trainer:
    """A trainer with the CPU recipe and the data of this benchmark."""
    changes = {
        "dataset": data,
        "out_dir": run,
        "num_threads": num_threads,
        "device": "cpu",
        "compile": False,
        "splines": False,
        "report": "off",
        "eval_iters": 1,
    }
    arguments = [f"--{name}={value}" for name, value in changes.items()]
    opened = open_run([str(ROOT / "configs/shakespeare_char_cpu.toml"), *arguments])
    trainer = Trainer(opened, Dataset.open(data), choose_device(opened.config))
    trainer.neighbours = Neighbours(num_threads, silent=True)  # a warning about the busy core would only disturb
    return trainer


def token_of(trainer: Trainer) -> Callable[[], int]:
    """A function that samples the next token at each call."""
    generator = torch.Generator().manual_seed(0)

    def tokens() -> Iterator[int]:
        trainer.model.eval()
        while True:
            yield from generate(trainer.model, [0], 500, 0.8, 0, 1.0, generator)

    return tokens().__next__


def make_dataset(folder: Path) -> None:
    """Write random characters, of as many kinds as in Shakespeare. The text does not change what a step costs."""
    tokens = np.random.default_rng(0)
    with DatasetWriter(folder, CharTokenizer(CHARACTERS), "a benchmark") as writer:
        writer.write("train", tokens.integers(0, len(CHARACTERS), 100_000))
        writer.write("val", tokens.integers(0, len(CHARACTERS), 10_000))


if __name__ == "__main__":
    main()
