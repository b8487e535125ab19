"""Race whole models to the lowest validation loss: `python bench/gpt.py bench/races/NAME.toml`.

Every contestant is tuned over the same values on one seed, and then trains on the race's other seeds. All train in
turns in one process, on the same batches, and are evaluated on the whole validation split.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone, before this folder

import common.threads  # noqa: F401  before torch

import torch

from bench.shared import nanogpt
from bench.shared.grid_plot import draw_losses_by_grid
from bench.shared.machine import machine_name
from bench.shared.output_files import check_output_files
from bench.shared.peer_blocks import register
from bench.shared.peers import load_peers
from bench.shared.race import Options, Race, Summary, run_side_by_side, summarize
from bench.shared.race_plot import draw_race
from bench.shared.race_record import Results, Trials, Where, write_record
from common.command_line import OptionParser, PathText
from common.errors import exit_on_user_error
from pictures.run_pictures import save_picture

USAGE = "python bench/gpt.py RACE.toml [--key value …]"


@dataclass(frozen=True)
class Arguments:
    race: PathText
    """A race: a file like those in bench/races."""
    equal: str = "steps"
    """The budget that is equal for all: steps, or time (slower contestants get fewer steps, and a fitting schedule)."""
    max_iters: int = 0
    """Steps; 0 for as many as the race says."""
    num_seeds: int = 0
    """Number of seeds to run; 0 for all of the race."""
    seeds: str = ""
    """Seeds to run, separated by commas, instead of the race's own."""
    only: str = ""
    """Contestants to run, separated by semicolons; the others are compared with the first. By default all."""
    tune: bool = True
    """Tune first; if False, all train with the options that the race gives them."""
    threads: int = 2
    """CPU threads."""
    peers: str = ""
    """Checkouts of other projects' layers, NAME=PATH,NAME=PATH; a layer without a checkout does not take part."""
    nanogpt: PathText = ""
    """A checkout of nanoGPT with prepared data; its own train.py then trains by its CPU recipe on each seed."""
    records: PathText = ""
    """JSON files of earlier calls for the same race, comma-separated: their results count, and are not run again."""
    output: PathText = ""
    """A JSON file for the results."""
    plot: PathText = ""
    """A picture of the race (.png, .pdf or .svg)."""
    grid_plot: PathText = ""
    """A picture of the final losses by the number of control points (.png, .pdf or .svg)."""

    def __post_init__(self) -> None:
        if self.equal not in ("steps", "time"):
            raise ValueError(f"equal must be steps or time; got {self.equal!r}")
        if min(self.max_iters, self.num_seeds) < 0 or not 1 <= self.threads <= 1024:
            raise ValueError("max_iters and num_seeds must not be negative, and threads from 1 to 1024")
        if not all(seed.strip().isdecimal() for seed in self.seeds.split(",") if self.seeds):
            raise ValueError(f"seeds must be whole numbers, separated by commas; got {self.seeds!r}")
        if self.seeds and self.num_seeds:
            raise ValueError("seeds names the seeds and num_seeds counts them; give one of the two")
        check_output_files(self.output, self.plot, self.grid_plot)
        if self.nanogpt:
            nanogpt.check_checkout(Path(self.nanogpt))


@exit_on_user_error
def main() -> None:
    arguments = OptionParser(Arguments, USAGE, positional="race").parse(sys.argv[1:])
    layers, absent = load_peers(arguments.peers)
    register(layers)
    race = Race.read(Path(arguments.race)).among(arguments.only).shortened(arguments.num_seeds, arguments.tune)
    if arguments.seeds:
        race = race.with_seeds([int(seed) for seed in arguments.seeds.split(",")])
    race, missing = race.without_missing_peers()
    for name in missing:
        print(f"{name} does not take part: {absent.get(name, f'give --peers {name}=PATH, the folder of its checkout')}")
    more: Options = {
        "num_threads": arguments.threads,
        **({"max_iters": arguments.max_iters} if arguments.max_iters else {}),
    }
    for name in race.contestants:  # find mistakes before hours of work
        race.configure(name, race.seeds[0], more)
    results = Results()
    for record in filter(None, arguments.records.split(",")):
        results.add(Path(record), race, more, where(arguments))
    print(f"{machine_name('cpu')}, torch {torch.__version__}, {arguments.threads} threads", flush=True)
    choose_options(race, more, arguments.equal, results)
    keep(arguments, race, results)  # from which on a call beside this one can take the options
    for seed in race.seeds:
        configs = {
            name: race.configure(name, seed, results.tuned[name])
            for name in race.contestants
            if not results.has(name, seed)
        }
        if arguments.nanogpt and not results.has(nanogpt.NAME, seed):
            results.curves.append(nanogpt.run(Path(arguments.nanogpt), seed, arguments.threads))
            print(f"seed {seed}: {nanogpt.NAME} {results.curves[-1].losses[-1]:.4f}", flush=True)
        if configs:
            curves = run_side_by_side(configs)
            results.curves += curves
            print(f"seed {seed}: " + ", ".join(f"{c.contestant} {c.losses[-1]:.4f}" for c in curves), flush=True)
        keep(arguments, race, results)
    print_table(summarize(results.in_order(race), rival_of(race)), rival_of(race), arguments.equal)


def rival_of(race: Race) -> str:
    """The contestant that the others are compared with: the first."""
    return next(iter(race.contestants))


def choose_options(race: Race, more: Options, equal: str, results: Results) -> None:
    """Tune the contestants that have no options from an earlier call, and give them their steps."""
    new = [name for name in race.contestants if name not in results.tuned]
    if not new:
        return
    tuned, trials = tune(race.among(";".join(new)), more)
    results.trials += trials
    if equal == "time":
        rival = rival_of(race)
        tuned = with_equal_time(race, {rival: results.tuned.get(rival, more), **tuned}, trials)
    results.tuned |= tuned


def tune(race: Race, more: Options) -> tuple[dict[str, Options], Trials]:
    """The options with the lowest final loss on the tuning seed, for each contestant; and all trials."""
    if not race.search:
        return {name: dict(more) for name in race.contestants}, []
    trials: Trials = []
    for trial in race.trials():
        options = {**more, **trial}
        curves = run_side_by_side({name: race.configure(name, race.tune_seed, options) for name in race.contestants})
        trials.append((trial, curves))
        print(f"{described(trial)}: " + ", ".join(f"{c.contestant} {c.losses[-1]:.4f}" for c in curves), flush=True)
    tuned = {}
    for k, name in enumerate(race.contestants):
        best, _ = min(trials, key=lambda trial: trial[1][k].losses[-1])
        tuned[name] = {**more, **best}
        print(f"{name} takes {described(best)}", flush=True)
    return tuned, trials


def with_equal_time(race: Race, tuned: dict[str, Options], trials: Trials) -> dict[str, Options]:
    """Give the others as many steps as fit in the time of the first, by their speeds in the last trial."""
    rival = rival_of(race)
    if trials and any(c.contestant == rival for c in trials[-1][1]):
        curves = {c.contestant: c for c in trials[-1][1]}
    else:
        short = {"max_iters": 100, "eval_interval": 100}
        configs = {name: race.configure(name, race.tune_seed, {**o, **short}) for name, o in tuned.items()}
        curves = {curve.contestant: curve for curve in run_side_by_side(configs)}
    steps = race.configure(rival, race.tune_seed, tuned[rival]).max_iters
    return {
        name: {**options, "max_iters": round(steps * curves[rival].step_ms / curves[name].step_ms)}
        for name, options in tuned.items()
    }


def print_table(summaries: list[Summary], rival: str, equal: str) -> None:
    print(
        f"equal {equal}; final validation loss, mean and standard deviation over seeds; differences with standard error"
    )
    print(
        f"  {'contestant':28} {'seeds':>5} {'parameters':>11} {'MFLOP/token':>11} {'loss':>16} {f'minus {rival}':>20} "
        f"{'ms a step':>10} {'speed':>6}"
    )
    for s in summaries:
        print(
            f"  {s.contestant:28} {s.seeds:>5} {s.parameters:>11,} {s.flops / 1e6:>11.2f} "
            f"{s.mean:>8.4f} ±{s.spread:.4f} {s.minus_rival:>+12.4f} ±{s.minus_rival_error:.4f} "
            f"{s.step_ms:>10.1f} {s.rival_ms_over_it:>6.2f}"
        )


def described(options: Options) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


def keep(arguments: Arguments, race: Race, results: Results) -> None:
    """Write the record and the pictures. Called before the first seed and after each, so that a stop loses only one."""
    curves = results.in_order(race)
    seeds = sorted({curve.seed for curve in curves})
    if arguments.output:
        finished, summaries = dataclasses.replace(race, seeds=seeds), summarize(curves, rival_of(race))
        write_record(Path(arguments.output), finished, results, summaries, where(arguments))
    if not curves:
        return
    place = f"{machine_name('cpu')}, {arguments.threads} threads, torch {torch.__version__}"
    counted = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"
    title = f"{race.name}: {counted}, equal {arguments.equal}"
    if arguments.plot:
        save_picture(draw_race(curves, title, place), Path(arguments.plot))
    if arguments.grid_plot:
        save_picture(draw_losses_by_grid(curves, title, place), Path(arguments.grid_plot))


def where(arguments: Arguments) -> Where:
    """What a record notes besides the race."""
    return {
        "machine": machine_name("cpu"),
        "torch": torch.__version__,
        "threads": arguments.threads,
        "equal": arguments.equal,
    }


if __name__ == "__main__":
    main()
