"""Checkpoints, read: find the one that is wanted, check it, and load its model. Nothing in a checkpoint is executed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from corpus.tokenizer import Tokenizer, tokenizer_from_metadata
from model import GPT
from training.checkpoint_files import (
    best_path,
    checkpoint_file,
    checkpoint_folder,
    is_sharded,
    list_steps,
    step_of,
)
from training.config import Config, from_dict
from training.refinement import points_after, refine_model
from training.sealed_file import FORMAT, NotSealed

FIELDS = {"format", "step", "config", "tokenizer", "data_fingerprint", "vocab_size", "model", "best_val_loss"}
TRAINING_FIELDS = {"optimizer", "scaler", "elapsed_s", "wandb_id", "skipped_steps"}


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint opened for use: the model in eval mode on the CPU, its configuration and its tokenizer."""

    model: GPT
    config: Config
    tokenizer: Tokenizer
    step: int
    path: Path


def load_checkpoint(path: str | Path, which: str = "latest") -> LoadedCheckpoint:
    """Load a checkpoint file, or the checkpoint of a run directory that `which` names: "latest", "best", or a step.

    UserError if there is none or it cannot be used.
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
    # The run's backend may not work on this machine, and any other gives the same numbers.
    model = GPT(dataclasses.replace(config, kan_impl="auto").model_config(state["vocab_size"]))
    refine_model(model, points_after(config.stages, state["step"]))
    model.load_state_dict(state["model"])
    return model


def read_state(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, verified, with all tensors. UserError if it is not one of this program."""
    return _read(path, checkpoint_file(path).read)


def open_checkpoint(path: Path) -> dict[str, Any]:
    """The state of a checkpoint to resume from, verified. "model" and "optimizer" are None if it is sharded.

    UserError if it is not one of this program, or has no optimizer state.
    """
    state = _read(path, checkpoint_file(path).read_to_resume)
    if not state.keys() >= TRAINING_FIELDS:
        raise UserError(f"{path} has no optimizer state")
    return state


def _read(path: Path, read: Callable[[], Any]) -> dict[str, Any]:
    advice = "use a checkpoint that train.py wrote, or another one of the run"
    try:
        state = read()
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}; {advice}") from None
    except NotSealed as error:
        raise UserError(f"{path} is damaged or not a checkpoint ({error}); {advice}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {advice}") from error
    is_ours = isinstance(state, dict) and state.get("format") == FORMAT and state.keys() >= FIELDS
    if not is_ours or not all(isinstance(state[name], int) for name in ("step", "vocab_size")):
        raise UserError(f"{path} is not a checkpoint of this program; {advice}")
    return state


def newest_good_state(run: Path) -> tuple[dict[str, Any], Path] | None:
    """The newest checkpoint of a run that can be read, and its path; None if the run has no checkpoints.

    Prints a line about each newer one that cannot be read. UserError if none of them can.
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


def find_checkpoint(path: Path, which: str) -> Path:
    """`path` itself if it is a checkpoint, else the one of this run directory that `which` names. UserError."""
    if path.is_file() or is_sharded(path):
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give the directory of a run, or one of its checkpoint files")
    folder = checkpoint_folder(path)
    if which not in ("latest", "best") and not which.isdecimal():
        raise UserError(f"a checkpoint is latest, best or a step; got {which!r}")
    found = next(_candidates(path, which), None)
    if found is None:
        steps = ", ".join(str(step_of(file)) for file in reversed(list_steps(path)))
        there = f"there are steps {steps}" if steps else "train.py writes one at each evaluation"
        raise UserError(f"{folder} has no checkpoint {which}; {there}")
    return found


def _candidates(run: Path, which: str) -> Iterator[Path]:
    """Checkpoints that may serve, the fittest first. Before its first evaluation a run has no best one."""
    steps = list_steps(run)
    if which not in ("latest", "best"):
        yield from (path for path in steps if step_of(path) == int(which))
        return
    best = best_path(run)
    others = [best] if best is not None else []
    yield from [*others, *steps] if which == "best" else [*steps, *others]
