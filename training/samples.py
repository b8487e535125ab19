"""Samples at checkpoints: what the model writes, the same way every time."""

from __future__ import annotations

from pathlib import Path

import torch

from model import GPT
from sample import generate
from training.dataset import Dataset

SEED, TEMPERATURE = 1337, 0.8


def write_sample(model: GPT, dataset: Dataset, directory: Path, step: int, length: int) -> None:
    """A sample with a fixed seed, so that the samples of a run show how it learns: samples/step_NNNNNN.txt."""
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(SEED)
    start = [int(dataset.tokens("val").shards[0][0])]
    tokens = list(generate(model, start, length, TEMPERATURE, 0, 1.0, generator, dataset.tokenizer.vocab_size))
    model.train(was_training)
    folder = directory / "samples"
    folder.mkdir(exist_ok=True)
    (folder / f"step_{step:06d}.txt").write_text(dataset.tokenizer.decode(start + tokens) + "\n", encoding="utf-8")
