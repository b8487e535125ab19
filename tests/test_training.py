"""A training run learns, measures correctly, keeps its records, and stops before its parameters are spoilt."""

import math
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train
from backends import BACKENDS
from model import GPT
from splines.records import SplineRecords
from tests.runs import (
    STEPS,
    assert_one_sentence,
    call,
    checkpoint_names,
    make_dataset,
    make_trainer,
    options,
    read_metrics,
    train_losses,
    train_until,
)
from tests.wandb_file import read_history
from training import spline_watch
from training.checkpoint import load_checkpoint, read_state
from training.config import parse
from training.metrics import Metrics
from training.progress import Progress, Stopwatch, progress_line

LINE = re.compile(
    r"step (\d+)/(\d+) (\d+)% \| loss \d+\.\d{3}( \| val \d+\.\d{3}\*?)? \| lr \d\.\de[+-]\d\d"
    r"( \| \d+(\.\d[kM])? tok/s \| \d+(\.\d)? ms \| eta (\d+:)?\d\d:\d\d)?"
)
KEYS = ["step", "train_loss", "val_loss", "learning_rate", "grad_norm", "tokens_per_second", "step_ms", "elapsed_s"]
EVERY_STEP = {"log_interval": 1}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "words")


def losses(dataset: Path, out_dir: Path, **changes: Any) -> list[float]:
    """The training loss of every step."""
    train_until(options(dataset, out_dir, **{**EVERY_STEP, **changes}))
    found = train_losses(out_dir)
    assert list(found) == list(range(1, len(found) + 1))
    return list(found.values())


@pytest.fixture(scope="module")
def baseline(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run whose splines start as random lines, so that they matter from the first step on."""
    return losses(dataset, tmp_path_factory.mktemp("runs") / "baseline", kan_init="random_normal")


@pytest.mark.machine
@pytest.mark.parametrize("impl", BACKENDS)
def test_every_backend_gives_the_same_loss_curve(
    tmp_path: Path, dataset: Path, baseline: list[float], impl: str
) -> None:
    found = losses(dataset, tmp_path, kan_impl=impl, kan_init="random_normal")
    assert found == pytest.approx(baseline, rel=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("impl", ["triton", "dense"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_gives_the_same_loss_curve(
    tmp_path: Path, dataset: Path, baseline: list[float], impl: str, compiled: bool
) -> None:
    changes = {"device": "cuda", "kan_impl": impl, "kan_init": "random_normal", "compile": compiled}
    exact = losses(dataset, tmp_path / "float32", dtype="float32", **changes)
    assert exact == pytest.approx(baseline, rel=5e-3)  # products in TF32
    narrow = losses(dataset, tmp_path / "bfloat16", dtype="bfloat16", **changes)
    assert narrow == pytest.approx(baseline, rel=3e-2)


def test_accumulated_gradients_are_those_of_the_larger_batch(tmp_path: Path, dataset: Path) -> None:
    whole = losses(dataset, tmp_path / "whole", batch_size=8)
    parts = losses(dataset, tmp_path / "parts", batch_size=4, gradient_accumulation_steps=2)
    assert parts == pytest.approx(whole, rel=1e-5)
    norms = [[record["grad_norm"] for record in read_metrics(tmp_path / name)] for name in ("whole", "parts")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_evaluation_does_not_disturb_training(tmp_path: Path, dataset: Path) -> None:
    noisy = {"dropout": 0.1}
    often = losses(dataset, tmp_path / "often", eval_interval=4, **noisy)
    seldom = losses(dataset, tmp_path / "seldom", eval_interval=6, eval_iters=0, sample_tokens=30, **noisy)
    never = losses(dataset, tmp_path / "never", eval_interval=100, sample_tokens=0, **noisy)
    assert often == seldom == never


def test_a_seed_means_one_run(tmp_path: Path, dataset: Path) -> None:
    first, again, other = (losses(dataset, tmp_path / f"{i}", seed=seed) for i, seed in enumerate([3, 3, 4]))
    assert first == again != other


def test_the_loss_is_the_entropy_of_uniform_guessing_at_first_and_falls_on_what_repeats(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", "abcdefghij" * 200)
    found = losses(data, tmp_path / "run", max_iters=120, eval_interval=60, learning_rate=0.01)
    assert found[0] == pytest.approx(math.log(10), abs=0.15)
    assert found[-1] < 0.2 and min(found[-10:]) < min(found[:60])
    assert [record["val_loss"] for record in read_metrics(tmp_path / "run")][-1] < 0.2


def test_the_whole_validation_split_is_scored_when_eval_iters_is_0(tmp_path: Path, dataset: Path) -> None:
    """Compare with a plain loop over all tokens."""
    trainer = make_trainer(options(dataset, tmp_path, eval_iters=0, batch_size=3))
    trainer.train(False)  # type: ignore[arg-type]
    tokens = torch.from_numpy(np.concatenate(trainer.val_stream.shards).astype(np.int64))
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 16):
            x, y = tokens[start : start + 17][None, :-1], tokens[start : start + 17][None, 1:]
            total += float(load_checkpoint(tmp_path).model(x, y)[1]) * y.numel()
    assert read_metrics(tmp_path)[-1]["val_loss"] == pytest.approx(total / (len(tokens) - 1), rel=1e-5)


def assert_saved_parameters_are_finite(run: Path) -> None:
    for name in checkpoint_names(run) if (run / "checkpoints").exists() else []:
        state = read_state(run / "checkpoints" / name)
        assert all(tensor.isfinite().all() for tensor in state["model"].values()), name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("step", [0, 5])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, bad: float, step: int
) -> None:
    forward, calls = GPT.forward, 0

    def failing(self: GPT, tokens: Any, targets: Any = None, cache: Any = None) -> Any:
        nonlocal calls
        logits, loss = forward(self, tokens, targets, cache)
        calls += self.training
        return logits, loss * bad if loss is not None and calls > step else loss

    monkeypatch.setattr(GPT, "forward", failing)
    result = call(train.main, *options(dataset, tmp_path / "run"))
    assert_one_sentence(result, f"step {step + 1} ", str(bad), "--learning_rate")
    if step:
        assert "the checkpoint of step 4 is good" in result.err
        assert load_checkpoint(tmp_path / "run").step == 4
    else:
        assert "nothing was saved" in result.err
    assert_saved_parameters_are_finite(tmp_path / "run")


@pytest.mark.parametrize("rate", [1e10, 1e38, 1e100])
@pytest.mark.parametrize("interval", [1, 4])
def test_a_learning_rate_that_explodes_ends_in_one_sentence_and_saves_only_finite_parameters(
    tmp_path: Path, dataset: Path, rate: float, interval: int
) -> None:
    changes = {"learning_rate": rate, "warmup_iters": 0, "eval_interval": interval, "qk_norm": False, "grad_clip": 0}
    result = call(train.main, *options(dataset, tmp_path / "run", **changes))
    if result.code:
        assert_one_sentence(result, "--learning_rate")
    read_metrics(tmp_path / "run")  # must be strict JSON for any numbers
    assert_saved_parameters_are_finite(tmp_path / "run")


def test_numbers_that_json_lacks_are_written_as_null(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    metrics.write({"step": 1, "train_loss": math.nan, "val_loss": math.inf, "grad_norm": -math.inf})
    metrics.close()
    assert read_metrics(tmp_path) == [{"step": 1, "train_loss": None, "val_loss": None, "grad_norm": None}]


def test_a_validation_loss_that_is_no_number_is_not_the_best(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([math.nan, 1.0, 2.0])
    monkeypatch.setattr(train, "evaluate", lambda *_: next(found))
    train_until(options(dataset, tmp_path))
    best = read_state(tmp_path / "checkpoints/best.pt")
    assert (best["step"], best["best_val_loss"]) == (8, 1.0)


@pytest.fixture(scope="module")
def whole_run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory and the output of a run of the command with everything switched on."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    result = call(train.main, *options(dataset, run, splines=True, report="end", eval_interval=6, wandb="offline"))
    assert result.code == 0 and not result.err
    return run, result.out


def test_metrics_have_all_their_keys(whole_run: tuple[Path, str]) -> None:
    records = read_metrics(whole_run[0])
    assert [record["step"] for record in records] == [2, 4, 6, 8, 10, 12]
    assert all(list(record) == KEYS + ["splines"] * (record["step"] % 6 == 0) for record in records)
    for record in records:
        assert (record["val_loss"] is None) == (record["step"] % 6 != 0)
        numbers = [record[name] for name in KEYS if name != "val_loss"]
        assert all(math.isfinite(value) and value > 0 for value in numbers)
        assert record["tokens_per_second"] == pytest.approx(4 * 16 / (record["step_ms"] / 1000))
    assert sorted(record["elapsed_s"] for record in records) == [record["elapsed_s"] for record in records]


def test_progress_lines_have_their_form(whole_run: tuple[Path, str]) -> None:
    lines = [line for line in whole_run[1].splitlines() if line.startswith("step ")]
    assert len(lines) == 6
    for line, record in zip(lines, read_metrics(whole_run[0]), strict=True):
        match = LINE.fullmatch(line)
        assert match and match[5], line
        assert [int(match[i]) for i in (1, 2, 3)] == [record["step"], STEPS, 100 * record["step"] // STEPS]
        assert f"loss {record['train_loss']:.3f}" in line and f"lr {record['learning_rate']:.1e}" in line
        assert record["val_loss"] is None or f"val {record['val_loss']:.3f}" in line


def test_the_progress_line_is_that_of_the_documentation() -> None:
    assert LINE.fullmatch(
        "step 1200/5000 24% | loss 1.612 | val 1.588* | lr 9.1e-04 | 41.2k tok/s | 398 ms | eta 00:25"
    )
    stopwatch = Stopwatch(16384)
    stopwatch.step_s = 0.398
    expected = "step 1200/5000 24% | loss 1.612 | val 1.588* | lr 9.1e-04 | 41.2k tok/s | 398 ms | eta 25:12"
    progress = Progress(step=1200, train_loss=1.612)
    progress.note_validation(1.588)
    assert progress_line(progress, 5000, True, 9.1e-4, stopwatch) == expected
    never_timed = progress_line(Progress(train_loss=1.612), 0, False, 9.1e-4, Stopwatch(1))
    assert never_timed == "step 0/0 0% | loss 1.612 | lr 9.1e-04"


def test_the_run_directory_holds_all_that_the_run_made(whole_run: tuple[Path, str]) -> None:
    run, out = whole_run
    assert checkpoint_names(run) == ["best.pt", "step_000006.pt", "step_000012.pt"]
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step_000006.txt", "step_000012.txt"]
    assert all(len((run / f"samples/step_{s:06d}.txt").read_text()) == 1 + 8 + 1 for s in (6, 12))
    assert SplineRecords(run).steps() == [0, 6, 12]
    picture = (
        run / "splines/step_000012/overview.png"
    ).read_bytes()  # drawn only at the end, because drawing takes seconds
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 5000
    assert str(run / "splines/step_000012/overview.png") in out
    assert str(run / "report.html") in out and (run / "report.html").stat().st_size > 50_000
    assert parse([str(run / "config.toml")])[0].out_dir == str(run)
    assert not [path for path in run.rglob("*") if path.name.endswith(".tmp")]


def test_wandb_offline_holds_the_metrics(whole_run: tuple[Path, str]) -> None:
    pytest.importorskip("wandb")
    (path,) = whole_run[0].glob("wandb/offline-run-*/*.wandb")
    logged = read_history(path)
    records = read_metrics(whole_run[0])
    assert [record["step"] for record in records] == list(logged)
    for record in records:
        items = logged[record["step"]]
        assert float(items["train_loss"]) == record["train_loss"]
        assert ("val_loss" in items) == (record["val_loss"] is not None)
        assert any(key.startswith("splines") for key in items) == (record["step"] in (6, 12))


class FakeRun:
    id = "fake"

    def __init__(self, failing: set[str]) -> None:
        self.failing = failing

    def log(self, *_: object, **__: object) -> None:
        self._maybe_fail("log")

    def finish(self) -> None:
        self._maybe_fail("finish")

    def _maybe_fail(self, what: str) -> None:
        if what in self.failing:
            raise ConnectionError(f"no network for {what}")


@pytest.mark.parametrize("failing", ["import", "init", "log", "finish"])
def test_whatever_wandb_does_the_run_goes_on(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def init(**_: object) -> FakeRun:
        if failing == "init":
            raise RuntimeError("cannot log in")
        return FakeRun({failing})

    fake = types.SimpleNamespace(init=init, Settings=lambda **_: None, Image=lambda path: path)
    monkeypatch.setitem(sys.modules, "wandb", None if failing == "import" else fake)  # type: ignore[arg-type]
    result = call(train.main, *options(dataset, tmp_path, wandb="online"))
    assert result.code == 0 and not result.err and f"done: {STEPS} steps" in result.out
    assert sum(line.startswith("wandb: off") for line in result.out.splitlines()) == 1
    assert len(read_metrics(tmp_path)) == 6


@pytest.mark.parametrize("failing", ["write_sample", "take_snapshots", "SplinePictures", "write_report"])
def test_a_failing_picture_or_sample_does_not_stop_the_run(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*_: object) -> Any:
        raise ValueError("nothing to see")

    monkeypatch.setattr(train if hasattr(train, failing) else spline_watch, failing, fail)
    result = call(train.main, *options(dataset, tmp_path, splines=failing != "write_sample", report="end"))
    times = {
        "write_sample": 3,
        "take_snapshots": 4,
        "SplinePictures": 1,
        "write_report": 1,
    }  # take_snapshots is also called before the first step
    assert result.code == 0 and result.out.count("ValueError: nothing to see; ") == times[failing]
    assert load_checkpoint(tmp_path).step == STEPS


def test_no_steps_at_all_still_leave_a_run(tmp_path: Path, dataset: Path) -> None:
    assert call(train.main, *options(dataset, tmp_path, max_iters=0)).code == 0
    assert load_checkpoint(tmp_path).step == 0 and read_metrics(tmp_path) == []


def test_runs_without_an_out_dir_are_numbered(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert call(train.main, *options(dataset, "", max_iters=2)).code == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["words-splines", "words-splines-2"]
    result = call(train.main, *options(dataset, "", max_iters=2, resume=True))
    assert result.code == 0 and "runs/words-splines-2, resumed at step 2" in result.out


def test_a_compiled_run_measures_its_throughput(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step except the first, which compiles, is timed. (The compiler here does nothing.)"""
    monkeypatch.setattr(torch, "compile", lambda model: model)
    train_until(options(dataset, tmp_path, compile=True))
    records = read_metrics(tmp_path)
    assert all(record["tokens_per_second"] for record in records[1:]), records
    assert all(record["step_ms"] for record in records[1:]), records


@pytest.mark.needs("torch.compile")
def test_a_compiled_run_has_the_same_losses(tmp_path: Path, dataset: Path, baseline: list[float]) -> None:
    found = losses(dataset, tmp_path, compile=True, kan_init="random_normal", eval_interval=STEPS, sample_tokens=4)
    assert found == pytest.approx(baseline, rel=1e-4)
    assert not any("_orig_mod" in name for name in read_state(tmp_path / "checkpoints/best.pt")["model"])


@pytest.mark.needs("torch.compile")
def test_compiled_training_is_deterministic_on_two_threads(tmp_path: Path) -> None:
    """Otherwise Inductor's scatters would add in the order in which threads arrive, which shows at some size only."""
    dataset = make_dataset(tmp_path / "words")
    size = {"n_embd": 64, "block_size": 32, "batch_size": 12, "num_threads": 2, "compile": True, "max_iters": 6}
    for name in ("a", "b"):
        call(train.main, *options(dataset, tmp_path / name, **size))
    first, second = (load_checkpoint(tmp_path / name).model.state_dict() for name in ("a", "b"))
    assert all(torch.equal(first[key], second[key]) for key in first)
