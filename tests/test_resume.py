"""A run that was stopped and resumed equals the uninterrupted run, bit for bit."""

import contextlib
import dataclasses
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from tests.runs import (
    ROOT,
    STEPS,
    assert_one_sentence,
    call,
    checkpoint_names,
    command,
    make_dataset,
    options,
    read_metrics,
    resume_options,
    train_losses,
    train_until,
)
from training.checkpoint import load_checkpoint, read_state, step_path
from training.config import parse

HARD = {"gradient_accumulation_steps": 2, "dropout": 0.1, "batch_size": 2, "pair_rows": 50}
ENDLESS = {"max_iters": 1_000_000, "eval_interval": 4, "keep_checkpoints": 2, "log_interval": 1, "sample_tokens": 0}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "words")


def assert_identical(first: Any, second: Any, where: str = "state") -> None:
    """Check that states are equal bit for bit, including what is nested in containers."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert list(first) == list(second), where
        for key in first:
            assert_identical(first[key], second[key], f"{where}[{key!r}]")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_identical(a, b, f"{where}[{index}]")
    else:
        assert first == second, where


def outcome(run: Path, step: int = STEPS) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The state and the metrics that interruptions must not change: all except timings, paths and how the run began."""
    state = read_state(step_path(run, step))
    del state["elapsed_s"], state["config"]["out_dir"], state["config"]["resume"]
    timings = {"tokens_per_second", "step_ms", "elapsed_s"}
    return state, [{k: v for k, v in record.items() if k not in timings} for record in read_metrics(run)]


@pytest.mark.parametrize("ffn", ["splines", "mlp"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, dataset: Path, ffn: str) -> None:
    train_until(options(dataset, tmp_path / "whole", ffn=ffn, **HARD))
    state, metrics = outcome(tmp_path / "whole")
    assert [record["step"] for record in metrics] == [2, 4, 6, 8, 10, 12]
    for stop in (1, 4, 7, 11):
        run = tmp_path / f"stopped_{stop}"
        train_until(options(dataset, run, ffn=ffn, **HARD), stop)
        assert load_checkpoint(run).step == stop
        torch.manual_seed(stop)  # the state of the generators must come from the checkpoint
        resumed = train_until(resume_options(run))
        assert resumed.progress.step == STEPS
        assert_identical(outcome(run), (state, metrics), f"stopped at {stop}")
        assert load_checkpoint(run, "best").step == load_checkpoint(tmp_path / "whole", "best").step


def test_a_run_stopped_at_every_step_is_the_uninterrupted_one(tmp_path: Path, dataset: Path) -> None:
    train_until(options(dataset, tmp_path / "whole", **HARD))
    run = tmp_path / "stopped"
    train_until(options(dataset, run, **HARD), 1)
    for stop in range(2, STEPS + 1):
        train_until(resume_options(run), stop)
    assert_identical(outcome(run), outcome(tmp_path / "whole"))


def test_a_resume_takes_the_runs_own_configuration(tmp_path: Path, dataset: Path) -> None:
    first = train_until(options(dataset, tmp_path, learning_rate=0.0123, beta2=0.97), 5)
    resumed = train_until(resume_options(tmp_path))
    assert dataclasses.replace(resumed.config, resume=False) == first.config
    assert parse([str(tmp_path / "config.toml")])[0] == first.config


def test_a_finished_run_can_be_prolonged(tmp_path: Path, dataset: Path) -> None:
    steady = {"schedule": "constant", **HARD}
    train_until(options(dataset, tmp_path / "whole", max_iters=16, **steady))
    train_until(options(dataset, tmp_path / "prolonged", **steady))
    before = step_path(tmp_path / "prolonged", STEPS).read_bytes()
    assert call(train.main, *resume_options(tmp_path / "prolonged")).code == 0
    assert step_path(tmp_path / "prolonged", STEPS).read_bytes() == before, "there was nothing left to do"
    train_until([*resume_options(tmp_path / "prolonged"), "--max_iters", "16"])
    assert_identical(outcome(tmp_path / "prolonged", 16), outcome(tmp_path / "whole", 16))


def test_metrics_after_the_checkpoint_and_half_a_line_are_dropped(tmp_path: Path, dataset: Path) -> None:
    """After a kill the newest checkpoint may be older than the last lines of metrics.jsonl."""
    train_until(options(dataset, tmp_path / "whole"))
    run = tmp_path / "killed"
    train_until(options(dataset, run), 8)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "train_loss": 77.0}\n\n{"step": 12, "train_lo')
    train_until(resume_options(run))
    assert_identical(outcome(run), outcome(tmp_path / "whole"))


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(tmp_path: Path, dataset: Path) -> None:
    train_until(options(dataset, tmp_path / "whole"))
    run = tmp_path / "damaged"
    train_until(options(dataset, run), 9)
    newest = step_path(run, 9)
    newest.write_bytes(newest.read_bytes()[:5000])
    result = call(train.main, *resume_options(run))
    assert result.code == 0 and str(newest) in result.out and "resumed at step 8" in result.out
    assert_identical(outcome(run), outcome(tmp_path / "whole"))


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(tmp_path: Path, dataset: Path) -> None:
    train_until(options(dataset, tmp_path / "whole"))
    run = tmp_path / "killed"
    train_until(options(dataset, run), 3)
    step_path(run, 3).unlink()
    result = call(train.main, *resume_options(run))
    assert result.code == 0 and "starting from step 0" in result.out
    assert_identical(outcome(run), outcome(tmp_path / "whole"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_lets_the_step_finish_and_be_saved(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    step = train.Trainer.step

    def interrupted_step(trainer: train.Trainer) -> None:
        if trainer.progress.step == 6:
            signal.raise_signal(number)
        step(trainer)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "step", interrupted_step)
        result = call(train.main, *options(dataset, tmp_path / "run", **HARD))
    assert result.code == code
    assert f"stopped by {number.name} at step 7" in result.out
    assert f"--out_dir {tmp_path / 'run'} --resume True" in result.out
    assert signal.getsignal(number) is before
    assert load_checkpoint(tmp_path / "run").step == 7
    assert call(train.main, *resume_options(tmp_path / "run")).code == 0
    train_until(options(dataset, tmp_path / "whole", **HARD))
    assert_identical(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))


@contextlib.contextmanager
def endless_run(dataset: Path, run: Path, **changes: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that runs train.py and has written its first checkpoints."""
    arguments = command("train.py", *options(dataset, run, **{**ENDLESS, **changes}))
    with open(run.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 90
        while not (run / "checkpoints").is_dir() or "step_" not in "".join(checkpoint_names(run)):
            assert process.poll() is None and time.monotonic() < deadline, run.with_suffix(".log").read_text()
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()


def assert_resumes(run: Path, at_least: int) -> None:
    """Resume the run for a few steps, and check that each logged step has exactly one line and no file is left over."""
    end = load_checkpoint(run).step + 6
    assert call(train.main, *resume_options(run), "--max_iters", end).code == 0
    steps = [record["step"] for record in read_metrics(run)]
    assert steps == list(range(1, end + 1)) and end >= at_least
    assert all(name.endswith(".pt") and not name.startswith(".") for name in checkpoint_names(run))


def test_a_terminated_process_saves_its_step_and_resumes(tmp_path: Path, dataset: Path) -> None:
    run = tmp_path / "run"
    with endless_run(dataset, run) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    said = run.with_suffix(".log").read_text()
    step = load_checkpoint(run).step
    assert f"stopped by SIGTERM at step {step}" in said and "Traceback" not in said
    assert max(train_losses(run)) == step
    assert_resumes(run, step)


def test_a_killed_process_resumes(tmp_path: Path, dataset: Path) -> None:
    run = tmp_path / "run"
    with endless_run(dataset, run, eval_interval=3) as process:
        time.sleep(0.1)
        process.kill()
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert_resumes(run, 3)


TWO_SIGNALS = """
import signal, time, train
def endless_step(trainer):
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    time.sleep(60)
train.Trainer.step = endless_step
train.main()
"""


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path, dataset: Path) -> None:
    """Send the signal within a step that would never end."""
    arguments = [sys.executable, "-c", TWO_SIGNALS, *options(dataset, tmp_path / "run")]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 143 and "Traceback" not in done.stderr
    assert "finishing the step" in done.stderr and "stopped by" not in done.stdout
    assert not (tmp_path / "run/checkpoints").exists()


def test_options_of_the_optimizer_can_be_changed_on_resuming(tmp_path: Path, dataset: Path) -> None:
    call(train.main, *options(dataset, tmp_path / "run", max_iters=4))
    changed = [*resume_options(tmp_path / "run"), "--max_iters=8", "--weight_decay=0", "--beta2=0.9"]
    call(train.main, *changed)
    groups = torch.load(tmp_path / "run/checkpoints/step_000008.pt", weights_only=True)["optimizer"]["param_groups"]
    assert all(group["weight_decay"] == 0 and tuple(group["betas"]) == (0.9, 0.9) for group in groups)


def test_a_run_goes_on_where_its_data_have_moved_to(tmp_path: Path) -> None:
    here, there, run = tmp_path / "here", tmp_path / "there", tmp_path / "run"
    train_until(options(make_dataset(here), tmp_path / "whole"))
    train_until(options(here, run), 6)
    here.rename(there)
    assert_one_sentence(call(train.main, *resume_options(run)), str(here), "is not there", "--dataset")
    other = make_dataset(tmp_path / "other", "other words " * 200)
    result = call(train.main, *resume_options(run), f"--dataset={other}")
    assert_one_sentence(result, str(other), "is not the data that")
    assert call(train.main, *resume_options(run), f"--dataset={there}").code == 0
    whole, moved = outcome(tmp_path / "whole"), outcome(run)
    del whole[0]["config"]["dataset"], moved[0]["config"]["dataset"]
    assert_identical(moved, whole)


def test_another_optimizer_is_refused_by_its_name(tmp_path: Path, dataset: Path) -> None:
    train_until(options(dataset, tmp_path), 4)
    result = call(train.main, *resume_options(tmp_path), "--optimizer=muon")
    assert_one_sentence(result, "cannot go on with optimizer=muon (it has adamw)", "leave these options out")
