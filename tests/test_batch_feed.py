"""Batches for a GPU, imitated: pinned, copied without waiting, fetched ahead; and a step reads from the GPU once."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from corpus.batches import Batch
from tests.runs import make_dataset, make_trainer, options, train_losses, train_until
from training.batch_feed import BatchFeed


class Sampler:
    """Batches that tell their step, and which steps were drawn when."""

    def __init__(self, log: list[object]) -> None:
        self.log = log

    def batch(self, step: int) -> Batch:
        self.log.append(step)
        return torch.full((2, 3), step), torch.full((2, 3), step + 1)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is done with tensors, which stay where they are."""
    log: list[object] = []

    def to(self: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        log.append("copied" if non_blocking else "waited")
        return self

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: (log.append("pinned"), self)[1])
    monkeypatch.setattr(torch.Tensor, "to", to)
    return log


def feed(log: list[object], kind: str) -> BatchFeed:
    return BatchFeed(Sampler(log), torch.device(kind), last_step=9)  # type: ignore[arg-type]


def test_for_a_gpu_batches_are_pinned_and_fetched_ahead(log: list[object]) -> None:
    on_gpu = feed(log, "cuda")
    pinned, copied = ["pinned"] * 2, ["copied"] * 2
    assert on_gpu.take(3)[0].unique() == 3 and log == [3, *pinned, *copied]
    on_gpu.fetch(4)
    assert log == [3, *pinned, *copied, 4, *pinned]
    assert on_gpu.take(4)[1].unique() == 5 and log == [3, *pinned, *copied, 4, *pinned, *copied]
    log.clear()
    assert on_gpu.take(4)[0].unique() == 4 and log == copied, "a step that is done again"
    assert on_gpu.take(7)[0].unique() == 7 and log == [*copied, 7, *pinned, *copied], "after a jump"
    log.clear()
    on_gpu.fetch(9)
    assert log == [], "there is no step after the last"


def test_on_a_cpu_nothing_is_fetched_ahead(log: list[object]) -> None:
    on_cpu = feed(log, "cpu")
    on_cpu.fetch(1)
    assert on_cpu.take(1)[0].unique() == 1 and log == [1, "waited", "waited"]


class Reads(TorchDispatchMode):
    """Counts the numbers that Python asks of tensors; with a GPU it waits for each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_the_gpu_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"gradient_accumulation_steps": 3, "kan_smoothness": 0.1, "log_interval": 100, "eval_interval": 100}
    trainer = make_trainer(options(make_dataset(tmp_path / "data"), tmp_path / "run", **changes))
    monkeypatch.setattr(trainer.scaler, "step", lambda optimizer: None)  # the optimizer's own counter is on the CPU
    tolist, lists = torch.Tensor.tolist, []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: lists.append(self) or tolist(self))
    trainer.step()
    with Reads() as reads:
        lists.clear()
        trainer.step()
    assert len(lists) == 1 and reads.count == 0


def test_a_run_that_fetches_ahead_is_the_run_that_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_dataset(tmp_path / "data")
    train_until(options(data, tmp_path / "plain"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    init = BatchFeed.__init__

    def ahead(self: BatchFeed, *arguments: object) -> None:
        init(self, *arguments)  # type: ignore[arg-type]
        self.ahead = True

    monkeypatch.setattr(BatchFeed, "__init__", ahead)
    train_until(options(data, tmp_path / "ahead"))
    assert train_losses(tmp_path / "plain") == train_losses(tmp_path / "ahead")
