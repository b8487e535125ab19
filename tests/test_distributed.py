"""Several processes train the run that one process would: replicated (DDP) or sharded (FSDP2), interrupted or not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import convert
import sample
import train
from backends import BACKENDS
from bench.shared.train_processes import free_port, rank_environment
from common.errors import UserError
from tests import machine
from tests.runs import (
    ROOT,
    STEPS,
    assert_one_sentence,
    call,
    checkpoint_names,
    make_dataset,
    options,
    read_metrics,
    resume_options,
    train_losses,
    train_until,
)
from training.checkpoint import list_steps, load_checkpoint, read_state
from training.distributed import share_of_step

HARD = {
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "kan_init": "random_normal",
    "n_layer": 2,
    "log_interval": 1,
    "pair_rows": 50,
}
WHOLE_SPLIT = {"eval_iters": 0}
RANDOM = {"dropout": 0.2, "optimizer": "muon"}
STOP = 6


def train_in_a_group(folder: Path, processes: int, cases: list[tuple[list[str], int]]) -> dict[str, str]:
    """Train all `cases` (arguments, step to stop at) in one group. Returns the errors of refused ones, by number."""
    path = folder / f"cases_{processes}.json"
    path.write_text(json.dumps(cases))
    port, ranks = free_port(), []
    for rank in range(processes):
        environment = {**os.environ, **rank_environment(rank, processes, port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.rank", str(path)]
        ranks.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        )
    errors = [rank.communicate(timeout=240)[1].decode() for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "\n".join(errors)
    found: dict[str, str] = json.loads((folder / "refused.json").read_text())
    return found


class Runs:
    """The same runs, trained by one process and by a group."""

    def __init__(self, folder: Path, dataset: Path, processes: int) -> None:
        self.folder, self.dataset, self.processes = folder, dataset, processes

    def arguments(self, name: str, **changes: Any) -> list[str]:
        return options(self.dataset, self.folder / name, **{**HARD, **changes})

    def resumed(self, name: str) -> list[str]:
        return [*resume_options(self.folder / name), "--max_iters", str(STEPS)]

    def train(self) -> "Runs":
        cases: list[tuple[list[str], int]] = []
        for kind, fsdp in (("ddp", False), ("fsdp", True)):
            cases.append((self.arguments(kind, fsdp=fsdp, **WHOLE_SPLIT), STEPS))
            for name in (f"{kind}_random", f"{kind}_stopped"):
                cases.append((self.arguments(name, fsdp=fsdp, **RANDOM), STOP if "stopped" in name else STEPS))
            cases.append((self.resumed(f"{kind}_stopped"), STEPS))
        cases.append((self.arguments("shards", fsdp=True), STOP))
        if self.processes == 2:
            for impl in (impl for impl in BACKENDS if machine.why_not_impl(impl) is None):
                for fsdp in (False, True):
                    changes = {"kan_impl": impl, "fsdp": fsdp, "max_iters": 3}
                    cases.append((self.arguments(f"{impl}_{fsdp}", **changes), STEPS))
            narrow = {"dtype": "bfloat16", "max_iters": 4, "fsdp": True}
            cases.append((self.arguments("bfloat16", **narrow), STEPS))
        cases.append((self.arguments("refused", batch_size=5, gradient_accumulation_steps=1), STEPS))
        refused = train_in_a_group(self.folder, self.processes, cases)
        assert list(refused) == [str(len(cases) - 1)], refused
        assert "batch_size" in refused[str(len(cases) - 1)] and f"by {self.processes} processes" in str(refused)
        return self


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module", params=[2, 4])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp(f"runs_{request.param}"), dataset, request.param).train()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    train_until(options(dataset, run, **HARD, **WHOLE_SPLIT))
    return run


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_losses_are_those_of_one_process_with_the_same_global_batch(runs: Runs, alone: Path, kind: str) -> None:
    found, expected = read_metrics(runs.folder / kind), read_metrics(alone)
    for name in ("train_loss", "grad_norm", "val_loss", "learning_rate"):
        values = [[record[name] or 0.0 for record in records] for records in (found, expected)]
        assert values[0] == pytest.approx(values[1], rel=1e-5), name
    model, whole = load_checkpoint(runs.folder / kind).model, load_checkpoint(alone).model
    for (name, parameter), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_stopped_and_resumed_group_is_the_uninterrupted_one_bit_for_bit(runs: Runs, kind: str) -> None:
    """The runs have dropout, gradient accumulation and Muon."""
    whole, stopped = (read_state(list_steps(runs.folder / f"{kind}_{name}")[0]) for name in ("random", "stopped"))
    assert whole["step"] == stopped["step"] == STEPS
    assert_equal_states(whole, stopped)
    assert train_losses(runs.folder / f"{kind}_random") == train_losses(runs.folder / f"{kind}_stopped")


def assert_equal_states(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert list(first["model"]) == list(second["model"])
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])
    moments, others = first["optimizer"]["state"], second["optimizer"]["state"]
    assert list(moments) == list(others) and moments
    for index in moments:
        assert list(moments[index]) == list(others[index])
        assert all(torch.equal(moments[index][key], others[index][key]) for key in moments[index])


def test_shards_go_on_in_one_process(runs: Runs, alone: Path) -> None:
    """With another number of processes, none finds its own shards."""
    train_until([*runs.resumed("shards"), "--fsdp=False"])
    assert list(train_losses(runs.folder / "shards").values()) == pytest.approx(
        list(train_losses(alone).values()), rel=1e-4
    )
    assert "step_000012.pt" in checkpoint_names(runs.folder / "shards")


def test_a_converted_checkpoint_is_the_shards_and_is_sampled_from(runs: Runs, tmp_path: Path) -> None:
    run, output = runs.folder / "fsdp", tmp_path / "whole.pt"
    result = call(convert.main, run, "--output", output)
    assert result.out.strip() == str(output) and not result.err
    assert_equal_states(read_state(output), read_state(list_steps(run)[0]))
    texts = [call(sample.main, path, "--max-new-tokens=8", "--step=latest").out for path in (run, output)]
    assert texts[0] == texts[1] and len(texts[0]) > 8
    assert_one_sentence(call(convert.main, run, "--output", output), "exists already")
    assert_one_sentence(call(convert.main, runs.folder / "ddp"), "in one file already")


def test_a_group_keeps_the_newest_and_the_best_and_leaves_nothing_else(runs: Runs) -> None:
    for kind in ("ddp_random", "ddp_stopped", "fsdp_random", "fsdp_stopped"):
        names = checkpoint_names(runs.folder / kind)
        assert {name.removesuffix(".pt") for name in names} - {"best"} >= {"step_000008", "step_000012"}, names
        assert not [path for path in (runs.folder / kind).rglob("*") if path.name.endswith(".tmp")]
        assert [record["step"] for record in read_metrics(runs.folder / kind)] == list(range(1, STEPS + 1))


def test_a_directory_that_holds_shards_is_not_used_for_another_run(runs: Runs, dataset: Path) -> None:
    result = call(train.main, *options(dataset, runs.folder / "fsdp"))
    assert_one_sentence(result, "already holds a run", "--resume True")


@pytest.mark.parametrize("impl", BACKENDS)
def test_every_way_to_compute_the_splines_works_in_a_group(runs: Runs, alone: Path, impl: str) -> None:
    if runs.processes != 2:
        pytest.skip("in groups of two only")
    expected = list(train_losses(alone).values())[:1]  # only the first of three steps, at which the schedules agree
    for fsdp in (False, True):
        found = list(train_losses(runs.folder / f"{impl}_{fsdp}").values())
        assert len(found) == 3 and found[:1] == pytest.approx(expected, rel=1e-5)


def test_shards_in_bfloat16_learn_about_the_same(runs: Runs, alone: Path) -> None:
    if runs.processes != 2:
        pytest.skip("in groups of two only")
    found, expected = (list(train_losses(run).values())[:1] for run in (runs.folder / "bfloat16", alone))
    assert found == pytest.approx(expected, rel=2e-2)


def test_damaged_shards_are_passed_over_and_nothing_leaves_their_folder(runs: Runs, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs.folder / "fsdp", tmp_path / "copy"))
    newest, before = list_steps(run)[:2]
    pieces = sorted(path for path in newest.iterdir())
    assert len(pieces) == runs.processes + 2
    for piece in pieces:
        whole = piece.read_bytes()
        for place in {0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 2, len(whole) - 1}:
            piece.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(UserError, match="damaged"):
                read_state(newest)
            piece.write_bytes(whole[:place])
            with pytest.raises(UserError, match="damaged"):
                read_state(newest)
        piece.write_bytes(whole)
    assert read_state(newest)["step"] == STEPS
    pieces[0].unlink()
    result = call(sample.main, run, "--step=latest")
    assert_one_sentence(result, str(newest), "damaged")
    trainer = train_until([*resume_options(run), "--fsdp=False"])
    assert trainer.run.checkpoint == before


@given(sequences=st.integers(1, 200), batch_size=st.integers(1, 40), processes=st.integers(1, 9))
def test_a_step_is_shared_evenly_or_refused(sequences: int, batch_size: int, processes: int) -> None:
    if sequences % processes:
        with pytest.raises(UserError, match=f"multiple of {processes}"):
            share_of_step(sequences, batch_size, processes)
        return
    share, one_pass = share_of_step(sequences, batch_size, processes)
    assert share * processes == sequences and share % one_pass == 0 and one_pass <= batch_size
    if processes == 1 and sequences % batch_size == 0:
        assert one_pass == batch_size


def test_shards_need_several_processes(tmp_path: Path, dataset: Path) -> None:
    assert_one_sentence(call(train.main, *options(dataset, tmp_path, fsdp=True)), "fsdp", "torchrun")


@pytest.mark.parametrize(
    ("environment", "part"),
    [({"WORLD_SIZE": "two"}, "WORLD_SIZE"), ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK"), ({"RANK": "-1"}, "RANK")],
    ids=str,
)
def test_an_environment_that_means_nothing_is_refused(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], part: str
) -> None:
    arguments = [sys.executable, str(ROOT / "train.py"), *options(dataset, tmp_path)]
    done = subprocess.run(arguments, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ") and part in done.stderr and "torchrun" in done.stderr
