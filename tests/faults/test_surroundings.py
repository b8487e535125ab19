"""A run survives its surroundings: a vanished directory, changed data, numbers that overflow, a tracker that hangs."""

import math
import os
import shutil
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from model import GPT
from tests.runs import (
    STEPS,
    assert_one_sentence,
    call,
    checkpoint_names,
    make_dataset,
    options,
    read_metrics,
    resume_options,
    train_losses,
    train_until,
)
from training import tracker
from training.checkpoint import load_checkpoint, read_state
from training.checkpoint_files import step_path

SKIP = {"max_skipped_steps": 3, "log_interval": 1}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "words")


def after_step(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], object]) -> None:
    """Run `action` once, after step `number`."""
    step = train.Trainer.step

    def step_and_act(trainer: train.Trainer) -> None:
        step(trainer)
        if trainer.progress.step == number:
            action()

    monkeypatch.setattr(train.Trainer, "step", step_and_act)


def test_a_directory_that_vanishes_is_made_anew_and_nothing_is_lost(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    after_step(monkeypatch, 6, lambda: shutil.rmtree(run))
    result = call(train.main, *options(dataset, run))
    assert result.code == 0 and f"{run} had vanished at step 8" in result.out
    assert load_checkpoint(run).step == STEPS and checkpoint_names(run)[-2:] == ["step_000008.pt", "step_000012.pt"]
    assert [record["step"] for record in read_metrics(run)] == [10, 12]
    assert call(train.main, *resume_options(run), "--max_iters=14").code == 0


def test_a_directory_that_cannot_be_made_anew_ends_the_run_with_one_sentence(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def replace_by_file() -> None:
        shutil.rmtree(run)
        run.write_text("in the way")

    after_step(monkeypatch, 6, replace_by_file)
    assert_one_sentence(call(train.main, *options(dataset, run)), str(run))


def cut(path: Path) -> None:
    os.truncate(path, 100)


def overwrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"\1\0")
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [cut, overwrite])
@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_data_that_change_under_a_run_end_it_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], name: str
) -> None:
    data, run = make_dataset(tmp_path / "data"), tmp_path / "run"
    whole = (data / name).read_bytes()
    with monkeypatch.context() as patch:
        after_step(patch, 6, lambda: change(data / name))
        result = call(train.main, *options(data, run))
    assert_one_sentence(result, str(data / name), "was changed", "--resume True")
    if name == "train.bin":
        assert "the checkpoint of step 4 is good" in result.err
    assert_one_sentence(call(train.main, *resume_options(run)), str(data / name))
    (data / name).write_bytes(whole)
    train_until(resume_options(run))
    train_until(options(data, tmp_path / "whole"))
    assert train_losses(run) == train_losses(tmp_path / "whole")


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], gradients_only: bool = False) -> None:
    """Make the loss, or only its gradient, not finite in these training steps."""
    forward, calls = GPT.forward, 0

    def poisoned(self: GPT, tokens: Any, targets: Any = None, cache: Any = None) -> Any:
        nonlocal calls
        logits, loss = forward(self, tokens, targets, cache)
        calls += self.training
        if self.training and calls in steps:
            if gradients_only:
                loss.register_hook(lambda gradient: gradient * math.inf)
            else:
                loss = loss * math.nan
        return logits, loss

    monkeypatch.setattr(GPT, "forward", poisoned)


@pytest.mark.parametrize("gradients_only", [False, True])
def test_steps_that_are_not_finite_are_skipped_if_wanted(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, gradients_only: bool
) -> None:
    poison(monkeypatch, {4, 5, 8}, gradients_only)
    result = call(train.main, *options(dataset, tmp_path, eval_interval=1, keep_checkpoints=20, **SKIP))
    assert result.code == 0 and [line[:7] for line in result.out.splitlines() if "skipped (" in line] == [
        "step 4 ",
        "step 5 ",
        "step 8 ",
    ]
    assert f"skipped (2 of at most {SKIP['max_skipped_steps']} in a row)" in result.out
    states = {step: read_state(step_path(tmp_path, step)) for step in range(1, STEPS + 1)}
    for step in range(2, STEPS + 1):
        before, after = states[step - 1]["model"], states[step]["model"]
        unchanged = all(torch.equal(before[name], after[name]) for name in before)
        assert unchanged == (step in {4, 5, 8}), step
    assert [states[step]["skipped_steps"] for step in (3, 4, 5, 6, 8, 9)] == [0, 1, 2, 0, 1, 0]


def test_too_many_skipped_steps_in_a_row_end_the_run_also_across_a_resume(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        poison(patch, set(range(5, 100)))
        result = call(train.main, *options(dataset, tmp_path / "run", **SKIP))
    assert_one_sentence(result, "step 8 ", "3 skipped steps in a row", "the checkpoint of step 4 is good")
    with monkeypatch.context() as patch:
        poison(patch, {5, 6})
        train_until(options(dataset, tmp_path / "other", **SKIP), 6)
    poison(monkeypatch, set(range(1, 100)))
    result = call(train.main, *resume_options(tmp_path / "other"))
    assert_one_sentence(result, "step 8 ", "3 skipped steps in a row", "the checkpoint of step 6 is good")


class Hanging:
    """A stand-in for W&B whose network is gone."""

    id = "hanging"

    def __init__(self, where: str) -> None:
        self.where = where

    def log(self, *_: object, **__: object) -> None:
        self.hang("log")

    def finish(self) -> None:
        self.hang("finish")

    def hang(self, place: str) -> None:
        if place == self.where:
            time.sleep(3600)


def test_a_resumed_run_continues_its_own_curve(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[str, str | None]] = []
    logged: list[int] = []

    def init(**options: Any) -> Any:
        begun.append((options["id"], options["resume"]))
        return types.SimpleNamespace(log=lambda _, step: logged.append(step), finish=lambda: None)

    fake = types.SimpleNamespace(init=init, Settings=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    train_until(options(dataset, tmp_path, wandb="online"), 6)
    train_until(resume_options(tmp_path))
    assert len(begun) == 2 and begun[0] == begun[1] and begun[0][1] == "allow"
    assert logged == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_hangs_delays_nothing(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def init(**_: object) -> Hanging:
        run = Hanging(where)
        run.hang("init")
        return run

    fake = types.SimpleNamespace(init=init, Settings=lambda **_: None, Image=lambda path: path)
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(tracker, "FINISH_TIMEOUT_S", 0.1)
    monkeypatch.setattr(tracker, "WAITING_RECORDS", 4)
    left: list[int] = []
    monkeypatch.setattr(train, "end_at_once", left.append)
    start = time.monotonic()
    result = call(train.main, *options(dataset, tmp_path, wandb="online", log_interval=1))
    assert result.code == 0 and f"done: {STEPS} steps" in result.out and time.monotonic() - start < 30
    assert "wandb:" in result.out and len(read_metrics(tmp_path)) == STEPS
    assert left == [0], "a hanging thread must not keep the process from ending"


@pytest.mark.parametrize(("batch", "advice"), [(4, "--batch_size 2 --gradient_accumulation_steps 2"), (3, "smaller")])
def test_a_device_without_enough_memory_ends_the_run_with_advice(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, batch: int, advice: str
) -> None:
    take = train.Trainer.step

    def step(trainer: train.Trainer) -> None:
        if trainer.progress.step == 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        take(trainer)

    monkeypatch.setattr(train.Trainer, "step", step)
    result = call(train.main, *options(dataset, tmp_path / "run", batch_size=batch))
    assert_one_sentence(result, "ran out of memory in step 6", "the checkpoint of step 4 is good", advice)
