"""Time sampling beside nanoGPT's: `python bench/sampling.py --nanogpt ../nanoGPT`.

Both models have the layers, heads, width, context and vocabulary of our default run and random weights. Ours is sampled
as sample.py does, in float64 with a cache; nanoGPT's as its sample.py does, in float32. They take turns.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone, before this folder

import common.threads  # noqa: F401  before torch

import torch

from bench.shared.machine import machine_name
from bench.shared.timing import take_turns
from common.command_line import OptionParser, PathText
from common.errors import UserError, exit_on_user_error
from model import GPT
from sample import choose, generate_batch, move
from training.config import Config

USAGE = "python bench/sampling.py --nanogpt FOLDER [--key value …]"
VOCABULARY = 100  # about that of source code by character
TEMPERATURE, TOP_K = 0.8, 200  # nanoGPT's


@dataclass(frozen=True)
class Options:
    nanogpt: PathText
    """A checkout of nanoGPT."""
    tokens: int = 500
    """Tokens of a text."""
    texts: int = 16
    """Texts in the batch that is timed beside a single text; nanoGPT writes them one by one."""
    threads: int = 1
    """CPU threads."""
    repeats: int = 3
    """Rounds; the median is reported."""

    def __post_init__(self) -> None:
        if min(self.tokens, self.texts, self.threads, self.repeats) < 1:
            raise ValueError("tokens, texts, threads and repeats must be at least 1")


@exit_on_user_error
def main() -> None:
    options = OptionParser(Options, USAGE).parse(sys.argv[1:])
    torch.set_num_threads(options.threads)
    ours = move(GPT(Config().model_config(VOCABULARY)), "cpu").eval()
    theirs = nanogpt_model(Path(options.nanogpt), ours)
    print(
        f"{machine_name('cpu')}, torch {torch.__version__}, {options.threads} threads; {options.tokens} tokens a text"
    )
    print(f"parameters: {ours.num_parameters():,} ours, {theirs.get_num_params():,} nanoGPT's")
    print(f"{'':>12}{'ours, tokens/s':>18}{'nanoGPT':>12}{'ratio':>8}")
    for texts in dict.fromkeys((1, options.texts)):
        runs: dict[str, Callable[[], object]] = {
            "ours": partial(sample_ours, ours, texts, options.tokens),
            "nanoGPT": partial(sample_nanogpt, theirs, options.tokens),
        }
        times = take_turns(runs, options.repeats, "cpu")
        speeds = [texts * options.tokens / times["ours"].ms, options.tokens / times["nanoGPT"].ms]
        print(
            f"{texts:>5} text{'s' * (texts > 1):1} {1000 * speeds[0]:>18.0f}{1000 * speeds[1]:>12.0f}"
            f"{speeds[0] / speeds[1]:>8.1f}"
        )


def nanogpt_model(folder: Path, like: GPT) -> Any:
    """nanoGPT's model from its checkout, as large as `like`. UserError if there is none."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    if spec is None or spec.loader is None or not (folder / "model.py").is_file():
        raise UserError(f"nanogpt must be the folder of a checkout of nanoGPT; {folder} has no model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    config = like.config
    shape = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    return module.GPT(module.GPTConfig(**shape, bias=False, dropout=0.0)).eval()


def sample_ours(model: GPT, texts: int, tokens: int) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in range(texts)]

    def choose_token(row: int, logits: torch.Tensor) -> int:
        return choose(logits, TEMPERATURE, TOP_K, 1.0, generators[row])

    for _ in generate_batch(model, [[0]] * texts, tokens, choose_token):
        pass


@torch.no_grad()
def sample_nanogpt(model: Any, tokens: int) -> None:
    model.generate(torch.zeros(1, 1, dtype=torch.long), tokens, temperature=TEMPERATURE, top_k=TOP_K)


if __name__ == "__main__":
    main()
