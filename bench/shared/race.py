"""A race: contestants with different options of train.py train in turns in one process, on the same batches."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.shared.peer_blocks import restore_own_init
from bench.shared.peers import PEERS
from bench.shared.timing import compile_without_limit
from common.errors import UserError
from corpus.dataset import Dataset, ensure_prepared
from feed_forward import FEED_FORWARDS
from train import Trainer
from training.config import Config, parse
from training.device import choose_device
from training.evaluation import evaluate
from training.run import Run

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TURN_STEPS = 50  # few enough that a slower machine slows all, enough that cold caches do not matter
TABLES = {"config", "common", "search", "tune_seed", "seeds", "contestants"}
Options = dict[str, Any]


@dataclass(frozen=True)
class Race:
    """A file of bench/races: the recipe, the options that all contestants share, and the options of each.

    Every contestant is tuned over all combinations of `search` (option → values) on `tune_seed`, which is not one of
    the race's own `seeds`.
    """

    name: str
    config: str
    common: Options
    search: dict[str, list[Any]]
    tune_seed: int
    seeds: list[int]
    contestants: dict[str, Options]

    @classmethod
    def read(cls, path: Path) -> Race:
        """Read a race from a TOML file. Raises UserError if it is not one."""
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
            race = cls(
                name=path.stem,
                config=table["config"],
                common=table.get("common", {}),
                search=table.get("search", {}),
                tune_seed=table.get("tune_seed", 0),
                seeds=table["seeds"],
                contestants=table["contestants"],
            )
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}); name a file like bench/races/NAME.toml"
            ) from error
        except KeyError as error:
            raise UserError(f"{path} has no {error.args[0]}; a race needs config, seeds and contestants") from error
        except ValueError as error:
            raise UserError(f"{path} is not valid TOML ({error})") from error
        unknown = set(table) - TABLES
        if unknown or len(race.contestants) < 2 or not race.seeds or race.tune_seed in race.seeds:
            raise UserError(
                f"{path} must have two contestants or more, seeds without tune_seed, and nothing but "
                f"{', '.join(sorted(TABLES))}" + (f"; it has {', '.join(sorted(unknown))}" if unknown else "")
            )
        return race

    def without_missing_peers(self) -> tuple[Race, list[str]]:
        """The race without contestants whose layer is missing, and the names of those layers."""
        missing = {str(o["ffn"]) for o in self.contestants.values() if o.get("ffn") in PEERS} - set(FEED_FORWARDS)
        able = {name: options for name, options in self.contestants.items() if options.get("ffn") not in missing}
        return dataclasses.replace(self, contestants=able), sorted(missing)

    def among(self, names: str) -> Race:
        """The race of the contestants that are named, separated by semicolons, or of all if `names` is empty.

        Raises UserError for an unknown name.
        """
        chosen = [name.strip() for name in names.split(";")] if names else list(self.contestants)
        unknown = [name for name in chosen if name not in self.contestants]
        if unknown:
            raise UserError(
                f"only names {unknown[0]!r}, which is not a contestant of {self.name}; choose from "
                f"{'; '.join(self.contestants)}, separated by semicolons"
            )
        return dataclasses.replace(self, contestants={name: self.contestants[name] for name in chosen})

    def with_seeds(self, seeds: list[int]) -> Race:
        """The race on these seeds. Raises UserError if it is tuned on one of them."""
        if self.tune_seed in seeds:
            raise UserError(f"{self.name} is tuned on seed {self.tune_seed}; choose other seeds than that")
        return dataclasses.replace(self, seeds=seeds)

    def shortened(self, num_seeds: int, tune: bool) -> Race:
        """The race with its first `num_seeds` seeds (0: all), and without the search unless `tune`."""
        return dataclasses.replace(self, seeds=self.seeds[: num_seeds or None], search=self.search if tune else {})

    def trials(self) -> Iterator[Options]:
        """Every combination of the values to search."""
        for values in itertools.product(*self.search.values()):
            yield dict(zip(self.search, values, strict=True))

    def configure(self, contestant: str, seed: int, more: Options) -> Config:
        options = {**self.common, **self.contestants[contestant], **more, "seed": seed}
        config, _ = parse([self.config, *(f"--{name}={value}" for name, value in options.items())])
        return dataclasses.replace(config, wandb="disabled", resume=False)


@dataclass
class Curve:
    """Validation loss by step and by seconds of training, not counting compilation and evaluation."""

    contestant: str
    seed: int
    parameters: int
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    splines: str = ""
    """The value of ffn that made its spline layers; "" if it has none."""
    control_points: int = 0
    """Of its splines, along each input; 0 if it has none."""
    flops: int = 0
    """Floating-point operations of a training step, per token."""

    @property
    def step_ms(self) -> float:
        return 1000 * self.seconds[-1] / self.steps[-1]


class Racer:
    """Trains one contestant with one seed, a turn at a time."""

    def __init__(self, name: str, config: Config, folder: Path) -> None:
        dataset = Dataset.open(ensure_prepared(config.dataset), verify=False)
        device = choose_device(config)
        self.config = config
        self.trainer = Trainer(Run(folder, config, None), dataset, device)
        model = self.trainer.model
        has_splines = bool(model.spline_layers() or model.pair_layers())
        self.curve = Curve(
            name,
            config.seed,
            model.num_parameters(),
            splines=config.ffn if has_splines else "",
            control_points=config.num_control_points if has_splines else 0,
            flops=model.flops_per_token(),
        )
        restore_own_init(self.trainer.model, config.seed)
        self.trained_s = 0.0
        self.warm = False

    @property
    def is_done(self) -> bool:
        return self.trainer.progress.step >= self.config.max_iters

    def take_turn(self, steps: int) -> None:
        """Train for some steps, and evaluate where it is due. The very first step compiles and is not timed."""
        for _ in range(min(steps, self.config.max_iters - self.trainer.progress.step)):
            start = time.perf_counter()
            self.trainer.step()
            self.trainer.device.synchronize()
            if self.warm:
                self.trained_s += time.perf_counter() - start
            self.warm = True
            step = self.trainer.progress.step
            if step % self.config.eval_interval == 0 or self.is_done:
                self._evaluate(step)

    def _evaluate(self, step: int) -> None:
        trainer = self.trainer
        self.curve.steps.append(step)
        self.curve.seconds.append(self.trained_s * step / max(1, step - 1))
        self.curve.losses.append(evaluate(trainer.model, trainer.val_stream, self.config, trainer.device))

    def close(self) -> None:
        self.trainer.writer.close()
        self.trainer.tracker.finish()


def run_side_by_side(configs: dict[str, Config]) -> list[Curve]:
    """Train all contestants to their ends, in turns of TURN_STEPS steps."""
    compile_without_limit()  # all compile the same functions, each with its own modules
    with tempfile.TemporaryDirectory() as folder:
        racers = []
        for k, (name, config) in enumerate(configs.items()):
            with contextlib.redirect_stdout(io.StringIO()):
                racers.append(Racer(name, config, Path(folder) / str(k)))
        while not all(racer.is_done for racer in racers):
            for racer in racers:
                racer.take_turn(TURN_STEPS)
        for racer in racers:
            racer.close()
    return [racer.curve for racer in racers]


@dataclass(frozen=True)
class Summary:
    """Final losses of one contestant over the seeds, and their differences from the rival's, seed by seed."""

    contestant: str
    seeds: int
    parameters: int
    flops: int
    mean: float
    spread: float
    """Standard deviation over seeds; 0 with one."""
    minus_rival: float
    """Over the seeds that both have run."""
    minus_rival_error: float
    """Standard error of that difference; 0 with one seed."""
    step_ms: float
    rival_ms_over_it: float


def summarize(curves: Sequence[Curve], rival: str) -> list[Summary]:
    """A summary of each contestant that has a seed in common with the rival."""
    finals: dict[str, dict[int, float]] = {}
    for curve in curves:
        finals.setdefault(curve.contestant, {})[curve.seed] = curve.losses[-1]
    speeds = {name: statistics.median(c.step_ms for c in curves if c.contestant == name) for name in finals}
    summaries = []
    for name, losses in finals.items():
        gaps = [loss - finals[rival][seed] for seed, loss in losses.items() if seed in finals.get(rival, {})]
        if not gaps:
            continue
        parameters, flops = next((curve.parameters, curve.flops) for curve in curves if curve.contestant == name)
        error = deviation(gaps) / len(gaps) ** 0.5
        mean, spread = statistics.mean(losses.values()), deviation(list(losses.values()))
        gap, speed = statistics.mean(gaps), speeds[name]
        ratio = speeds[rival] / speed
        summaries.append(Summary(name, len(losses), parameters, flops, mean, spread, gap, error, speed, ratio))
    return summaries


def deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
