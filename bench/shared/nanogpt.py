"""Runs nanoGPT's own train.py from the user's checkout. None of its code is copied here."""

from __future__ import annotations

import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.shared.race import Curve
from common.errors import UserError
from corpus.dataset import Dataset, ensure_prepared
from model import GPT, GPTConfig
from training.config import Config
from training.device import choose_device
from training.evaluation import evaluate

# The section "I only have a macbook" in nanoGPT's README.
RECIPE = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=50 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)
NAME = "nanoGPT's train.py"
ITERATION = re.compile(r"^iter (\d+): loss .* time ([\d.]+)ms", re.MULTILINE)
PARTS = {  # parts of parameter names, nanoGPT's → ours
    "transformer.wte.": "token_embedding.",
    "transformer.wpe.": "position_embedding.",
    "transformer.ln_f.": "norm.",
    "transformer.h.": "blocks.",
    "lm_head.": "head.",
    ".ln_1.": ".norm_1.",
    ".ln_2.": ".norm_2.",
    ".mlp.": ".ffn.",
}


def check_checkout(folder: Path) -> None:
    """Raise ValueError if nanoGPT cannot be run from `folder`."""
    if not (folder / "train.py").is_file():
        raise ValueError(f"nanogpt must be the folder of a checkout of nanoGPT; {folder} has no train.py")
    data = folder / "data" / "shakespeare_char"
    if not all((data / name).is_file() for name in ("train.bin", "val.bin", "meta.pkl")):
        raise ValueError(f"nanoGPT's data is not prepared; run python data/shakespeare_char/prepare.py in {folder}")


def command(out_dir: Path, *more: str) -> list[str]:
    """The command of nanoGPT's recipe for CPUs, to be run in its folder."""
    return [sys.executable, "train.py", *shlex.split(RECIPE), f"--out_dir={out_dir}", *more]


def environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads)}


def run(folder: Path, seed: int, threads: int) -> Curve:
    """Train by nanoGPT's recipe; the loss is its last checkpoint's on the whole validation split.

    Raises UserError if it fails. nanoGPT has no option for the seed, but takes any Python file as its configuration.
    One line in such a file shifts the seed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out_dir = Path(scratch) / "out"
        reseed = Path(scratch) / "seed.py"
        reseed.write_text(f"torch.manual_seed = lambda seed, set=torch.manual_seed: set(seed + {seed})\n")
        more = (str(reseed), "--always_save_checkpoint=True", "--eval_interval=2000")
        ms = train(folder, command(out_dir, *more), threads)
        saved = torch.load(out_dir / "ckpt.pt", map_location="cpu", weights_only=True)
    model = as_ours(saved["model"], saved["model_args"])
    steps = int(saved["iter_num"])
    return Curve(NAME, seed, model.num_parameters(), [steps], [steps * ms / 1000], [whole_split_loss(model)])


def train(folder: Path, command: list[str], threads: int) -> float:
    """Run a command of nanoGPT's train.py. Returns the median milliseconds of a step; raises UserError if it fails."""
    done = subprocess.run(command, cwd=folder, env=environment(threads), capture_output=True, text=True)
    times = [float(ms) for step, ms in ITERATION.findall(done.stdout) if int(step)]  # the first step warms up
    if done.returncode or not times:
        raise UserError(f"nanoGPT's train.py failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return statistics.median(times)


def step_ms(folder: Path, threads: int, steps: int = 150) -> float:
    """The median milliseconds of a step in a short run of nanoGPT's recipe. Raises UserError if it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        short = (f"--max_iters={steps}", "--log_interval=5", "--eval_interval=100000", "--eval_iters=1")
        return train(folder, command(Path(scratch) / "out", *short), threads)


def as_ours(weights: dict[str, Tensor], arguments: dict[str, Any]) -> GPT:
    """Convert nanoGPT's model to one of ours that computes the same."""
    shape = {name: arguments[name] for name in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")}
    options: dict[str, Any] = {"position": "learned", "norm": "layernorm", "qk_norm": False}
    model = GPT(GPTConfig(ffn="mlp", zero_init_projections=False, **options, **shape))
    renamed = {}
    for name, weight in weights.items():
        for theirs, ours in PARTS.items():
            name = name.replace(theirs, ours)
        renamed[name] = weight
    model.load_state_dict(renamed)
    return model


def whole_split_loss(model: GPT) -> float:
    config = Config(dataset="shakespeare_char", block_size=model.config.block_size, eval_iters=0, device="cpu")
    dataset = Dataset.open(ensure_prepared(config.dataset), verify=False)
    return evaluate(model, dataset.tokens("val"), config, choose_device(config))
