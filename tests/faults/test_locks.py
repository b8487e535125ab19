"""Two real processes want one folder; a lock lets one in, also after another was killed."""

import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import report
import train
from common import folder_lock
from common.errors import UserError
from common.folder_lock import FolderLock
from corpus import dataset as dataset_module
from corpus.dataset import Dataset, ensure_prepared
from corpus.tokenizer import CharTokenizer
from corpus.writer import DatasetWriter
from tests.data_fixtures import write_dataset
from tests.runs import (
    assert_one_sentence,
    call,
    make_dataset,
    options,
    resume_options,
    train_losses,
    train_until,
)
from training.config import Config
from training.run import open_run

if not hasattr(os, "fork"):
    pytest.skip("needs fork and flock", allow_module_level=True)


class Other:
    """A fork of this process that runs `action`, reports what it returned, and waits to be ended."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._said, says = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(says)
            return
        try:
            kept = action()
            os.write(says, f"{kept}\n".encode())
            time.sleep(100)
        except SystemExit as ended:
            os._exit(int(ended.code or 0))
        finally:
            os._exit(99)

    def said(self) -> str:
        with open(self._said) as pipe:
            return pipe.readline().strip()

    def end(self, number: int) -> int:
        os.kill(self.pid, number)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@contextlib.contextmanager
def other(action: Callable[[], object]) -> Iterator[Other]:
    process = Other(action)
    try:
        yield process
    finally:
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            process.end(signal.SIGKILL)


def hold(folder: Path) -> FolderLock:
    lock = FolderLock(folder)
    assert lock.acquire()
    return lock


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "words")


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    lock = FolderLock(folder)
    with other(lambda: hold(folder)) as process:
        process.said()
        assert not lock.acquire() and lock.holder().startswith(f"process {process.pid} on ")
        lock.release()
        assert not FolderLock(folder).acquire(), "one that was not ours was let go"
        process.end(signal.SIGKILL)
    assert lock.acquire() and lock.is_sure and not FolderLock(folder).acquire()
    lock.release()
    assert not list(folder.iterdir())
    with FolderLock(tmp_path / "empty" / "folder") as lock:
        assert lock.acquire()
    assert not (tmp_path / "empty").exists(), "what was made for nothing"


@pytest.mark.parametrize("lacking", ["module", "file system"])
def test_without_locks_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if lacking == "module":
        monkeypatch.setattr(folder_lock, "fcntl", None)
    else:
        monkeypatch.setattr(folder_lock.fcntl, "flock", refuse)
    with FolderLock(tmp_path) as lock:
        assert lock.acquire() and FolderLock(tmp_path).acquire() and not lock.is_sure
    monkeypatch.chdir(tmp_path)
    runs = [open_run(["--dataset=words"]) for _ in range(3)]
    assert len({run.directory for run in runs}) == 3, "folders that are made are not shared even so"


def test_a_run_that_is_trained_is_nobody_elses(tmp_path: Path, dataset: Path) -> None:
    run = tmp_path / "run"
    train_until(options(dataset, run), 4)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with other(lambda: hold(run)) as process:
        process.said()
        for arguments in (options(dataset, run), resume_options(run)):
            result = call(train.main, *arguments)
            assert_one_sentence(result, str(run), f"process {process.pid} on ", "--out_dir")
        assert call(report.main, run).code == 0, "looking at it stays allowed"
    assert {path: path.read_bytes() for path in before} == before
    train_until(resume_options(run))
    train_until(options(dataset, tmp_path / "whole"))
    assert train_losses(run) == train_losses(tmp_path / "whole")


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kept = []

    def start() -> Path:
        kept.append(open_run(["--dataset=words"]))  # it has written nothing yet
        return kept[0].directory

    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(other(start)) for _ in range(5)]
        names = {process.said() for process in processes}
    first = f"runs/words-{Config().ffn}"
    assert names == {first, *(f"{first}-{number}" for number in range(2, 6))}
    assert str(start()) == first, "killed before they wrote anything: their folders are free"


def test_a_run_that_could_not_begin_leaves_no_folder(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    assert_one_sentence(call(train.main, *options("no_such_data", run)), "no_such_data")
    assert not run.parent.exists()


CHARACTERS = CharTokenizer("abc")


def prepare_half(folder: Path) -> DatasetWriter:
    writer = DatasetWriter(folder, CHARACTERS, "half").__enter__()
    writer.write("train", np.zeros(10000, dtype=np.int64))
    return writer


def test_a_dataset_is_prepared_by_one_process_and_a_killed_one_leaves_nothing(tmp_path: Path) -> None:
    tokens = np.array([0, 1, 2] * 9)
    with other(lambda: prepare_half(tmp_path)) as process:
        process.said()
        with pytest.raises(UserError, match=f"is being prepared by process {process.pid} on "):
            write_dataset(tmp_path, tokens, tokens)
        process.end(signal.SIGKILL)
    (tmp_path / ".input.txt.123.tmp").write_text("half a download")
    assert list(tmp_path.glob(".preparing-*"))
    write_dataset(tmp_path, tokens, tokens)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "train.bin", "val.bin"]
    assert Dataset.open(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_preparation_that_is_told_to_end_tidies_up(tmp_path: Path, number: signal.Signals) -> None:
    def prepare() -> None:
        signal.signal(number, signal.SIG_DFL)
        with DatasetWriter(tmp_path, CHARACTERS, "half") as writer:
            writer.write("train", np.zeros(10000, dtype=np.int64))
            os.kill(os.getpid(), number)
            time.sleep(100)

    process = Other(prepare)
    assert os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1]) == 128 + number
    assert not list(tmp_path.iterdir())


PREPARE = """
import sys, time
from pathlib import Path
def prepare(file):
    from tests.runs import make_dataset
    with open(Path(__file__).with_name("count"), "a") as count:
        count.write("once\\n")
    time.sleep(0.5)
    make_dataset(Path(__file__).parent)
"""


def test_runs_that_need_the_same_data_prepare_them_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "DATA_ROOT", tmp_path)
    (tmp_path / "words").mkdir()
    (tmp_path / "words/prepare.py").write_text(PREPARE)
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(other(lambda: ensure_prepared("words"))) for _ in range(3)]
        assert {process.said() for process in processes} == {str(tmp_path / "words")}
    assert (tmp_path / "words/count").read_text() == "once\n"
    assert Dataset.open(tmp_path / "words")
