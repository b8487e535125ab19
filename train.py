"""Train a GPT with spline blocks: `python train.py [configs/NAME.toml] [--key value …]`; --help lists the options."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

from common.command_line import command
from common.errors import UserError, end_at_once, exit_on_user_error
from corpus.batches import BatchSampler, evaluation_batches
from corpus.dataset import Dataset
from corpus.token_file import DataChanged
from report import REPORT_FILE, write_report
from sample import write_sample
from training.batch_feed import BatchFeed
from training.device import Device, choose_device
from training.distributed import ALONE, LostProcess, World, join_world, noticing_losses, share_of_step
from training.evaluation import evaluate
from training.interrupt import StopRequest, must_stop
from training.optimizer import make_optimizer, set_learning_rate
from training.parallel import ParallelModel
from training.progress import Stopwatch, duration, progress_line
from training.randomness import seed_step
from training.run import Run, open_run
from training.run_facts import write_facts
from training.run_writer import RunWriter
from training.schedule import learning_rate
from training.setup import build_model, open_together
from training.spline_training import SplineTraining
from training.spline_watch import SplineWatch
from training.tracker import Tracker


@exit_on_user_error
def main() -> None:
    with join_world() as world:
        run = open_run(sys.argv[1:], world)
        dataset = open_together(run.config.dataset, world)
        with world.together():
            device = choose_device(run.config, world)
        trainer = Trainer(run, dataset, device, world)
        trainer.describe()
        with StopRequest() as stop:
            trainer.train(stop)
            trainer.report(stop)
        trainer.tell_what_next(stop)
    if trainer.tracker.hangs:
        end_at_once(stop.exit_code)
    sys.exit(stop.exit_code)


@dataclass
class Progress:
    """How far a run is: what changes from step to step besides parameters and optimizer state."""

    step: int = 0
    train_loss: float = math.nan
    grad_norm: float = math.nan
    val_loss: float | None = None
    is_best: bool = False
    best_val_loss: float = math.inf
    skipped_steps: int = 0
    """In a row, up to now."""
    saved_step: int = -1
    """The step whose checkpoint is written, or being written."""


class Trainer:
    """One run, from its first (or resumed) step to its last; on each of its processes."""

    def __init__(self, run: Run, dataset: Dataset, device: Device, world: World = ALONE) -> None:
        self.run, self.config, self.dataset, self.device, self.world = run, run.config, dataset, device, world
        config = run.config
        torch.manual_seed(config.seed)
        sequences = config.batch_size * config.gradient_accumulation_steps
        with world.together():
            share, self.pass_size = share_of_step(sequences, config.batch_size, world.size)
            self.model = build_model(run, dataset, device, world)
            train_stream, self.val_stream = dataset.tokens("train"), dataset.tokens("val")
            self.batches = BatchSampler(train_stream, config.block_size, sequences, config.seed, world.rank, world.size)
            evaluation_batches(self.val_stream, config.block_size, config.batch_size, config.eval_iters)  # enough?
        self.passes = share // self.pass_size
        self.feed = BatchFeed(self.batches, device.device, config.max_iters)
        self.parallel = ParallelModel(self.model, device, world, config.fsdp)
        self.compiling = device.compile  # in the first step, which is not timed
        self.splines = SplineTraining(self.model, config)
        self.optimizer = make_optimizer(self.model, config)
        self.scaler = device.grad_scaler()
        self.progress = Progress()
        with world.together():
            elapsed_s, wandb_id = self._restore(run) if run.state else (0.0, None)
        self._settle()
        self.stopwatch = Stopwatch(sequences * config.block_size, elapsed_s)
        self.writer = RunWriter(run, self.parallel, self.optimizer)
        self.tracker = Tracker(config, run.directory, wandb_id, silent=not world.is_main)
        self.watch = SplineWatch(run.directory, config, self.val_stream, self.tracker)
        with self.writer.writing():
            if world.is_main:
                write_facts(run.directory, self.model, dataset, device)
                self.watch.records.forget_after(self.progress.step)

    def _settle(self) -> None:
        self.parallel.settle(*(part[: self.pass_size] for part in self.batches.batch(self.progress.step)))

    def _restore(self, run: Run) -> tuple[float, str | None]:
        state = run.state
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
        config, meta = self.config, self.dataset.meta
        ffn, layers = self.model.num_ffn_parameters(), self.model.spline_layers()
        kind = f"spline layers, G={layers[0].num_control_points}" if layers else config.ffn
        print(f"run     {self.run.directory}" + (f", resumed at step {self.progress.step}" if self.run.state else ""))
        print(
            f"data    {config.dataset}: {meta.total_tokens('train'):,} tokens to train on, "
            f"{meta.total_tokens('val'):,} to validate, vocabulary {self.dataset.tokenizer.vocab_size:,}"
        )
        print(
            f"model   {config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, context "
            f"{config.block_size}: {self.model.num_parameters():,} parameters, {ffn:,} of them in {kind}"
        )
        print(f"device  {self.device}{self.parallel}")
        if layers:
            if config.fitted_share_outside:
                widths = [layer.spline_width for layer in layers]
                print(f"grids   {min(widths):.3g} to {max(widths):.3g} wide, fitted to the activations")
            print(f"splines computed by {layers[0].resolved_impl} ({layers[0].why_this_impl})")
        sys.stdout.flush()

    def train(self, stop: StopRequest) -> None:
        """All steps that are left, with evaluations and checkpoints between; returns early when asked to stop."""
        config, progress = self.config, self.progress
        if progress.step == 0:
            with self.stopwatch.pause():
                self._look()
        try:
            with noticing_losses():
                while progress.step < config.max_iters and not must_stop(stop, self.world):
                    self.step()
                    self._log_if_due()
                    if self._is_due(config.eval_interval):
                        with self.stopwatch.pause():
                            self._save()
                            self._show()
                if progress.saved_step != progress.step:
                    self._save()
                self.writer.wait()
                if self.world.is_main and not stop:
                    self.watch.finish(progress.step)
        except (LostProcess, DataChanged) as error:
            kept, again = self.writer.kept(), self.writer.resume_command()
            raise type(error)(f"{error}; {kept}: go on with {again}") from error
        finally:
            self.writer.close()
            self.tracker.finish()

    def _is_due(self, interval: int) -> bool:
        return self.progress.step % interval == 0 or self.progress.step == self.config.max_iters

    def step(self) -> None:
        """One optimizer step on gradient_accumulation_steps micro-batches, shared by all processes."""
        progress, config = self.progress, self.config
        set_learning_rate(self.optimizer, learning_rate(progress.step, config))
        seed_step(config.seed, progress.step, self.world.rank)
        self.parallel.train()
        x, y = self.feed.take(progress.step)
        loss = torch.zeros((), device=self.device.device)
        parts = zip(x.split(self.pass_size), y.split(self.pass_size), strict=True)
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
            self._settle()
            untimed, self.compiling = True, self.device.compile  # once more, for the new shapes
        if untimed:
            self.stopwatch.restart()
        else:
            self.stopwatch.step()

    def _is_usable(self) -> bool:
        """Whether loss and gradients are finite. If not, stop before they spoil the parameters, or skip the step.

        (The float16 scaler skips bad gradients itself.)
        """
        progress, config = self.progress, self.config
        bad_norm = not math.isfinite(progress.grad_norm) and not self.scaler.is_enabled()
        if math.isfinite(progress.train_loss) and not bad_norm:
            progress.skipped_steps = 0
            return True
        what = f"step {progress.step + 1} gave a loss of {progress.train_loss:g} and a gradient norm of "
        what += f"{progress.grad_norm:g}"
        if not config.max_skipped_steps:
            raise UserError(f"{what}, and training stopped before using them; {self.writer.kept()}; {self._mend()}")
        if progress.skipped_steps == config.max_skipped_steps:
            skipped = f"after {progress.skipped_steps} skipped steps in a row"
            raise UserError(f"{what} {skipped}, and training stopped; {self.writer.kept()}; {self._mend()}")
        progress.skipped_steps += 1
        print(f"{what}: skipped ({progress.skipped_steps} of at most {config.max_skipped_steps} in a row)", flush=True)
        return False

    def _mend(self) -> str:
        return f"try a lower --learning_rate (now {self.config.learning_rate:g}) or more --warmup_iters"

    def _log_if_due(self) -> None:
        """Evaluate if due; then a progress line, a line of metrics and W&B if either is due."""
        config, progress, stopwatch = self.config, self.progress, self.stopwatch
        evaluating = self._is_due(config.eval_interval)
        if not evaluating and not self._is_due(config.log_interval):
            return
        self.device.synchronize()
        stopwatch.lap()
        val_loss = splines = None
        if evaluating:
            with stopwatch.pause():
                splines = self._look()
                val_loss = evaluate(self.model, self.val_stream, config, self.device, self.world)
            progress.val_loss = val_loss
            progress.is_best = val_loss < progress.best_val_loss
            if progress.is_best:
                progress.best_val_loss = val_loss
        rate = learning_rate(progress.step - 1, config)
        is_best = evaluating and progress.is_best
        line = progress_line(
            progress.step,
            config.max_iters,
            progress.train_loss,
            progress.val_loss,
            is_best,
            rate,
            stopwatch,
            self._mfu(),
        )
        print(line, flush=True)
        record: dict[str, Any] = {
            "step": progress.step,
            "train_loss": progress.train_loss,
            "val_loss": val_loss,
            "learning_rate": rate,
            "grad_norm": progress.grad_norm,
            "tokens_per_second": stopwatch.tokens_per_second,
            "step_ms": 1000 * stopwatch.step_s,
            "elapsed_s": stopwatch.elapsed_s,
            **self.splines.metrics(),
        }
        if splines is not None:
            record["splines"] = splines
        self.writer.log(record)
        self.tracker.log(record, progress.step)

    def _mfu(self) -> float | None:
        """Share of the GPU's peak that the model's arithmetic reaches, where that peak is known."""
        peak = self.device.peak_flops()
        return self.model.flops_per_token() * self.stopwatch.tokens_per_second / peak if peak else None

    def _save(self) -> None:
        """Copy all that the run needs to go on as if it had not stopped; a thread writes it."""
        progress, config = self.progress, self.config
        if self.world.max(not self.parallel.is_finite()):
            raise UserError(
                f"step {progress.step} made parameters that are not finite; {self.writer.kept()}; {self._mend()}"
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
        self.writer.save(header, is_best=progress.is_best and self._is_due(config.eval_interval))
        progress.saved_step = progress.step

    def _look(self) -> list[dict[str, Any]] | None:
        """Record the splines; the numbers that sum them up, a dict a layer, on the main process."""
        model = self.parallel.whole() if self.config.splines else None
        return self.watch.look(model, self.progress.step) if self.world.is_main and model is not None else None

    def _show(self) -> None:
        """A sample, and the live report. They are for looking at: their failure does not stop the run."""
        step, model = self.progress.step, self.parallel.whole()
        if not self.world.is_main or model is None:
            return
        try:
            if self.config.sample_tokens:
                write_sample(model, self.dataset, self.run.directory, step, self.config.sample_tokens)
            if self.config.report == "live":
                write_report([self.run.directory], live=step < self.config.max_iters)
        except Exception as error:
            print(f"sample of step {step}: {type(error).__name__}: {error}; training goes on", flush=True)

    def report(self, stop: StopRequest) -> None:
        """Write report.html, unless the run was stopped; `python report.py` does it any time."""
        if self.config.report != "off" and self.world.is_main and not stop:
            try:
                write_report([self.run.directory])
            except Exception as error:
                print(f"report: {type(error).__name__}: {error}; the run is complete", flush=True)

    def tell_what_next(self, stop: StopRequest) -> None:
        directory, progress = self.run.directory, self.progress
        if stop:
            print(f"stopped by {stop.signal_name} at step {progress.step}, which is saved; go on with")
            print(f"  {self.writer.resume_command()}")
            return
        print(self.writer.summary(self.stopwatch.elapsed_s))
        best = f", best validation loss {progress.best_val_loss:.4f}" if math.isfinite(progress.best_val_loss) else ""
        print(f"done: {progress.step} steps in {duration(self.stopwatch.elapsed_s)}{best}")
        picture = self.watch.records.step_folder(progress.step) / "overview.png"
        if picture.is_file():
            print(f"splines: {picture}")
        print(f"sample:  {command('sample.py', str(directory))}")
        if (directory / REPORT_FILE).is_file():
            print(f"report:  {directory / REPORT_FILE} (open it in a browser)", flush=True)


if __name__ == "__main__":
    main()
