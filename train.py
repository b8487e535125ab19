"""Train a GPT with spline blocks: `python train.py [configs/NAME.toml] [--key value …]`; --help lists the options."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import common.threads  # noqa: F401  before torch

import torch

from common.command_line import command
from common.errors import UserError, end_at_once, exit_on_user_error
from common.output import output_may_fail
from corpus.batches import BatchSampler
from corpus.dataset import Dataset
from corpus.token_file import DataChanged
from model import GPT
from report import REPORT_FILE, write_report
from sample import write_sample
from training.batch_feed import BatchFeed
from training.compiling import CompileFailed, check_together, detecting_failures, do_without
from training.device import Device, choose_device
from training.distributed import ALONE, LostProcess, World, detecting_lost_processes, join_world, share_of_step
from training.evaluation import check_evaluation, evaluate
from training.interrupt import StopRequest, must_stop
from training.neighbours import Neighbours
from training.optimizer import make_optimizer, set_learning_rate
from training.parallel import ParallelModel
from training.progress import Progress, Stopwatch, duration, progress_line
from training.progress_bar import ProgressBar
from training.run import Run, open_run
from training.run_facts import opening_lines, write_facts
from training.run_writer import RunWriter
from training.schedule import learning_rate, seed_step
from training.setup import build_model, open_together
from training.spline_recorder import SplineRecorder
from training.tracker import Tracker


@output_may_fail()
@exit_on_user_error
def main() -> None:
    with join_world() as world:
        run = open_run(sys.argv[1:], world)
        with run.lock or nullcontext():
            dataset = open_together(run.config.dataset, world)
            with world.together():
                device = choose_device(run.config, world)
            device = check_together(device, world)
            trainer = Trainer(run, dataset, device, world)
            trainer.describe()
            with StopRequest() as stop:
                trainer.train(stop)
                trainer.report(stop)
            trainer.tell_what_next(stop)
    if trainer.tracker.hangs:
        end_at_once(stop.exit_code)
    sys.exit(stop.exit_code)


class Trainer:
    """Trains one run, from its first (or resumed) step to its last. Each process of the run has one."""

    def __init__(self, run: Run, dataset: Dataset, device: Device, world: World = ALONE) -> None:
        """Set up everything that a step needs, then make the run's directory and write its first files."""
        self.run, self.config, self.dataset, self.device, self.world = run, run.config, dataset, device, world
        self.progress = Progress()
        self.bar = ProgressBar(sys.stdout, self.config.max_iters, silent=not world.is_main)
        self._set_up_model_and_batches()
        self.optimizer = make_optimizer(self.model, self.config)
        self.scaler = device.grad_scaler()
        with world.together():  # a checkpoint is loaded after sharding, and into the optimizer's state
            elapsed_s, wandb_id = self._restore_checkpoint() if run.state else (0.0, None)
        self._run_throwaway_pass()  # at the step that follows, so after the progress is restored
        self._set_up_records(elapsed_s, wandb_id)

    def _set_up_model_and_batches(self) -> None:
        run, config, world = self.run, self.config, self.world
        torch.manual_seed(config.seed)  # for the model's initial weights
        sequences = config.batch_size * config.gradient_accumulation_steps
        with world.together():
            share, self.pass_size = share_of_step(sequences, config.batch_size, world.size)
            self.model, self.splines = build_model(run, self.dataset, self.device, world)
            train_stream, self.val_stream = self.dataset.tokens("train"), self.dataset.tokens("val")
            self.batches = BatchSampler(train_stream, config.block_size, sequences, config.seed, world.rank, world.size)
            check_evaluation(self.val_stream, config)
        self.passes = share // self.pass_size
        self.feed = BatchFeed(self.batches, self.device.device, config.max_iters)
        self.parallel = ParallelModel(self.model, self.device, world, config.fsdp)
        self.compiling = self.device.compile  # whether the next step compiles, and so is not timed

    def _set_up_records(self, elapsed_s: float, wandb_id: str | None) -> None:
        """Begin to measure and to write. `elapsed_s` and `wandb_id` are those of the run before it was resumed."""
        run, config, is_main = self.run, self.config, self.world.is_main
        tokens_per_step = config.batch_size * config.gradient_accumulation_steps * config.block_size
        self.stopwatch = Stopwatch(tokens_per_step, elapsed_s)
        self.neighbours = Neighbours(torch.get_num_threads(), silent=self.device.device.type != "cpu")
        self.writer = RunWriter(run, self.parallel, self.optimizer)
        self.tracker = Tracker(config, run.directory, wandb_id, silent=not is_main)
        self.spline_recorder = SplineRecorder(run.directory, config, self.val_stream, self.tracker)
        self._write_facts()
        with self.writer.writing():
            if is_main:
                self.spline_recorder.records.forget_after(self.progress.step)

    def _run_throwaway_pass(self) -> None:
        self.parallel.run_throwaway_pass(*(part[: self.pass_size] for part in self.batches.batch(self.progress.step)))

    def _restore_checkpoint(self) -> tuple[float, str | None]:
        """Go on from the run's checkpoint. Returns the run's seconds up to then, and its id at W&B."""
        run, state = self.run, self.run.state
        assert state is not None and run.checkpoint is not None
        if state["data_fingerprint"] != self.dataset.fingerprint:
            raise UserError(
                f"{self.dataset.folder} is not the data that {run.directory} was trained on; "
                f"prepare that again, or start a new run in another --out_dir"
            )
        try:
            self.parallel.restore(self.optimizer, state, run.checkpoint)
            if state["scaler"] and self.scaler.is_enabled():  # empty unless that run was in float16 too
                self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"the newest checkpoint of {run.directory} does not fit its configuration") from error
        self.progress.step = self.progress.saved_step = state["step"]
        self.progress.best_val_loss = state["best_val_loss"]
        self.progress.skipped_steps = state["skipped_steps"]
        return state["elapsed_s"], state["wandb_id"]

    def describe(self) -> None:
        """Print the first lines of a run: its directory, data, model and device."""
        for line in opening_lines(self.run, self.model, self.dataset, f"{self.device}{self.parallel}"):
            print(line, flush=True)

    def train(self, stop: StopRequest) -> None:
        """Take the steps that are left, with evaluations and checkpoints. Returns early if asked to stop."""
        config, progress = self.config, self.progress
        if progress.step == 0:
            with self.stopwatch.pause():
                self._record_splines()
        try:
            with detecting_lost_processes(), self.bar:
                while progress.step < config.max_iters and not must_stop(stop, self.world):
                    if not self._attempt(stop):
                        continue
                    self.bar.update(progress, self.stopwatch)
                    if self._is_due(config.eval_interval):
                        self._evaluate()
                    elif self._is_due(config.log_interval):
                        self._log()
                if progress.saved_step != progress.step:
                    self._save_checkpoint(is_best=False)
                self.writer.wait()
                if self.world.is_main and not stop:
                    self.spline_recorder.finish(progress.step)
        except (LostProcess, DataChanged) as error:
            kept, again = self.writer.kept(), self.writer.resume_command()
            raise type(error)(f"{error}; {kept}: go on with {again}") from error
        except torch.OutOfMemoryError as error:
            raise UserError(self._out_of_memory()) from error
        finally:
            self.writer.close()
            self.tracker.finish()

    def _out_of_memory(self) -> str:
        config = self.config
        smaller, passes = max(1, config.batch_size // 2), 2 * config.gradient_accumulation_steps
        same = f"--batch_size {smaller} --gradient_accumulation_steps {passes} makes the same step in smaller passes"
        advice = same if config.batch_size % 2 == 0 else "choose a smaller --batch_size, --block_size or model"
        return (
            f"{self.device.device} ran out of memory in step {self.progress.step + 1}; {self.writer.kept()}; {advice}"
        )

    def _is_due(self, interval: int) -> bool:
        return self.progress.step % interval == 0 or self.progress.step == self.config.max_iters

    def _attempt(self, stop: StopRequest) -> bool:
        """Take one step. If compiling it fails, take this and all later steps uncompiled.

        Returns False if no step was taken because training is to stop.
        """
        try:
            self.step()
        except CompileFailed as failure:
            if self.world.size > 1:
                raise
            if stop:  # Ctrl-C ended the compilers; the resumed run will compile this step
                return False
            self.device, self.compiling = do_without(self.device, failure.reason), False
            self.parallel.use(self.device)
            self._write_facts()
            self.stopwatch.restart()
            self.step()
        return True

    def _write_facts(self) -> None:
        with self.writer.writing():
            if self.world.is_main:
                write_facts(self.run.directory, self.model, self.dataset, self.device)

    def step(self) -> None:
        """One optimizer step on gradient_accumulation_steps micro-batches, shared by all processes."""
        progress, config = self.progress, self.config
        set_learning_rate(self.optimizer, learning_rate(progress.step, config))
        seed_step(config.seed, progress.step, self.world.rank)
        self.parallel.train()
        x, y = self.feed.take(progress.step)
        loss = torch.zeros((), device=self.device.device)
        parts = zip(x.split(self.pass_size), y.split(self.pass_size), strict=True)
        with detecting_failures(self.compiling, self.optimizer):
            for number, (x_part, y_part) in enumerate(parts, start=1):
                with self.parallel.accumulating(last=number == self.passes):
                    part = self.parallel.loss(x_part, y_part) / self.passes
                    self.scaler.scale(part + self.splines.penalty() / self.passes).backward()
                loss += part.detach()
        self.scaler.unscale_(self.optimizer)
        norm = self.parallel.clip_gradients(config.grad_clip or math.inf)
        self.feed.fetch(progress.step + 1)
        own_loss, progress.grad_norm = torch.stack((loss, norm)).tolist()  # the one time that a step waits for a GPU
        progress.train_loss = self.world.mean(own_loss)
        if self._is_usable():
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        untimed, self.compiling = self.compiling, False
        if self.splines.refine(progress.step, self.optimizer):
            self.parallel.wrap()
            self._run_throwaway_pass()
            untimed, self.compiling = True, self.device.compile  # again, for the new shapes
        if untimed:
            self.stopwatch.restart()
            self.neighbours.forget()
        else:
            self.neighbours.notice(self.stopwatch.step())

    def _is_usable(self) -> bool:
        """Whether loss and gradients are finite. If not, the step is skipped, or UserError ends the run.

        Either way they do not reach the parameters. With float16 the scaler itself skips gradients that are not finite.
        """
        progress, config = self.progress, self.config
        bad_norm = not math.isfinite(progress.grad_norm) and not self.scaler.is_enabled()
        if math.isfinite(progress.train_loss) and not bad_norm:
            progress.skipped_steps = 0
            return True
        what = f"step {progress.step + 1} gave a loss of {progress.train_loss:g} and a gradient norm of "
        what += f"{progress.grad_norm:g}"
        if not config.max_skipped_steps:
            raise UserError(f"{what}, and training stopped before using them; {self.writer.kept()}; {self._advice()}")
        if progress.skipped_steps == config.max_skipped_steps:
            skipped = f"after {progress.skipped_steps} skipped steps in a row"
            raise UserError(f"{what} {skipped}, and training stopped; {self.writer.kept()}; {self._advice()}")
        progress.skipped_steps += 1
        print(f"{what}: skipped ({progress.skipped_steps} of at most {config.max_skipped_steps} in a row)", flush=True)
        return False

    def _advice(self) -> str:
        return f"try a lower --learning_rate (now {self.config.learning_rate:g}) or more --warmup_iters"

    def _evaluate(self) -> None:
        """Record the splines, evaluate, log, save a checkpoint, write a sample and a report.

        The time that this takes does not count as that of training steps.
        """
        progress, step = self.progress, self.progress.step
        self._lap()
        with self.stopwatch.pause():
            statistics = self._record_splines()
            progress.note_validation(evaluate(self.model, self.val_stream, self.config, self.device, self.world))
            self._log(statistics, evaluated=True)
            self._save_checkpoint(progress.is_best)
            if (model := self.parallel.whole()) is not None and self.world.is_main:
                self._try_to_show(f"sample of step {step}", lambda: self._write_sample(model))
                self._try_to_show(f"report of step {step}", self._write_live_report)

    def _lap(self) -> None:
        self.device.synchronize()
        self.stopwatch.lap()

    def _log(self, statistics: list[dict[str, Any]] | None = None, evaluated: bool = False) -> None:
        """Print a progress line, and log to metrics.jsonl and W&B. `statistics`: of the splines, at an evaluation."""
        config, progress, stopwatch = self.config, self.progress, self.stopwatch
        if not evaluated:
            self._lap()
        rate = learning_rate(progress.step - 1, config)
        print(progress_line(progress, config.max_iters, evaluated, rate, stopwatch, self._mfu()), flush=True)
        record: dict[str, Any] = {
            "step": progress.step,
            "train_loss": progress.train_loss,
            "val_loss": progress.val_loss if evaluated else None,
            "learning_rate": rate,
            "grad_norm": progress.grad_norm,
            "tokens_per_second": stopwatch.tokens_per_second,
            "step_ms": 1000 * stopwatch.step_s,
            "elapsed_s": stopwatch.elapsed_s,
            **self.splines.metrics(),
        }
        if statistics is not None:
            record["splines"] = statistics
        self.writer.log(record)
        self.tracker.log(record, progress.step)

    def _mfu(self) -> float | None:
        """Model FLOPs utilization: the share of the GPU's peak that the model's arithmetic reaches; None if unknown."""
        peak = self.device.peak_flops()
        return self.model.flops_per_token() * self.stopwatch.tokens_per_second / peak if peak else None

    def _save_checkpoint(self, is_best: bool) -> None:
        """Copy everything that a resumed run needs to go on as if it had not stopped, and let a thread write it."""
        progress, config = self.progress, self.config
        if self.world.max(not self.parallel.is_finite()):
            raise UserError(
                f"step {progress.step} made parameters that are not finite; {self.writer.kept()}; {self._advice()}"
            )
        header = {
            "step": progress.step,
            "config": asdict(config),
            "tokenizer": self.dataset.tokenizer.to_metadata(),
            "data_fingerprint": self.dataset.fingerprint,
            "vocab_size": self.model.config.vocab_size,
            "best_val_loss": progress.best_val_loss,
            "skipped_steps": progress.skipped_steps,
            "scaler": self.scaler.state_dict(),
            "elapsed_s": self.stopwatch.elapsed_s,
            "wandb_id": self.tracker.run_id,
        }
        self.writer.save(header, is_best)
        progress.saved_step = progress.step

    def _record_splines(self) -> list[dict[str, Any]] | None:
        """Record the splines. On the main process, returns statistics of them, a dict for each layer."""
        model = self.parallel.whole() if self.config.splines else None  # which every process must call
        if model is None or not self.world.is_main:
            return None
        return self.spline_recorder.record(model, self.progress.step)

    def _write_sample(self, model: GPT) -> None:
        if self.config.sample_tokens:
            write_sample(model, self.dataset, self.run.directory, self.progress.step, self.config.sample_tokens)

    def _write_live_report(self) -> None:
        if self.config.report == "live":
            write_report([self.run.directory], live=self.progress.step < self.config.max_iters)

    def report(self, stop: StopRequest) -> None:
        """Write report.html, unless the run was stopped. `python report.py` can write it later."""
        if self.config.report != "off" and self.world.is_main and not stop:
            self._try_to_show("report", lambda: write_report([self.run.directory]), "the run is complete")

    @staticmethod
    def _try_to_show(name: str, write: Callable[[], object], consequence: str = "training goes on") -> None:
        """Call `write`, and print its failure: a sample or report that cannot be written must not stop the run."""
        try:
            write()
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}; {consequence}", flush=True)

    def tell_what_next(self, stop: StopRequest) -> None:
        """Print how the run ended, and the commands to continue it or to look at it."""
        directory, progress = self.run.directory, self.progress
        if stop:
            print(f"stopped by {stop.signal_name} at step {progress.step}, which is saved; go on with")
            print(f"  {self.writer.resume_command()}")
            return
        print(self.writer.summary(self.stopwatch.elapsed_s))
        best = f", best validation loss {progress.best_val_loss:.4f}" if math.isfinite(progress.best_val_loss) else ""
        print(f"done: {progress.step} steps in {duration(self.stopwatch.elapsed_s)}{best}")
        picture = self.spline_recorder.records.step_folder(progress.step) / "overview.png"
        if picture.is_file():
            print(f"splines: {picture}")
        print(f"sample:  {command('sample.py', str(directory))}")
        if (directory / REPORT_FILE).is_file():
            print(f"report:  {directory / REPORT_FILE} (open it in a browser)", flush=True)


if __name__ == "__main__":
    main()
