"""A tiny dataset, tiny options and ways to call the commands, for tests of whole runs."""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train
from corpus.dataset import Dataset, ensure_prepared
from corpus.tokenizer import CharTokenizer
from corpus.writer import DatasetWriter
from training.config import Config, plain_defaults
from training.device import choose_device
from training.distributed import ALONE, World
from training.run import Run, open_run

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12
# The options of a plain model and AdamW, where a run's defaults differ from them.
PLAIN = {name: value for name, value in plain_defaults().items() if value != getattr(Config(), name)}
TINY = {
    **PLAIN,
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 16,
    "batch_size": 4,
    "max_iters": STEPS,
    "warmup_iters": 2,
    "eval_interval": 4,
    "eval_iters": 2,
    "log_interval": 2,
    "sample_tokens": 8,
    "num_threads": 1,
    "device": "cpu",
    "dtype": "float32",
    "splines": False,
    "report": "off",
}
WORDS = np.array(
    ["the", "spline", "bends", "where", "its", "knots", "tell", "it", "and", "goes", "on", "as", "a", "line"]
)


def random_words(count: int, seed: int = 0) -> str:
    """Words in random order, as text to learn from."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, count)) + "\n"


def make_dataset(folder: Path, text: str = "") -> Path:
    """Write a prepared character dataset, with nine tenths of `text` for training."""
    text = text or random_words(600)
    tokenizer = CharTokenizer.from_text(text)
    tokens = tokenizer.encode_array(text)
    cut = len(tokens) * 9 // 10
    with DatasetWriter(folder, tokenizer, "a test") as writer:
        writer.write("train", tokens[:cut])
        writer.write("val", tokens[cut:])
    return folder


def options(dataset: Path | str, out_dir: Path | str, /, **changes: Any) -> list[str]:
    """The arguments of train.py for a tiny run, with some options changed."""
    values = {"dataset": dataset, "out_dir": out_dir, **TINY, **changes}
    return [f"--{name}={value}" for name, value in values.items()]


def resume_options(out_dir: Path) -> list[str]:
    return ["--out_dir", str(out_dir), "--resume", "True"]


def make_trainer(arguments: list[str], world: World = ALONE) -> train.Trainer:
    run = open_run(arguments, world)
    try:
        dataset = Dataset.open(ensure_prepared(run.config.dataset))
        return train.Trainer(run, dataset, choose_device(run.config, world), world)
    except BaseException:
        let_go(run)
        raise


def let_go(run: Run) -> None:
    """Unlock the run's directory, like the end of its process."""
    if run.lock is not None:
        run.lock.release()


class StopAfter:
    """Asks to stop once a trainer has done `step` steps; stands in for a `StopRequest`."""

    signal_name, exit_code = "SIGTERM", 143

    def __init__(self, trainer: train.Trainer, step: int) -> None:
        self.trainer, self.step = trainer, step

    def __bool__(self) -> bool:
        return self.trainer.progress.step >= self.step

    def agree(self, world: World) -> bool:
        return bool(self)  # all processes have done the same number of steps


def train_until(arguments: list[str], step: int = 1 << 30, world: World = ALONE) -> train.Trainer:
    """Train in this process without a command, and stop after `step` as if by SIGTERM."""
    trainer = make_trainer(arguments, world)
    try:
        trainer.train(StopAfter(trainer, step))  # type: ignore[arg-type]
    finally:
        let_go(trainer.run)
    return trainer


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def call(main: Callable[[], None], *arguments: object) -> Result:
    """Call a command's `main` in this process. An exception that would be a traceback is raised."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["command.py", *map(str, arguments)])
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    return Result(code, out.getvalue(), err.getvalue())


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def run_command(
    script: str, *arguments: object, env: Mapping[str, str] | None = None, timeout: float = 60, **more: Any
) -> Result:
    """Run a command in its own process, like a user."""
    environment = {**os.environ, **(env or {})}
    done = subprocess.run(
        command(script, *arguments), env=environment, timeout=timeout, cwd=ROOT, capture_output=True, text=True, **more
    )
    return Result(done.returncode, done.stdout, done.stderr)


def assert_one_sentence(result: Result, *parts: str) -> None:
    """Check the result of a user's mistake: status 2, and one line on stderr that contains `parts`."""
    assert result.code == 2, result
    lines = result.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    assert "Traceback" not in result.out + result.err
    for part in parts:
        assert part in lines[0], f"{part!r} is not in {lines[0]!r}"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl, which must be strict JSON (no NaN, no Infinity)."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def train_losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["train_loss"] for record in read_metrics(run)}


def checkpoint_names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())
