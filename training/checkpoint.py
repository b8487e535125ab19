"""Checkpoints: written whole or not at all, read without running anything that is in them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from model import GPT
from training.config import Config, from_dict
from training.errors import UserError
from training.refinement import points_after, refine_model
from training.tokenizer import Tokenizer, tokenizer_from_metadata

FORMAT = "splinegpt-checkpoint-1"
FIELDS = {"format", "step", "config", "tokenizer", "data_fingerprint", "vocab_size", "model", "best_val_loss"}
TRAINING_FIELDS = {"optimizer", "scaler", "rng", "elapsed_s", "wandb_id"}


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
    """The numbered checkpoints of a run, newest first."""
    found = [path for path in checkpoint_folder(run).glob("step_*.pt") if re.fullmatch(r"step_\d+\.pt", path.name)]
    return sorted(found, key=_step_of, reverse=True)


def save_checkpoint(run: Path, state: dict[str, Any], is_best: bool, keep: int) -> Path:
    """Write `state` as the run's newest checkpoint and delete all but the newest `keep`.

    The file is written under a temporary name, flushed to the disk and renamed, so a crash or a full disk leaves
    the earlier checkpoints as they were. Raises OSError when it cannot be written.
    """
    path = step_path(run, state["step"])
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    _write_atomically({"format": FORMAT, **state}, path)
    if is_best:
        _link_atomically(path, path.with_name("best.pt"))
    earlier = [old for old in list_steps(run) if _step_of(old) <= state["step"]]  # a later one may be a damaged one
    for old in earlier[keep:]:
        old.unlink(missing_ok=True)
    return path


def _write_atomically(state: dict[str, Any], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        _replace(temporary, path)
    except RuntimeError as error:  # how torch.save reports a write that failed
        raise OSError(str(error).split("\n")[0]) from error
    finally:
        temporary.unlink(missing_ok=True)


def _link_atomically(path: Path, link: Path) -> None:
    """Let `link` be a second name of the file at `path` (a copy where the file system has no links)."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        _replace(temporary, link)
    finally:
        temporary.unlink(missing_ok=True)


def _replace(source: Path, target: Path) -> None:
    os.replace(source, target)
    if os.name == "posix":  # the rename itself is on the disk only once the directory is
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _remove_leftovers(folder: Path) -> None:
    """Delete temporary files that a killed process left behind."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def read_state(path: Path) -> dict[str, Any]:
    """The mapping in a checkpoint file, checked; nothing in the file is executed. UserError if it is not one."""
    mend = "use a checkpoint that train.py wrote, or another one of the run"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}; {mend}") from None
    except Exception as error:  # unpicklers fail in as many ways as files can be damaged
        if isinstance(error, MemoryError):
            raise
        raise UserError(f"{path} is damaged or not a checkpoint; {mend}") from error
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
            state = read_state(path)
            if state.keys() >= TRAINING_FIELDS:
                return state, path
            print(f"{path} has no optimizer state; trying the one before", flush=True)
        except UserError as error:
            print(f"{error}; trying the one before", flush=True)
    if candidates:
        raise UserError(f"none of the {len(candidates)} checkpoints in {checkpoint_folder(run)} can be read")
    return None


def load_checkpoint(path: str | Path, which: str = "latest") -> LoadedCheckpoint:
    """Open a run directory's checkpoint, or a .pt file.

    `which`, for a directory: "latest", "best", or a step. UserError if it is not there or cannot be used.
    """
    file = _find_file(Path(path), which)
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
    model = GPT(replace(config, kan_impl="auto").model_config(state["vocab_size"]))
    refine_model(model, points_after(config.stages(), state["step"]))
    model.load_state_dict(state["model"])
    return model


def _find_file(path: Path, which: str) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give the directory of a run, or one of its checkpoint files")
    folder = checkpoint_folder(path)
    if which not in ("latest", "best") and not which.isdecimal():
        raise UserError(f"a checkpoint is latest, best or a step; got {which!r}")
    candidates = list(_candidates(path, which))
    if not candidates:
        steps = ", ".join(str(_step_of(file)) for file in reversed(list_steps(path)))
        there = f"there are steps {steps}" if steps else "train.py writes one at each evaluation"
        raise UserError(f"{folder} has no checkpoint {which}; {there}")
    return candidates[0]


def _candidates(run: Path, which: str) -> Iterator[Path]:
    """Files that may serve, the best first: a run has no best one yet before its first evaluation."""
    best = checkpoint_folder(run) / "best.pt"
    if which == "latest":
        wanted = [*list_steps(run), best]
    else:
        wanted = [best, *list_steps(run)] if which == "best" else [step_path(run, int(which))]
    yield from (path for path in wanted if path.is_file())


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def training_state(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    config: Config,
    tokenizer: Tokenizer,
    data_fingerprint: str,
    step: int,
    best_val_loss: float,
    elapsed_s: float,
    wandb_id: str | None,
) -> dict[str, Any]:
    """Everything a run needs to go on as if it had not stopped, in types that `weights_only` loading takes."""
    rng = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(device)
    return {
        "step": step,
        "config": asdict(config),
        "tokenizer": tokenizer.to_metadata(),
        "data_fingerprint": data_fingerprint,
        "vocab_size": model.config.vocab_size,
        "model": model.state_dict(),
        "best_val_loss": best_val_loss,
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "rng": rng,
        "elapsed_s": elapsed_s,
        "wandb_id": wandb_id,
    }
