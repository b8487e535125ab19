"""Straighten what is nearly straight: `python simplify.py OUT_DIR --tolerance 0.2` writes a run with fewer curves.

With --fit N it instead prints formulas for the N most curved splines, or for those that are named.
"""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import common.threads  # noqa: F401  before torch

import torch
import tyro

from common.command_line import OptionParser, command
from common.errors import UserError, exit_on_user_error
from common.files import write_atomically
from common.output import output_may_fail
from corpus.dataset import Dataset, ensure_prepared
from kan_layer import KANLayer
from model import GPT
from splines import simplification
from splines.choice import ALL, chosen_splines, layers_to_draw, parse_features
from splines.formulas import best_fit
from splines.views import view_splines
from training.activations import layer_inputs
from training.checkpoint import LoadedCheckpoint, load_checkpoint, read_state, save_checkpoint
from training.config import save
from training.device import choose_device
from training.evaluation import evaluate
from training.run import CONFIG_FILE
from training.run_splines import run_directory, splines_at, validation_batches

USAGE = "python simplify.py OUT_DIR [--tolerance T] [--fit N] [--key value …]"


@dataclass(frozen=True)
class Options:
    out_dir: tyro.conf.Positional[Path]
    """The run's directory, or one of its checkpoint files."""
    tolerance: float = 0.2
    """How much a spline may change, as a part of a typical one into the same output (root mean square over tokens)."""
    step: str = "latest"
    """Which checkpoint: latest, best or a step."""
    output: Path | None = None
    """Directory of the simplified run; by default OUT_DIR-simplified."""
    fit: int = 0
    """Print formulas with their R² for this many of the most curved splines, and write nothing."""
    layer: int | None = None
    """With --fit: only this layer."""
    inputs: str = ""
    """With --fit and --layer: only these input features, as in 3 or 3,17."""
    outputs: str = ""
    """With --fit and --layer: only these output features."""

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < float("inf"):
            raise UserError(f"tolerance must be 0 or a finite number above; got {self.tolerance}")
        if self.fit < 0:
            raise UserError(f"fit must be a number of splines, 0 or more; got {self.fit}")
        if (self.inputs or self.outputs) and self.layer is None:
            raise UserError("--inputs and --outputs are features of a layer; say which with --layer")


@dataclass(frozen=True)
class Shares:
    """What became of a layer's splines."""

    curved: int
    straight: int
    removed: int
    points: int
    """Control points of a spline."""

    @property
    def numbers(self) -> int:
        """What is left to store: all control points of a curve, the slope of a line."""
        return self.curved * self.points + self.straight

    @property
    def all(self) -> int:
        return self.curved + self.straight + self.removed


@output_may_fail()  # minutes of work are not to be lost with their reader
@exit_on_user_error
def main() -> None:
    options = OptionParser(Options, USAGE, positional="out_dir").parse(sys.argv[1:])
    if options.fit or options.layer is not None:
        print_fits(options)
        return
    checkpoint = load_checkpoint(options.out_dir, options.step)
    output = options.output or Path(f"{run_directory(options.out_dir)}-simplified")
    check_output(output)
    simple, shares = simplified(checkpoint, options.tolerance)
    describe(shares)
    before, after = losses(checkpoint, [checkpoint.model, simple])
    print(f"validation loss {before:.4f} → {after:.4f} ({after - before:+.4f})")
    write_run(checkpoint, simple, output)
    print(f"written: {output}")
    print(f"  {command('sample.py', str(output))}")
    longer = str(2 * max(1, checkpoint.step))
    print(f"  {command('train.py', '--out_dir', str(output), '--resume', 'True', '--max_iters', longer)}")


def check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is there already; choose another --output")


def simplified(checkpoint: LoadedCheckpoint, tolerance: float) -> tuple[GPT, list[Shares]]:
    """A copy of the model with simpler splines, and what became of them. All layers are judged by the original."""
    model = copy.deepcopy(checkpoint.model)
    if not model.spline_layers():
        raise UserError(
            f"{checkpoint.path} has no splines to simplify: it was trained with ffn={checkpoint.config.ffn}"
        )
    inputs, _ = layer_inputs(checkpoint.model, validation_batches(checkpoint))
    if not inputs:
        raise UserError(f"simplifying needs the dataset {checkpoint.config.dataset}, to see what reaches the splines")
    shares = []
    for layer, x in zip(model.spline_layers(), inputs, strict=True):
        rows = layer.rows(x)
        assert rows is not None
        seen = simplification.moments(rows, layer.grid)
        plan = simplification.plan(layer.control_points().detach().float().numpy(), seen, tolerance)
        apply(plan, layer)
        curved, straight, removed = (int(part.sum()) for part in (plan.kept, plan.straight, plan.removed))
        shares.append(Shares(curved, straight, removed, layer.num_control_points))
    return model, shares


@torch.no_grad()
def apply(plan: simplification.Replacements, layer: KANLayer) -> None:
    """Put the planned lines and zeros into `layer`."""
    points, knots = (values.detach().double().cpu().numpy() for values in (layer.control_points(), layer.knots()))
    values, gain = simplification.replace(points, knots, plan, layer.bias is not None, layer.zero_centred)
    layer.set_control_points(torch.from_numpy(values))
    if layer.bias is not None:
        layer.bias.add_(torch.from_numpy(gain).to(layer.bias))


def describe(shares: Sequence[Shares]) -> None:
    print("layer   curved  straight  removed")
    for number, each in enumerate(shares):
        parts = (each.curved, each.straight, each.removed)
        print(f"{number:>5}" + "".join(f"{100 * part / each.all:>8.1f} %" for part in parts))
    before, after = sum(each.all * each.points for each in shares), sum(each.numbers for each in shares)
    print(f"numbers in splines {before:,} → {after:,} ({100 * after / before:.1f} %)")


def losses(checkpoint: LoadedCheckpoint, models: Sequence[GPT]) -> list[float]:
    """The validation loss of each model, measured as the run measured its own."""
    config = replace(checkpoint.config, device="cpu", dtype="float32", compile=False)
    stream = Dataset.open(ensure_prepared(config.dataset), verify=False).tokens("val")
    device = choose_device(config)
    return [evaluate(model, stream, config, device) for model in models]


def write_run(checkpoint: LoadedCheckpoint, model: GPT, output: Path) -> None:
    """A run directory that holds the simplified model as its one checkpoint; the optimizer's state comes along."""
    state = {**read_state(checkpoint.path), "model": model.state_dict()}
    output.mkdir(parents=True, exist_ok=True)
    save_checkpoint(output, state, is_best=True, keep=1)
    resolved = replace(checkpoint.config, out_dir=str(output), resume=False)
    write_atomically(output / CONFIG_FILE, lambda temporary: save(resolved, temporary))
    for name in ("metrics.jsonl", "run.json"):
        source = run_directory(checkpoint.path) / name
        if source.is_file():
            shutil.copyfile(source, output / name)


def print_fits(options: Options) -> None:
    """A table of splines, the formulas that come closest, and how close."""
    step, _, snapshots = splines_at(options.out_dir, options.step)
    print(f"step {step}; R² is the part of a spline's variation, over the activations, that its formula explains")
    print("layer  input → output     R²   formula")
    layers = layers_to_draw(snapshots, options.layer)
    inputs, outputs = parse_features(options.inputs, "inputs"), parse_features(options.outputs, "outputs")
    for layer in layers:
        snapshot = snapshots[layer]
        try:
            edges = chosen_splines(snapshot, inputs, outputs, -(-options.fit // len(layers)) or ALL)
        except ValueError as error:
            raise UserError(str(error)) from error
        for view in view_splines(snapshot, edges):
            found = best_fit(view)
            print(f"{layer:>5}  {view.input:>5} → {view.output:<6}  {found.r2:>6.3f}   {found}")


if __name__ == "__main__":
    main()
