"""How the splines of a run looked at each checkpoint: splines/step_NNNNNN/splines.npz, small enough to keep them all.

A checkpoint of a large model is deleted soon; its record stays, and films, the explorer and redrawn pictures read it.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import write_atomically
from splines.grid import Array
from splines.snapshot import Snapshot, load, save

RECORD_FILE = "splines.npz"
MOST_VALUES = 2_000_000  # control points in one record: 8 MB, so that hundreds of checkpoints can have one


class SplineRecords:
    """The records of the run in `run_dir`."""

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self.folder = Path(run_dir) / "splines"

    def step_folder(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def steps(self) -> list[int]:
        """The steps that have a record, in order."""
        found = [re.fullmatch(r"step_(\d+)", path.parent.name) for path in self.folder.glob(f"*/{RECORD_FILE}")]
        return sorted(int(match[1]) for match in found if match)

    def write(self, step: int, snapshots: Sequence[Snapshot]) -> Path:
        """Keep `snapshots`, or the same block of features of each at every step where they are too large. OSError."""
        folder = self.step_folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        kept = [bounded(snapshot, MOST_VALUES // len(snapshots)) for snapshot in snapshots]
        path = folder / RECORD_FILE
        write_atomically(path, lambda temporary: save(temporary, kept))
        return path

    def read(self, step: int) -> list[Snapshot]:
        """The layers at `step`. UserError if there is no record of it, or a damaged one."""
        path = self.step_folder(step) / RECORD_FILE
        try:
            return load(path)
        except FileNotFoundError:
            there = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"{self.folder} has no record of step {step}; there are steps {there}") from None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}); delete it to do without that step") from error

    def forget_after(self, step: int) -> None:
        """Delete the records of later steps: a run that goes on from an earlier checkpoint makes them again."""
        for later in self.steps():
            if later > step:
                (self.step_folder(later) / RECORD_FILE).unlink(missing_ok=True)


def bounded(snapshot: Snapshot, most_values: int) -> Snapshot:
    """The snapshot, or evenly spaced features of it with at most `most_values` control points."""
    inputs, knots, outputs = snapshot.control_points.shape
    if most_values >= inputs * knots * outputs:
        return snapshot
    side = max(1, math.isqrt(most_values // knots))
    rows = min(inputs, max(side, most_values // (knots * min(outputs, side))))
    return snapshot.block(spread(inputs, rows), spread(outputs, max(1, most_values // (knots * rows))))


def spread(count: int, at_most: int) -> Array:
    """Up to `at_most` of 0 … count - 1, evenly spaced."""
    return np.arange(count) if count <= at_most else np.arange(at_most) * count // at_most
