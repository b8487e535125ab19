"""run.json: what a run is that its options do not say, for reports: sizes, vocabulary, machine, versions."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from common.files import write_atomically
from corpus.dataset import Dataset
from model import GPT
from training.device import Device

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


def read_facts(directory: Path) -> dict[str, Any]:
    """What `write_facts` wrote; {} where there is nothing to read."""
    try:
        facts = json.loads((directory / FACTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
