"""Race whole models: `python bench/gpt.py bench/races/NAME.toml`. Loss against steps and time, over seeds, tuned alike.

Every contestant is tuned over the same values on a seed of its own, then runs on the others. All train in turns in one
process, on the same batches, and are evaluated on the whole validation split.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this runs as a plain script

import common.threads  # noqa: F401  before torch

import torch

from bench.shared import nanogpt
from bench.shared.machine import machine_name
from bench.shared.outputs import check_outputs
from bench.shared.peer_blocks import register
from bench.shared.peers import load_peers
from bench.shared.race import Curve, Options, Race, Summary, run_side_by_side, summarize
from bench.shared.race_plot import draw_race
from common.command_line import OptionParser, PathText
from common.errors import exit_on_user_error
from common.files import write_atomically
from pictures.run_pictures import save_picture

USAGE = "python bench/gpt.py RACE.toml [--key value …]"


@dataclass(frozen=True)
class Arguments:
    race: PathText
    """A file of bench/races."""
    equal: str = "steps"
    """What all have the same of: steps, or time (the slower do fewer steps, and end their schedule there)."""
    max_iters: int = 0
    """Steps; 0 leaves those of the race."""
    num_seeds: int = 0
    """How many of the race's seeds to run; 0 for all."""
    only: str = ""
    """Contestants to run, with semicolons between; the first is then the rival of the others. By default all."""
    tune: bool = True
    """Whether to tune first; otherwise all run with the options that the race gives them."""
    threads: int = 2
    """CPU threads."""
    peers: str = ""
    """Checkouts of others' layers that the race names, NAME=PATH,NAME=PATH; without one its layer takes no part."""
    nanogpt: PathText = ""
    """A prepared checkout of nanoGPT, whose own train.py runs by its CPU recipe, with each seed, before the others."""
    output: PathText = ""
    """A JSON file for the results."""
    plot: PathText = ""
    """A picture of the race (.png, .pdf or .svg)."""

    def __post_init__(self) -> None:
        if self.equal not in ("steps", "time"):
            raise ValueError(f"equal must be steps or time; got {self.equal!r}")
        if min(self.max_iters, self.num_seeds) < 0 or not 1 <= self.threads <= 1024:
            raise ValueError("max_iters and num_seeds must not be negative, and threads from 1 to 1024")
        check_outputs(self.output, self.plot)
        if self.nanogpt:
            nanogpt.check_checkout(Path(self.nanogpt))


@exit_on_user_error
def main() -> None:
    arguments = OptionParser(Arguments, USAGE, positional="race").parse(sys.argv[1:])
    layers, absent = load_peers(arguments.peers)
    register(layers)
    race = Race.read(Path(arguments.race)).among(arguments.only).shortened(arguments.num_seeds, arguments.tune)
    race, missing = race.without_missing_peers()
    for name in missing:
        print(f"{name} takes no part: {absent.get(name, f'give --peers {name}=PATH, the folder of its checkout')}")
    more: Options = {
        "num_threads": arguments.threads,
        **({"max_iters": arguments.max_iters} if arguments.max_iters else {}),
    }
    for name in race.contestants:  # mistakes before work
        race.configure(name, race.seeds[0], more)
    print(f"{machine_name('cpu')}, torch {torch.__version__}, {arguments.threads} threads", flush=True)
    tuned, trials = tune(race, more)
    if arguments.equal == "time":
        tuned = with_equal_time(race, tuned, trials)
    curves: list[Curve] = []
    rival = next(iter(race.contestants))
    for seed in race.seeds:
        configs = {name: race.configure(name, seed, options) for name, options in tuned.items()}
        if arguments.nanogpt:
            curves.append(nanogpt.run(Path(arguments.nanogpt), seed, arguments.threads))
            print(f"seed {seed}: {nanogpt.NAME} {curves[-1].losses[-1]:.4f}", flush=True)
        curves += run_side_by_side(configs)
        print(
            f"seed {seed}: " + ", ".join(f"{c.contestant} {c.losses[-1]:.4f}" for c in curves[-len(configs) :]),
            flush=True,
        )
        summaries = summarize(curves, rival)
        keep(arguments, race.shortened(len({c.seed for c in curves}), arguments.tune), tuned, trials, curves, summaries)
    print_table(summaries, rival, arguments.equal)


Trials = list[tuple[Options, list[Curve]]]


def tune(race: Race, more: Options) -> tuple[dict[str, Options], Trials]:
    """For each contestant the options with the lowest final loss on the tuning seed, and all that was tried."""
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
    """The rival keeps its steps; the others get as many as fit in its time, by the speeds seen while tuning."""
    rival = next(iter(race.contestants))
    if trials:
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
    print(f"  {'contestant':28} {'parameters':>11} {'loss':>16} {f'minus {rival}':>20} {'ms a step':>10} {'speed':>6}")
    for s in summaries:
        print(
            f"  {s.contestant:28} {s.parameters:>11,} {s.mean:>8.4f} ±{s.spread:.4f} "
            f"{s.minus_rival:>+12.4f} ±{s.minus_rival_error:.4f} {s.step_ms:>10.1f} {s.rival_ms_over_it:>6.2f}"
        )


def described(options: Options) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


def keep(
    arguments: Arguments,
    race: Race,
    tuned: dict[str, Options],
    trials: Trials,
    curves: list[Curve],
    summaries: list[Summary],
) -> None:
    """Write the record and the picture, after every seed: a race that is stopped has the seeds that were done."""
    record = {
        "machine": machine_name("cpu"),
        "torch": torch.__version__,
        "threads": arguments.threads,
        "equal": arguments.equal,
        "race": asdict(race),
        "tuned": tuned,
        "trials": [{"options": trial, "curves": [asdict(curve) for curve in tried]} for trial, tried in trials],
        "summaries": [asdict(summary) for summary in summaries],
        "curves": [asdict(curve) for curve in curves],
    }
    if arguments.output:
        text = json.dumps(record, indent=1, allow_nan=False)
        write_atomically(Path(arguments.output), lambda path: path.write_text(text + "\n"))
    if arguments.plot:
        where = f"{record['machine']}, {arguments.threads} threads, torch {torch.__version__}"
        title = f"{race.name}: {len(race.seeds)} seeds, equal {arguments.equal}"
        save_picture(draw_race(curves, title, where), Path(arguments.plot))


if __name__ == "__main__":
    main()
