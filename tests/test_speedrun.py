"""bench/speedrun.py stops the clock at the line with the loss, ends the process, and reports failures in a sentence."""

import math
import sys
import time
from pathlib import Path

import pytest

from bench import speedrun
from common.errors import UserError
from tests.runs import assert_one_sentence, call

OPTIONS = speedrun.Options(target=1.9, threads=1)


def printing(*lines: str, then: str = "") -> list[str]:
    code = "import time\n" + "".join(f"print({line!r}, flush=True)\n" for line in lines) + then
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    "line", ["step 250/250 100% | loss 1.9 | val 1.880* | lr 1e-3", "step 250: train loss 1.7, val loss 1.8800"]
)
def test_the_first_line_at_the_target_ends_the_run(tmp_path: Path, line: str) -> None:
    early = ("val 2.500", "step 9/9 | loss 1.2 | lr 1e-3", "an interval 1.0")
    start = time.perf_counter()
    finish = speedrun.run_until("it", printing(*early, line, then="time.sleep(60)"), tmp_path, OPTIONS)
    assert finish.loss == 1.88 and 0 < finish.seconds <= time.perf_counter() - start < 30


def test_one_that_never_gets_there_has_no_time_and_one_without_a_loss_is_a_mistake(tmp_path: Path) -> None:
    lines = ("val 2.5", "val 2.1", "val 2.3")
    assert speedrun.run_until("it", printing(*lines), tmp_path, OPTIONS) == speedrun.Finish(math.inf, 2.1)
    with pytest.raises(UserError, match="it showed no loss; it ended with: no such file"):
        speedrun.run_until("it", printing("no such file"), tmp_path, OPTIONS)


def test_or_the_last_line_where_that_will_do(tmp_path: Path) -> None:
    command = printing("val 2.5", "val 1.950")
    assert speedrun.run_until("it", command, tmp_path, OPTIONS, or_end=True).loss == 1.95
    with pytest.raises(UserError, match="ended with"):
        speedrun.run_until("it", printing("nothing"), tmp_path, OPTIONS, or_end=True)


def test_who_runs_and_where(tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    data = tmp_path / "data" / "shakespeare_char"
    data.mkdir(parents=True)
    for name in ("train.bin", "val.bin", "meta.pkl"):
        (data / name).touch()
    options = speedrun.Options(nanogpt=str(tmp_path), config=str(Path(speedrun.ROOT) / "configs/speedrun.toml"))
    found = speedrun.commands(options, 7, tmp_path)
    assert list(found) == ["splines", "SwiGLU twin", "MLP twin", "nanoGPT"]
    assert all("--seed=7" in found[name][0] for name in ("splines", "SwiGLU twin", "MLP twin"))
    assert "--ffn" in found["MLP twin"][0] and found["nanoGPT"][1] == tmp_path
    assert all(
        "--device=cpu" in command or f"--num_threads={options.threads}" in command for command, _ in found.values()
    )
    assert "nanoGPT" not in speedrun.commands(speedrun.Options(), 7, tmp_path)


@pytest.mark.parametrize(
    ("argument", "part"),
    [
        ("--target=0", "target"),
        ("--repeats=0", "repeats"),
        ("--nanogpt=/nowhere", "has no train.py"),
        ("--config=no.toml", "no.toml"),
    ],
)
def test_an_impossible_option_is_refused(argument: str, part: str) -> None:
    assert_one_sentence(call(speedrun.main, argument), part)
