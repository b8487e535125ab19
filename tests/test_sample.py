"""Sampling: the cache changes nothing, filters keep the right tokens, and a seed gives one text."""

import io
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import train
from corpus.tokenizer import GPT2Tokenizer
from corpus.writer import DatasetWriter
from model import GPT
from sample import choose, filter_top_k, filter_top_p, generate, generate_batch, main, move
from tests.data_fixtures import gpt2_vocabulary  # noqa: F401  a fixture
from tests.runs import (
    ROOT,
    Result,
    assert_one_sentence,
    call,
    command,
    make_dataset,
    options,
    random_words,
    train_until,
)
from tests.terminal import Terminal
from training.checkpoint import LoadedCheckpoint, load_checkpoint
from training.config import Config

BLOCK = 16
VARIED = {"max_iters": 40, "eval_interval": 40, "kan_init": "random_normal"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    out_dir = tmp_path_factory.mktemp("runs") / "kan"
    train_until(options(dataset, out_dir, **VARIED))
    return out_dir


@pytest.fixture(scope="module")
def trained(run: Path) -> LoadedCheckpoint:
    return load_checkpoint(run)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens_of(model: GPT, prompt: list[int], count: int, temperature: float = 0.0, seed: int = 0) -> list[int]:
    return list(generate(model, prompt, count, temperature, 0, 1.0, generator(seed)))


def naive_argmax(model: GPT, context: list[int]) -> int:
    with torch.no_grad():
        return int(model(torch.tensor([context]))[0][0, -1].argmax())


def untrained(**changes: object) -> GPT:
    torch.manual_seed(1)
    config = Config(n_layer=2, n_head=2, n_embd=16, block_size=BLOCK, zero_init_projections=False, **changes)
    model = GPT(config.model_config(23)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("length", [1, 5, BLOCK])
@pytest.mark.parametrize(
    "changes",
    [{}, {"position": "learned", "norm": "layernorm", "qk_norm": False}, {"ffn": "mlp"}, {"ffn": "swiglu"}],
    ids=str,
)
def test_generation_with_the_cache_is_that_of_whole_contexts(changes: dict[str, object], length: int) -> None:
    model = untrained(**changes)
    context = [(7 * i) % 23 for i in range(length)]
    count = BLOCK + 1 - length  # so that the last token is predicted from a full context
    found = tokens_of(model, context, count)
    for token in found:
        assert token == naive_argmax(model, context)
        context.append(token)
    assert len(found) == count


@pytest.mark.parametrize("block_size", [1, 2, 5, BLOCK])
def test_generation_goes_on_beyond_the_context_from_its_newer_half(block_size: int) -> None:
    torch.manual_seed(1)
    model = GPT(Config(n_layer=1, n_head=2, n_embd=8, block_size=block_size).model_config(23)).eval()
    context = [3, 1, 2][-block_size:]
    whole = list(context)
    for token in tokens_of(model, [3, 1, 2], 3 * BLOCK):
        if len(context) > block_size:
            context = context[-max(1, block_size // 2) :]
        assert token == naive_argmax(model, context)
        context.append(token)
        whole.append(token)
    assert len(whole) >= 3 * BLOCK


def test_a_prompt_longer_than_the_context_counts_by_its_end(trained: LoadedCheckpoint) -> None:
    prompt = [i % trained.tokenizer.vocab_size for i in range(5 * BLOCK)]
    assert tokens_of(trained.model, prompt, 20) == tokens_of(trained.model, prompt[-BLOCK:], 20)


def test_greedy_generation_depends_on_no_seed(trained: LoadedCheckpoint) -> None:
    assert tokens_of(trained.model, [1], 50, 0.0, seed=1) == tokens_of(trained.model, [1], 50, 0.0, seed=2)


def test_generation_leaves_the_prompt_and_the_global_generator_alone(trained: LoadedCheckpoint) -> None:
    prompt, state = [1, 2], torch.get_rng_state()
    tokens_of(trained.model, prompt, 20, 1.0)
    assert prompt == [1, 2] and torch.equal(torch.get_rng_state(), state)


LOGITS = st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=12).map(torch.tensor)


@settings(deadline=None)
@given(LOGITS, st.integers(0, 14))
def test_top_k_keeps_the_k_largest(logits: Tensor, k: int) -> None:
    filtered = filter_top_k(logits, k)
    kept = filtered > -torch.inf
    assert int(kept.sum()) == (min(k, len(logits)) or len(logits))
    assert torch.equal(filtered[kept], logits[kept])
    assert not len(logits[~kept]) or logits[~kept].max() <= logits[kept].min()


def dyadic(weights: list[int]) -> Tensor:
    """Multiples of 1/1024 as probabilities, which floating point adds up exactly."""
    weights = [*weights, 1024 - sum(weights)]
    return torch.tensor(weights, dtype=torch.float32) / 1024


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 128), max_size=8).map(dyadic), st.integers(1, 1024).map(lambda n: n / 1024))
def test_top_p_keeps_the_fewest_tokens_that_reach_p(probabilities: Tensor, p: float) -> None:
    found = filter_top_p(probabilities, p)
    kept = probabilities[found > 0]
    assert torch.equal(found[found > 0], kept)
    fewest, total = 0, 0.0
    for probability in sorted(probabilities.tolist(), reverse=True):
        if total >= p:
            break
        fewest, total = fewest + 1, total + probability
    assert len(kept) == fewest and float(kept.sum()) == total >= p
    dropped = probabilities[found == 0]
    assert not len(dropped) or dropped.max() <= kept.min()


@settings(deadline=None, max_examples=60)
@given(LOGITS, st.integers(1, 4), st.floats(0.1, 1.0), st.floats(0.2, 3.0), st.integers(0, 99))
def test_a_drawn_token_passes_both_filters(logits: Tensor, k: int, p: float, temperature: float, seed: int) -> None:
    probabilities = (logits / temperature).softmax(0)
    order = probabilities.argsort(descending=True).tolist()
    for _ in range(5):
        token = choose(logits, temperature, k, p, generator(seed))
        likelier = [probabilities[other] for other in order if probabilities[other] > probabilities[token]]
        assert len(likelier) < k
        top = sum(float(probabilities[other]) for other in order[:k])
        assert sum(map(float, likelier)) < p * top + 1e-5


def test_tokens_are_drawn_with_the_probabilities_of_the_model() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0])
    one = generator()
    drawn = np.bincount([choose(logits, 0.5, 0, 1.0, one) for _ in range(5000)], minlength=4) / 5000
    assert drawn == pytest.approx((logits / 0.5).softmax(0).numpy(), abs=0.03)


def sampled(run: Path, **changes: object) -> Result:
    values = {"prompt": "the ", "max-new-tokens": 60, **changes}
    result = call(main, run, *(f"--{name}={value}" for name, value in values.items()))
    assert result.code == 0 and re.fullmatch(r"\d+ tokens in \d+\.\d\d s, \d+ tokens/s\n", result.err), result
    return Result(result.code, result.out, "")


def test_a_seed_means_one_text(run: Path) -> None:
    assert sampled(run, seed=5) == sampled(run, seed=5)
    assert sampled(run, seed=5) != sampled(run, seed=6)


def test_samples_of_one_command_differ_and_the_first_does_not_depend_on_their_number(run: Path) -> None:
    texts = sampled(run, **{"num-samples": 3}).out.split("\n" + "-" * 40 + "\n")
    assert len(texts) == len({text.strip("\n") for text in texts}) == 3
    assert texts[0].rstrip("\n") == sampled(run).out.rstrip("\n")


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_what_is_printed_is_the_prompt_and_the_decoded_tokens(
    run: Path, trained: LoadedCheckpoint, temperature: float
) -> None:
    tokens = tokens_of(trained.model, trained.tokenizer.encode("the "), 60, temperature, seed=9)
    text = trained.tokenizer.decode(tokens)
    assert sampled(run, seed=9, temperature=temperature).out == f"the {text}\n"


def test_checkpoints_are_chosen_by_step(tmp_path: Path, dataset: Path) -> None:
    train_until(options(dataset, tmp_path, learning_rate=0.05, zero_init_projections=False))
    eight, twelve = sampled(tmp_path, step=8), sampled(tmp_path, step=12)
    assert eight != twelve == sampled(tmp_path, step="latest")
    assert twelve == sampled(tmp_path / "checkpoints/step_000012.pt")


def test_tokens_that_only_pad_the_vocabulary_are_never_emitted(tmp_path: Path, dataset: Path) -> None:
    """vocab_size may be padded, as in configs/gpt2_124m.toml; the tokenizer has no text for the padding."""
    result = call(train.main, *options(dataset, tmp_path, vocab_size=256, sample_tokens=50))
    assert result.code == 0 and "training goes on" not in result.out
    assert len((tmp_path / "samples/step_000012.txt").read_text()) >= 50
    assert len(sampled(tmp_path, temperature=1.5).out) == len("the ") + 60 + 1


@pytest.fixture(scope="module")
def bpe_run(gpt2_vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:  # noqa: F811
    """A run on GPT-2's tokens of text in which characters are split over several of them."""
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = GPT2Tokenizer()
    with DatasetWriter(folder / "data", tokenizer, "a test") as writer:
        writer.write("train", tokenizer.encode_array("🙂 ⽔ naïve ∰ " * 200 + random_words(200)))
        writer.write("val", tokenizer.encode_array("∰ naïve 🙂 ⽔ " * 20))
    changes = {"max_iters": 6, "eval_interval": 6, "learning_rate": 0.05, "warmup_iters": 0}
    assert call(train.main, *options(folder / "data", folder / "run", **changes)).code == 0
    yield folder / "run"


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_byte_pairs_are_trained_on_sampled_and_streamed(bpe_run: Path, temperature: float) -> None:
    trained = load_checkpoint(bpe_run)
    assert trained.tokenizer.vocab_size == 50257
    prompt = "naïve 🙂"
    tokens = tokens_of(trained.model, trained.tokenizer.encode(prompt), 60, temperature, seed=9)
    text = trained.tokenizer.decode(tokens)
    assert sampled(bpe_run, prompt=prompt, seed=9, temperature=temperature).out == f"{prompt}{text}\n"


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.lists(st.integers(0, 22), min_size=1, max_size=BLOCK + 3), min_size=1, max_size=5),
    st.integers(1, 3 * BLOCK),
    st.sampled_from(
        [
            {"token_shift": True, "pair_rows": 30, "attention_gate": True},
            {"architecture": "nanogpt", "ffn": "gated_splines"},
        ]
    ),
)
def test_prompts_of_any_lengths_are_continued_together_as_one_by_one(
    prompts: list[list[int]], count: int, changes: dict[str, object]
) -> None:
    """Within the context and beyond it; every row draws from random numbers of its own."""
    model = untrained(**changes).double()
    alone = [tokens_of(model, prompt, count, 1.0, seed=number) for number, prompt in enumerate(prompts)]
    generators = [generator(number) for number in range(len(prompts))]

    def choose_token(row: int, logits: Tensor) -> int:
        return choose(logits, 1.0, 0, 1.0, generators[row])

    together: list[list[int]] = [[] for _ in prompts]
    for tokens in generate_batch(model, prompts, count, choose_token):
        for row, token in enumerate(tokens):
            together[row] += [token] if token is not None else []
    assert together == alone


LINE = "\n" + "-" * 40 + "\n"


def test_texts_do_not_depend_on_the_batch(run: Path, tmp_path: Path) -> None:
    """Nor on the other prompts; the second sample of a seed is the first of the next."""
    lines = ["the ", "spline bends where ", "a", "knots tell it"]
    (tmp_path / "prompts.txt").write_text("\n\n".join(lines) + "\n")
    given = {"prompt_file": tmp_path / "prompts.txt", "prompt_lines": True, "num_samples": 3, "max_new_tokens": 40}
    together = [prompted(run, **given, batch_size=size) for size in (1, 5, 12, 100)]
    assert together[1:] == together[:-1]
    alone = [prompted(run, prompt=line, max_new_tokens=40, seed=1337 + n) for line in lines for n in range(3)]
    assert LINE.join(text.removesuffix("\n") for text in alone) + "\n" == together[0].replace("\n" + LINE, LINE)


def prompted(run: Path, **values: object) -> str:
    result = call(main, run, *(f"--{name}={value}" for name, value in values.items()))
    assert result.code == 0, result
    return result.out


def test_a_prompt_is_read_from_a_file_or_from_standard_input(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sampled(run, prompt="the spline\nbends").out
    (tmp_path / "prompt.txt").write_bytes(b"the spline\r\nbends\n")
    assert prompted(run, prompt_file=tmp_path / "prompt.txt", max_new_tokens=60) == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("the spline\nbends\n"))
    assert prompted(run, prompt="-", max_new_tokens=60) == expected


def test_prompts_that_cannot_be_are_one_sentence(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "latin").write_bytes(b"na\xefve")
    for arguments, part in (
        (["--prompt_file", tmp_path / "none"], "none"),
        (["--prompt_file", tmp_path / "empty"], "the prompt is empty"),
        (["--prompt_file", tmp_path / "latin"], "not UTF-8"),
        (["--prompt_file", tmp_path / "empty", "--prompt", "a"], "not both"),
        (["--prompt_lines", "True"], "--prompt_lines finds no line"),
        (["--batch_size", 0], "batch_size must be at least 1"),
    ):
        assert_one_sentence(call(main, run, *arguments), part)


@pytest.mark.needs("terminal")
def test_in_a_terminal_it_goes_on_from_what_one_types(run: Path) -> None:
    terminal = Terminal("sample.py", run, "--max_new_tokens", 30, "--seed", 5)
    try:
        hint = terminal.read_until(lambda text: text.endswith("> "))
        assert "Ctrl-D ends" in hint
        for number, line in enumerate(["the ", "bends ", "the "]):
            terminal.type(line + "\n")
            shown = terminal.read_until(lambda text: text.endswith("> "))
            alone = sampled(run, prompt=line, seed=5 + number, **{"max-new-tokens": 30}).out
            assert alone in shown
        terminal.type("Ω\n")
        assert "not in the vocabulary" in terminal.read_until(lambda text: text.endswith("> "))
        terminal.type("\x04")
        assert re.search(r"\n90 tokens in .* tokens/s\n", terminal.read_until(lambda text: "tokens/s" in text) + "\n")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.close()


@pytest.mark.needs("terminal")
def test_ctrl_c_stops_a_text_and_then_the_command(run: Path) -> None:
    terminal = Terminal("sample.py", run, "--max_new_tokens", 10**9)
    try:
        terminal.read_until(lambda text: text.endswith("> "))
        terminal.type("the \n")
        terminal.read_until(lambda text: len(text) > 100)
        terminal.process.send_signal(signal.SIGINT)
        terminal.read_until(lambda text: text.endswith("\n> "))
        time.sleep(0.5)  # a signal between the prompt and the wait for a key would be noticed at the next key
        terminal.process.send_signal(signal.SIGINT)
        assert "interrupted" in terminal.read_until(lambda text: "interrupted" in text)
        assert terminal.process.wait(30) == 130
    finally:
        terminal.close()


def test_without_a_terminal_and_a_prompt_it_begins_a_line(run: Path) -> None:
    result = subprocess.run(
        command("sample.py", run, "--max_new_tokens", 20),
        input="not a prompt\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0 and "> " not in result.stdout and "not a prompt" not in result.stdout
    tokens = tokens_of(load_checkpoint(run, "best").model, load_checkpoint(run).tokenizer.encode("\n"), 20, 0.8, 1337)
    assert result.stdout == load_checkpoint(run).tokenizer.decode(tokens) + "\n"


@pytest.mark.parametrize("changes", [{}, {"ffn": "gated_splines", "architecture": "nanogpt"}, {"ffn": "mlp"}], ids=str)
@torch.no_grad()
def test_the_batch_is_no_matter_to_logits_beyond_the_last_digits_of_float64(changes: dict[str, object]) -> None:
    model = move(untrained(**changes), "cpu")
    tokens = torch.randint(23, (17, BLOCK))
    alone = torch.cat([model(row[None])[0] for row in tokens])
    assert alone.dtype is torch.float64
    torch.testing.assert_close(model(tokens)[0], alone, rtol=0, atol=1e-12)
