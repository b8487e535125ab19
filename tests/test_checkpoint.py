"""A checkpoint is written atomically, and read without running anything that is in it."""

import errno
import os
import pickle
import resource
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from common.errors import UserError
from tests.runs import (
    Result,
    StopAfter,
    assert_one_sentence,
    call,
    checkpoint_names,
    make_dataset,
    make_trainer,
    options,
    read_metrics,
    resume_options,
    run_command,
    train_until,
)
from training import run_writer
from training.checkpoint import load_checkpoint, newest_good_state, read_state, save_checkpoint, step_path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A run with checkpoints of steps 8 and 12, which tests must not change."""
    run = tmp_path_factory.mktemp("runs") / "kan"
    train_until(options(dataset, run))
    return run


@pytest.fixture
def run(tmp_path: Path, finished: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def assert_undamaged(run: Path, step: int) -> None:
    """Check that all checkpoints can be read, that the newest is of `step`, and that no temporary file is left."""
    names = checkpoint_names(run)
    assert names and all(name == "best.pt" or name.startswith("step_") for name in names), names
    for name in names:
        read_state(run / "checkpoints" / name)
    assert load_checkpoint(run).step == step


def no_space(state: object, file: Any) -> None:
    file.write(b"half a checkpoint")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def writer_failed(state: object, file: Any) -> None:
    file.write(b"half a checkpoint")
    raise RuntimeError("[enforce fail at inline_container.cc:783] . PytorchStreamWriter failed writing file\nframe #0")


@pytest.mark.parametrize("fail", [no_space, writer_failed])
@pytest.mark.parametrize("step", [4, 8])
def test_a_save_that_fails_leaves_the_earlier_checkpoints(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, fail: Any, step: int
) -> None:
    real = torch.save
    monkeypatch.setattr(torch, "save", lambda s, f: fail(s, f) if s["step"] >= step else real(s, f))
    run = tmp_path / "run"
    result = call(train.main, *options(dataset, run))
    assert_one_sentence(result, str(run), f"at step {step}", "make room", "--resume True")
    if step > 4:
        assert "the checkpoint of step 4 is good" in result.err
        assert_undamaged(run, 4)
    else:
        assert checkpoint_names(run) == []


def test_a_save_that_is_interrupted_leaves_no_temporary_file(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(state: object, file: Any) -> None:
        file.write(b"half a checkpoint")
        raise KeyboardInterrupt

    state = read_state(step_path(run, 12))
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(run, {**state, "step": 13}, True, 2)
    assert_undamaged(run, 12)


def test_what_a_killed_process_left_behind_is_removed(run: Path) -> None:
    (run / "checkpoints/.step_000013.pt.99999.tmp").write_bytes(b"half a checkpoint")
    state = read_state(step_path(run, 12))
    save_checkpoint(run, {**state, "step": 13}, False, 2)
    assert_undamaged(run, 13)


@pytest.mark.needs("full device")
def test_metrics_that_cannot_be_written_end_the_run_with_one_sentence(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full acts like a full disk."""

    class Full(run_writer.Metrics):
        def __init__(self, path: Path, resume_step: int) -> None:
            super().__init__(path, resume_step)
            self._file.close()
            self._file = open("/dev/full", "a", encoding="utf-8")  # noqa: SIM115

    monkeypatch.setattr(run_writer, "Metrics", Full)
    result = call(train.main, *options(dataset, tmp_path / "run"))
    assert_one_sentence(result, "could not be written", os.strerror(errno.ENOSPC))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.5 MB. Only root can make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(folder)], capture_output=True
    )
    if not made or made.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


LARGER = {"n_embd": 64, "keep_checkpoints": 10, "max_iters": 40, "log_interval": 1}  # half a MB a checkpoint


def last_good_step(run: Path, result: Result) -> int:
    kept = max(int(name[5:11]) for name in checkpoint_names(run) if name != "best.pt")
    assert f"the checkpoint of step {kept} is good" in result.err
    return kept


def test_a_full_disk_leaves_the_earlier_checkpoints(small_disk: Path, dataset: Path) -> None:
    run = small_disk / "run"
    result = run_command("train.py", *options(dataset, run, **LARGER))
    assert_one_sentence(result, str(run), "make room")
    step = last_good_step(run, result)
    assert_undamaged(run, step)
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    assert call(train.main, *resume_options(run)).code == 0, "room was made, but the run does not go on"
    assert_undamaged(run, 40)
    assert [record["step"] for record in read_metrics(run)] == list(range(1, 41))


def test_a_limit_on_file_sizes_leaves_the_earlier_checkpoints(tmp_path: Path, dataset: Path) -> None:
    run = tmp_path / "run"
    train_until(options(dataset, run, **LARGER), 4)
    size = step_path(run, 4).stat().st_size

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    result = run_command("train.py", *resume_options(run), preexec_fn=limit)
    assert_one_sentence(result, str(run), "step 4 is good")
    assert_undamaged(run, 4)


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_a_truncated_checkpoint_is_a_user_error(finished: Path, tmp_path_factory: Any, data: st.DataObject) -> None:
    whole = step_path(finished, 12).read_bytes()
    path = tmp_path_factory.getbasetemp() / "truncated.pt"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(UserError, match=r"truncated\.pt"):
        load_checkpoint(path)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_changed_byte_is_harmless_or_a_user_error(finished: Path, tmp_path_factory: Any, data: st.DataObject) -> None:
    damaged = bytearray(step_path(finished, 12).read_bytes())
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(damaged)
    try:
        load_checkpoint(path)
    except UserError as error:
        assert "damaged.pt" in str(error)


class Bomb:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_code_in_a_checkpoint_is_refused_and_not_executed(run: Path, tmp_path: Path, write: Any) -> None:
    mark = tmp_path / "executed"
    path = step_path(run, 13)
    write({**read_state(step_path(run, 12)), "step": Bomb(mark)}, path)
    with pytest.raises(UserError):
        load_checkpoint(path)
    assert newest_good_state(run) is not None
    assert not mark.exists()


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_checkpoints_and_the_best_are_kept(tmp_path: Path, dataset: Path, keep: int) -> None:
    train_until(options(dataset, tmp_path, eval_interval=2, keep_checkpoints=keep))
    newest = [f"step_{step:06d}.pt" for step in (8, 10, 12)][-keep:]
    assert checkpoint_names(tmp_path) == ["best.pt", *newest]
    losses = {record["step"]: record["val_loss"] for record in read_metrics(tmp_path)}
    best = load_checkpoint(tmp_path, "best")
    assert losses[best.step] == min(losses.values())


def test_the_best_checkpoint_outlives_worse_ones(tmp_path: Path, dataset: Path, monkeypatch: Any) -> None:
    losses = iter([3.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr(train, "evaluate", lambda *_: next(losses))
    train_until(options(dataset, tmp_path, eval_interval=3, keep_checkpoints=1))
    assert checkpoint_names(tmp_path) == ["best.pt", "step_000012.pt"]
    assert load_checkpoint(tmp_path, "best").step == 6
    assert read_state(step_path(tmp_path, 12))["best_val_loss"] == 1.0


def test_the_newest_good_state_is_the_one_before_a_damaged_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = step_path(run, 12)
    newest.write_bytes(newest.read_bytes()[:-100])
    found = newest_good_state(run)
    assert found is not None and found[1] == step_path(run, 8) and found[0]["step"] == 8
    said = capsys.readouterr().out.strip()
    assert str(newest) in said and "trying the one before" in said and "\n" not in said


def test_a_run_without_checkpoints_has_no_state_and_one_with_damaged_ones_a_user_error(run: Path) -> None:
    assert newest_good_state(run / "elsewhere") is None
    for path in (run / "checkpoints").glob("step_*"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 2"):
        newest_good_state(run)


def test_a_checkpoint_gives_back_the_model_the_config_and_the_vocabulary(tmp_path: Path, dataset: Path) -> None:
    trainer = make_trainer(options(dataset, tmp_path))
    trainer.train(StopAfter(trainer, 6))  # type: ignore[arg-type]
    loaded = load_checkpoint(tmp_path)
    assert loaded.step == 6 and not loaded.model.training
    assert asdict(loaded.config) == asdict(trainer.config)
    assert loaded.tokenizer.to_metadata() == trainer.dataset.tokenizer.to_metadata()
    expected, found = trainer.model.state_dict(), loaded.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
