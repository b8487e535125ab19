"""What a run shows of its splines: a record and numbers at each evaluation, pictures at the end, a report.

All of it is for looking at, so nothing here can stop a run: what fails is said in a line.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from corpus.batches import Batch
from corpus.dataset import TokenStream
from model import GPT
from pictures.run_pictures import SplinePictures
from splines.records import SplineRecords
from splines.snapshot import Snapshot
from splines.statistics import LayerStatistics, curve_advice, grid_advice, layer_statistics
from training.activations import picture_batches, take_snapshots
from training.config import Config
from training.tracker import Tracker

T = TypeVar("T")
PATIENCE = 0.1  # of the run: what the first steps look like is nothing to warn about


class SplineWatch:
    """Looks at the splines of (uncompiled) models, as the validation text in `stream` reaches them."""

    def __init__(self, run_dir: Path, config: Config, stream: TokenStream, tracker: Tracker) -> None:
        self.run_dir, self.config, self.tracker = run_dir, config, tracker
        self.records = SplineRecords(run_dir)
        self._stream = stream
        self._batches: list[Batch] | None = None
        self._warned = False
        self._final: list[Snapshot] = []  # of the last step, where the record may hold only some features

    def record(self, model: GPT, step: int) -> list[dict[str, Any]] | None:
        """Record the splines at `step`, warn about bad grids, and return statistics, a dict for each layer.

        None for models without splines, after a failure, and before the first step, when a record is all there is to
        do: it is where the slider and the film start from.
        """
        return self._guarded(step, lambda: self._record(model, step)) if self._is_wanted(model) else None

    def _record(self, model: GPT, step: int) -> list[dict[str, Any]] | None:
        snapshots = self._snapshots(model)
        self.records.write(step, snapshots)
        if step == 0:
            return None
        statistics = [layer_statistics(snapshot) for snapshot in snapshots]
        self._final = snapshots if step == self.config.max_iters else []
        self._warn(step, statistics)
        self.tracker.log_splines(snapshots, statistics, step)
        return [each.as_dict() for each in statistics]

    def _is_wanted(self, model: GPT) -> bool:
        return self.config.splines and bool(model.spline_layers())

    def _snapshots(self, model: GPT) -> list[Snapshot]:
        if self._batches is None:
            self._batches = picture_batches(self._stream, self.config.block_size)
        return take_snapshots(model, self._batches)

    @staticmethod
    def _guarded(step: int, action: Callable[[], T]) -> T | None:
        try:
            return action()
        except Exception as error:
            print(f"splines of step {step}: {type(error).__name__}: {error}; training goes on", flush=True)
            return None

    def finish(self, step: int) -> None:
        """Draw the splines as they are at the end, if `step` was recorded."""
        if self.config.splines and step in self.records.steps():
            self._guarded(step, lambda: self._draw(step))

    def _draw(self, step: int) -> None:
        folder = SplinePictures(self.run_dir).draw(step, self._final or self.records.read(step))
        self.tracker.log_picture(folder / "overview.png", step)

    def _warn(self, step: int, statistics: list[LayerStatistics]) -> None:
        """About a bad grid once, early enough to mend it; about straight lines at the end."""
        advice = []
        if not self._warned and step >= PATIENCE * self.config.max_iters:
            advice += grid_advice(statistics)
            self._warned = bool(advice)
        if step == self.config.max_iters:
            advice += curve_advice(statistics)
        for sentence in advice:
            print(f"warning: {sentence}", flush=True)
