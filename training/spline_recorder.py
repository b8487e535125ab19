"""Records the splines of a run at each evaluation, and draws them at the end.

None of this may stop a run: a failure is printed in one line.
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
PATIENCE = 0.1  # share of a run in which there are no warnings, because grids still change


class SplineRecorder:
    """Records the splines of (uncompiled) models, with the activations that the validation text in `stream` causes."""

    def __init__(self, run_dir: Path, config: Config, stream: TokenStream, tracker: Tracker) -> None:
        self.run_dir, self.config, self.tracker = run_dir, config, tracker
        self.records = SplineRecords(run_dir)
        self._stream = stream
        self._batches: list[Batch] | None = None
        self._warned = False
        self._final: list[Snapshot] = []  # of the last step, with all features, of which the record may hold only some

    def record(self, model: GPT, step: int) -> list[dict[str, Any]] | None:
        """Record the splines at `step`, warn about bad grids, and return statistics, a dict for each layer.

        Returns None for models without splines, after a failure, and at step 0, which is only recorded: the report's
        slider and the film start there.
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
        """Draw the splines of `step`, the last one, if it was recorded."""
        if self.config.splines and step in self.records.steps():
            self._guarded(step, lambda: self._draw(step))

    def _draw(self, step: int) -> None:
        folder = SplinePictures(self.run_dir).draw(step, self._final or self.records.read(step))
        self.tracker.log_picture(folder / "overview.png", step)

    def _warn(self, step: int, statistics: list[LayerStatistics]) -> None:
        """Warn about bad grids once, early enough to change them, and about straight lines at the end."""
        advice = []
        if not self._warned and step >= PATIENCE * self.config.max_iters:
            advice += grid_advice(statistics)
            self._warned = bool(advice)
        if step == self.config.max_iters:
            advice += curve_advice(statistics)
        for sentence in advice:
            print(f"warning: {sentence}", flush=True)
