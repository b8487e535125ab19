"""The pictures of a run's splines, one folder per checkpoint, all with the same axes so that they can be compared."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.files import write_atomically
from pictures.overview import draw_overview
from pictures.page import STYLES, Style, matplotlib_defaults
from pictures.sheets import DPI, SHEET_SPLINES, capitalized, draw_layer_sheet, needed_limit, nice_limit
from splines.records import SplineRecords
from splines.snapshot import Snapshot
from splines.views import LayerView, layer_view

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXES_FILE = "axes.json"
NOT_ROUNDING = 1e-5  # in float32 even a straight line has bends, of up to this share of its values
BRIGHT_SHARE = 0.995  # colours end at this quantile of a heat map; ending at its maximum would leave the map pale


@dataclass(frozen=True)
class Axes:
    """The axis limits that all pictures of a run share; 0 while all splines are zero or straight."""

    spline_limit: float = 0.0
    """The y axes are ± this."""
    importance_limit: float = 0.0
    """The colours of the heat maps end here."""

    def widened(self, layers: Sequence[LayerView]) -> Axes:
        """These axes, wide enough for `layers`."""
        spline = max(needed_limit(view.splines) for view in layers)
        importance = max(float(np.quantile(view.heat_map, BRIGHT_SHARE)) for view in layers)
        return Axes(
            max(self.spline_limit, nice_limit(spline) if spline > 0 else 0.0),
            max(self.importance_limit, nice_limit(importance) if importance > NOT_ROUNDING * spline else 0.0),
        )


class SplinePictures:
    """Draws layer_00.png … and overview.png into `run_dir`/splines/step_NNNNNN, in the colours of `style`.

    If a step needs wider axes than the existing pictures have, these are drawn again from the run's records. Errors,
    such as a full disk, are raised; a training run should report them and continue.
    """

    def __init__(self, run_dir: str | os.PathLike[str], style: Style = STYLES["light"]) -> None:
        self.records = SplineRecords(run_dir)
        self.style = style

    def draw(self, step: int, snapshots: Sequence[Snapshot], count: int = SHEET_SPLINES) -> Path:
        """Draw the layers at `step`, `count` splines each; return the folder."""
        layers = [layer_view(snapshot, count) for snapshot in snapshots]
        folder = self.records.step_folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        self._draw_step(folder, layers, self._share_axes(step, layers, count))
        return folder

    def axes(self) -> Axes:
        """The axes of the existing pictures; zeros if there are no pictures."""
        try:
            stored = json.loads((self.records.folder / AXES_FILE).read_text())
            return Axes(float(stored["spline_limit"]), float(stored["importance_limit"]))
        except (OSError, ValueError, KeyError, TypeError):  # missing or damaged: all pictures are drawn again
            return Axes()

    def _share_axes(self, step: int, layers: Sequence[LayerView], count: int) -> Axes:
        """Axes that fit all records of the run and `layers` at `step`; if they changed, other steps are drawn again."""
        before = self.axes()
        axes = before.widened(layers)
        others = {
            other: [layer_view(snapshot, count) for snapshot in self.records.read(other)]
            for other in self.records.steps()
            if other != step
        }
        for views in others.values():
            axes = axes.widened(views)
        if axes == before:
            return axes
        for other, views in others.items():
            folder = self.records.step_folder(other)
            if (folder / "overview.png").exists():
                self._draw_step(folder, views, axes)
        # Written last: after an interruption the old axes remain, and the next call draws all pictures again.
        text = json.dumps(asdict(axes)) + "\n"
        write_atomically(self.records.folder / AXES_FILE, lambda path: path.write_text(text))
        return axes

    def _draw_step(self, folder: Path, layers: Sequence[LayerView], axes: Axes) -> None:
        step = int(folder.name.removeprefix("step_"))
        limit, importance_limit = axes.spline_limit or nice_limit(0), axes.importance_limit or nice_limit(0)
        for view in layers:
            title = f"{capitalized(view.name)}, step {step:,} · {len(view.splines)} most curved splines"
            sheet = draw_layer_sheet(view.splines, title, limit, style=self.style)
            save_picture(sheet, folder / f"layer_{view.layer:02d}.png")
        title = f"What the splines learnt · step {step:,}"
        save_picture(draw_overview(layers, title, limit, importance_limit, self.style), folder / "overview.png")


@matplotlib_defaults()
def save_picture(figure: Figure, path: Path) -> None:
    """Write a picture atomically; the suffix decides the format (.png, .svg, .pdf)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.removeprefix(".").lower(), dpi=DPI)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))
