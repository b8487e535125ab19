"""Where the milliseconds of a training step go: `python bench/step.py [--key value …]`.

Models of equal parameters train in turns in one process, on the same batches. Plain clocks time their steps; then a
profile of some more steps divides each step into parts. What no part accounts for is Python's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone, before this folder

import common.threads  # noqa: F401  before torch

import torch

from bench.shared import nanogpt
from bench.shared.machine import machine_name
from bench.shared.output_files import check_output_files
from bench.shared.race import Racer
from bench.shared.step_parts import LAYER_PARTS, PARTS, REST, profiled_parts
from bench.shared.step_plot import draw_steps
from bench.shared.timing import compile_without_limit
from common.command_line import OptionParser, PathText
from common.errors import exit_on_user_error
from common.files import write_atomically
from pictures.run_pictures import save_picture
from training.config import Config, parse

USAGE = "python bench/step.py [--key value …]"
TWINS = {"splines": "mlp", "gated_splines": "swiglu", "pair_splines": "swiglu"}
BLOCKS = tuple(dict.fromkeys(itertools.chain(*TWINS.items())))
CHOICES = {"optimizers": ("adamw", "muon"), "modes": ("eager", "compiled"), "blocks": BLOCKS}
PLAIN_GRID = 8  # gives a plain spline layer as many parameters as the MLP
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Arguments:
    config: PathText = ""
    """A recipe like those in configs; by default the options of a plain `python train.py`."""
    widths: str = "128"
    """Widths of the model (n_embd), comma-separated."""
    optimizers: str = "adamw,muon"
    """adamw, muon or both."""
    modes: str = "eager,compiled"
    """eager, compiled or both."""
    blocks: str = "splines,mlp,gated_splines,swiglu"
    """Feed-forward layers; each kind of splines is compared with its twin, mlp or swiglu."""
    n_layer: int = 0
    """Layers, if not as many as the recipe has."""
    block_size: int = 0
    """Context length, if not the recipe's."""
    batch_size: int = 0
    """Sequences in a step, if not the recipe's."""
    dataset: PathText = ""
    """The data, if not the recipe's."""
    threads: int = 2
    """CPU threads."""
    rounds: int = 9
    """Turns of each contestant."""
    steps: int = 10
    """Steps in a turn, and steps that are profiled."""
    nanogpt: PathText = ""
    """A checkout of nanoGPT with prepared data; its own train.py then takes short turns before and after each group,
    by its recipe for CPUs, which is that of --config configs/shakespeare_char_cpu.toml."""
    output: PathText = ""
    """A JSON file for the results."""
    plot: PathText = ""
    """A picture of the parts (.png, .pdf or .svg)."""

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if not self.listed(name) or set(self.listed(name)) - set(allowed):
                raise ValueError(f"{name} must be some of {', '.join(allowed)}; got {getattr(self, name)!r}")
        if not all(width.isdecimal() and int(width) for width in self.listed("widths")):
            raise ValueError(f"widths must be numbers from 1 on, separated by commas; got {self.widths!r}")
        if min(self.n_layer, self.block_size, self.batch_size) < 0 or min(self.rounds, self.steps) < 1:
            raise ValueError("n_layer, block_size and batch_size must not be negative, and rounds and steps at least 1")
        if not 1 <= self.threads <= 1024:
            raise ValueError(f"threads must be from 1 to 1024; got {self.threads}")
        check_output_files(self.output, self.plot)
        if self.nanogpt:
            nanogpt.check_checkout(Path(self.nanogpt))

    def listed(self, name: str) -> list[str]:
        return [part.strip() for part in str(getattr(self, name)).split(",")]

    def configure(self, width: int, optimizer: str, mode: str, block: str) -> Config:
        options: dict[str, Any] = {
            "n_embd": width,
            "optimizer": optimizer,
            "compile": mode == "compiled",
            "ffn": block,
            "num_threads": self.threads,
            "device": "cpu",
            "max_iters": 1_000_000,  # the schedule's end is far away
        }
        if block == "splines":
            options |= {"num_control_points": PLAIN_GRID, "kan_zero_centred": False}
        for name in ("n_layer", "block_size", "batch_size", "dataset"):
            if getattr(self, name):
                options[name] = getattr(self, name)
        config, _ = parse([*filter(None, [self.config]), *(f"--{name}={value}" for name, value in options.items())])
        return dataclasses.replace(config, wandb="disabled", resume=False)


@dataclass(frozen=True)
class Step:
    """The step of one contestant."""

    width: int
    optimizer: str
    mode: str
    block: str
    parameters: int
    ms: float
    parts: dict[str, float]
    """Milliseconds of each part; they add up to `ms`."""
    twin_over_it: float | None
    """The twin's time divided by this one, the median over the turns; None without a twin."""
    bound: float | None
    """That ratio if the feed-forward layer took no time."""


@exit_on_user_error
def main() -> None:
    arguments = OptionParser(Arguments, USAGE).parse(sys.argv[1:])
    groups = list(itertools.product(*(arguments.listed(name) for name in ("widths", "optimizers", "modes"))))
    for width, optimizer, mode in groups:  # find mistakes before minutes of work
        for block in arguments.listed("blocks"):
            arguments.configure(int(width), optimizer, mode, block)
    where = f"{machine_name('cpu')}, torch {torch.__version__}, {arguments.threads} threads"
    print(where, flush=True)
    steps: list[Step] = []
    for width, optimizer, mode in groups:
        theirs = nanogpt_ms(arguments)
        found = measure(arguments, int(width), optimizer, mode)
        print_table(found)
        print_beside_nanogpt(found, [*theirs, *nanogpt_ms(arguments)])
        steps += found
        keep(arguments, where, steps)


def measure(arguments: Arguments, width: int, optimizer: str, mode: str) -> list[Step]:
    """The steps of all blocks, which take turns."""
    if mode == "compiled":
        compile_without_limit()
    with racers(arguments, width, optimizer, mode) as contestants:
        turns: dict[str, list[float]] = {block: [] for block in contestants}
        for _ in range(arguments.rounds):
            for block, racer in contestants.items():
                turns[block].append(turn_ms(racer, arguments.steps))
        times = {block: statistics.median(ms) for block, ms in turns.items()}
        parts = {
            block: fitted(profiled_parts(racer.trainer, arguments.steps), times[block])
            for block, racer in contestants.items()
        }
        sizes = {block: racer.curve.parameters for block, racer in contestants.items()}
    steps = []
    for block, ms in times.items():
        twin, bound, ratio = TWINS.get(block), None, None
        if twin in times:
            ratio = statistics.median(theirs / ours for theirs, ours in zip(turns[twin], turns[block], strict=True))
            bound = times[twin] / (ms - sum(parts[block][part] for part in LAYER_PARTS))
        steps.append(Step(width, optimizer, mode, block, sizes[block], ms, parts[block], ratio, bound))
    return steps


@contextlib.contextmanager
def racers(arguments: Arguments, width: int, optimizer: str, mode: str) -> Iterator[dict[str, Racer]]:
    with tempfile.TemporaryDirectory() as folder:
        contestants = {}
        for block in arguments.listed("blocks"):
            with contextlib.redirect_stdout(io.StringIO()):
                config = arguments.configure(width, optimizer, mode, block)
                contestants[block] = Racer(block, config, Path(folder) / block)
            for _ in range(WARM_UP_STEPS):
                contestants[block].trainer.step()
        yield contestants
        for racer in contestants.values():
            racer.close()


def turn_ms(racer: Racer, steps: int) -> float:
    """The median time of a step."""
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        racer.trainer.step()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def fitted(parts: dict[str, float], ms: float) -> dict[str, float]:
    """Parts that add up to `ms`: Python gets what the others leave, without the time that the profiler itself takes.

    If they leave nothing, because the machine was slower while they were profiled, all shrink by one factor.
    """
    others = {part: value for part, value in parts.items() if part != REST}
    profiled = sum(others.values())
    if profiled < ms:
        return {**others, REST: ms - profiled}
    return {part: value * ms / (profiled + parts[REST]) for part, value in parts.items()}


def print_table(steps: Sequence[Step]) -> None:
    first = steps[0]
    print(f"\nwidth {first.width}, {first.optimizer}, {first.mode}: milliseconds of a step")
    print(f"  {'':28}" + "".join(f"{step.block:>15}" for step in steps))
    for part in PARTS:
        if any(step.parts[part] > 0 for step in steps):
            print(f"  {part:28}" + "".join(f"{step.parts[part]:>15.2f}" for step in steps))
    rows = {
        "the step": [f"{step.ms:.2f}" for step in steps],
        "parameters": [f"{step.parameters:,}" for step in steps],
        "the twin's step over it": [f"{step.twin_over_it:.2f}" if step.twin_over_it else "" for step in steps],
        "if the layer took no time": [f"{step.bound:.2f}" if step.bound else "" for step in steps],
    }
    for name, values in rows.items():
        print(f"  {name:28}" + "".join(f"{value:>15}" for value in values), flush=True)


def nanogpt_ms(arguments: Arguments) -> list[float]:
    """The milliseconds of a step of nanoGPT's train.py, if there is a checkout."""
    return [nanogpt.step_ms(Path(arguments.nanogpt), arguments.threads)] if arguments.nanogpt else []


def print_beside_nanogpt(steps: Sequence[Step], ms: Sequence[float]) -> None:
    if ms:
        beside = ", ".join(f"{step.block} {statistics.mean(ms) / step.ms:.2f} times as fast" for step in steps)
        print(f"  {nanogpt.NAME}: {', '.join(f'{each:.1f}' for each in ms)} ms before and after; {beside}", flush=True)


def keep(arguments: Arguments, where: str, steps: Sequence[Step]) -> None:
    """Write the record and the picture. Called after every group, so that a stopped run keeps what it has."""
    if arguments.output:
        record = {"where": where, "options": asdict(arguments), "steps": [asdict(step) for step in steps]}
        text = json.dumps(record, indent=1, allow_nan=False)
        write_atomically(Path(arguments.output), lambda path: path.write_text(text + "\n"))
    if arguments.plot:
        save_picture(draw_steps([asdict(step) for step in steps], where), Path(arguments.plot))


if __name__ == "__main__":
    main()
