"""Kill a training run many times and check that it ends like an uninterrupted one: `python bench/soak.py`.

Half of the kills (SIGKILL) come while a checkpoint is being written, a quarter at a random moment after launch and a
quarter at a random moment after the first step. After each kill the checkpoints are verified, and the run must resume
from the newest one. At the end its parameters and moments must equal, bit for bit, those of an uninterrupted run.
"""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone, before this folder

import common.threads  # noqa: F401  before torch

import numpy as np
import torch

from bench.shared.machine import machine_name
from bench.shared.train_processes import TrainProcesses
from common.command_line import OptionParser
from common.errors import UserError, exit_on_user_error
from corpus.tokenizer import CharTokenizer
from corpus.writer import DatasetWriter
from training.checkpoint import checkpoint_folder, list_steps, read_state, step_of

USAGE = "python bench/soak.py [--key value …]"
# A small run, but with everything that could go wrong when it is resumed.
HARD_RUN = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 64,
    "block_size": 32,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "dropout": 0.1,
    "optimizer": "muon",
    "schedule": "constant",
    "eval_interval": 4,
    "eval_iters": 2,
    "log_interval": 1,
    "sample_tokens": 0,
    "splines": False,
    "report": "off",
    "device": "cpu",
    "compile": False,
    "num_threads": 1,
}
MOMENTS = ("save", "save", "launch", "step")
PATIENCE_S = 600.0  # on a busy machine a process may take minutes to start
RESUMED = re.compile(r"^run .*, resumed at step (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Options:
    kills: int = 200
    """Number of kills."""
    minutes: float = 0.0
    """Stop after this time, even if kills are left; 0 for no limit."""
    processes: int = 1
    """Processes of the run. If there are several, one is killed, and the others must end by themselves."""
    fsdp: bool = False
    """Shard the model over the processes."""
    fork: bool = True
    """Fork each process from one that has imported PyTorch; False starts it afresh, which takes seconds."""
    seed: int = 0
    """Seed for the random moments."""
    longest_life: float = 2.0
    """Longest time, in seconds after launch or after the first step, until a kill at a random moment."""

    def __post_init__(self) -> None:
        if self.kills < 1 or self.processes < 1 or not 0 <= self.minutes < float("inf") or self.longest_life <= 0:
            raise ValueError("kills and processes must be at least 1, minutes at least 0, longest_life above 0")
        if self.fsdp and self.processes == 1:
            raise ValueError("fsdp needs --processes of at least 2")


@dataclass
class Report:
    kills: int = 0
    inside_saves: int = 0
    before_the_first_step: int = 0
    resumes: int = 0
    verified: int = 0
    steps_lost: int = 0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.kills} kills survived, {self.inside_saves} of them inside a save, {self.before_the_first_step} "
            f"before the first step; {self.resumes} resumes; {self.verified} checkpoints verified; {self.steps_lost} "
            f"steps lost beyond the last checkpoint; {len(self.faults)} faults"
        )


class Soak:
    def __init__(self, options: Options, folder: Path) -> None:
        self.options, self.folder, self.report = options, folder, Report()
        self.run = folder / "killed"
        self.random = random.Random(options.seed)
        self.dataset = make_dataset(folder / "data")

    def arguments(self, run: Path, **changes: Any) -> list[str]:
        values = {"dataset": self.dataset, "out_dir": run, **HARD_RUN, "fsdp": self.options.fsdp, **changes}
        return [f"--{name}={value}" for name, value in values.items()]

    def life(self, moment: str) -> None:
        """Start or resume the run, kill it at one of MOMENTS, and verify its checkpoints."""
        report = self.report
        expected = self.newest_step()
        resume = (self.run / "config.toml").is_file()
        arguments = self.arguments(self.run, max_iters=10_000_000, resume=resume)
        with self.start(arguments) as processes:
            inside = moment == "save" and self.wait_for_a_save(processes)
            if moment == "step":
                processes.wait_for(lambda: "\nstep " in processes.said(), PATIENCE_S)
            if moment != "save":
                time.sleep(self.random.uniform(0, self.options.longest_life))
            processes.signal(signal.SIGKILL, self.random.randrange(self.options.processes))
            report.kills += 1
            report.inside_saves += inside
            try:
                processes.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                report.faults.append("the other processes did not end by themselves")
        said = processes.said()
        self.check_resume(said, expected)
        report.before_the_first_step += "\nstep " not in said
        for path in list_steps(self.run):
            try:
                read_state(path)
                report.verified += 1
            except UserError as error:
                report.faults.append(str(error))
        report.steps_lost += max(0, expected - self.newest_step())

    def start(self, arguments: list[str]) -> TrainProcesses:
        return TrainProcesses(arguments, self.folder / "log", self.options.processes, self.options.fork)

    def wait_for_a_save(self, processes: TrainProcesses) -> bool:
        """Wait for one of the next checkpoints and a random moment into it. False if it is no longer being written."""
        folder = checkpoint_folder(self.run)
        newest = self.newest_step() + 4 * self.random.randrange(3)
        if not processes.wait_for(lambda: any(folder.glob(".step_*.tmp")) and self.newest_step() >= newest, PATIENCE_S):
            self.report.faults.append(f"no checkpoint was written; {processes.said()[-500:]}")
            return False
        time.sleep(self.random.uniform(0, 0.004))
        return any(folder.glob(".step_*.tmp"))

    def check_resume(self, said: str, expected: int) -> None:
        if "Traceback" in said or "trying the one before" in said:
            self.report.faults.append(said[-1500:])
        found = RESUMED.search(said)
        if found:
            self.report.resumes += 1
            self.report.steps_lost += max(0, expected - int(found[1]))

    def newest_step(self) -> int:
        return max((step_of(path) for path in list_steps(self.run)), default=0)

    def finish(self) -> bool:
        """Let the run end, train another one to the same step without interruption, and tell whether they are equal."""
        last = self.newest_step() + 8
        rest = self.arguments(self.run, max_iters=last, resume=(self.run / "config.toml").is_file())
        for run, arguments in ((self.run, rest), (self.folder / "whole", None)):
            arguments = arguments or self.arguments(run, max_iters=last)
            with self.start(arguments) as processes:
                if any(processes.wait(3600)):
                    raise UserError(f"a run failed: {processes.said()[-1500:]}")
        killed, whole = (read_state(list_steps(run)[0]) for run in (self.run, self.folder / "whole"))
        print(f"both runs ended at step {killed['step']}")
        return all(equal(killed[name], whole[name]) for name in ("step", "model", "optimizer", "best_val_loss"))


def equal(first: Any, second: Any) -> bool:
    """Compare states bit for bit, including what is nested in dictionaries, lists and tuples."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(equal(first[name], second[name]) for name in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(equal(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


def make_dataset(folder: Path) -> Path:
    tokens = np.random.default_rng(0).integers(0, 20, 50_000)
    with DatasetWriter(folder, CharTokenizer("abcdefghijklmnopqrst"), "a soak test") as writer:
        writer.write("train", tokens[:45_000])
        writer.write("val", tokens[45_000:])
    return folder


@exit_on_user_error
def main() -> None:
    options = OptionParser(Options, USAGE).parse(sys.argv[1:])
    torch.set_num_threads(1)  # threads do not survive a fork
    import train  # noqa: F401  so that forked processes need not import it

    print(f"{machine_name('cpu')}, torch {torch.__version__}, {options.processes} processes a run", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(options, Path(folder))
        while soak.report.kills < options.kills:
            if options.minutes and time.monotonic() - start > 60 * options.minutes:
                break
            soak.life(soak.random.choice(MOMENTS))
            if soak.report.kills % 20 == 0:
                print(f"{(time.monotonic() - start) / 60:5.1f} min: {soak.report}", flush=True)
        same = soak.finish()
    print(f"{(time.monotonic() - start) / 60:5.1f} min: {soak.report}")
    print(f"parameters and moments at the end: {'equal, bit for bit' if same else 'DIFFERENT'}")
    for fault in soak.report.faults:
        print(f"fault: {fault}")
    if not same or soak.report.faults or soak.report.steps_lost:
        raise UserError("the interrupted run differs from the uninterrupted one, or there were faults")


if __name__ == "__main__":
    main()
