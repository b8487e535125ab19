"""The pictures of a run's splines, one folder a checkpoint, all on the same axes so that they make a flip-book."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from figures import DPI, SHEET_SPLINES, draw_layer_sheet, draw_overview, needed_limit, nice_limit, plot_layer
from spline_views import (
    MOST_TOKENS,
    TOKENS_AT_ONCE,
    LayerView,
    layer_inputs,
    layer_view,
    load_views,
    most_curved,
    save_views,
)
from training.batches import Batch, evaluation_batches
from training.dataset import TokenStream
from training.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from model import GPT

    Batches = Iterable[Tensor | Sequence[Tensor]]

AXES_FILE, VIEWS_FILE = "axes.json", "views.npz"
NOT_ROUNDING = 1e-5  # the bends of a straight line in float32 are below this share of its values
BRIGHT_SHARE = 0.995  # the colours end where all but 0.5 % of a heat map do; its maximum would leave it pale


@dataclass(frozen=True)
class Axes:
    """What all pictures of a run share; 0 while all splines are zero or straight, which settles nothing."""

    spline_limit: float = 0.0
    """The y axis is ± this."""
    importance_limit: float = 0.0
    """Where the colours of the heat maps end."""

    def widened(self, layers: Sequence[LayerView]) -> Axes:
        """These axes, wide enough for `layers`."""
        spline = max(needed_limit(view.splines) for view in layers)
        importance = max(float(np.quantile(view.heat_map, BRIGHT_SHARE)) for view in layers)
        return Axes(
            max(self.spline_limit, nice_limit(spline) if spline > 0 else 0.0),
            max(self.importance_limit, nice_limit(importance) if importance > NOT_ROUNDING * spline else 0.0),
        )


class SplinePictures:
    """Draws into `run_dir`/splines/step_NNNNNN: layer_00.png …, overview.png, and views.npz, what they were drawn from.

    When a checkpoint needs wider axes than those before it, these are drawn again. Errors (a full disk, activations
    that are not finite) are raised as they come; whoever trains should report them and go on.
    """

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self.folder = Path(run_dir) / "splines"

    def step_folder(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def draw(self, model: GPT, step: int, batches: Batches, count: int = SHEET_SPLINES) -> Path | None:
        """Draw the splines of the (uncompiled) model at `step`, `count` a layer; the folder, None without splines.

        `batches`, tokens (B, T) or pairs of tokens and targets, show what reaches the splines; [] if not known.
        """
        if not model.spline_layers():
            return None
        layers = [
            layer_view(layer, index, activations, count)
            for index, (layer, activations) in enumerate(self._layers(model, batches))
        ]
        folder = self.step_folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / VIEWS_FILE, lambda path: save_views(path, layers))
        self._draw_step(folder, layers, self._share_axes(folder, layers))
        return folder

    def draw_layer(
        self,
        model: GPT,
        step: int,
        batches: Batches,
        index: int,
        count: int = SHEET_SPLINES,
        everything: bool = False,
        output: Path | None = None,
    ) -> Path:
        """Draw layer `index` alone: its `count` most curved splines or all; to `output` or the step's folder."""
        layer, activations = self._layers(model, batches)[index]
        heading = f"Layer {index}, step {step:,} · "
        if everything:
            figure = plot_layer(layer, everything=True, activations=activations, title=heading)
        else:
            views = most_curved(layer, activations, count, index)
            limit = max(self.axes().spline_limit, nice_limit(needed_limit(views)))
            figure = draw_layer_sheet(views, f"{heading}{len(views)} most curved splines", limit)
        name = f"layer_{index:02d}_{'everything' if everything else 'most_curved'}.png"
        path = output or self.step_folder(step) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if output:  # the user's name decides the format: .png, .pdf, .svg
            figure.savefig(path, dpi=DPI)
        else:
            save_picture(figure, path)
        return path

    def axes(self) -> Axes:
        """The axes of the pictures that there are."""
        try:
            stored = json.loads((self.folder / AXES_FILE).read_text())
            return Axes(float(stored["spline_limit"]), float(stored["importance_limit"]))
        except (OSError, ValueError, KeyError, TypeError):  # none yet, or spoilt: all pictures are drawn again
            return Axes()

    @staticmethod
    def _layers(model: GPT, batches: Batches) -> list[tuple[Any, Tensor | None]]:
        layers = model.spline_layers()
        inputs: Sequence[Tensor | None] = layer_inputs(model, batches) or [None] * len(layers)
        return list(zip(layers, inputs, strict=True))

    def _share_axes(self, folder: Path, layers: Sequence[LayerView]) -> Axes:
        """The run's axes, wide enough for `layers` in `folder`; other steps are redrawn if that widens them."""
        before = self.axes()
        axes = before.widened(layers)
        if axes == before:
            return axes
        others = [path.parent for path in self.folder.glob(f"step_*/{VIEWS_FILE}") if path.parent != folder]
        for other in others:
            axes = axes.widened(load_views(other / VIEWS_FILE))
        for other in others:
            self._draw_step(other, load_views(other / VIEWS_FILE), axes)
        # Last, so that an interruption leaves the old axes and the next checkpoint does all this again.
        text = json.dumps(asdict(axes)) + "\n"
        write_atomically(self.folder / AXES_FILE, lambda path: path.write_text(text))
        return axes

    @staticmethod
    def _draw_step(folder: Path, layers: Sequence[LayerView], axes: Axes) -> None:
        step = int(folder.name.removeprefix("step_"))
        limit, importance_limit = axes.spline_limit or nice_limit(0), axes.importance_limit or nice_limit(0)
        for view in layers:
            title = f"Layer {view.layer}, step {step:,} · {len(view.splines)} most curved splines"
            sheet = draw_layer_sheet(view.splines, title, limit)
            save_picture(sheet, folder / f"layer_{view.layer:02d}.png")
        title = f"What the splines learnt · step {step:,}"
        overview = draw_overview(layers, title, limit, importance_limit)
        save_picture(overview, folder / "overview.png")


def picture_batches(stream: TokenStream, block_size: int) -> list[Batch]:
    """The validation text whose activations the histograms show; the same for every picture of a run."""
    length = min(block_size, len(stream) - 1)
    rows = max(1, TOKENS_AT_ONCE // length)
    return list(evaluation_batches(stream, length, rows, math.ceil(MOST_TOKENS / (rows * length))))


def save_picture(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))
