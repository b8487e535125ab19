"""Draw the splines of a checkpoint again: all pictures of the run, or one layer's."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from figures import SHEET_SPLINES
from model import GPT
from training.batches import Batch
from training.checkpoint import LoadedCheckpoint, load_checkpoint
from training.dataset import Dataset, ensure_prepared
from training.errors import UserError, exit_on_user_error
from training.options import OptionParser
from training.pictures import SplinePictures, picture_batches

USAGE = "python plot.py OUT_DIR [--layer L] [--key value …]"
FORMATS = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Options:
    out_dir: tyro.conf.Positional[Path]
    """The run's directory, or one of its checkpoint files."""
    layer: int | None = None
    """Draw only this spline layer, counted from 0; without it all layers and the overview."""
    step: str = "latest"
    """Which checkpoint: latest, best or a step."""
    count: int = SHEET_SPLINES
    """Splines on a layer's sheet, the most curved ones."""
    everything: bool = False
    """Draw every spline of the layer (of each layer, without --layer) on one sheet."""
    output: Path | None = None
    """Where to write the layer's picture (.png, .pdf or .svg); by default among the run's pictures."""


@exit_on_user_error
def main() -> None:
    options = OptionParser(Options, USAGE, positional="out_dir").parse(sys.argv[1:])
    check(options)
    checkpoint = load_checkpoint(options.out_dir, options.step)
    layers = layers_to_draw(checkpoint.model, options)
    batches = validation_batches(checkpoint)
    try:
        paths = draw(checkpoint, layers, batches, options)
    except OSError as error:
        where = options.output or run_directory(checkpoint.path)
        raise UserError(f"{where} cannot be written ({error.strerror}); choose another --output") from error
    for path in paths:
        print(path)


def draw(checkpoint: LoadedCheckpoint, layers: list[int], batches: list[Batch], options: Options) -> list[Path]:
    """Draw what the options ask for; the files written."""
    pictures = SplinePictures(run_directory(checkpoint.path))
    if options.layer is None and not options.everything:
        folder = pictures.draw(checkpoint.model, checkpoint.step, batches, options.count)
        assert folder is not None  # there are spline layers
        return [*(folder / f"layer_{layer:02d}.png" for layer in layers), folder / "overview.png"]
    return [
        pictures.draw_layer(
            checkpoint.model, checkpoint.step, batches, layer, options.count, options.everything, options.output
        )
        for layer in layers
    ]


def check(options: Options) -> None:
    if options.count < 1:
        raise UserError(f"count must be at least 1; got {options.count}")
    if options.output and options.layer is None:
        raise UserError("--output names one picture; say which with --layer")
    if options.output and options.output.suffix.lower() not in FORMATS:
        raise UserError(f"--output must end in {', '.join(FORMATS)}; got {options.output}")


def layers_to_draw(model: GPT, options: Options) -> list[int]:
    """Numbers of the spline layers that the user wants to see."""
    count = len(model.spline_layers())
    if not count:
        raise UserError(f"{options.out_dir} has no splines to draw: its model was trained with ffn={model.config.ffn}")
    if options.layer is None:
        return list(range(count))
    if not 0 <= options.layer < count:
        raise UserError(f"layer must be from 0 to {count - 1}; got {options.layer}")
    return [options.layer]


def validation_batches(checkpoint: LoadedCheckpoint) -> list[Batch]:
    """Enough of the run's validation data for the histograms; [], and a sentence, if it is not there any more."""
    config = checkpoint.config
    try:
        dataset = Dataset.open(ensure_prepared(config.dataset), verify=False)
        if dataset.tokenizer.to_metadata() != checkpoint.tokenizer.to_metadata():
            raise UserError(f"dataset {config.dataset} has another vocabulary than the checkpoint")
        return picture_batches(dataset.tokens("val"), config.block_size)
    except UserError as error:
        print(f"the pictures have no histograms: {error}", flush=True)
        return []


def run_directory(checkpoint: Path) -> Path:
    """The run that a checkpoint file belongs to; the file's own folder if it lies elsewhere."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == "checkpoints" else folder


if __name__ == "__main__":
    main()
