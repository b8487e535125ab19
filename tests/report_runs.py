"""Made-up runs for tests of the report: options, metrics, samples and records without any training."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch

from corpus.tokenizer import CharTokenizer
from kan_layer import KANLayer
from model import GPT
from splines.records import SplineRecords
from splines.snapshot import Snapshot
from splines.statistics import layer_statistics
from tests.runs import PLAIN
from training.checkpoint_files import save_checkpoint
from training.config import Config, save

LETTERS = "abcdefgh <\n"


def look_at(layer: KANLayer, index: int = 0, seed: int = 0, count: int = 500) -> Snapshot:
    """A snapshot with activations that depend a little on the token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(len(LETTERS), (count,), generator=generator)
    activations = torch.randn(count, layer.in_features, generator=generator) + 0.1 * tokens[:, None]
    return layer.snapshot(activations, tokens, number=index)


def make_run(
    folder: Path, layers_by_step: dict[int, list[KANLayer]], sample: str = "a sample", **changes: object
) -> Path:
    """Make a run that was evaluated, and whose splines were recorded, at these steps."""
    options: dict[str, Any] = {**PLAIN, **changes, "out_dir": str(folder), "max_iters": max(layers_by_step)}
    config = Config(**options)
    (folder / "samples").mkdir(parents=True)
    save(config, folder / "config.toml")
    facts = {
        "parameters": 123456,
        "ffn_parameters": 65536,
        "splines": 0,
        "tokenizer": {"name": "char", "vocabulary": LETTERS},
    }
    facts |= {"splines_computed_by": "native", "train_tokens": 1000, "val_tokens": 100, "device": "cpu, float32"}
    facts |= {"machine": "Linux", "torch": "2", "python": "3"}
    (folder / "run.json").write_text(json.dumps(facts))
    lines = []
    for step, layers in layers_by_step.items():
        record = {"step": step, "train_loss": 2 + math.exp(-step / 100), "val_loss": 2.1 + math.exp(-step / 100)}
        record |= {
            "learning_rate": 1e-3,
            "grad_norm": 1.0,
            "tokens_per_second": 2e4,
            "step_ms": 10.0,
            "elapsed_s": step / 10,
        }
        snapshots = [look_at(layer, index) for index, layer in enumerate(layers)]
        if snapshots:
            SplineRecords(folder).write(step, snapshots)
            record["splines"] = [layer_statistics(snapshot).as_dict() for snapshot in snapshots]  # type: ignore[assignment]
        lines.append(json.dumps(record))
        (folder / f"samples/step_{step:06d}.txt").write_text(f"{sample} {step}\n")
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def make_model_run(folder: Path, seed: int = 0, records: bool = True, **changes: object) -> GPT:
    """A run whose newest checkpoint is a model of these options with random weights; the model, in float64."""
    step = 10
    options: dict[str, Any] = {**PLAIN, **changes, "out_dir": str(folder)}
    config = Config(**options)
    tokenizer = CharTokenizer(LETTERS)
    model = GPT(config.model_config(tokenizer.vocab_size)).eval()
    randomize(model, seed)
    make_run(folder, {step: model.spline_layers() if records else []}, **changes)
    state = {"step": step, "config": dataclasses.asdict(config), "tokenizer": tokenizer.to_metadata()}
    state |= {"data_fingerprint": "", "vocab_size": model.config.vocab_size, "model": model.state_dict()}
    save_checkpoint(folder, {**state, "best_val_loss": 1.0}, is_best=False, keep=1)
    return model.double()


@torch.no_grad()
def randomize(model: GPT, seed: int) -> None:
    """Weights of the sizes that trained ones have, so that every part of the model matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:  # norms around one, biases around zero
            parameter.copy_(noise * 0.2 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
        else:
            fan_in = parameter.shape[0] if parameter.dim() == 3 else parameter.shape[1]
            parameter.copy_(noise / math.sqrt(fan_in) * (2.0 if "embedding" in name else 1.0))
