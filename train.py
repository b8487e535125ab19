"""Train a GPT with spline blocks: `python train.py [configs/NAME.toml] [--key value …]`; --help lists the options."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import backends
from model import GPT
from sample import generate
from training.batches import BatchSampler, evaluation_batches
from training.checkpoint import save_checkpoint, training_state
from training.dataset import Dataset, ensure_prepared
from training.device import Device, choose_device
from training.errors import UserError, exit_on_user_error
from training.evaluation import EVALUATION_TOKENS, evaluate
from training.interrupt import StopRequest
from training.optimizer import load_state, make_optimizer, set_learning_rate
from training.pictures import SplinePictures, picture_batches
from training.progress import Metrics, Stopwatch, duration, progress_line
from training.run import Run, command, open_run
from training.schedule import learning_rate
from training.spline_training import SplineTraining
from training.tracker import Tracker

SAMPLE_SEED, SAMPLE_TEMPERATURE = 1337, 0.8


@exit_on_user_error
def main() -> None:
    run = open_run(sys.argv[1:])
    dataset = Dataset.open(ensure_prepared(run.config.dataset), run.config.verify_data)
    device = choose_device(run.config)
    trainer = Trainer(run, dataset, device)
    trainer.describe()
    with StopRequest() as stop:
        trainer.train(stop)
    trainer.tell_what_next(stop)
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
    saved_step: int = -1


class Trainer:
    """One run, from its first (or resumed) step to its last."""

    def __init__(self, run: Run, dataset: Dataset, device: Device) -> None:
        self.run, self.config, self.dataset, self.device = run, run.config, dataset, device
        config = run.config
        torch.manual_seed(config.seed)
        self.model = build_model(run, dataset, device)
        self.step_model: nn.Module = torch.compile(self.model) if device.compile else self.model  # type: ignore[assignment]
        self.compiling = device.compile  # in the first step, which is not timed
        self.splines = SplineTraining(self.model, config)
        self.optimizer = make_optimizer(self.model, config)
        self.scaler = device.grad_scaler()
        self.progress = Progress()
        sequences = config.batch_size * config.gradient_accumulation_steps
        self.batches = BatchSampler(dataset.tokens("train"), config.block_size, sequences, config.seed)
        self.val_stream = dataset.tokens("val")
        evaluation_batches(self.val_stream, config.block_size, config.batch_size, config.eval_iters)  # is there enough?
        elapsed_s, wandb_id = self._restore(run) if run.state else (0.0, None)
        self.stopwatch = Stopwatch(sequences * config.block_size, elapsed_s)
        run.create()
        self.metrics = Metrics(run.directory / "metrics.jsonl", self.progress.step)
        self.tracker = Tracker(config, run.directory, wandb_id)

    def _restore(self, run: Run) -> tuple[float, str | None]:
        state = run.state
        assert state is not None
        if state["data_fingerprint"] != self.dataset.fingerprint:
            raise UserError(
                f"{self.dataset.folder} is not the data that {run.directory} was trained on; "
                f"prepare that again, or start a new run in another --out_dir"
            )
        try:
            self.model.load_state_dict(state["model"])
            load_state(self.optimizer, state["optimizer"])
            if state["scaler"] and self.scaler.is_enabled():  # empty unless that run was in float16 too
                self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"the newest checkpoint of {run.directory} does not fit its configuration") from error
        torch.set_rng_state(state["rng"]["cpu"])
        if "cuda" in state["rng"] and self.device.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device.device)
        self.progress.step = self.progress.saved_step = state["step"]
        self.progress.best_val_loss = state["best_val_loss"]
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
        print(f"device  {self.device}")
        if layers:
            if config.fitted_share_outside:
                widths = [layer.spline_width for layer in layers]
                print(f"grids   {min(widths):.3g} to {max(widths):.3g} wide, fitted to the activations")
            print(f"splines computed by {layers[0].resolved_impl} ({layers[0].why_this_impl})")
        sys.stdout.flush()

    def train(self, stop: StopRequest) -> None:
        """All steps that are left, with evaluations and checkpoints between; returns early when asked to stop."""
        config, progress = self.config, self.progress
        try:
            while progress.step < config.max_iters and not stop:
                self.step()
                self._log_if_due()
                if self._is_due(config.eval_interval):
                    with self.stopwatch.pause():
                        self._save()
                        self._show()
            if progress.saved_step != progress.step:
                self._save()
        except BrokenPipeError:  # who read the progress lines has gone away: not a matter of the disk
            raise
        except OSError as error:
            raise UserError(self._cannot_write(error)) from error
        finally:
            self.metrics.close()
            self.tracker.finish()

    def _is_due(self, interval: int) -> bool:
        return self.progress.step % interval == 0 or self.progress.step == self.config.max_iters

    def step(self) -> None:
        """One optimizer step on gradient_accumulation_steps micro-batches."""
        progress, config = self.progress, self.config
        set_learning_rate(self.optimizer, learning_rate(progress.step, config))
        self.step_model.train()
        x, y = self.batches.batch(progress.step)
        loss = torch.zeros((), device=self.device.device)
        for x_part, y_part in zip(x.split(config.batch_size), y.split(config.batch_size), strict=True):
            with self.device.autocast():
                _, part = self.step_model(x_part.to(self.device.device), y_part.to(self.device.device))
            loss += part.detach() / config.gradient_accumulation_steps
            part = (part + self.splines.penalty()) / config.gradient_accumulation_steps
            self.scaler.scale(part).backward()
        self.scaler.unscale_(self.optimizer)
        limit = config.grad_clip or math.inf
        progress.grad_norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        progress.train_loss = float(loss)
        self._refuse_nonfinite()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        untimed, self.compiling = self.compiling, False
        if self.splines.refine(progress.step, self.optimizer):
            untimed, self.compiling = True, self.device.compile  # once more, for the new shapes
        if untimed:
            self.stopwatch.restart()
        else:
            self.stopwatch.step()

    def _refuse_nonfinite(self) -> None:
        """Stop before the step that would spoil the parameters. (The float16 scaler skips bad gradients itself.)"""
        progress = self.progress
        bad_norm = not math.isfinite(progress.grad_norm) and not self.scaler.is_enabled()
        if math.isfinite(progress.train_loss) and not bad_norm:
            return
        raise UserError(
            f"step {progress.step + 1} gave a loss of {progress.train_loss:g} and a gradient norm of "
            f"{progress.grad_norm:g}, and training stopped before using them; {self._kept()}; {self._mend()}"
        )

    def _kept(self) -> str:
        saved = self.progress.saved_step
        return f"the checkpoint of step {saved} is good" if saved >= 0 else "nothing was saved yet"

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
        val_loss = None
        if evaluating:
            with stopwatch.pause():
                val_loss = progress.val_loss = evaluate(self.model, self.val_stream, config, self.device)
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
        record = {
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
        self.metrics.write(record)
        self.tracker.log(record, progress.step)

    def _mfu(self) -> float | None:
        """Share of the GPU's peak that the model's arithmetic reaches, where that peak is known."""
        peak = self.device.peak_flops()
        return self.model.flops_per_token() * self.stopwatch.tokens_per_second / peak if peak else None

    def _save(self) -> None:
        progress = self.progress
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise UserError(f"step {progress.step} made parameters that are not finite; {self._kept()}; {self._mend()}")
        state = training_state(
            self.model,
            self.optimizer,
            self.scaler,
            self.device.device,
            self.config,
            self.dataset.tokenizer,
            self.dataset.fingerprint,
            progress.step,
            progress.best_val_loss,
            self.stopwatch.elapsed_s,
            self.tracker.run_id,
        )
        is_best = progress.is_best and self._is_due(self.config.eval_interval)
        save_checkpoint(self.run.directory, state, is_best, self.config.keep_checkpoints)
        progress.saved_step = progress.step

    def _show(self) -> None:
        """Pictures of the splines and a sample. They are for looking at: their failure does not stop the run."""
        step = self.progress.step
        try:
            self.splines.warn_once(self.val_stream)
            if self.config.splines:
                folder = SplinePictures(self.run.directory).draw(
                    self.model, step, picture_batches(self.val_stream, self.config.block_size)
                )
                if folder is not None:
                    self.tracker.log_picture(folder / "overview.png", step)
            if self.config.sample_tokens:
                write_sample(self.model, self.dataset, self.run.directory, step, self.config.sample_tokens)
        except Exception as error:
            print(f"pictures and sample of step {step}: {type(error).__name__}: {error}; training goes on", flush=True)

    def _cannot_write(self, error: OSError) -> str:
        return (
            f"{self.run.directory} could not be written at step {self.progress.step} "
            f"({error.strerror or error}); {self._kept()}: "
            f"make room, then go on with {self._resume_command()}"
        )

    def _resume_command(self) -> str:
        return command("train.py", "--out_dir", str(self.run.directory), "--resume", "True")

    def tell_what_next(self, stop: StopRequest) -> None:
        directory, progress = self.run.directory, self.progress
        if stop:
            print(f"stopped by {stop.signal_name} at step {progress.step}, which is saved; go on with")
            print(f"  {self._resume_command()}")
            return
        best = f", best validation loss {progress.best_val_loss:.4f}" if math.isfinite(progress.best_val_loss) else ""
        print(f"done: {progress.step} steps in {duration(self.stopwatch.elapsed_s)}{best}")
        picture = SplinePictures(directory).step_folder(progress.step) / "overview.png"
        if picture.is_file():
            print(f"splines: {picture}")
        print(f"sample:  {command('sample.py', str(directory))}", flush=True)


def build_model(run: Run, dataset: Dataset, device: Device) -> GPT:
    """The model that a run goes on with, on its device, with the grids of its step (not yet with saved parameters).

    UserError if the vocabulary or the chosen backend does not fit.
    """
    config, tokenizer = run.config, dataset.tokenizer
    if run.source is None and 0 < config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"vocab_size {config.vocab_size} is below the {tokenizer.vocab_size} of {config.dataset}; use 0 or more"
        )
    model_config = config.model_config(tokenizer.vocab_size)
    try:
        if config.ffn == "kan":
            width, tokens = config.n_embd, max(config.batch_size * config.block_size, EVALUATION_TOKENS)
            for stage in config.stages():
                problem = backends.Problem(width, stage.points, width, device.device, tokens)
                backends.choose(config.kan_impl, problem)
        model = run.source.build(model_config, tokenizer) if run.source is not None else GPT(model_config)
        model = model.to(device.device)
        splines = SplineTraining(model, config)
        if run.state is None:
            splines.begin(dataset.tokens("train"))
        splines.refine(run.state["step"] if run.state else 0)
        return model
    except ValueError as error:
        raise UserError(str(error)) from error


def write_sample(model: GPT, dataset: Dataset, directory: Path, step: int, length: int) -> None:
    """A sample with a fixed seed, so that the samples of a run show how it learns: samples/step_NNNNNN.txt."""
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    start = [int(dataset.tokens("val").shards[0][0])]
    tokens = list(generate(model, start, length, SAMPLE_TEMPERATURE, 0, 1.0, generator, dataset.tokenizer.vocab_size))
    model.train(was_training)
    folder = directory / "samples"
    folder.mkdir(exist_ok=True)
    (folder / f"step_{step:06d}.txt").write_text(dataset.tokenizer.decode(start + tokens) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
