"""Checkpoints: written whole or not at all, read without running anything that is in them."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from corpus.tokenizer import Tokenizer, tokenizer_from_metadata
from model import GPT
from training.config import Config, from_dict
from training.distributed import World
from training.refinement import points_after, refine_model
from training.sealed_file import NotSealed, check_seal, read_sealed, replace, write_sealed

if TYPE_CHECKING:
    from training.sharded_checkpoint import ShardedCheckpoint, ShardedState

FORMAT = "splinegpt-checkpoint-2"
FIELDS = {"format", "step", "config", "tokenizer", "data_fingerprint", "vocab_size", "model", "best_val_loss"}
TRAINING_FIELDS = {"optimizer", "scaler", "elapsed_s", "wandb_id", "skipped_steps"}


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint opened for use: the model in eval mode on the CPU, and what is needed to feed and read it."""

    model: GPT
    config: Config
    tokenizer: Tokenizer
    step: int
    path: Path


def checkpoint_folder(run: Path) -> Path:
    return run / "checkpoints"


def step_path(run: Path, step: int) -> Path:
    return checkpoint_folder(run) / f"step_{step:06d}.pt"


def list_steps(run: Path) -> list[Path]:
    """The numbered checkpoints of a run, files and folders of shards, newest first."""
    found = [path for path in checkpoint_folder(run).glob("step_*") if re.fullmatch(r"step_\d+(\.pt)?", path.name)]
    found = [path for path in found if path.suffix or is_sharded(path)]
    return sorted(found, key=lambda path: (step_of(path), path.suffix), reverse=True)  # .pt before its shards


def has_checkpoints(run: Path) -> bool:
    """Whether there is anything that a new run must not overwrite. Raises OSError."""
    folder = checkpoint_folder(run)
    return folder.is_dir() and (any(folder.glob("*.pt")) or bool(list_steps(run)))


def save_checkpoint(run: Path, state: dict[str, Any], is_best: bool, keep: int) -> Path:
    """Write `state` as the run's newest checkpoint and delete all but the newest `keep`.

    The file is written under a temporary name, flushed to the disk and renamed, so a crash or a full disk leaves
    the earlier checkpoints as they were. Raises OSError when it cannot be written.
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
    """As `save_checkpoint`, for a model in pieces: every process must call it. The best one is kept too."""
    from training.sharded_checkpoint import write_sharded

    step = state.header["step"]
    try:
        with world.together():
            if world.is_main:
                checkpoint_folder(run).mkdir(parents=True, exist_ok=True)
                _remove_leftovers(checkpoint_folder(run))
    except UserError as error:
        raise OSError(str(error)) from error
    write_sharded(step_path(run, step).with_suffix(""), state, world)
    if world.is_main:
        _remove_earlier(run, step, keep)


def _remove_earlier(run: Path, step: int, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints up to `step` (a later one may be a damaged one) and the best."""
    from training.sharded_checkpoint import remove_sharded

    earlier = [old for old in list_steps(run) if step_of(old) <= step]
    best = best_sharded(run)
    for old in earlier[keep:]:
        if old.is_file():
            old.unlink(missing_ok=True)
        elif old != best:
            remove_sharded(old)


def best_sharded(run: Path) -> Path | None:
    """The folder of shards that had the lowest validation loss."""
    folders = [path for path in list_steps(run) if path.is_dir()]
    return next((path for path in folders if _is_best(path)), None)


def _is_best(folder: Path) -> bool:
    try:
        return bool(open_sharded(folder, verify=False).header["is_best"])
    except (NotSealed, OSError, KeyError):
        return False


def _link_atomically(path: Path, link: Path) -> None:
    """Let `link` be a second name of the file at `path` (a copy where the file system has no links)."""
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


def read_state(path: Path) -> dict[str, Any]:
    """The mapping in a checkpoint, checked, in one piece; nothing in it is executed. UserError if it is not one."""
    return _read(path, lambda: open_sharded(path).read_state() if path.is_dir() else read_sealed(path))


def open_checkpoint(path: Path) -> dict[str, Any]:
    """As `read_state`, of a checkpoint that a run can go on from; of shards all is checked, but no tensor is read."""
    state = _read(path, lambda: open_sharded(path).header if path.is_dir() else read_sealed(path))
    if not state.keys() >= TRAINING_FIELDS:
        raise UserError(f"{path} has no optimizer state")
    return state


def open_sharded(path: Path, verify: bool = True) -> ShardedCheckpoint:
    from training.sharded_checkpoint import ShardedCheckpoint  # half a second of imports that few runs need

    return ShardedCheckpoint.open(path, verify)


def _read(path: Path, read: Callable[[], Any]) -> dict[str, Any]:
    mend = "use a checkpoint that train.py wrote, or another one of the run"
    try:
        state = read()
        if path.is_dir():
            state = {"format": FORMAT, "model": None, "optimizer": None, **state}
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}; {mend}") from None
    except NotSealed as error:
        raise UserError(f"{path} is damaged or not a checkpoint ({error}); {mend}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {mend}") from error
    is_ours = isinstance(state, dict) and state.get("format") == FORMAT and state.keys() >= FIELDS
    if not is_ours or not all(isinstance(state[name], int) for name in ("step", "vocab_size")):
        raise UserError(f"{path} is not a checkpoint of this program; {mend}")
    return state


def newest_good_state(run: Path) -> tuple[dict[str, Any], Path] | None:
    """The newest checkpoint of a run that can be read, with a line about each one that cannot; None if there is none.

    UserError if there are checkpoints, but not one is good.
    """
    candidates = list_steps(run)
    for path in candidates:
        try:
            return open_checkpoint(path), path
        except UserError as error:
            print(f"{error}; trying the one before", flush=True)
    if candidates:
        raise UserError(f"none of the {len(candidates)} checkpoints in {checkpoint_folder(run)} can be read")
    return None


def newest_good_step(run: Path) -> int | None:
    """The step of the newest checkpoint whose checksums fit; None if there is none, or the folder is gone."""
    for path in list_steps(run):
        try:
            open_sharded(path) if path.is_dir() else check_seal(path)
            return step_of(path)
        except (NotSealed, OSError):
            continue
    return None


def load_checkpoint(path: str | Path, which: str = "latest") -> LoadedCheckpoint:
    """Open a run directory's checkpoint, or a .pt file.

    `which`, for a directory: "latest", "best", or a step. UserError if it is not there or cannot be used.
    """
    file = find_checkpoint(Path(path), which)
    state = read_state(file)
    config = from_dict(state["config"], str(file))
    tokenizer = tokenizer_from_metadata(state["tokenizer"])
    rows, tokens = state["vocab_size"], tokenizer.vocab_size
    if rows != max(config.vocab_size, tokens):
        raise UserError(f"{file} is damaged: its vocabulary of {tokens} does not belong to its model of {rows}")
    try:
        model = _restore_model(config, state)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{file} does not hold the model that its configuration describes: it is damaged") from error
    return LoadedCheckpoint(model.eval(), config, tokenizer, int(state["step"]), file)


def _restore_model(config: Config, state: dict[str, Any]) -> GPT:
    # How the run computed its splines may not be possible on this machine, and does not matter here.
    model = GPT(dataclasses.replace(config, kan_impl="auto").model_config(state["vocab_size"]))
    refine_model(model, points_after(config.stages(), state["step"]))
    model.load_state_dict(state["model"])
    return model


def find_checkpoint(path: Path, which: str) -> Path:
    if path.is_file() or is_sharded(path):
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give the directory of a run, or one of its checkpoint files")
    folder = checkpoint_folder(path)
    if which not in ("latest", "best") and not which.isdecimal():
        raise UserError(f"a checkpoint is latest, best or a step; got {which!r}")
    candidates = list(_candidates(path, which))
    if not candidates:
        steps = ", ".join(str(step_of(file)) for file in reversed(list_steps(path)))
        there = f"there are steps {steps}" if steps else "train.py writes one at each evaluation"
        raise UserError(f"{folder} has no checkpoint {which}; {there}")
    return candidates[0]


def _candidates(run: Path, which: str) -> Iterator[Path]:
    """Files that may serve, the best first: a run has no best one yet before its first evaluation."""
    steps, best = list_steps(run), checkpoint_folder(run) / "best.pt"
    best = best if best.is_file() else best_sharded(run) or best
    if which == "latest":
        wanted = [*steps, best]
    else:
        wanted = [best, *steps] if which == "best" else [path for path in steps if step_of(path) == int(which)]
    yield from (path for path in wanted if path.exists())


def is_sharded(path: Path) -> bool:
    return (path / "index.json").is_file()


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))
