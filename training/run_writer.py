"""What a run writes into its directory, metrics and checkpoints, and what is safe when that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from common.command_line import command
from common.errors import UserError
from training.checkpoint import newest_good_step, save_checkpoint, save_sharded
from training.metrics import Metrics
from training.parallel import ParallelModel
from training.run import Run
from training.saver import SaveFailed, Saver


class RunWriter:
    """Writes in the main process, but for what is sharded; every process of the run must call every method."""

    def __init__(self, run: Run, parallel: ParallelModel, optimizer: torch.optim.Optimizer) -> None:
        """Makes the directory. UserError if it cannot be written."""
        self.run, self.parallel, self.optimizer = run, parallel, optimizer
        self.world = parallel.world
        self.step = run.state["step"] if run.state else 0
        self.saver = Saver()
        # Threads of all processes talk while these train, so they need a line of their own.
        self._thread_world = self.world.twin() if parallel.sharded else self.world
        self._metrics: Metrics | None = None
        with self.writing():
            if self.world.is_main:
                run.create()
                self._metrics = self._open_metrics()

    def _open_metrics(self) -> Metrics:
        return Metrics(self.run.directory / "metrics.jsonl", self.step)

    def log(self, record: dict[str, Any]) -> None:
        with self.writing():
            if self._metrics is not None:
                self._metrics.write(record)

    def save(self, header: dict[str, Any], is_best: bool) -> None:
        """Copy the model, the moments and `header`, and let a thread write them. UserError if the last one failed."""
        self.step = header["step"]
        directory, keep = self.run.directory, self.run.config.keep_checkpoints
        with self.writing():
            self._recreate_if_vanished()
            if self.parallel.sharded:
                self.saver.save(
                    self.step,
                    self.parallel.sharded_state({**header, "is_best": is_best}, self.optimizer),
                    lambda copy: save_sharded(directory, copy, keep, self._thread_world),
                )
            elif self.world.is_main:
                model = self.parallel.model
                state = {**header, "model": model.state_dict(), "optimizer": self.optimizer.state_dict()}
                self.saver.save(self.step, state, lambda copy: save_checkpoint(directory, copy, is_best, keep))

    def _recreate_if_vanished(self) -> None:
        """Somebody may have deleted the run's directory; what is in memory is worth keeping."""
        if self._metrics is not None and not self.run.is_there():
            print(f"{self.run.directory} had vanished at step {self.step}; it is made anew", flush=True)
            self.run.create()
            self.saver.wait_regardless(forget=True)  # what was being written meanwhile may have failed for that reason
            self._metrics.close()
            self._metrics = self._open_metrics()

    def wait(self) -> None:
        """Until everything is on the disk. UserError if it cannot be."""
        with self.writing():
            self.saver.wait()

    def close(self) -> None:
        """Wait for the last checkpoint, whatever becomes of it."""
        self.saver.wait_regardless()
        if self._metrics is not None:
            self._metrics.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A stretch in which the run is written: if that fails on one process, all stop with its sentence."""
        with self.world.together():
            try:
                yield
            except OSError as error:
                raise UserError(self._cannot_write(error)) from error

    def _cannot_write(self, error: OSError) -> str:
        step = error.step if isinstance(error, SaveFailed) else self.step
        return (
            f"{self.run.directory} could not be written at step {step} "
            f"({error.strerror or error}); {self.kept()}: make room, then go on with {self.resume_command()}"
        )

    def kept(self) -> str:
        """What is safe, as a clause: waits for what is being written, and verifies what is there."""
        self.saver.wait_regardless()
        step = newest_good_step(self.run.directory)
        return "nothing was saved yet" if step is None else f"the checkpoint of step {step} is good"

    def resume_command(self) -> str:
        return command("train.py", "--out_dir", str(self.run.directory), "--resume", "True", processes=self.world.size)

    def summary(self, elapsed_s: float) -> str:
        """What saving cost, as a line."""
        saver = self.saver
        share = 100 * saver.held_up_s / elapsed_s if elapsed_s else 0.0
        return (
            f"saved {saver.count} checkpoints, which held up training for {saver.held_up_s:.2f} s, {share:.2f} % of "
            f"its time (written beside it in {saver.written_s:.2f} s)"
        )
