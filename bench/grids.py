"""Large grids: final validation loss by method, number of control points and seed: `python bench/grids.py --help`.

Runs are recorded one by one in --output and not repeated when the command is given again.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import training.threads  # noqa: F401  before torch

import torch

from bench.grids_plot import draw_grids
from bench.machine import machine_name
from bench.outputs import check_outputs
from bench.race import run_side_by_side
from training.config import Config, parse
from training.errors import UserError, exit_on_user_error
from training.files import write_atomically
from training.options import OptionParser, PathText
from training.pictures import save_picture

USAGE = (
    "python bench/grids.py [--grids 5,64 --methods plain,balanced --seeds 1 --more 'max_iters=600' --output FILE.json]"
)
RECIPE = "configs/shakespeare_char_cpu.toml"
COMMON: dict[str, Any] = {"position": "rope", "norm": "rmsnorm", "qk_norm": True, "zero_init_projections": True}
COMMON |= {"kan_block": "plain", "spline_width": 4.0}
COMMON |= {"compile": False, "splines": False, "sample_tokens": 0}
# Coarse to fine: through which grids, of nested knots, to get to the one named; each for an equal share of the steps.
NESTED = {5: [5], 8: [8], 9: [5, 9], 16: [6, 16], 17: [5, 9, 17], 22: [8, 22], 33: [5, 9, 17, 33], 64: [8, 22, 64]}
NESTED |= {65: [5, 9, 17, 33, 65]}


@dataclass(frozen=True)
class Arguments:
    """Train one model for each method, grid and seed; everything else as in configs/shakespeare_char_cpu.toml."""

    grids: str = "5,8,16,32,64"
    """Numbers of control points."""
    methods: str = "plain"
    """plain (B-spline), a variant, penalty:WEIGHT, refine, and combinations with +: refine+balanced."""
    seeds: str = "1,2,3"
    """Seeds of parameters and batches."""
    more: str = ""
    """More options of train.py for all runs: 'optimizer=muon max_iters=600'."""
    threads: int = 1
    """CPU threads."""
    output: PathText = "grids.json"
    """Where results are kept; runs that are there are not repeated."""
    plot: PathText = ""
    """A picture of these runs (.png, .pdf or .svg)."""

    def __post_init__(self) -> None:
        check_outputs(self.output, self.plot)


@dataclass
class Entry:
    """One run."""

    method: str
    grid: int
    seed: int
    more: str
    parameters: int = 0
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    step_ms: float = 0.0
    machine: str = ""
    torch: str = ""

    @property
    def key(self) -> tuple[str, int, int, str]:
        return self.method, self.grid, self.seed, self.more


@exit_on_user_error
def main() -> None:
    arguments = OptionParser(Arguments, USAGE).parse(sys.argv[1:])
    path = Path(arguments.output)
    entries = read_entries(path)
    done = {entry.key for entry in entries}
    wanted = list(runs(arguments))
    configs = [configure(entry, arguments.threads) for entry in wanted]  # mistakes before work
    for entry, config in zip(wanted, configs, strict=True):
        if entry.key in done:
            continue
        [curve] = run_side_by_side({entry.method: config})
        entry.parameters, entry.steps, entry.losses = curve.parameters, curve.steps, curve.losses
        entry.step_ms, entry.machine, entry.torch = curve.step_ms, machine_name("cpu"), torch.__version__
        entries = [*read_entries(path), entry]
        write_entries(path, entries, arguments.threads)
        print(
            f"{entry.method} G={entry.grid} seed {entry.seed} {entry.more}: {entry.losses[-1]:.4f}, "
            f"{entry.step_ms:.0f} ms a step",
            flush=True,
        )
    shown = [entry for entry in entries if entry.key in {run.key for run in wanted}]
    print_table(shown)
    if arguments.plot:
        save_picture(draw_grids(shown, f"{RECIPE} {arguments.more}"), Path(arguments.plot))


def runs(arguments: Arguments) -> Iterator[Entry]:
    try:
        grids = [int(grid) for grid in arguments.grids.split(",")]
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
    except ValueError as error:
        raise UserError(f"grids and seeds are integers with commas between; {error}") from None
    for seed in seeds:
        for grid in grids:
            for method in arguments.methods.split(","):
                yield Entry(method, grid, seed, arguments.more)


def configure(entry: Entry, threads: int) -> Config:
    options: dict[str, Any] = {**COMMON, "num_threads": threads, "seed": entry.seed, "num_control_points": entry.grid}
    more = [option.partition("=") for option in entry.more.split()]
    if not all(equals for _, equals, _ in more):
        raise UserError(f"more is a list of NAME=VALUE with spaces between; got {entry.more!r}")
    options |= {name: value for name, _, value in more}
    for part in entry.method.split("+"):
        name, _, value = part.partition(":")
        if name == "penalty":
            options["kan_smoothness"] = value
        elif name == "refine":
            steps = parse([RECIPE, *(f"--{name}={value}" for name, value in options.items())])[0].max_iters
            options |= coarse_to_fine(entry.grid, steps)
        elif name != "plain":
            options["kan_variant"] = name
    return parse([RECIPE, *(f"--{name}={value}" for name, value in options.items())])[0]


def coarse_to_fine(grid: int, steps: int) -> dict[str, Any]:
    if grid not in NESTED:
        raise UserError(f"refine has no nested grids to {grid}; use {', '.join(map(str, NESTED))}")
    stages = NESTED[grid]
    starts = [steps * k // len(stages) for k in range(len(stages))]
    refine = ",".join(f"{points}@{start}" for points, start in zip(stages, starts, strict=True))
    return {"num_control_points": stages[0], "kan_refine": refine}


def read_entries(path: Path) -> list[Entry]:
    if not path.exists():
        return []
    try:
        return [Entry(**run) for run in json.loads(path.read_text())["runs"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} does not hold results of bench/grids.py ({error}); name another --output") from error


def write_entries(path: Path, entries: list[Entry], threads: int) -> None:
    record = {
        "threads": threads,
        "recipe": RECIPE,
        "common": COMMON,
        "runs": [asdict(entry) for entry in entries],
    }
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def print_table(entries: list[Entry]) -> None:
    """Methods down, grids across: mean over seeds ± standard deviation."""
    grids = sorted({entry.grid for entry in entries})
    print(f"{'':32}" + "".join(f"{f'G={grid}':>17}" for grid in grids))
    for method in dict.fromkeys(entry.method for entry in entries):
        cells = []
        for grid in grids:
            losses = [entry.losses[-1] for entry in entries if (entry.method, entry.grid) == (method, grid)]
            spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
            cells.append(f"{statistics.mean(losses):>9.4f} ±{spread:.4f}" if losses else f"{'–':>17}")
        print(f"{method:32}" + "".join(cells))


if __name__ == "__main__":
    main()
