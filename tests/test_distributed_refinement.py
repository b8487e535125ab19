"""Several processes refine and penalise splines like one; with fsdp both are refused."""

from pathlib import Path

import pytest

import train
from tests.runs import (
    STEPS,
    assert_one_sentence,
    call,
    make_dataset,
    options,
    resume_options,
    train_losses,
    train_until,
)
from tests.test_distributed import HARD, train_in_a_group
from tests.test_resume import assert_identical, outcome

SPLINES = {**HARD, "kan_refine": "5@0,9@5,17@8", "kan_smoothness": 10, "kan_variant": "balanced", "kan_fit_grid": 0.02}


def test_a_group_refines_as_one_process_does_and_resumes_across_it(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "words")
    runs = {name: options(dataset, tmp_path / name, **SPLINES) for name in ("one", "two", "stopped", "at_once")}
    refused = train_in_a_group(
        tmp_path,
        2,
        [
            (runs["two"], STEPS),
            (runs["stopped"], 6),
            ([*resume_options(tmp_path / "stopped")], STEPS),
            (runs["at_once"], 5),
            ([*resume_options(tmp_path / "at_once")], STEPS),
        ],
    )
    assert not refused
    train_until(runs["one"])
    assert list(train_losses(tmp_path / "two")) == list(train_losses(tmp_path / "one"))
    for step, loss in train_losses(tmp_path / "one").items():
        assert train_losses(tmp_path / "two")[step] == pytest.approx(loss, abs=1e-4)
    for name in ("stopped", "at_once"):
        assert_identical(outcome(tmp_path / name), outcome(tmp_path / "two"), name)


@pytest.mark.parametrize("more", [{"kan_refine": "5@0,9@5"}, {"kan_smoothness": 1}])
def test_sharded_splines_are_neither_refined_nor_penalized(tmp_path: Path, more: dict) -> None:
    result = call(train.main, *options(tmp_path, tmp_path, fsdp=True, **more))
    assert_one_sentence(result, "kan_refine and kan_smoothness need whole parameters")
