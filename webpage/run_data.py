"""Reads what a report shows of one run from its directory: options, metrics, samples, commands."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from corpus.tokenizer import Tokenizer, tokenizer_from_metadata
from model_options import PAIRS
from splines.statistics import LayerStatistics
from training.config import Config, read_saved
from training.metrics import read_metrics
from training.run import CONFIG_FILE
from training.run_facts import read_facts

METRICS = ("step", "train_loss", "val_loss", "learning_rate", "grad_norm", "tokens_per_second", "elapsed_s")
MOST_POINTS = 2000  # per curve; a longer one is thinned, but keeps its evaluations
MOST_SAMPLES, LONGEST_SAMPLE = 60, 20_000


@dataclass(frozen=True)
class RunData:
    """One run, as read from its directory."""

    directory: Path
    name: str
    config: Config
    facts: dict[str, Any]
    """The record of `training.run_facts`, or {} for a run without one."""
    lines: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    samples: list[dict[str, Any]]
    """`step` and `text` of each sample, in order."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        try:
            return tokenizer_from_metadata(self.facts["tokenizer"])
        except (KeyError, UserError):
            return None

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("val_loss") is not None]

    @property
    def best(self) -> dict[str, Any] | None:
        """The line with the best validation loss."""
        return min(self.evaluations, key=lambda line: line["val_loss"], default=None)

    @property
    def steps(self) -> int:
        return int(self.lines[-1]["step"]) if self.lines else 0

    @property
    def statistics(self) -> list[tuple[int, list[LayerStatistics]]]:
        """The statistics of all layers' splines, by step."""
        found = []
        for line in self.lines:
            try:
                layers = [
                    LayerStatistics(**{**each, "curved_quantiles": tuple(each["curved_quantiles"])})
                    for each in line.get("splines") or []
                ]
            except (TypeError, KeyError):  # written by another version
                continue
            if layers:
                found.append((int(line["step"]), layers))
        return found

    def script_data(self) -> dict[str, Any]:
        """The data of the run for the page's script."""
        lines = thinned(self.lines)
        columns = {name: [_number(line.get(name)) for line in lines] for name in METRICS}
        return {"name": self.name, "metrics": columns, "samples": self.samples}

    def commands(self) -> list[tuple[str, str]]:
        """Commands for the run, each with what it does."""
        directory = str(self.directory)
        again = ["--out_dir", f"{directory}-again"]
        has_pairs = self.config.ffn == PAIRS
        return [
            ("Write text with the best checkpoint.", command("sample.py", directory)),
            ("Train the same model again.", command("train.py", f"{directory}/{CONFIG_FILE}", *again)),
            ("The same from the options alone.", command("train.py", *self._options(), *again)),
            ("Go on from the newest checkpoint, for longer.", self._longer()),
            *[("A film of how the splines formed.", command("plot.py", directory, "--film"))] * self.config.has_splines,
            *[("Maps of its functions of two inputs.", command("plot.py", directory, "--maps", "True"))] * has_pairs,
            ("This page again.", command("report.py", directory)),
        ]

    def _options(self) -> list[str]:
        """The options that differ from the defaults, as arguments of a command line."""
        default = Config()
        return [
            token
            for name, value in dataclasses.asdict(self.config).items()
            if name not in ("out_dir", "resume") and value != getattr(default, name)
            for token in (f"--{name}", str(value))
        ]

    def _longer(self) -> str:
        more = str(2 * max(1, self.config.max_iters))
        return command("train.py", "--out_dir", str(self.directory), "--resume", "True", "--max_iters", more)


def read_run(directory: Path) -> RunData:
    """Read the run in `directory`. Raises UserError if there is none."""
    if not (directory / CONFIG_FILE).is_file():
        raise UserError(
            f"{directory} is not the directory of a run: it has no {CONFIG_FILE}; give one that train.py made"
        )
    config = read_saved(directory / CONFIG_FILE)
    name = directory.resolve().name
    return RunData(directory, name, config, read_facts(directory), read_metrics(directory), read_samples(directory))


def read_runs(directories: Sequence[Path]) -> list[RunData]:
    """Read the runs in `directories`, by names that tell them apart. Raises UserError if one is not a run."""
    names = distinct_names(directories)
    return [dataclasses.replace(read_run(each), name=name) for each, name in zip(directories, names, strict=True)]


def distinct_names(directories: Sequence[Path]) -> list[str]:
    """The shortest end of each path that no other of the directories has."""
    paths = [directory.resolve().parts for directory in directories]
    names = []
    for path in paths:
        others = [other for other in paths if other != path]
        count = 1
        while any(other[-count:] == path[-count:] for other in others):
            count += 1
        names.append(str(Path(*path[-count:])))
    return names


def read_samples(directory: Path) -> list[dict[str, Any]]:
    paths = sorted((directory / "samples").glob("step_*.txt"))
    kept = paths[:: max(1, -(-len(paths) // MOST_SAMPLES))]
    if paths and paths[-1] not in kept:
        kept.append(paths[-1])
    found = []
    for path in kept:
        step = path.stem.removeprefix("step_")
        if step.isdecimal():
            text = path.read_text(encoding="utf-8", errors="replace")[:LONGEST_SAMPLE]
            found.append({"step": int(step), "text": text})
    return found


def thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """About MOST_POINTS evenly spaced lines at most, plus all lines with a validation loss."""
    every = -(-len(lines) // MOST_POINTS)
    last = len(lines) - 1
    return [
        line
        for k, line in enumerate(lines)
        if every <= 1 or k % every == 0 or k == last or line.get("val_loss") is not None
    ]


def command(script: str, *arguments: str) -> str:
    """A command line that readers of the page can copy on any machine."""
    return shlex.join(["python", script, *arguments])


def _number(value: Any) -> float | int | None:
    """A finite number, rounded to the digits that a chart can show, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")
