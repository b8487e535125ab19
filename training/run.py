"""The directory of a run: a new one or one to resume, with its resolved configuration and newest checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import remove_leftovers, write_atomically
from common.folder_lock import FolderLock, is_unused
from corpus.dataset import find_dataset
from model import GPTConfig
from training.checkpoint import has_checkpoints, newest_good_state, open_checkpoint
from training.config import Config, from_dict, parse, save
from training.distributed import ALONE, World
from training.init_from import Source, read_source

CONFIG_FILE = "config.toml"
MAY_CHANGE = {"kan_impl", "dropout"}  # of the model's options: they leave the parameters as they are
MUST_STAY = {field.name for field in dataclasses.fields(GPTConfig)} - MAY_CHANGE | {"seed", "kan_refine", "optimizer"}


@dataclass(frozen=True)
class Run:
    """Where a run lives, its configuration, and the checkpoint to go on from: its content (without model and optimizer
    if it is a sharded one) and its path, None to start from the beginning."""

    directory: Path
    config: Config
    state: dict[str, Any] | None
    checkpoint: Path | None = None
    source: Source | None = None
    """The trained model that a run begins with, if it begins with one."""
    lock: FolderLock | None = None
    """Keeps other processes from training there; on the main process alone."""

    def is_there(self) -> bool:
        return (self.directory / CONFIG_FILE).is_file()

    def create(self) -> None:
        """Make the directory and keep the resolved configuration in it: `--out_dir DIR --resume True` then suffices."""
        with _writing_in(self.directory):
            if self.lock is not None and not self.lock.renew():
                raise UserError(f"{self.directory} is in use by {self.lock.holder()} by now; choose another --out_dir")
            self.directory.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.directory, *self.directory.glob("splines/step_*"))
            resolved = dataclasses.replace(self.config, out_dir=str(self.directory), resume=False)
            write_atomically(self.directory / CONFIG_FILE, lambda temporary: save(resolved, temporary))


def open_run(arguments: Sequence[str], world: World = ALONE) -> Run:
    """Parse the command line, find the run's directory and lock it; nothing is written yet. Raises UserError.

    The main process decides where the run lives and from which checkpoint it goes on, the others follow.
    """
    config, file = parse(arguments)
    name = f"{file.stem if file else Path(config.dataset).name}-{config.ffn}"
    run = None
    with world.together():
        if world.is_main:
            run = _resume(arguments, config, name) if config.resume else _start(config, name)
    return _follow(run, world)


def _follow(run: Run | None, world: World) -> Run:
    """The main process's run; the others open it where it says."""
    description = None
    if run is not None:
        checkpoint = str(run.checkpoint) if run.checkpoint else None
        description = {"directory": str(run.directory), "config": dataclasses.asdict(run.config), "from": checkpoint}
    description = world.broadcast(description)
    with world.together():
        if run is None:
            path = Path(description["from"]) if description["from"] else None
            config = from_dict(description["config"], "the main process")
            run = Run(Path(description["directory"]), config, open_checkpoint(path) if path else None, path)
    assert run is not None
    return run


def _start(config: Config, name: str) -> Run:
    lock = _lock(Path(config.out_dir)) if config.out_dir else _lock_new(name)
    with _kept_if_all_is_well(lock):
        if has_checkpoints(lock.folder):
            raise UserError(
                f"{lock.folder} already holds a run; go on with it by --resume True, or choose another --out_dir"
            )
        return dataclasses.replace(_begin(lock.folder, config), lock=lock)


def _lock(directory: Path) -> FolderLock:
    """UserError if another process trains there, or nothing can be written there."""
    lock = FolderLock(directory)
    with _writing_in(directory):
        taken = lock.take()
    if not taken:
        raise UserError(
            f"{directory} is in use by {lock.holder()}, which trains there; let that end, or choose another --out_dir"
        )
    return lock


def _lock_new(name: str) -> FolderLock:
    """On the first numbered directory that nobody uses. Without locks that is one that only we can have made."""
    for path in _numbered(name):
        lock = FolderLock(path)
        with _writing_in(path):
            if is_unused(path) and lock.take() and is_unused(path) and (lock.is_sure or lock.made):
                return lock
        lock.release()
    raise AssertionError  # the numbers do not end


@contextlib.contextmanager
def _writing_in(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{directory} cannot be written ({reason}); choose another --out_dir") from error


@contextlib.contextmanager
def _kept_if_all_is_well(lock: FolderLock) -> Iterator[None]:
    try:
        yield
    except BaseException:
        lock.release()
        raise


def _begin(directory: Path, config: Config) -> Run:
    """A run from its first step on: of a new model, or of its source, whose architecture it takes over."""
    if not config.init_from:
        return Run(directory, config, None)
    source = read_source(config.init_from)
    return Run(directory, source.configure(config), None, source=source)


def _numbered(name: str) -> Iterator[Path]:
    yield Path("runs") / name
    number = 2
    while True:
        yield Path("runs") / f"{name}-{number}"
        number += 1


def _resume(arguments: Sequence[str], config: Config, name: str) -> Run:
    directory = Path(config.out_dir) if config.out_dir else _last_existing(name)
    if not (directory / CONFIG_FILE).is_file():
        raise UserError(f"{directory} holds no run to resume; name one with --out_dir, or leave --resume out")
    lock = _lock(directory)
    with _kept_if_all_is_well(lock):
        config, _ = parse(arguments, saved=directory / CONFIG_FILE)
        state = newest_good_state(directory)
        if state is None:
            print(f"{directory} has no checkpoint yet: starting from step 0", flush=True)
            return dataclasses.replace(_begin(directory, config), lock=lock)
        _refuse_contradictions(config, state[0]["config"], state[1])
        _find_data_again(directory, config, state[0]["config"])
        return Run(directory, config, *state, lock=lock)


def _last_existing(name: str) -> Path:
    directory = Path("runs") / name
    for path in _numbered(name):
        if not path.exists():
            return directory
        if not is_unused(path):
            directory = path
    raise AssertionError  # the numbers do not end


def _refuse_contradictions(config: Config, saved: dict[str, Any], path: Path) -> None:
    wanted = dataclasses.asdict(config)
    saved = dataclasses.asdict(from_dict(saved, str(path)))  # an option newer than the checkpoint was at its default
    different = sorted(name for name in wanted if wanted[name] != saved[name])
    refused = [f"{name}={wanted[name]} (it has {saved[name]})" for name in different if name in MUST_STAY]
    if refused:
        raise UserError(
            f"{path} cannot go on with {', '.join(refused)}; leave these options out to keep the run's own, "
            f"or start a new run in another --out_dir"
        )
    changed = [f"{name} {saved[name]} → {wanted[name]}" for name in different if name not in ("out_dir", "resume")]
    if changed:
        print(f"resuming with other options than before: {', '.join(changed)}", flush=True)


def _find_data_again(directory: Path, config: Config, saved: dict[str, Any]) -> None:
    """UserError if the dataset of a run is not where it was, and no other place of it is given."""
    try:
        find_dataset(config.dataset)
    except UserError as error:
        if config.dataset != saved["dataset"]:
            raise
        raise UserError(
            f"{directory} was trained on {config.dataset}, which is not there; say by --dataset where these data are "
            f"now (they are recognized by their content)"
        ) from error
