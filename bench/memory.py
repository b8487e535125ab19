"""Check that a run's memory stays flat: `python bench/memory.py` trains on more tokens than fit in its memory.

The run and the page cache of its files share a memory limit. The limit is a control group, which needs root; without
root the run is not limited, and the output says so. Resident memory is compared after an early and after a late step.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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

USAGE = "python bench/memory.py [--key value …]"
CHARACTERS = "abcdefghijklmnopqrstuvwxyz"
PIECE_TOKENS = 1 << 22
GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Options:
    data_mb: int = 1024
    """Size of the token file."""
    limit_mb: int = 768
    """Memory limit for the process together with the page cache of its files."""
    first: int = 500
    """The step after which memory is measured first."""
    last: int = 5000
    """The step after which it is measured again."""
    splines: bool = True
    """Record and draw the splines, which is a run's default."""

    def __post_init__(self) -> None:
        if not 0 < self.first < self.last or self.first % 100 or self.last % 100:
            raise ValueError("first and last must be multiples of 100, and first below last")
        if self.data_mb <= self.limit_mb or self.limit_mb < 1:
            raise ValueError("data_mb must be above limit_mb, or the limit would not matter")


@exit_on_user_error
def main() -> None:
    options = OptionParser(Options, USAGE).parse(sys.argv[1:])
    print(f"{machine_name('cpu')}, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as name, memory_limit(options.limit_mb << 20) as (join, limited):
        folder = Path(name)
        data = make_dataset(folder / "data", options.data_mb << 20)
        print(f"{options.data_mb} MB of tokens; memory and page cache {limited}", flush=True)
        early, late = train(options, data, folder, join)
    growth = 100 * (late - early) / early
    print(
        f"resident memory: {early / 1024:.1f} MB after step {options.first}, "
        f"{late / 1024:.1f} MB after step {options.last}"
    )
    print(f"growth {growth:+.2f} %")


def train(options: Options, data: Path, folder: Path, join: str) -> tuple[int, int]:
    """Train, and return the resident memory in kB after the steps `first` and `last`."""
    values = {
        "dataset": data,
        "out_dir": folder / "run",
        "max_iters": options.last + 100,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "block_size": 64,
        "log_interval": 100,
        "eval_iters": 20,
        "device": "cpu",
        "compile": False,
        "num_threads": 1,
        "splines": options.splines,
    }

    def enter() -> None:
        if join:
            Path(join).write_text(str(os.getpid()))

    found = []
    with TrainProcesses([f"--{key}={value}" for key, value in values.items()], folder / "log", preexec_fn=enter) as run:
        for step in (options.first, options.last):
            if not run.wait_for(lambda step=step: f"\nstep {step}/" in run.said(), 3600):  # type: ignore[misc]
                raise UserError(f"the run did not reach step {step}: {run.said()[-500:]}")
            status = Path(f"/proc/{run.processes[0].pid}/status").read_text()
            match = re.search(r"VmRSS:\s+(\d+) kB", status)
            assert match is not None
            found.append(int(match[1]))
    return found[0], found[1]


def make_dataset(folder: Path, size: int) -> Path:
    """Write a dataset of `size` bytes of random tokens, two bytes each."""
    random = np.random.default_rng(0)
    with DatasetWriter(folder, CharTokenizer(CHARACTERS), "a memory test", shard_tokens=size) as writer:
        for start in range(0, size // 2, PIECE_TOKENS):
            writer.write("train", random.integers(0, len(CHARACTERS), min(PIECE_TOKENS, size // 2 - start)))
        writer.write("val", random.integers(0, len(CHARACTERS), 100_000))
    return folder


@contextlib.contextmanager
def memory_limit(size: int) -> Iterator[tuple[str, str]]:
    """Make a control group. Gives the file where a process writes its id to join ("": none), and a phrase to print."""
    for group, limit in ((GROUPS / "memory", "memory.limit_in_bytes"), (GROUPS, "memory.max")):
        folder = group / f"splinegpt_memory_{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / limit).write_text(str(size))
            yield str(folder / "cgroup.procs"), f"limited to {size >> 20} MB"
            return
        except OSError:
            continue
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()
    yield "", "NOT limited (this needs root and Linux control groups)"


if __name__ == "__main__":
    main()
