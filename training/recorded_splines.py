"""The splines of a run at one of its steps: from their record if there is one, else from a checkpoint."""

from __future__ import annotations

from pathlib import Path

from common.errors import UserError
from corpus.batches import Batch
from corpus.dataset import Dataset, ensure_prepared
from splines.records import SplineRecords
from splines.snapshot import Snapshot
from training.activations import picture_batches, take_snapshots
from training.checkpoint import LoadedCheckpoint, load_checkpoint
from training.checkpoint_files import list_steps, step_path


def splines_at(path: Path, which: str) -> tuple[int, Path, list[Snapshot]]:
    """Find the splines that `path` and `which` name. Returns their step, the run's directory, and a snapshot per layer.

    A record serves if its checkpoint has been deleted since. Without a whole record, one is made from the checkpoint.
    """
    run = run_directory(path)
    records = SplineRecords(run)
    recorded = records.steps()
    newest = recorded[-1] if recorded and not list_steps(run) else -1  # the latest step, if there are no checkpoints
    at = int(which) if which.isdecimal() else newest if which == "latest" else -1
    if at in recorded and path.is_dir() and not step_path(run, at).is_file():
        return at, run, records.read(at)
    checkpoint = load_checkpoint(path, which)
    step = checkpoint.step
    if not checkpoint.model.spline_layers():
        maps = "; --maps True draws its functions of two inputs" if checkpoint.model.pair_layers() else ""
        raise UserError(f"{path} has no splines to draw: its model was trained with ffn={checkpoint.config.ffn}{maps}")
    if step in recorded and all(snapshot.is_whole for snapshot in records.read(step)):
        return step, run, records.read(step)
    snapshots = take_snapshots(checkpoint.model, validation_batches(checkpoint))
    if step not in recorded:
        records.write(step, snapshots)
    return step, run, snapshots


def validation_batches(checkpoint: LoadedCheckpoint) -> list[Batch]:
    """Enough of the run's validation text for histograms. If it is gone, prints so and returns []."""
    config = checkpoint.config
    try:
        dataset = Dataset.open(ensure_prepared(config.dataset), verify=False)
        if dataset.tokenizer.to_metadata() != checkpoint.tokenizer.to_metadata():
            raise UserError(f"dataset {config.dataset} has another vocabulary than the checkpoint")
        return picture_batches(dataset.tokens("val"), config.block_size)
    except UserError as error:
        print(f"the pictures have no histograms: {error}", flush=True)
        return []


def run_directory(path: Path) -> Path:
    """The directory of the run to which `path`, a run or a checkpoint, belongs; else the folder of the file."""
    if path.is_dir():
        return path
    folder = path.resolve().parent
    return folder.parent if folder.name == "checkpoints" else folder
