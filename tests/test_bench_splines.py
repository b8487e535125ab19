"""bench/grids.py, conditioning.py, variants.py, attention.py: complete tables, and one sentence for each mistake."""

import json
import math
from pathlib import Path

import pytest

from bench import attention, conditioning, grids, sampling, variants
from splines.parametrisation import VARIANTS
from tests.runs import TINY, assert_one_sentence, call, make_dataset


def tiny(dataset: Path) -> str:
    kept = {name: value for name, value in TINY.items() if name not in ("splines", "sample_tokens", "num_threads")}
    return " ".join(f"{name}={value}" for name, value in {"dataset": dataset, **kept}.items())


def test_grids_trains_every_method_and_repeats_nothing(tmp_path: Path) -> None:
    more = tiny(make_dataset(tmp_path / "words"))
    output = tmp_path / "grids.json"
    arguments = [
        "--grids=5,9",
        "--methods=plain,balanced,refine+DCT,penalty:10",
        f"--more={more}",
        f"--output={output}",
    ]
    first = call(grids.main, *arguments, "--seeds=1")
    assert first.code == 0 and first.out.count(" seed 1 ") == 8, first
    picture = tmp_path / "grids.svg"
    second = call(grids.main, *arguments, "--seeds=1,2", f"--plot={picture}")
    assert second.out.count(" seed 1 ") == 0 and second.out.count(" seed 2 ") == 8
    runs = json.loads(output.read_text())["runs"]
    assert len(runs) == 16 and all(len(run["losses"]) == 3 and math.isfinite(run["losses"][-1]) for run in runs)
    table = second.out.splitlines()[-5:]
    assert table[0].split() == ["G=5", "G=9"]
    for line, method in zip(table[1:], ("plain", "balanced", "refine+DCT", "penalty:10"), strict=True):
        mean = sum(r["losses"][-1] for r in runs if r["method"] == method and r["grid"] == 9) / 2
        assert line.split()[0] == method and f"{mean:.4f}" in line
    assert all(f"{method}, G=9" in picture.read_text() for method in ("plain", "penalty:10"))
    grown = [run["parameters"] for run in runs if run["method"] == "plain"]
    assert grown[1] > grown[0]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--grids=five"], "grids and seeds must be integers"),
        (["--methods=magic"], "kan_variant must be one of"),
        (["--methods=refine", "--grids=7"], "refine knows no nested grids that lead to 7"),
        (["--more=magic"], "NAME=VALUE"),
        (["--plot=picture.gif"], "plot must end with one of"),
        (["--plot=nowhere/picture.svg"], "nowhere/picture.svg cannot be written"),
        (["--output=pyproject.toml"], "does not hold results of bench/grids.py"),
    ],
)
def test_mistakes_of_grids(tmp_path: Path, arguments: list[str], part: str) -> None:
    defaults = [f"--output={tmp_path / 'grids.json'}"]
    assert_one_sentence(call(grids.main, *defaults, *arguments), part)


def test_conditioning_prints_every_variant() -> None:
    done = call(conditioning.main, "--grids=5,64", "--weights=1")
    lines = [line.split() for line in done.out.splitlines()[1:]]
    assert done.code == 0 and [line[:2] for line in lines] == [[g, v] for g in ("5", "64") for v in VARIANTS]
    assert all(float(value) >= 1 for line in lines for value in line[2:])


def test_data_conditions_are_those_of_the_mass_matrix() -> None:
    """The mass matrix of hats is h·(1/6, 2/3, 1/6), halved at its ends. Its condition tends to 4 (Wathen 1987)."""
    for grid in (16, 64, 129):
        assert conditioning.conditions("B-spline", grid).uniform == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("arguments", [["--grids=x"], ["--grids=1"], ["--weights=-1"], ["--width=0"]])
def test_mistakes_of_conditioning(arguments: list[str]) -> None:
    assert_one_sentence(call(conditioning.main, *arguments))


def test_variants_times_steps_and_products() -> None:
    small = ["--grids=5,9", "--n_layer=1", "--n_embd=16", "--batch_size=2", "--threads=1", "--repeats=1"]
    done = call(variants.main, *small)
    assert done.code == 0, done
    assert done.out.count("%") == 2 * len(variants.VARIANTS) and "product by halves" in done.out
    assert_one_sentence(call(variants.main, "--grids=1"), "at least 2")


def test_attention_prints_both_types_and_refuses_heads_that_do_not_fit() -> None:
    done = call(attention.main, "--repeats=1", "--batch_size=1")
    lines = [line.split() for line in done.out.splitlines() if line.split()[0].startswith("forward")]
    assert [line[0] for line in lines] == 2 * ["forward", "forward+backward"]
    assert "one operator" in done.out
    assert all(float(number) > 0 for line in lines for number in line[1:])
    assert_one_sentence(call(attention.main, "--n_head=3"), "n_embd must be a multiple of n_head")


NANOGPT = """
import torch
from dataclasses import dataclass

@dataclass
class GPTConfig:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    bias: bool
    dropout: float

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def get_num_params(self):
        return 1234

    def generate(self, tokens, count, temperature, top_k):
        assert self.config.vocab_size > 1 and tokens.shape == (1, 1)
        torch.randn(64, 64) @ torch.randn(64, 64)
"""


def test_sampling_is_timed_beside_nanogpt(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(NANOGPT)
    done = call(sampling.main, f"--nanogpt={tmp_path}", "--tokens=3", "--texts=2", "--repeats=1")
    assert done.code == 0 and "1,234 nanoGPT's" in done.out, done
    numbers = [line.split()[2:] for line in done.out.splitlines() if " text" in line and "tokens" not in line]
    assert len(numbers) == 2 and all(float(number) >= 0 for line in numbers for number in line)
    assert_one_sentence(call(sampling.main, f"--nanogpt={tmp_path / 'none'}"), "has no model.py")
