"""Write report.html about a run, or about several side by side: `python report.py OUT_DIR [OUT_DIR …]`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common.threads  # noqa: F401  before torch

import tyro

from common.command_line import OptionParser
from common.errors import UserError, exit_on_user_error
from common.files import write_atomically
from model_options import PAIRS
from splines.records import SplineRecords
from splines.views import SplineView, most_curved
from training.checkpoint import load_checkpoint
from training.recorded_splines import splines_at
from webpage.build import STRIP_SPLINES, build_page
from webpage.maps import pack_maps
from webpage.packing import BUDGET, pack
from webpage.run_data import RunData, read_run, read_runs
from webpage.weights import PackedModel, pack_model, why_not

USAGE = "python report.py OUT_DIR [OUT_DIR …] [--live] [--output FILE]"
REPORT_FILE = "report.html"
SECONDS_BETWEEN_CHECKS = 5.0
LATER = "The page that is written when training ends holds the model itself, which then runs here."


@dataclass(frozen=True)
class Options:
    out_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of runs. Curves and options of all are compared; splines and samples are those of the first."""
    output: Path | None = None
    """Where to write the page; by default report.html in the first directory."""
    live: bool = False
    """Write the page again whenever a run has logged something new, until Ctrl-C."""


@exit_on_user_error
def main() -> None:
    options = OptionParser(Options, USAGE, positional="out_dirs").parse(sys.argv[1:])
    record_if_missing(options.out_dirs)
    print(write_report(options.out_dirs, options.output, options.live), flush=True)
    seen = newest(options.out_dirs)
    while options.live:
        time.sleep(SECONDS_BETWEEN_CHECKS)
        if newest(options.out_dirs) != seen:
            seen = newest(options.out_dirs)
            write_report(options.out_dirs, options.output, live=True)


def write_report(out_dirs: Sequence[Path], output: Path | None = None, live: bool = False) -> Path:
    """Write the page about the runs in `out_dirs`, and return its path. `live`: an open page reloads itself regularly.

    UserError for a directory that holds no run or a damaged one; OSError if the page cannot be written.
    """
    runs = read_runs(out_dirs)
    # Splines of one run are shown: of the first that has any.
    runs.sort(key=lambda run: not SplineRecords(run.directory).steps())
    records = SplineRecords(runs[0].directory)
    model = LATER if live else live_model(runs[0], records)
    if isinstance(model, PackedModel):
        packed = pack(records, runs[0].tokenizer, BUDGET - len(model.block), whole=model.shares_splines)
    else:
        packed = pack(records, runs[0].tokenizer)
    path = output or Path(out_dirs[0]) / REPORT_FILE
    maps = None if live else newest_maps(runs)
    page = build_page(runs, packed, strip_splines(records), model, maps, live)
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


def live_model(run: RunData, records: SplineRecords) -> PackedModel | str:
    """Pack the newest model of `run`, to run in the page. Returns a sentence instead if that is not possible."""
    tokenizer = run.facts.get("tokenizer")
    name = tokenizer.get("name", "char") if isinstance(tokenizer, dict) else "char"
    reason = why_not(name, run.config.ffn)  # before a checkpoint is read, which may be large
    if reason is not None:
        return reason
    try:
        checkpoint = load_checkpoint(run.directory, "latest")
    except UserError as error:
        return f"There is no live model here: {error}."
    steps = records.steps()
    return pack_model(checkpoint, records.read(steps[-1]) if steps else [])


def newest_maps(runs: Sequence[RunData]) -> dict[str, Any] | None:
    """Pack functions of two inputs, of the first run that has some, from its newest checkpoint.

    Returns None if no run has any. If the checkpoint cannot be used, prints why and returns None.
    """
    run = next((run for run in runs if run.config.ffn == PAIRS), None)
    if run is None:
        return None
    try:
        return pack_maps(load_checkpoint(run.directory, "latest"), run.name)
    except UserError as error:
        print(f"{run.directory}: no functions of two inputs to show ({error})", flush=True)
        return None


def strip_splines(records: SplineRecords) -> list[SplineView]:
    """Choose a few of the most curved splines of the newest step, from all layers."""
    steps = records.steps()
    if not steps:
        return []
    layers = [most_curved(snapshot, STRIP_SPLINES) for snapshot in records.read(steps[-1])]
    by_rank = [view for views in zip(*layers, strict=False) for view in views]
    return sorted(by_rank[:STRIP_SPLINES], key=lambda view: view.layer)


def record_if_missing(out_dirs: Sequence[Path]) -> None:
    """Record the splines of the newest checkpoint of runs that were trained with --splines False."""
    for directory in out_dirs:
        if read_run(directory).config.has_splines and not SplineRecords(directory).steps():
            try:
                splines_at(directory, "latest")
            except UserError as error:
                print(f"{directory}: no splines to show ({error})", flush=True)


def newest(out_dirs: Sequence[Path]) -> list[float]:
    """The time when each run last logged something; 0 if never."""
    files = [Path(directory) / "metrics.jsonl" for directory in out_dirs]
    return [file.stat().st_mtime if file.exists() else 0.0 for file in files]


if __name__ == "__main__":
    main()
