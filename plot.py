"""Draw splines: all pictures of a checkpoint, a layer, a single function, or a film over the recorded steps."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import common.threads  # noqa: F401  before torch

import tyro

from common.command_line import OptionParser
from common.errors import UserError, exit_on_user_error
from kan_layer import to_numpy
from pictures.film import write_film
from pictures.hats import draw_basis
from pictures.maps import draw_maps, most_interacting
from pictures.page import STYLES, chosen_style
from pictures.run_pictures import SplinePictures, save_picture
from pictures.sheets import SHEET_SPLINES, capitalized, draw_snapshot
from splines.choice import ALL, chosen_splines, layers_to_draw, parse_features
from splines.records import SplineRecords
from splines.snapshot import Snapshot
from splines.views import view_splines
from training.checkpoint import load_checkpoint
from training.recorded_splines import run_directory, splines_at

USAGE = "python plot.py OUT_DIR [--layer L] [--key value …]"
FORMATS = (".png", ".pdf", ".svg")
BASIS = "basis"


@dataclass(frozen=True)
class Options:
    out_dir: tyro.conf.Positional[Path]
    """The run's directory, or one of its checkpoint files; the word basis draws the figure in docs/splines.md."""
    layer: int | None = None
    """Draw only this spline layer, counted from 0; without it all layers and the overview."""
    inputs: str = ""
    """Only these input features of the layer, as in 3 or 3,17."""
    outputs: str = ""
    """Only these output features. With one input and one output, the function is drawn large."""
    step: str = "latest"
    """Which checkpoint: latest, best, or a step (of a checkpoint or a record)."""
    count: int = SHEET_SPLINES
    """Number of splines on a sheet or in a film; the most curved ones are shown."""
    everything: bool = False
    """Draw every spline of the layer on one sheet; without --layer, a sheet for each layer."""
    maps: bool = False
    """Draw the functions of two inputs that ffn=pair_splines learns, as maps; without --layer, a sheet for each."""
    film: bool = False
    """Write an animation of how the splines formed, over all recorded steps."""
    style: Literal["light", "dark", "print"] = "light"
    """Colours: for a light or a dark page, or black ink alone."""
    output: Path | None = None
    """Where to write the picture (.png, .pdf, .svg) or film (.gif, .png, .mp4); by default among the run's."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"count must be at least 1; got {self.count}")
        if (self.inputs or self.outputs) and self.layer is None:
            raise UserError("--inputs and --outputs are features of a layer; say which with --layer")
        if self.output and self.layer is None and not self.film and str(self.out_dir) != BASIS:
            raise UserError("--output names one picture; say which with --layer")
        if self.output and not self.film and self.output.suffix.lower() not in FORMATS:
            raise UserError(f"--output must end in {', '.join(FORMATS)}; got {self.output}")
        parse_features(self.inputs, "inputs")
        parse_features(self.outputs, "outputs")


@exit_on_user_error
def main() -> None:
    options = OptionParser(Options, USAGE, positional="out_dir").parse(sys.argv[1:])
    try:
        paths = draw(options)
    except OSError as error:
        where = options.output or options.out_dir
        raise UserError(f"{where} cannot be written ({error.strerror or error}); choose another --output") from error
    except ValueError as error:  # features that do not exist
        raise UserError(str(error)) from error
    for path in paths:
        print(path)


def draw(options: Options) -> list[Path]:
    """Draw what the options ask for, and return the files written."""
    if str(options.out_dir) == BASIS and not options.out_dir.exists():
        path = options.output or Path("basis.png")
        save_picture(draw_basis(chosen_style(options.style)), path)
        return [path]
    if options.film:
        return [draw_film(options)]
    if options.maps:
        return draw_pairs(options)
    step, run, snapshots = splines_at(options.out_dir, options.step)
    layers = layers_to_draw(snapshots, options.layer)
    if options.layer is None and not options.everything:
        folder = SplinePictures(run, STYLES[options.style]).draw(step, snapshots, options.count)
        return [*(folder / f"layer_{layer:02d}.png" for layer in layers), folder / "overview.png"]
    return [draw_layer(options, step, run, snapshots[layer]) for layer in layers]


def draw_layer(options: Options, step: int, run: Path, snapshot: Snapshot) -> Path:
    """Draw a sheet of a layer. Its axes are those of the run's other pictures if they are wide enough."""
    inputs, outputs = parse_features(options.inputs, "inputs"), parse_features(options.outputs, "outputs")
    heading = f"{capitalized(snapshot.name)}, step {step:,} · "
    limit = SplinePictures(run).axes().spline_limit
    style = STYLES[options.style]
    figure = draw_snapshot(snapshot, inputs, outputs, options.everything, options.count, heading, style, limit=limit)
    named = "_".join(f"{k}{'-'.join(map(str, v))}" for k, v in (("in", inputs), ("out", outputs)) if v is not None)
    name = f"layer_{snapshot.layer:02d}_{'everything' if options.everything else named or 'most_curved'}.png"
    path = options.output or SplineRecords(run).step_folder(step) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(figure, path)
    return path


def draw_pairs(options: Options) -> list[Path]:
    """Draw a sheet of maps for each layer of functions of two inputs, or for one of them."""
    checkpoint = load_checkpoint(options.out_dir, options.step)
    layers = dict(enumerate(checkpoint.model.pair_layers()))
    if not layers:
        raise UserError(f"{options.out_dir} has no maps to draw: its ffn is {checkpoint.config.ffn}, not pair_splines")
    if options.layer is not None and options.layer not in layers:
        raise UserError(f"--layer must be from 0 to {len(layers) - 1}; got {options.layer}")
    folder = SplineRecords(run_directory(options.out_dir)).step_folder(checkpoint.step)
    paths = []
    for number in layers if options.layer is None else [options.layer]:
        title = f"Functions of two inputs, block {number}, step {checkpoint.step:,}"
        views = most_interacting(to_numpy(layers[number].control_points()).transpose(0, 3, 1, 2), options.count)
        names = ("now", "one token before")
        figure = draw_maps(views, layers[number].spline_width, title, names, STYLES[options.style])
        paths.append(options.output or folder / f"maps_{number:02d}.png")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        save_picture(figure, paths[-1])
    return paths


def draw_film(options: Options) -> Path:
    """Write the film of the named splines, or of those that are most curved at the end (of one layer, or of all)."""
    records = SplineRecords(run_directory(options.out_dir))
    steps = records.steps()
    if len(steps) < 2:
        raise UserError(f"{records.folder} has records of {len(steps)} steps, and a film needs two; train longer")
    last = records.read(steps[-1])
    layers = layers_to_draw(last, options.layer)
    inputs, outputs = parse_features(options.inputs, "inputs"), parse_features(options.outputs, "outputs")
    count = ALL if inputs and outputs else -(-options.count // len(layers))
    edges = {layer: chosen_splines(last[layer], inputs, outputs, count) for layer in layers}
    frames = []
    for step in steps:
        snapshots = records.read(step)
        views = [view for layer, chosen in edges.items() for view in view_splines(snapshots[layer], chosen)]
        frames.append((step, views))
    path = options.output or records.folder / "film.gif"
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"How splines of layer {options.layer} formed" if options.layer is not None else "How splines formed"
    write_film(path, frames, title, STYLES[options.style])
    return path


if __name__ == "__main__":
    main()
