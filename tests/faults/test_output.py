"""Output that fails costs only the output. Tested with real pipes, terminals and full disks."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

import train
from tests.faults.test_kills import ENDLESS
from tests.runs import STEPS, command, make_dataset, options, read_metrics
from training.checkpoint import list_steps, load_checkpoint


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "words")


@contextlib.contextmanager
def training(dataset: Path, run: Path, changes: dict[str, Any], **popen: Any) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command("train.py", *options(dataset, run, **changes)), text=True, **popen) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until_saved(lines: IO[str], run: Path) -> None:
    for _ in lines:
        if list_steps(run):
            return
    raise AssertionError("the run ended before its first checkpoint")


def assert_last_step_is_saved(run: Path) -> None:
    """The step of the last line of metrics.jsonl, which may be later than the last evaluation."""
    assert load_checkpoint(run).step == read_metrics(run)[-1]["step"]


def test_ctrl_c_saves_where_the_reader_of_the_output_dies_first(tmp_path: Path, dataset: Path) -> None:
    """In `train.py | tee log` a Ctrl-C interrupts tee too."""
    run, seldom = tmp_path / "run", {**ENDLESS, "eval_interval": 50}
    with training(dataset, run, seldom, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        read_until_saved(process.stdout, run)
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=100) == 130
        said = process.stderr.read()
    assert "Traceback" not in said and "Exception" not in said
    assert said.count("standard output cannot be written (Broken pipe)") == 1
    assert_last_step_is_saved(run)


def test_a_closed_terminal_saves_and_ends_the_run(tmp_path: Path, dataset: Path) -> None:
    run = tmp_path / "run"
    ours, theirs = pty.openpty()
    script = "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); import train; train.main()"
    arguments = [sys.executable, "-c", script, *options(dataset, run, **{**ENDLESS, "eval_interval": 50})]
    root = Path(train.__file__).parent
    with subprocess.Popen(
        arguments, cwd=root, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as process:
        os.close(theirs)
        with open(ours, encoding="utf-8", errors="replace") as terminal:
            read_until_saved(terminal, run)
        try:
            assert process.wait(timeout=100) == 128 + signal.SIGHUP
        finally:
            process.kill()
    assert_last_step_is_saved(run)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_on_a_full_disk_does_not_stop_the_run(tmp_path: Path, dataset: Path) -> None:
    run = tmp_path / "run"
    with open("/dev/full", "w") as full, training(dataset, run, {}, stdout=full, stderr=full) as process:
        assert process.wait(timeout=100) == 0
    assert load_checkpoint(run).step == STEPS


def test_an_interrupted_evaluation_ends_with_a_checkpoint(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    evaluate = train.evaluate

    def interrupted(*arguments: Any) -> float:
        with contextlib.suppress(OSError):
            os.close(reader)
        signal.raise_signal(signal.SIGINT)
        return evaluate(*arguments)

    monkeypatch.setattr(train, "evaluate", interrupted)
    monkeypatch.setattr(sys, "argv", ["train.py", *options(dataset, tmp_path / "run")])
    with open(writer, "w") as pipe, contextlib.redirect_stdout(pipe), pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 130
    assert load_checkpoint(tmp_path / "run").step == 4
