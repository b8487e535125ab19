"""Real processes are killed or stopped at any moment, and the run resumes from its newest checkpoint."""

import ctypes
import os
import signal
import time
from pathlib import Path

import pytest

from bench.shared.train_processes import TrainProcesses
from bench.soak import Options, Soak
from tests.runs import checkpoint_names, make_dataset, options, read_metrics, resume_options, train_until
from training.checkpoint import list_steps, load_checkpoint, read_state, step_of

ENDLESS = {"max_iters": 1_000_000, "eval_interval": 4, "log_interval": 1, "sample_tokens": 0, "schedule": "constant"}
ENDLESS |= {"compile": False, "kan_impl": "dense"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "words")


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Run a short `bench/soak.py`."""
    soak = Soak(Options(longest_life=1.0, fork=False), tmp_path)
    for moment in ("save", "step", "save"):
        soak.life(moment)
    assert soak.report.kills == 3 and soak.report.resumes, soak.report
    assert not soak.report.faults and soak.report.steps_lost == 0
    assert soak.finish()


def has_checkpoint(run: Path, after: int = 0) -> bool:
    return any(step_of(path) > after for path in list_steps(run))


def test_a_signal_to_one_of_several_processes_stops_all_and_a_lost_one_too(tmp_path: Path, dataset: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    with TrainProcesses(options(dataset, run, **ENDLESS), log, 2) as group:
        assert group.wait_for(lambda: has_checkpoint(run)), group.said()
        group.signal(signal.SIGUSR1, rank=1)
        assert group.wait() == [138, 138], group.said()
        said = group.said()
    step = load_checkpoint(run).step
    assert f"stopped by SIGUSR1 at step {step}" in said and "--nproc-per-node=2" in said and "Traceback" not in said
    with TrainProcesses(resume_options(run), log, 2) as group:
        assert group.wait_for(lambda: has_checkpoint(run, after=step + 1)), group.said()
        group.signal(signal.SIGKILL, rank=0)
        assert group.wait() == [-signal.SIGKILL, 2], group.said()
        said = group.said()
    assert f"resumed at step {step}" in said and "Traceback" not in said
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "process 1: another process" in error and "--resume True" in error
    last = max(step_of(path) for path in list_steps(run))
    assert last > step
    train_until([*resume_options(run), f"--max_iters={last + 2}"])  # the number of processes may change
    assert [record["step"] for record in read_metrics(run)] == list(range(1, last + 3))
    assert not [name for name in checkpoint_names(run) if name.startswith(".")]


def without_root_powers() -> None:
    """Drop CAP_DAC_OVERRIDE (1) by PR_CAPBSET_DROP (24), with which root could write anywhere."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


def test_a_directory_that_becomes_read_only_ends_the_run_with_one_sentence(tmp_path: Path, dataset: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    with TrainProcesses(options(dataset, run, **ENDLESS), log, preexec_fn=without_root_powers) as process:
        assert process.wait_for(lambda: has_checkpoint(run)), process.said()
        (run / "checkpoints").chmod(0o555)
        assert process.wait() == [2], process.said()
        said = process.said()
    kept = max(step_of(path) for path in list_steps(run))
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert f"the checkpoint of step {kept} is good" in error and os.strerror(13) in error and "Traceback" not in said
    (run / "checkpoints").chmod(0o755)
    assert read_state(list_steps(run)[0])["step"] == kept
    train_until([*resume_options(run), f"--max_iters={kept + 2}"])


def test_signals_are_those_of_torchrun_twice(tmp_path: Path, dataset: Path) -> None:
    """Under torchrun a Ctrl-C arrives from the terminal and from torchrun. That must not count as a second one."""
    run, log = tmp_path / "run", tmp_path / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_RUN_ID", "none")
        with TrainProcesses(options(dataset, run, **ENDLESS), log) as process:
            assert process.wait_for(lambda: has_checkpoint(run)), process.said()
            process.signal(signal.SIGINT)
            time.sleep(0.001)
            process.signal(signal.SIGINT)
            assert process.wait() == [130], process.said()
    assert "stopped by SIGINT" in log.read_text() and load_checkpoint(run)
