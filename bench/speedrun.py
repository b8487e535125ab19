"""Race whole processes to a validation loss: `python bench/speedrun.py --nanogpt CHECKOUT`.

The time runs from launch, imports included, to the line that shows the validation loss at the target. Our splines and
their twins run by `train.py`, with the loss of the whole split. nanoGPT runs by its own `train.py` and CPU recipe, with
its own estimate from 20 batches; if that stays above the target, the time is that of its whole recipe. They take turns,
and medians are compared.
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone, before this folder

import common.threads  # noqa: F401  before torch

import torch

from bench.shared import nanogpt
from bench.shared.machine import machine_name
from common.command_line import OptionParser, PathText
from common.errors import UserError, exit_on_user_error
from corpus.dataset import Dataset, ensure_prepared

USAGE = "python bench/speedrun.py [--key value …]"
ROOT = Path(__file__).resolve().parents[1]
VALIDATION = re.compile(r"\bval (?:loss )?(\d+\.\d+)")


@dataclass(frozen=True)
class Options:
    target: float = 1.88
    """The loss to reach, in nats per character; 1.88 is that of nanoGPT's README."""
    config: PathText = "configs/speedrun.toml"
    """The recipe of the splines, which the twins change."""
    swiglu: str = "--ffn swiglu --muon_learning_rate 0.02 --max_iters 80 --eval_interval 80 --decay_iters 77"
    """Options of the SwiGLU twin, with the fewest steps that reach the target on every seed."""
    mlp: str = "--ffn mlp --max_iters 106 --eval_interval 106 --decay_iters 103"
    """Options of the MLP twin, with the fewest steps that reach the target on every seed."""
    nanogpt: PathText = ""
    """A checkout of nanoGPT with prepared data; by default nanoGPT does not take part."""
    threads: int = 2
    """CPU threads."""
    repeats: int = 3
    """Rounds in which each runs once. Round k has seed k."""

    def __post_init__(self) -> None:
        if not 0 < self.target < 10:
            raise ValueError(f"target must be from 0 to 10; got {self.target}")
        if self.repeats < 1 or not 1 <= self.threads <= 1024:
            raise ValueError("repeats must be at least 1, and threads from 1 to 1024")
        if self.nanogpt:
            nanogpt.check_checkout(Path(self.nanogpt))
        if not Path(self.config).is_file():
            raise ValueError(f"there is no config file {self.config}")


@dataclass(frozen=True)
class Finish:
    seconds: float
    loss: float


@exit_on_user_error
def main() -> None:
    options = OptionParser(Options, USAGE).parse(sys.argv[1:])
    Dataset.open(ensure_prepared("shakespeare_char"), verify=False)
    print(
        f"{machine_name('cpu')}, torch {torch.__version__}, {options.threads} threads; target {options.target}",
        flush=True,
    )
    finishes: dict[str, list[Finish]] = {}
    for seed in range(1, options.repeats + 1):
        with tempfile.TemporaryDirectory() as folder:
            for name, (command, where) in commands(options, seed, Path(folder)).items():
                finish = run_until(name, command, where, options, or_end=name == "nanoGPT")
                finishes.setdefault(name, []).append(finish)
                print(f"  {name:14} {finish.seconds:>7.1f} s to {finish.loss:.4f}", flush=True)
    medians = {name: statistics.median(finish.seconds for finish in own) for name, own in finishes.items()}
    for name, seconds in medians.items():
        print(f"{name:14} median {seconds:>7.1f} s, {seconds / medians['splines']:>5.2f} times the splines'")


def commands(options: Options, seed: int, folder: Path) -> dict[str, tuple[list[str], Path]]:
    """Command and working directory of each contestant."""
    ours = [sys.executable, "train.py", options.config, f"--num_threads={options.threads}", f"--seed={seed}"]
    changes = {"splines": "", "SwiGLU twin": options.swiglu, "MLP twin": options.mlp}
    found = {
        name: ([*ours, f"--out_dir={folder / name.split()[0]}", *shlex.split(more)], ROOT)
        for name, more in changes.items()
    }
    if options.nanogpt:
        found["nanoGPT"] = (nanogpt.command(folder / "nanogpt"), Path(options.nanogpt))
    return found


def run_until(name: str, command: Sequence[str], where: Path, options: Options, or_end: bool = False) -> Finish:
    """Seconds from launch to the first validation loss at the target; infinite if there is none.

    With `or_end`, a process that misses the target counts as if its last loss had met it, which is in its favour.
    Raises UserError for a process that shows no loss.
    """
    if shutil.which(command[0]) is None:
        raise UserError(f"there is no program {command[0]}")
    start = time.perf_counter()
    losses: list[float] = []
    with subprocess.Popen(
        command,
        cwd=where,
        env=nanogpt.environment(options.threads),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
    ) as process:
        assert process.stdout is not None
        tail: list[str] = []
        for line in process.stdout:
            tail = [*tail[-2:], line.strip()]
            match = VALIDATION.search(line)
            if match is None:
                continue
            losses.append(float(match[1]))
            seconds = time.perf_counter() - start
            if losses[-1] <= options.target:
                process.terminate()
                return Finish(seconds, losses[-1])
    if or_end and losses:
        return Finish(seconds, losses[-1])
    if losses:
        return Finish(math.inf, min(losses))
    raise UserError(f"{name} showed no loss; it ended with: {' / '.join(tail)}")


if __name__ == "__main__":
    main()
