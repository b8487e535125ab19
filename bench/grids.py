"""Compare ways to train large grids: `python bench/grids.py --help`.

The result is the final validation loss by method, number of control points and seed. Each run is recorded in --output
as it ends. A command that is given again repeats none of the recorded runs.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone, before this folder

import common.threads  # noqa: F401  before torch

import torch

from bench.shared.machine import machine_name
from bench.shared.output_files import check_output_files
from bench.shared.race import run_side_by_side
from bench.shared.race_plot import COLORS, DASHES, STYLE, draw_band, label_ends, style_axes
from common.command_line import OptionParser, PathText
from common.errors import UserError, exit_on_user_error
from common.files import write_atomically
from pictures.page import matplotlib_defaults
from pictures.run_pictures import save_picture
from training.config import Config, parse

if TYPE_CHECKING:
    from matplotlib.figure import Figure

USAGE = (
    "python bench/grids.py [--grids 5,64 --methods plain,balanced --seeds 1 --more 'max_iters=600' --output FILE.json]"
)
SHOWN = 0.75  # the share of the losses' range, from the lowest up, that the picture shows
RECIPE = "configs/shakespeare_char_cpu.toml"
COMMON: dict[str, Any] = {"architecture": "modern", "ffn": "splines", "spline_width": 4.0}
COMMON |= {"dtype": "float32", "compile": False, "splines": False, "sample_tokens": 0}
# For the method "refine": the grids on the way to the one named. The knots of each are among those of the next. Each
# trains for an equal share of the steps.
NESTED = {5: [5], 8: [8], 9: [5, 9], 16: [6, 16], 17: [5, 9, 17], 22: [8, 22], 33: [5, 9, 17, 33], 64: [8, 22, 64]}
NESTED |= {65: [5, 9, 17, 33, 65]}


@dataclass(frozen=True)
class Arguments:
    """Train one model for each method, grid and seed, by the recipe of configs/shakespeare_char_cpu.toml."""

    grids: str = "5,8,16,32,64"
    """Numbers of control points."""
    methods: str = "plain"
    """plain (B-spline), the name of a variant, penalty:WEIGHT, refine, or several as in refine+balanced."""
    seeds: str = "1,2,3"
    """Seeds for parameters and batches."""
    more: str = ""
    """Further options of train.py for all runs, as in 'optimizer=muon max_iters=600'."""
    threads: int = 1
    """CPU threads."""
    output: PathText = "grids.json"
    """A JSON file for the results. Runs that it holds already are not repeated."""
    plot: PathText = ""
    """A picture of these runs (.png, .pdf or .svg)."""

    def __post_init__(self) -> None:
        check_output_files(self.output, self.plot)


@dataclass
class Entry:
    """One run and its result."""

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
    configs = [configure(entry, arguments.threads) for entry in wanted]  # find mistakes before hours of work
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
        raise UserError(f"grids and seeds must be integers separated by commas; {error}") from None
    for seed in seeds:
        for grid in grids:
            for method in arguments.methods.split(","):
                yield Entry(method, grid, seed, arguments.more)


def configure(entry: Entry, threads: int) -> Config:
    options: dict[str, Any] = {**COMMON, "num_threads": threads, "seed": entry.seed, "num_control_points": entry.grid}
    more = [option.partition("=") for option in entry.more.split()]
    if not all(equals for _, equals, _ in more):
        raise UserError(f"more must be NAME=VALUE, separated by spaces; got {entry.more!r}")
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
        raise UserError(f"refine knows no nested grids that lead to {grid}; use {', '.join(map(str, NESTED))}")
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
    """Print a row for each method and a column for each grid: mean over seeds ± standard deviation."""
    grids = sorted({entry.grid for entry in entries})
    print(f"{'':32}" + "".join(f"{f'G={grid}':>17}" for grid in grids))
    for method in dict.fromkeys(entry.method for entry in entries):
        cells = []
        for grid in grids:
            losses = [entry.losses[-1] for entry in entries if (entry.method, entry.grid) == (method, grid)]
            spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
            cells.append(f"{statistics.mean(losses):>9.4f} ±{spread:.4f}" if losses else f"{'–':>17}")
        print(f"{method:32}" + "".join(cells))


@matplotlib_defaults()
def draw_grids(entries: Sequence[Entry], where: str) -> Figure:
    """Draw means over seeds as lines, and bands from the lowest to the highest seed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    methods = list(dict.fromkeys(entry.method for entry in entries))
    colors = {method: COLORS[k % len(COLORS)] for k, method in enumerate(methods)}
    grids = sorted({entry.grid for entry in entries})
    figure = Figure(figsize=(12.6, 4.6), facecolor="white")
    figure.text(0.04, 0.94, "Loss by the number of control points", fontsize=13, weight="bold", color=STYLE.ink)
    figure.text(0.04, 0.89, "Validation loss, mean and range over seeds", fontsize=9, color=STYLE.muted)
    figure.text(0.04, 0.85, where, fontsize=8, color=STYLE.muted)
    finals, curves = (figure.add_axes((x, 0.13, w, 0.66)) for x, w in ((0.05, 0.32), (0.52, 0.3)))
    style_axes(finals, "control points")
    style_axes(curves, "steps")
    finals.set_xscale("log", base=2)
    finals.set_xticks(grids, [str(grid) for grid in grids])
    finals.xaxis.set_minor_locator(NullLocator())
    lines: dict[str, tuple[float, str]] = {}
    for method, color in colors.items():
        own = {grid: chosen(entries, method, grid) for grid in grids}
        last = {grid: [entry.losses[-1] for entry in runs] for grid, runs in own.items() if runs}
        lines[method] = draw_band(finals, list(last), list(last.values()), color, "-", "o"), color
    label_ends(finals, max(grids), lines)
    lines = {}
    for grid, dashes in zip(dict.fromkeys((grids[0], grids[-1])), DASHES[1:], strict=False):
        for method, color in colors.items():
            runs = chosen(entries, method, grid)
            if runs:
                losses = [list(at) for at in zip(*(run.losses for run in runs), strict=True)]
                lines[f"{method}, G={grid}"] = draw_band(curves, runs[0].steps, losses, color, dashes), color
    lowest = min(at for at, _ in lines.values())
    highest = max(entry.losses[0] for entry in entries)
    curves.set_ylim(lowest - 0.03 * (highest - lowest), lowest + SHOWN * (highest - lowest))
    label_ends(curves, max(entry.steps[-1] for entry in entries), lines)
    return figure


def chosen(entries: Sequence[Entry], method: str, grid: int) -> list[Entry]:
    return [entry for entry in entries if (entry.method, entry.grid) == (method, grid)]


if __name__ == "__main__":
    main()
