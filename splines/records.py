"""Records of a run's splines at each checkpoint: splines/step_NNNNNN/splines.npz, small enough to keep them all.

Checkpoints of a large model are soon deleted. Their records stay, and films, the explorer and redrawn pictures read
them.
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
MAX_VALUES = 2_000_000  # control points in one record: 8 MB, so that hundreds of checkpoints can have one


class SplineRecords:
    """The records of the run in `run_dir`."""

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self.folder = Path(run_dir) / "splines"

    def step_folder(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def steps(self) -> list[int]:
        """The steps that have a record, in ascending order."""
        found = [re.fullmatch(r"step_(\d+)", path.parent.name) for path in self.folder.glob(f"*/{RECORD_FILE}")]
        return sorted(int(match[1]) for match in found if match)

    def write(self, step: int, snapshots: Sequence[Snapshot]) -> Path:
        """Write the record of `step` and return its path. Raises OSError.

        Of snapshots that are too large only some features are kept, the same ones at every step.
        """
        folder = self.step_folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        kept = [bounded(snapshot, MAX_VALUES // len(snapshots)) for snapshot in snapshots]
        path = folder / RECORD_FILE
        write_atomically(path, lambda temporary: save(temporary, kept))
        return path

    def read(self, step: int) -> list[Snapshot]:
        """The layers at `step`. Raises UserError if its record is missing or damaged."""
        path = self.step_folder(step) / RECORD_FILE
        try:
            return load(path)
        except FileNotFoundError:
            there = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"{self.folder} has no record of step {step}; there are steps {there}") from None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}); delete it to do without that step") from error

    def forget_after(self, step: int) -> None:
        """Delete the records of later steps, which a run that resumes from an earlier checkpoint writes again."""
        for later in self.steps():
            if later > step:
                (self.step_folder(later) / RECORD_FILE).unlink(missing_ok=True)


def bounded(snapshot: Snapshot, max_values: int) -> Snapshot:
    """The snapshot, or evenly spaced features of it with at most `max_values` control points."""
    inputs, knots, outputs = snapshot.control_points.shape
    if max_values >= inputs * knots * outputs:
        return snapshot
    side = max(1, math.isqrt(max_values // knots))
    rows = min(inputs, max(side, max_values // (knots * min(outputs, side))))
    return snapshot.block(spread(inputs, rows), spread(outputs, max(1, max_values // (knots * rows))))


def spread(count: int, at_most: int) -> Array:
    """At most `at_most` of the numbers 0 … count - 1, evenly spaced."""
    return np.arange(count) if count <= at_most else np.arange(at_most) * count // at_most
