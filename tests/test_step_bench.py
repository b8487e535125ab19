"""bench/step.py: the parts of a step add up to it, each piece of work is in its own part, and mistakes get one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from backends import fused_attention
from bench import step
from bench.shared.step_parts import (
    ATTENTION,
    LAYER_PARTS,
    LOOPS,
    PARTS,
    PROJECTIONS,
    REST,
    ROTARY,
    SHIFT,
    SPLINES,
    profiled_parts,
)
from embeddings import RotaryEmbedding
from feed_forward import TokenShift
from kan_layer import KANLayer
from tests.runs import assert_one_sentence, call, let_go, make_dataset, make_trainer, options, run_command

TINY = ("--widths=16", "--n_layer=1", "--block_size=16", "--batch_size=2", "--threads=1", "--rounds=2", "--steps=2")
WIDTH_OF_WORK = 900


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("step") / "words")


def measured(dataset: Path, folder: Path, *more: str) -> list[dict[str, Any]]:
    files = ("--output", folder / "step.json", "--plot", folder / "step.png", "--dataset", dataset)
    done = run_command("bench/step.py", *TINY, *files, *more)
    assert done.code == 0, done
    assert (folder / "step.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    steps: list[dict[str, Any]] = json.loads((folder / "step.json").read_text())["steps"]
    for each in steps:
        assert set(each["parts"]) == set(PARTS) and all(value >= 0 for value in each["parts"].values())
        assert sum(each["parts"].values()) == pytest.approx(each["ms"])
        assert ("splines" in each["block"]) == all(each["parts"][part] > 0 for part in PARTS if SPLINES in part)
        assert all(each["parts"][part] > 0 for part in (ATTENTION, PROJECTIONS))
    return steps


def test_the_parts_of_each_contestant_add_up_to_its_step(dataset: Path, tmp_path: Path) -> None:
    steps = measured(dataset, tmp_path, "--modes=eager")
    assert [(each["optimizer"], each["block"]) for each in steps] == [
        (optimizer, block) for optimizer in ("adamw", "muon") for block in ("splines", "mlp", "gated_splines", "swiglu")
    ]
    for each, twin in zip(steps[::2], steps[1::2], strict=True):
        rest = each["ms"] - sum(each["parts"][part] for part in LAYER_PARTS)
        assert each["bound"] == pytest.approx(twin["ms"] / rest) and each["twin_over_it"] > 0
        assert twin["bound"] is twin["twin_over_it"] is None
        assert each["parameters"] == pytest.approx(twin["parameters"], rel=0.02)


@pytest.mark.needs("torch.compile")
def test_compiled_loops_are_one_part(dataset: Path, tmp_path: Path) -> None:
    (each,) = measured(dataset, tmp_path, "--modes=compiled", "--optimizers=adamw", "--blocks=splines")
    assert each["parts"][LOOPS] > 0 and each["parts"][ROTARY] == 0 and each["twin_over_it"] is None


@pytest.mark.parametrize(
    ("module", "parts"),
    [(KANLayer, LAYER_PARTS[:2]), (RotaryEmbedding, (ROTARY,)), (TokenShift, (SHIFT,))],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_work_that_is_added_to_a_module_shows_in_its_part(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: type[nn.Module], parts: tuple[str, ...]
) -> None:
    forward = module.forward

    def forward_with_work(self: nn.Module, x: Tensor, *rest: Any) -> Tensor:
        work = x.new_ones(WIDTH_OF_WORK, WIDTH_OF_WORK) * x.mean()
        return forward(self, x, *rest) + 0 * (work @ work).mean()

    monkeypatch.setattr(module, "forward", forward_with_work)
    monkeypatch.setattr(fused_attention, "can_compute", lambda qkv: False)  # which rotates without the module
    trainer = make_trainer(options(dataset, tmp_path, token_shift=True, compile=False))
    try:
        trainer.step()
        found = profiled_parts(trainer, 2)
    finally:
        let_go(trainer.run)
    total = sum(value for part, value in found.items() if part != REST)
    assert sum(found[part] for part in parts) > 0.5 * total, found
    assert all(found[part] > 0.02 * total for part in parts), "forward and backward are told apart"


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("--blocks=splines,cubes", ["blocks", "swiglu"]),
        ("--modes=fast", ["modes", "compiled"]),
        ("--optimizers=", ["optimizers", "muon"]),
        ("--widths=128,wide", ["widths", "128,wide"]),
        ("--widths=0", ["widths"]),
        ("--steps=0", ["steps"]),
        ("--threads=0", ["threads"]),
        ("--plot=a.gif", ["a.gif", ".png"]),
        ("--output=/no/such/folder/a.json", ["/no/such/folder/a.json"]),
        ("--config=/no/such/recipe.toml", ["/no/such/recipe.toml"]),
    ],
)
def test_an_impossible_option_is_refused(argument: str, parts: list[str]) -> None:
    assert_one_sentence(call(step.main, argument), *parts)


def test_nanogpt_s_own_steps_are_timed_beside_ours(dataset: Path, tmp_path: Path) -> None:
    data = tmp_path / "data" / "shakespeare_char"
    data.mkdir(parents=True)
    for name in ("train.bin", "val.bin", "meta.pkl"):
        (data / name).touch()
    program = tmp_path / "train.py"
    program.write_text("for k in range(4): print(f'iter {k}: loss 1.0, time {(900, 9, 12.5, 99)[k]:.2f}ms, mfu 0%')")
    arguments = (*TINY, f"--dataset={dataset}", f"--nanogpt={tmp_path}", "--optimizers=adamw", "--modes=eager")
    done = call(step.main, *arguments, "--blocks=mlp")
    assert done.code == 0 and "12.5, 12.5 ms before and after; mlp" in done.out, done
    program.write_text("raise SystemExit('no such recipe')")
    assert_one_sentence(call(step.main, *arguments, "--blocks=mlp"), "train.py failed: no such recipe")
    program.unlink()
    assert_one_sentence(call(step.main, *arguments, "--blocks=mlp"), "has no train.py")
