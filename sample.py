"""Write text with a trained model: `python sample.py OUT_DIR --prompt "def "`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import common.threads  # noqa: F401  before torch

import torch
import tyro
from torch import Tensor

from common.command_line import OptionParser
from common.errors import UserError, exit_on_user_error
from corpus.dataset import Dataset
from corpus.tokenizer import Tokenizer
from model import GPT
from training.checkpoint import load_checkpoint

SEED, TEMPERATURE = 1337, 0.8  # of the samples that training writes
USAGE = "python sample.py OUT_DIR [--prompt TEXT] [--key value …]"


@dataclass(frozen=True)
class Options:
    out_dir: tyro.conf.Positional[Path]
    """The run's directory, or one of its checkpoint files."""
    prompt: str | None = None
    """Text to go on from; by default the beginning of a line."""
    max_new_tokens: int = 500
    """Tokens to write per sample."""
    temperature: float = 0.8
    """Below 1 more predictable, above 1 more surprising; 0 always takes the likeliest token."""
    top_k: int = 0
    """Choose among the k likeliest tokens only; 0 for all."""
    top_p: float = 1.0
    """Choose among the fewest tokens whose probabilities add up to p; 1 for all."""
    num_samples: int = 1
    """How many samples to write."""
    seed: int = 1337
    """The same seed gives the same samples."""
    step: str = "best"
    """Which checkpoint: best, latest or a step."""
    device: str = "cpu"
    """cpu, cuda or mps; small models are fastest on the CPU."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.num_samples < 1:
            raise UserError("max_new_tokens and num_samples must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be 0 or a finite number above; got {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (all tokens) or more; got {self.top_k}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be from 0 to 2**63 - 1; got {self.seed}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1; got {self.top_p}")


@exit_on_user_error
def main() -> None:
    options = OptionParser(Options, USAGE, positional="out_dir").parse(sys.argv[1:])
    checkpoint = load_checkpoint(options.out_dir, options.step)
    model = move(checkpoint.model, options.device)
    tokens = encode_prompt(options.prompt, checkpoint.tokenizer)
    generator = torch.Generator().manual_seed(options.seed)
    for number in range(options.num_samples):
        if number:
            print("\n" + "-" * 40)
        stream = checkpoint.tokenizer.stream()
        print(options.prompt or "", end="", flush=True)
        for token in generate(
            model,
            tokens,
            options.max_new_tokens,
            options.temperature,
            options.top_k,
            options.top_p,
            generator,
            checkpoint.tokenizer.vocab_size,
        ):
            sys.stdout.write(stream.push(token))
            sys.stdout.flush()
        print(stream.finish())


def move(model: GPT, device: str) -> GPT:
    try:
        torch.empty(1, device=device).cpu()  # a device that holds no numbers, like meta, fails here
        return model.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {device!r} cannot be used ({str(error).splitlines()[0]}); use --device cpu") from error


def encode_prompt(prompt: str | None, tokenizer: Tokenizer) -> list[int]:
    if prompt == "":
        raise UserError("the prompt is empty; give --prompt some text, or leave it out")
    if prompt is not None:
        return tokenizer.encode(prompt)
    try:
        return tokenizer.encode("\n")
    except UserError:  # a vocabulary without line ends
        return [0]


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Tokens one by one, all below `vocab_size`: the model's own may be larger, padded with rows that mean nothing.

    The model sees at most its block_size: when that is full, it goes on from the newer half.
    """
    device = model.token_embedding.weight.device
    block_size = model.config.block_size
    context = list(prompt)[-block_size:]
    cache, unseen = model.new_cache(), context
    for _ in range(max_new_tokens):
        if cache.length + len(unseen) > block_size:
            context = context[-max(1, block_size // 2) :]
            cache, unseen = model.new_cache(), context
        logits, _ = model(torch.tensor([unseen], device=device), cache=cache)  # (1, T, vocab_size)
        # Drawn on the CPU, so that a seed means the same text on every device.
        token = choose(logits[0, -1, :vocab_size].float().cpu(), temperature, top_k, top_p, generator)
        context.append(token)
        unseen = [token]
        yield token


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """Draw a token from logits (vocab_size,)."""
    if temperature == 0:
        return int(logits.argmax())
    logits = (logits - logits.max()).double() / temperature  # so that no temperature overflows
    probabilities = filter_top_p(filter_top_k(logits, top_k).softmax(dim=-1), top_p)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def filter_top_k(logits: Tensor, k: int) -> Tensor:
    """All but the k largest set to -inf; k = 0 keeps all."""
    if k == 0 or k >= logits.numel():
        return logits
    kept = logits.topk(k)
    return torch.full_like(logits, -torch.inf).scatter(0, kept.indices, kept.values)


def filter_top_p(probabilities: Tensor, p: float) -> Tensor:
    """The fewest, largest probabilities that add up to at least p, the others set to 0 (Holtzman et al. 2019)."""
    if p >= 1:
        return probabilities
    ordered, indices = probabilities.sort(descending=True)
    before = ordered.cumsum(0) - ordered  # what the likelier tokens have together
    return torch.zeros_like(probabilities).scatter(0, indices, ordered.where(before < p, 0.0))


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


if __name__ == "__main__":
    main()
