"""bench/gpt.py: a race trains like train.py, its table follows from its curves, and mistakes get one line."""

import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench import gpt
from bench.shared.grid_plot import draw_losses_by_grid
from bench.shared.race import Curve, Race, run_side_by_side, summarize
from tests.runs import (
    STEPS,
    TINY,
    assert_one_sentence,
    call,
    make_dataset,
    options,
    read_metrics,
    run_command,
    train_until,
)
from training.config import Config

CONTESTANTS = {"MLP": {"ffn": "mlp"}, "splines": {"ffn": "splines"}, "gated": {"ffn": "gated_splines"}}
SEEDS = [3, 4]


def toml(table: dict[str, Any]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())


def write_race(folder: Path, dataset: Path, **changes: Any) -> Path:
    config = folder / "config.toml"
    config.write_text(toml({**TINY, "dataset": str(dataset)}))
    head: dict[str, Any] = {"config": str(config), "tune_seed": 0, "seeds": SEEDS, **changes}
    tables = {"search": {"learning_rate": [1e-3, 1e-2]}, **{f"contestants.{k}": v for k, v in CONTESTANTS.items()}}
    path = folder / "race.toml"
    path.write_text(toml(head) + "".join(f"[{name}]\n{toml(table)}" for name, table in tables.items()))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("race")
    write_race(folder, make_dataset(folder / "words"))
    files = {"output": "race.json", "plot": "race.png", "grid_plot": "grids.png"}
    named = (f"--{option}={folder / name}" for option, name in files.items())
    done = run_command("bench/gpt.py", folder / "race.toml", "--threads=1", *named)
    assert done.code == 0 and done.err == "", done
    assert all(name in done.out for name in CONTESTANTS)
    return folder


@pytest.fixture(scope="module")
def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "race.json").read_text())


def test_a_race_is_what_train_py_does(folder: Path, record: dict[str, Any], tmp_path: Path) -> None:
    for k, curve in enumerate(record["curves"]):
        tuned = {**CONTESTANTS[curve["contestant"]], **record["tuned"][curve["contestant"]], "seed": curve["seed"]}
        train_until(options(folder / "words", tmp_path / str(k), **tuned))
        evaluations = {line["step"]: line["val_loss"] for line in read_metrics(tmp_path / str(k)) if line["val_loss"]}
        assert dict(zip(curve["steps"], curve["losses"], strict=True)) == pytest.approx(evaluations, rel=1e-5)
        assert curve["steps"][-1] == STEPS


def test_all_are_tuned_over_the_same_values_on_another_seed(record: dict[str, Any]) -> None:
    assert [trial["options"] for trial in record["trials"]] == [{"learning_rate": 1e-3}, {"learning_rate": 1e-2}]
    for trial in record["trials"]:
        assert [curve["contestant"] for curve in trial["curves"]] == list(CONTESTANTS)
        assert all(curve["seed"] == 0 for curve in trial["curves"])
    for k, name in enumerate(CONTESTANTS):
        losses = [trial["curves"][k]["losses"][-1] for trial in record["trials"]]
        best = record["trials"][losses.index(min(losses))]["options"]["learning_rate"]
        assert record["tuned"][name]["learning_rate"] == best


def test_seconds_grow_and_leave_out_the_first_step(record: dict[str, Any]) -> None:
    for curve in record["curves"]:
        assert all(a < b for a, b in zip(curve["seconds"], curve["seconds"][1:], strict=False))
        assert curve["seconds"][0] > 0


def test_the_picture_of_grids_shows_means_by_control_points_and_twins_as_level_lines(record: dict[str, Any]) -> None:
    points = {curve["contestant"]: (curve["splines"], curve["control_points"]) for curve in record["curves"]}
    assert points == {"MLP": ("", 0), "splines": ("splines", 5), "gated": ("gated_splines", 5)}
    losses = {3: (2.0, 2.2), 65: (1.5, 1.9), 9: (1.8, 1.8), 0: (2.5, 3.5)}
    curves = [
        Curve(str(grid), seed, 1, losses=[9.0, loss], splines="gated_splines" if grid else "", control_points=grid)
        for grid, ends in losses.items()
        for seed, loss in enumerate(ends)
    ]
    [axes] = draw_losses_by_grid(curves, "title", "where").axes
    drawn = {tuple(line.get_xdata()): tuple(line.get_ydata()) for line in axes.lines}
    assert drawn[3, 9, 65] == pytest.approx((2.1, 1.8, 1.7)) and drawn[3, 65] == pytest.approx((3.0, 3.0))


def test_the_table_follows_from_the_curves() -> None:
    curves = [
        Curve(name, seed, size, [10], [ms / 100], [loss])
        for name, size, ms, losses in (("a", 7, 20.0, (2.0, 2.2)), ("b", 8, 10.0, (1.9, 2.0)))
        for seed, loss in enumerate(losses)
    ]
    rival, other = summarize(curves, "a")
    assert (rival.minus_rival, rival.rival_ms_over_it) == (0, 1)
    assert other.mean == pytest.approx(1.95) and other.spread == pytest.approx(statistics.stdev((1.9, 2.0)))
    assert other.minus_rival == pytest.approx(-0.15)
    assert other.minus_rival_error == pytest.approx(statistics.stdev((-0.1, -0.2)) / 2**0.5)
    assert other.step_ms == pytest.approx(10) and other.rival_ms_over_it == pytest.approx(2)


def test_in_equal_time_the_slower_do_fewer_steps() -> None:
    race = Race("r", "configs/shakespeare_char_cpu.toml", {}, {}, 0, [1], {"a": {"ffn": "mlp"}, "b": {}})
    curves = [Curve("a", 0, 1, [100], [2.0], [1.0]), Curve("b", 0, 1, [100], [4.0], [1.0])]
    tuned = gpt.with_equal_time(race, {"a": {"max_iters": 60}, "b": {"max_iters": 60}}, [({}, curves)])
    assert (tuned["a"]["max_iters"], tuned["b"]["max_iters"]) == (60, 30)


def test_a_race_that_is_stopped_has_a_record_of_the_seeds_that_were_done(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = iter([run_side_by_side])

    def stopped_in_the_second(configs: dict[str, Config]) -> list[Curve]:
        return next(seeds)(configs)

    monkeypatch.setattr(gpt, "run_side_by_side", stopped_in_the_second)
    with pytest.raises(StopIteration):
        call(gpt.main, folder / "race.toml", "--tune=False", "--threads=1", f"--output={tmp_path / 'race.json'}")
    kept = json.loads((tmp_path / "race.json").read_text())
    assert kept["race"]["seeds"] == SEEDS[:1] and {curve["seed"] for curve in kept["curves"]} == {SEEDS[0]}
    assert len(kept["summaries"]) == len(CONTESTANTS)


def test_seeds_and_contestants_of_earlier_calls_count_and_are_not_run_again(folder: Path, tmp_path: Path) -> None:
    call_with = partial(call, gpt.main, folder / "race.toml", "--threads=1", "--tune=False")
    parts, whole = [tmp_path / "4.json", tmp_path / "3.json"], tmp_path / "whole.json"
    assert call_with("--seeds=4", f"--output={parts[0]}").code == 0
    assert call_with("--seeds=3", "--only=MLP;gated", f"--output={parts[1]}").code == 0
    without_rival = tmp_path / "rest.json"  # is no harm
    assert call_with("--seeds=5", "--only=gated;splines", f"--output={without_rival}").code == 0
    assert call_with("--seeds=3", f"--records={without_rival}", f"--output={tmp_path / 'a.json'}").code == 0
    done = call_with(f"--records={parts[0]},{parts[1]}", f"--output={whole}")
    assert done.code == 0 and "seed 3: splines" in done.out and "seed 4:" not in done.out, done
    of_parts = [curve for part in parts for curve in json.loads(part.read_text())["curves"]]
    merged = json.loads(whole.read_text())["curves"]
    assert [(c["seed"], c["contestant"]) for c in merged] == [(s, c) for s in SEEDS for c in CONTESTANTS]
    assert len(of_parts) == 5 and all(curve in merged for curve in of_parts)
    for wrong, part in ((folder / "race.toml", "not the record of a race"), (tmp_path / "no.json", "cannot be read")):
        assert_one_sentence(call_with(f"--records={wrong}"), part)
    other = tmp_path / "4-of-another-race.json"
    other.write_text(parts[0].read_text().replace('"ffn": "mlp"', '"ffn": "swiglu"'))
    for more in (
        [f"--records={parts[0]}", "--equal=time"],
        [f"--records={parts[0]}", "--max_iters=9"],
        [f"--records={parts[0]},{folder / 'race.json'}"],
        [f"--records={other}"],
    ):
        assert_one_sentence(call_with(*more), "differs from this call")
    assert_one_sentence(call_with("--seeds=0"), "choose other seeds")
    assert_one_sentence(call_with("--seeds=3", "--num_seeds=1"), "give one of the two")


def test_a_race_can_be_run_among_some(folder: Path) -> None:
    race = Race.read(folder / "race.toml")
    assert race.among("") == race
    assert list(race.among("gated; MLP").contestants) == ["gated", "MLP"]
    assert_one_sentence(call(gpt.main, folder / "race.toml", "--only=gated;magic"), "'magic'", "MLP; splines; gated")


def test_a_race_can_be_shortened() -> None:
    race = Race("r", "", {}, {"learning_rate": [1, 2]}, 0, [5, 6, 7], {"a": {}, "b": {}})
    assert race.shortened(0, tune=True) == race
    short = race.shortened(2, tune=False)
    assert short.seeds == [5, 6] and list(short.trials()) == [{}] and not short.search


def test_the_races_of_the_repository_are_fair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters or arithmetic agree within 2 %, except for contestants whose names say otherwise."""
    for path in Path("bench/races").glob("*.toml"):
        race, _ = Race.read(path).without_missing_peers()
        assert len(race.seeds) >= 5 and race.search
        from model import GPT

        sizes = {}
        for name in race.contestants:
            model = GPT(race.configure(name, race.seeds[0], {}).model_config(65))
            sizes[name] = model.num_parameters(), model.flops_per_token()
        equal = {name: size for name, size in sizes.items() if "fewer" not in name and "twice" not in name}
        by_measure = zip(*equal.values(), strict=True)
        assert any(max(values) / min(values) < 1.02 for values in by_measure), (path, sizes)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"seeds": []}, "seeds"),
        ({"tune_seed": 3}, "seeds without tune_seed"),
        ({"laps": 3}, "it has laps"),
    ],
)
def test_a_race_that_is_none_is_refused(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    path = write_race(tmp_path, tmp_path, **changes)
    assert_one_sentence(call(gpt.main, path), part)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["no.toml"], "no.toml cannot be read"),
        ([], "race is missing"),
        (["no.toml", "--equal=luck"], "steps or time"),
        (["no.toml", "--plot=a.gif"], "plot must end"),
    ],
)
def test_an_impossible_option_is_refused(arguments: list[str], part: str) -> None:
    assert_one_sentence(call(gpt.main, *arguments), part)


def test_an_unknown_option_of_a_contestant_is_refused_before_any_work(tmp_path: Path) -> None:
    path = write_race(tmp_path, make_dataset(tmp_path / "words"))
    path.write_text(path.read_text() + "\n[contestants.odd]\nfnn = 'mlp'\n")
    assert_one_sentence(call(gpt.main, path), "unknown option fnn", "did you mean ffn")
