"""Write text with a trained model: `python sample.py OUT_DIR --prompt "def "`."""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
from training.exported_model import load_model

SEED, TEMPERATURE = 1337, 0.8  # for the samples that training writes
USAGE = "python sample.py OUT_DIR [--prompt TEXT] [--key value …]"
SEPARATOR = "\n" + "-" * 40


@dataclass(frozen=True)
class Options:
    out_dir: tyro.conf.Positional[Path]
    """The run's directory, one of its checkpoint files, or a folder that export.py wrote."""
    prompt: str | None = None
    """Text to continue; - reads it from standard input. Without a prompt the model continues what you type, line by
    line until Ctrl-D; without a terminal it begins a new line."""
    prompt_file: Path | None = None
    """A UTF-8 file that holds the prompt. One line end at its end is dropped, as it is from standard input."""
    prompt_lines: bool = False
    """Take each line of the prompt that is not empty for a prompt of its own."""
    max_new_tokens: int = 500
    """Tokens per sample."""
    temperature: float = 0.8
    """Below 1 the text is more predictable, above 1 more surprising. 0 always takes the most likely token."""
    top_k: int = 0
    """Draw from the k most likely tokens only; 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities add up to at least p; 1: from all."""
    num_samples: int = 1
    """How many samples to write for each prompt."""
    batch_size: int = 8
    """Samples written at once: more are faster together and need more memory. The texts do not depend on it."""
    seed: int = 1337
    """The same seed gives the same samples; the second sample of a prompt is the first of the next seed, and so on."""
    step: str = "best"
    """Which checkpoint: best, latest or a step."""
    device: str = "cpu"
    """cpu, cuda or mps; small models are fastest on the CPU."""

    def __post_init__(self) -> None:
        if min(self.max_new_tokens, self.num_samples, self.batch_size) < 1:
            raise UserError("max_new_tokens, num_samples and batch_size must be at least 1")
        if self.prompt is not None and self.prompt_file is not None:
            raise UserError("give either --prompt or --prompt_file, not both")
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
    prompts = read_prompts(options)
    model, tokenizer = load_model(options.out_dir, options.step)
    writer = Writer(move(model, options.device), tokenizer, options)
    if prompts == [None] and sys.stdin.isatty() and sys.stdout.isatty():
        converse(writer)
    else:
        writer.write(prompts)
    print(writer.speed(), file=sys.stderr)


def read_prompts(options: Options) -> list[str | None]:
    """The prompts that the options give; None stands for the beginning of a line."""
    text = options.prompt
    try:
        if options.prompt_file is not None:
            text = without_last_line_end(options.prompt_file.read_bytes().decode("utf-8"))
        elif text == "-":
            text = without_last_line_end(sys.stdin.read())
    except UnicodeDecodeError as error:
        raise UserError(
            f"the prompt is not UTF-8 text ({error.reason} at byte {error.start}); save it as such"
        ) from error
    if text == "":
        raise UserError("the prompt is empty; give it some text, or leave it out")
    if not options.prompt_lines:
        return [text]
    lines = [line for line in (text or "").split("\n") if line]
    if not lines:
        raise UserError("--prompt_lines finds no line that is not empty; give --prompt, --prompt - or --prompt_file")
    return list(lines)


def without_last_line_end(text: str) -> str:
    """Editors and echo add one. Other line ends become those of training texts."""
    return text.replace("\r\n", "\n").removesuffix("\n")


def converse(writer: Writer) -> None:
    """Go on from each line that is typed, until the end of input (Ctrl-D). Ctrl-C ends a text before its time."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  lets input() edit lines and remember them
    print("Type how a text begins; Enter lets the model go on. Ctrl-C stops a text, Ctrl-D ends.", file=sys.stderr)
    with contextlib.suppress(EOFError):
        while True:
            prompt = input("> ")
            try:
                writer.write([prompt or None])
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                print()
    print()


class Writer:
    """Writes texts to standard output as they come into being, and counts them."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, options: Options) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.seeds = itertools.count(options.seed)
        self.tokens, self.seconds = 0, 0.0

    def write(self, prompts: Sequence[str | None]) -> None:
        """Write num_samples texts for each prompt, `batch_size` at once. Calls have seeds of their own, one behind the
        other; within a call all prompts share them, so that a text does not depend on the other prompts."""
        seeds = list(itertools.islice(self.seeds, self.options.num_samples))
        jobs = [(prompt, encode_prompt(prompt, self.tokenizer), seed) for prompt in prompts for seed in seeds]
        for start in range(0, len(jobs), self.options.batch_size):
            self._write_batch(jobs[start : start + self.options.batch_size], is_first=start == 0)

    def _write_batch(self, jobs: Sequence[tuple[str | None, list[int], int]], is_first: bool) -> None:
        """Write the first text while it is generated, the others when all are complete."""
        streams = [self.tokenizer.stream() for _ in jobs]
        texts = [prompt or "" for prompt, _, _ in jobs]
        print("" if is_first else SEPARATOR + "\n", texts[0], sep="", end="", flush=True)
        for tokens in self._generate([job[1] for job in jobs], [job[2] for job in jobs]):
            for row, token in enumerate(tokens):
                if token is None:
                    continue
                piece = streams[row].push(token)
                texts[row] += piece
                if row == 0:
                    print(piece, end="", flush=True)
        print(streams[0].finish())
        for text, stream in zip(texts[1:], streams[1:], strict=True):
            print(SEPARATOR, text + stream.finish(), sep="\n")

    def _generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Iterator[list[int | None]]:
        options = self.options
        generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
        start = time.perf_counter()

        def choose_token(row: int, logits: Tensor) -> int:
            return choose(logits, options.temperature, options.top_k, options.top_p, generators[row])

        try:
            for tokens in generate_batch(
                self.model, prompts, options.max_new_tokens, choose_token, self.tokenizer.vocab_size
            ):
                self.tokens += sum(token is not None for token in tokens)
                yield tokens
        finally:
            self.seconds += time.perf_counter() - start

    def speed(self) -> str:
        rate = f", {self.tokens / self.seconds:.0f} tokens/s" if self.tokens else ""
        return f"{self.tokens} tokens in {self.seconds:.2f} s{rate}"


def move(model: GPT, device: str) -> GPT:
    try:
        torch.empty(1, device=device).cpu()  # a device that holds no numbers, like meta, fails here
        # A matrix product rounds differently in batches of different sizes. In float32, which is all that mps has, that
        # changes a token in a million, and with it the rest of its text; in float64 none.
        return model.to(device, torch.float32 if device.startswith("mps") else torch.float64)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {device!r} cannot be used ({str(error).splitlines()[0]}); use --device cpu") from error


def encode_prompt(prompt: str | None, tokenizer: Tokenizer) -> list[int]:
    if prompt == "":
        raise UserError("the prompt is empty; give --prompt some text, or leave it out")
    if prompt is not None:
        return tokenizer.encode(prompt)
    try:
        return tokenizer.encode("\n")
    except UserError:  # the vocabulary has no line end
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
    """Yield tokens one by one, all below `vocab_size`: the model's vocabulary may be padded with unused rows.

    The model sees at most block_size tokens. When they are full, it goes on with the newer half of them.
    """

    def choose_token(row: int, logits: Tensor) -> int:
        return choose(logits, temperature, top_k, top_p, generator)

    for (token,) in generate_batch(model, [prompt], max_new_tokens, choose_token, vocab_size):
        assert token is not None
        yield token


@torch.no_grad()
def generate_batch(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    choose_token: Callable[[int, Tensor], int],
    vocab_size: int | None = None,
) -> Iterator[list[int | None]]:
    """Continue several prompts at once; each item holds the new token of every row, None for rows without one.

    All rows have the same position, so that one cache serves them without padding: the model reads the shortest prompt
    whole, and then one token of every row at a time, those of longer prompts as given. A row without a token is still
    reading, or complete. `choose_token` is given a row's number and its logits (vocab_size,) on the CPU.
    """
    device = model.token_embedding.weight.device
    block_size = model.config.block_size
    given = [list(prompt)[-block_size:] for prompt in prompts]
    shortest, longest = min(map(len, given)), max(map(len, given))
    rows = [prompt[:shortest] for prompt in given]
    cache, unseen = model.new_cache(len(rows)), rows
    for length in range(shortest, longest + max_new_tokens):
        if cache.length + len(unseen[0]) > block_size:
            unseen = [row[-max(1, block_size // 2) :] for row in rows]
            cache = model.new_cache(len(rows))
        logits, _ = model(torch.tensor(unseen, device=device), cache=cache)  # (rows, T, vocab_size)
        # Drawn on the CPU, so that a seed means the same text on every device.
        last = logits[:, -1, :vocab_size].to("cpu", torch.promote_types(logits.dtype, torch.float32))
        new: list[int | None] = [None] * len(rows)
        for number, (row, prompt) in enumerate(zip(rows, given, strict=True)):
            if len(prompt) <= length < len(prompt) + max_new_tokens:
                new[number] = choose_token(number, last[number])
            row.append(prompt[length] if length < len(prompt) else new[number] or 0)
        unseen = [row[-1:] for row in rows]
        if any(token is not None for token in new):
            yield new


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """Draw a token from logits (vocab_size,)."""
    if temperature == 0:
        return int(logits.argmax())
    logits = (logits - logits.max()).double() / temperature  # the maximum is 0, so that no temperature overflows
    probabilities = filter_top_p(filter_top_k(logits, top_k).softmax(dim=-1), top_p)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def filter_top_k(logits: Tensor, k: int) -> Tensor:
    """Set all but the k largest logits to -inf; k = 0 keeps all."""
    if k == 0 or k >= logits.numel():
        return logits
    kept = logits.topk(k)
    return torch.full_like(logits, -torch.inf).scatter(0, kept.indices, kept.values)


def filter_top_p(probabilities: Tensor, p: float) -> Tensor:
    """Keep the fewest, largest probabilities that add up to at least p; the others are 0 (Holtzman et al. 2019)."""
    if p >= 1:
        return probabilities
    ordered, indices = probabilities.sort(descending=True)
    before = ordered.cumsum(0) - ordered  # the sum over all more likely tokens
    return torch.zeros_like(probabilities).scatter(0, indices, ordered.where(before < p, 0.0))


def write_sample(model: GPT, dataset: Dataset, directory: Path, step: int, length: int) -> None:
    """Write samples/step_NNNNNN.txt. The seed is fixed, so that the samples of a run show how it learns."""
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
