"""The report of a run, or of several side by side: `python report.py OUT_DIR [OUT_DIR …]` writes report.html."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import common.threads  # noqa: F401  before torch

import tyro

from common.command_line import OptionParser
from common.errors import UserError, exit_on_user_error
from common.files import write_atomically
from splines.records import SplineRecords
from splines.views import SplineView, most_curved
from training.checkpoint import load_checkpoint
from training.run_splines import splines_at
from webpage.build import STRIP_SPLINES, build_page
from webpage.packing import BUDGET, pack
from webpage.run_data import RunData, read_run, read_runs
from webpage.weights import PackedModel, pack_model, why_not

USAGE = "python report.py OUT_DIR [OUT_DIR …] [--live] [--output FILE]"
REPORT_FILE = "report.html"
LOOK_EVERY_S = 5.0
LATER = "The model itself comes with the page that is written when training ends: then it runs here."


@dataclass(frozen=True)
class Options:
    out_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of runs; the first one's splines and samples are shown, all curves and options are compared."""
    output: Path | None = None
    """Where to write the page; by default report.html in the first directory."""
    live: bool = False
    """Go on writing it whenever the run has logged something new; stop with Ctrl-C."""


@exit_on_user_error
def main() -> None:
    options = OptionParser(Options, USAGE, positional="out_dirs").parse(sys.argv[1:])
    record_if_missing(options.out_dirs)
    print(write_report(options.out_dirs, options.output, options.live), flush=True)
    seen = newest(options.out_dirs)
    while options.live:
        time.sleep(LOOK_EVERY_S)
        if newest(options.out_dirs) != seen:
            seen = newest(options.out_dirs)
            write_report(options.out_dirs, options.output, live=True)


def write_report(out_dirs: Sequence[Path], output: Path | None = None, live: bool = False) -> Path:
    """Write the page about the runs in `out_dirs`; its path. `live`: an open page loads itself again now and then.

    UserError for a directory that holds no run or is damaged; OSError if the page cannot be written.
    """
    runs = read_runs(out_dirs)
    # Splines are shown of one run: the first that has any.
    runs.sort(key=lambda run: not SplineRecords(run.directory).steps())
    records = SplineRecords(runs[0].directory)
    model = LATER if live else live_model(runs[0], records)
    if isinstance(model, PackedModel):
        packed = pack(records, runs[0].tokenizer, BUDGET - len(model.block), whole=model.shares_splines)
    else:
        packed = pack(records, runs[0].tokenizer)
    path = output or Path(out_dirs[0]) / REPORT_FILE
    page = build_page(runs, packed, strip_splines(records), model, live)
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


def live_model(run: RunData, records: SplineRecords) -> PackedModel | str:
    """The newest model of `run`, to run in the page; or a sentence on why there is none."""
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


def strip_splines(records: SplineRecords) -> list[SplineView]:
    """A few of the most curved splines of the newest step, from all layers."""
    steps = records.steps()
    if not steps:
        return []
    layers = [most_curved(snapshot, STRIP_SPLINES) for snapshot in records.read(steps[-1])]
    by_rank = [view for views in zip(*layers, strict=False) for view in views]
    return sorted(by_rank[:STRIP_SPLINES], key=lambda view: view.layer)


def record_if_missing(out_dirs: Sequence[Path]) -> None:
    """For runs that were trained with --splines False: record the splines of the newest checkpoint now."""
    for directory in out_dirs:
        if read_run(directory).config.has_splines and not SplineRecords(directory).steps():
            try:
                splines_at(directory, "latest")
            except UserError as error:
                print(f"{directory}: no splines to show ({error})", flush=True)


def newest(out_dirs: Sequence[Path]) -> list[float]:
    """When each run last logged something; 0 if never."""
    files = [Path(directory) / "metrics.jsonl" for directory in out_dirs]
    return [file.stat().st_mtime if file.exists() else 0.0 for file in files]


if __name__ == "__main__":
    main()
