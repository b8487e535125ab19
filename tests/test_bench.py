"""bench/layer.py: its record agrees with itself, and every mistake is one sentence."""

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import layer
from bench.shared import timing
from bench.shared.contestants import is_matrices
from bench.shared.layer_plot import moved_apart
from tests.runs import Result, assert_one_sentence, call, run_command

TINY = ("--tokens=16,32", "--widths=8,8", "--grids=3,5", "--repeats=1", "--threads=1")
CHEBY_KAN = """
import torch
class ChebyKANLayer(torch.nn.Module):
    def __init__(self, input_dim, output_dim, degree):
        super().__init__()
        self.coefficients = torch.nn.Parameter(torch.randn(degree + 1, input_dim, output_dim))
    def forward(self, x):
        return torch.tanh(x) @ self.coefficients.sum(0)
"""
FAST_KAN = """
import torch
class FastKANLayer(torch.nn.Module):
    def __init__(self, input_dim, output_dim, grid_min, grid_max, num_grids):
        super().__init__()
    def forward(self, x):
        raise RuntimeError("not today\\nnor tomorrow")
"""
KANDITIONED = """
import torch
class KANLayer(torch.nn.Linear):
    def __init__(self, inputs, outputs, init, num_control_points, spline_width, variant="B-spline", impl="embedding"):
        super().__init__(inputs, outputs)
        print("NOISE")
        if variant == "DCT":
            raise NotImplementedError("DCT is to come")
"""


@dataclass(frozen=True)
class Bench:
    command: Result
    text: str
    picture: bytes
    home: Path

    @property
    def record(self) -> dict[str, Any]:
        return json.loads(self.text)

    def cases(self) -> dict[tuple[Any, ...], dict[str, dict[str, Any]]]:
        """The results, by case and contestant."""
        cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
        for result in self.record["results"]:
            case = tuple(result[name] for name in ("tokens", "width", "grid", "dtype"))
            assert result["contestant"] not in cases.setdefault(case, {})
            cases[case][result["contestant"]] = result
        return cases


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    home = tmp_path_factory.mktemp("bench")
    for path, code in (
        ("cheby/ChebyKANLayer.py", CHEBY_KAN),
        ("fast/fastkan/fastkan.py", FAST_KAN),
        ("kd/src/KANditioned/kan_layer.py", KANDITIONED),
    ):
        (home / path).parent.mkdir(parents=True)
        (home / path).write_text(code)
        (home / path).with_name("__init__.py").touch()  # or an installed package of that name would come first
    peers = f"--peers=cheby-kan={home}/cheby,fast-kan={home}/fast,kanditioned={home}/kd"
    files = ("--output", home / "times.json", "--plot", home / "times.png")
    command = run_command("bench/layer.py", *TINY, "--dtypes=float32,bfloat16", peers, *files)
    assert command.code == 0, command
    return Bench(command, (home / "times.json").read_text(), (home / "times.png").read_bytes(), home)


def test_every_contestant_of_every_case_is_timed(bench: Bench) -> None:
    cases = bench.cases()
    assert set(cases) == {(n, 8, g, dtype) for n in (16, 32) for g in (3, 5) for dtype in ("float32", "bfloat16")}
    skipped = {record["contestant"] for record in bench.record["skipped"]}
    for contestants in cases.values():
        assert {"mlp", "dense", "embedding_bag", "cheby-kan", "kanditioned embedding"} <= set(contestants)
        assert {"native", "csr"} <= set(contestants) | skipped
        for result in contestants.values():
            for measurement in (result["forward"], result["training"]):
                assert measurement["rounds"] == 1
                queued = {measurement.pop(name) for name in ("queued_ms", "queued_mlp_over_it")}
                assert queued == {None}, "only a GPU has a queue"
                assert all(value > 0 and math.isfinite(value) for value in measurement.values())


def test_parameters_are_those_of_the_mlp(bench: Bench) -> None:
    for (_, width, grid, _), contestants in bench.cases().items():
        for name in ("mlp", "dense", "embedding_bag", "cheby-kan"):
            assert contestants[name]["parameters"] == width * grid * width
        assert contestants["mlp 4x"]["parameters"] == 8 * width**2
        assert contestants["swiglu"]["parameters"] == pytest.approx(
            width * grid * width, abs=1.5 * width
        )  # tables round


def test_ratios_and_shares_follow_from_times_and_peaks(bench: Bench) -> None:
    peaks = bench.record["peaks"]
    for (tokens, width, _, dtype), contestants in bench.cases().items():
        most = peaks["gflops"]["float32"] if dtype == "float32" else max(peaks["gflops"].values())
        for name, result in contestants.items():
            for step, multiply_adds in (("forward", 2), ("training", 5)):
                it = result[step]
                assert it["mlp_over_it"] == pytest.approx(contestants["mlp"][step]["ms"] / it["ms"])
                assert it["of_peak_gflops"] == pytest.approx(it["gflops"] / most)
                assert it["of_peak_gbps"] == pytest.approx(it["gbps"] / peaks["gbps"])
                shares = it["of_peak_gflops"], it["of_peak_gbps"]
                assert it["limit_ms"] == pytest.approx(max(shares) * it["ms"])
                if not is_matrices(name):
                    assert it["gflops"] * it["ms"] == pytest.approx(2 * multiply_adds * tokens * width**2 / 1e6)


def test_what_fails_is_skipped_with_its_reason_and_said_once(bench: Bench) -> None:
    reasons = {record["contestant"]: record["reason"] for record in bench.record["skipped"]}
    assert reasons["fast-kan"] == "RuntimeError: not today"
    assert reasons["kanditioned DCT"] == "NotImplementedError: DCT is to come"
    assert bench.command.out.count("fast-kan skipped: RuntimeError: not today") == 1
    assert "NOISE" not in bench.command.out and bench.command.err == ""


def test_the_record_names_the_machine_and_no_paths(bench: Bench) -> None:
    record = bench.record
    assert record["machine"] and record["cpu"] and record["torch"] and record["threads"] == 1
    assert record["gpu"] is None and all(result["memory"] is None for result in record["results"])
    assert record["options"]["peers"] == "cheby-kan,fast-kan,kanditioned"
    assert str(bench.home) not in bench.text


def test_the_picture_is_a_png(bench: Bench) -> None:
    assert bench.picture.startswith(b"\x89PNG\r\n\x1a\n") and bench.picture.endswith(b"IEND\xaeB`\x82")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--tokens=16", "--widths=8,8"], ["tokens and widths", "1 and 2"]),
        (["--grids=5,many"], ["grids", "5,many"]),
        (["--grids=1"], ["grids", "from 2"]),
        (["--tokens="], ["tokens"]),
        (["--dtypes=float32,float8"], ["float8", "bfloat16"]),
        (["--impls=magic"], ["magic", "native"]),
        (["--tokens=1e4"], ["tokens", "1e4"]),
        ([f"--grids=5,{10**30}"], ["grids", "2,147,483,647"]),
        (["--threads=1000000"], ["threads"]),
        (["--peers=cheby-kan=~nobody-of-that-name"], ["~nobody-of-that-name"]),
        (["--output=/"], ["folder"]),
        (["--peers=magic-kan"], ["magic-kan", "cheby-kan"]),
        (["--peers=cheby-kan=/no/such/folder"], ["/no/such/folder", "no folder"]),
        (["--repeats=0"], ["repeats"]),
        (["--device=quantum"], ["quantum"]),
        (["--plot=a.gif"], ["a.gif", ".png"]),
        (["--grids=5", "--plot=a.png"], ["plot", "two"]),
        (["--output=/no/such/folder/a.json"], ["/no/such/folder/a.json"]),
        (["--pears=x"], ["pears", "peers"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_an_impossible_option_is_refused(arguments: list[str], parts: list[str]) -> None:
    assert_one_sentence(call(layer.main, *arguments), *parts)


@pytest.mark.parametrize(
    ("code", "part"),
    [
        (None, "has no ChebyKANLayer.py"),
        ("import no_such_package", "no_such_package"),
        ("def broken(:", "SyntaxError"),
        ("x = 1", "ChebyKANLayer"),
    ],
)
def test_a_checkout_that_will_not_do_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str | None, part: str
) -> None:
    if code is not None:
        (tmp_path / "ChebyKANLayer.py").write_text(code)
    monkeypatch.delitem(layer.sys.modules, "ChebyKANLayer", raising=False)
    assert_one_sentence(call(layer.main, f"--peers=cheby-kan={tmp_path}"), "cheby-kan", str(tmp_path), part)


def test_slow_contestants_get_three_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds", lambda run, device: run())
    times = timing.take_turns({"slow": lambda: 2.5, "fast": lambda: 0.25}, 5, "cpu")
    assert times == {"slow": timing.Median(2500, 3), "fast": timing.Median(250, 5)}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_labels_keep_their_order_and_their_distance(heights: list[float]) -> None:
    places = moved_apart(heights, 0.05)
    order = sorted(range(len(heights)), key=lambda k: heights[k])
    assert all(places[upper] - places[lower] > 0.05 - 1e-9 for lower, upper in pairwise(order))
    if all(heights[upper] - heights[lower] > 0.05 for lower, upper in pairwise(order)):
        assert places == pytest.approx(heights)
