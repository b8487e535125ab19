"""Facts about a run beyond its options (sizes, vocabulary, machine, versions): run.json, and its opening lines."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from common.files import write_atomically
from corpus.dataset import Dataset
from model import GPT
from training.device import Device
from training.run import Run

FACTS_FILE = "run.json"


def write_facts(directory: Path, model: GPT, dataset: Dataset, device: Device) -> None:
    """Raises OSError."""
    layers = model.spline_layers()
    facts = {
        "parameters": model.num_parameters(),
        "ffn_parameters": model.num_ffn_parameters(),
        "splines": sum(layer.in_features * layer.out_features for layer in layers),
        "splines_computed_by": layers[0].resolved_impl if layers else None,
        "train_tokens": dataset.meta.total_tokens("train"),
        "val_tokens": dataset.meta.total_tokens("val"),
        "tokenizer": dataset.tokenizer.to_metadata(),
        "device": str(device),
        "machine": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    text = json.dumps(facts, ensure_ascii=False, indent=1) + "\n"
    write_atomically(directory / FACTS_FILE, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def opening_lines(run: Run, model: GPT, dataset: Dataset, device: str) -> Iterator[str]:
    """The lines that a run begins with: where it is kept, its data, its model, its device, its splines."""
    config, meta, layers = run.config, dataset.meta, model.spline_layers()
    kind = f"spline layers, G={layers[0].num_control_points}" if layers else config.ffn
    yield f"run     {run.directory}" + (f", resumed at step {run.state['step']}" if run.state else "")
    yield (
        f"data    {config.dataset}: {meta.total_tokens('train'):,} tokens to train on, "
        f"{meta.total_tokens('val'):,} to validate, vocabulary {dataset.tokenizer.vocab_size:,}"
    )
    yield (
        f"model   {config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, context {config.block_size}: "
        f"{model.num_parameters():,} parameters, {model.num_ffn_parameters():,} of them in {kind}"
    )
    yield f"device  {device}"
    if not layers:
        return
    if config.fitted_share_outside:
        widths = [layer.spline_width for layer in layers]
        yield f"grids   {min(widths):.3g} to {max(widths):.3g} wide, fitted to the activations"
    yield f"splines computed by {layers[0].resolved_impl} ({layers[0].why_this_impl})"


def read_facts(directory: Path) -> dict[str, Any]:
    """What `write_facts` wrote; {} where there is nothing to read."""
    try:
        facts = json.loads((directory / FACTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
