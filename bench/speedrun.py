"""Race whole processes to a validation loss: `python bench/speedrun.py --nanogpt CHECKOUT`.

From launch, imports included, to the line that shows the loss on the validation split: ours and our twins by
`train.py`, on the whole split; nanoGPT's own `train.py` by its CPU recipe, on its own estimate from 20 batches,
or to the end of its recipe if that estimate stays above. They take turns, and medians are compared.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this runs as a plain script

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
    """The loss to reach, in nats per character; nanoGPT's README gives 1.88."""
    config: PathText = "configs/speedrun.toml"
    """Our recipe."""
    swiglu: str = "--ffn swiglu --muon_learning_rate 0.02 --max_iters 80 --eval_interval 80 --decay_iters 77"
    """Options that make it the SwiGLU twin's; with the fewest steps in which that reaches the target on every seed."""
    mlp: str = "--ffn mlp --max_iters 106 --eval_interval 106 --decay_iters 103"
    """The same for the usual MLP."""
    nanogpt: PathText = ""
    """A checkout of nanoGPT; without one it does not take part."""
    threads: int = 2
    """CPU threads."""
    repeats: int = 3
    """Rounds in which each runs once, all with one seed; the first has 1."""

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
    """What to run, and where."""
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
    """Seconds from launch to the first line with a validation loss at the target; without end if none comes.

    With `or_end`, to the last one if none is at the target: in favour of what would have taken longer. UserError for a
    process that shows no loss.
    """
    if shutil.which(command[0]) is None:
        raise UserError(f"{command[0]} is not there")
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
