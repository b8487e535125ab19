"""The checkpoint files of a run: their names, the two kinds they come in, and which of them are kept."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from common.errors import UserError
from training.distributed import World
from training.sealed_file import FORMAT, NotSealed, check_seal, read_sealed, replace, write_sealed

if TYPE_CHECKING:
    from training.sharded_checkpoint import ShardedState


class CheckpointFile(Protocol):
    """A checkpoint on the disk, of either kind. All methods that read raise NotSealed or OSError."""

    @property
    def path(self) -> Path:
        """The file, or the folder of shards."""

    def read(self) -> Any:
        """Read and verify everything; returns the state with all tensors in one piece each."""

    def read_to_resume(self) -> Any:
        """Verify everything, but read tensors only if they come as one piece; else "model" is None."""

    def verify(self) -> None:
        """Compare the checksums."""

    def is_best(self) -> bool:
        """Whether it says of itself that it had the lowest validation loss; False if it cannot be read."""

    def remove(self) -> None: ...


@dataclass(frozen=True)
class OneFile:
    """A checkpoint in one file. The best one has a second name, best.pt, and need not say so itself."""

    path: Path

    def read(self) -> Any:
        return read_sealed(self.path)

    def read_to_resume(self) -> Any:
        return self.read()

    def verify(self) -> None:
        check_seal(self.path)

    def is_best(self) -> bool:
        return False

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def checkpoint_file(path: Path) -> CheckpointFile:
    """The checkpoint at `path`, which need not exist: shards if it is a folder."""
    if not path.is_dir():
        return OneFile(path)
    from training.sharded_checkpoint import Shards  # takes half a second to import, and few runs have shards

    return Shards(path)


def checkpoint_folder(run: Path) -> Path:
    return run / "checkpoints"


def step_path(run: Path, step: int) -> Path:
    return checkpoint_folder(run) / f"step_{step:06d}.pt"


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def is_sharded(path: Path) -> bool:
    """Whether `path` is a complete folder of shards: their index is written last."""
    return (path / "index.json").is_file()


def list_steps(run: Path) -> list[Path]:
    """The numbered checkpoints of a run, files and folders of shards, newest first."""
    found = [path for path in checkpoint_folder(run).glob("step_*") if re.fullmatch(r"step_\d+(\.pt)?", path.name)]
    found = [path for path in found if path.suffix or is_sharded(path)]
    return sorted(found, key=lambda path: (step_of(path), path.suffix), reverse=True)  # .pt before its shards


def best_path(run: Path) -> Path | None:
    """The checkpoint with the lowest validation loss; None before the first evaluation."""
    best = checkpoint_folder(run) / "best.pt"
    return best if best.is_file() else _best_shards(run)


def _best_shards(run: Path) -> Path | None:
    folders = [path for path in list_steps(run) if path.is_dir()]
    return next((path for path in folders if checkpoint_file(path).is_best()), None)


def has_checkpoints(run: Path) -> bool:
    """Whether there is anything that a new run must not overwrite. Raises OSError."""
    folder = checkpoint_folder(run)
    return folder.is_dir() and (any(folder.glob("*.pt")) or bool(list_steps(run)))


def newest_good_step(run: Path) -> int | None:
    """The step of the newest checkpoint whose checksums fit; None if there is none, or the folder is gone."""
    for path in list_steps(run):
        try:
            checkpoint_file(path).verify()
            return step_of(path)
        except (NotSealed, OSError):
            continue
    return None


def save_checkpoint(run: Path, state: dict[str, Any], is_best: bool, keep: int) -> Path:
    """Write `state` atomically as the run's newest checkpoint, then delete all but the newest `keep`.

    A crash or a full disk leaves the earlier checkpoints as they were. Raises OSError if the file cannot be written.
    """
    path = step_path(run, state["step"])
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    write_sealed({"format": FORMAT, **state}, path)
    if is_best:
        _link_atomically(path, path.with_name("best.pt"))
    _remove_earlier(run, state["step"], keep)
    return path


def save_sharded(run: Path, state: ShardedState, keep: int, world: World) -> None:
    """Do the same for a sharded model: every process calls it and writes its own part. The best one is kept too."""
    step = state.header["step"]
    try:
        with world.together():
            if world.is_main:
                checkpoint_folder(run).mkdir(parents=True, exist_ok=True)
                _remove_leftovers(checkpoint_folder(run))
    except UserError as error:
        raise OSError(str(error)) from error
    state.write(step_path(run, step).with_suffix(""), world)
    if world.is_main:
        _remove_earlier(run, step, keep)


def _remove_earlier(run: Path, step: int, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints up to `step`, and the best.

    Later ones stay: a run that resumed before a damaged checkpoint has not reached that step again.
    """
    earlier = [path for path in list_steps(run) if step_of(path) <= step]
    best = _best_shards(run)
    for path in earlier[keep:]:
        if path != best:
            checkpoint_file(path).remove()


def _link_atomically(path: Path, link: Path) -> None:
    """Make `link` a second name of the file at `path`, or a copy if the file system has no links."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        replace(temporary, link)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    """Delete temporary files that a killed process left behind."""
    for leftover in folder.glob(".*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
