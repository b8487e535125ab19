"""Made-up runs for tests of the report: options, metrics, samples and records without any training."""

import dataclasses
import json
import math
from pathlib import Path

import torch

from kan_layer import KANLayer
from splines.records import SplineRecords
from splines.snapshot import Snapshot
from splines.statistics import layer_statistics
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
    config = dataclasses.replace(Config(), out_dir=str(folder), max_iters=max(layers_by_step), **changes)  # type: ignore[arg-type]
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
