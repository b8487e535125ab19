"""The Triton backend where there is no GPU: its kernels in Triton's interpreter, its tiles, and what it refuses."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import backends
from backends import triton, triton_tiles
from backends.cells import find_cell, knot_units
from tests import machine
from tests.test_backends import inputs_of_every_kind, random_layer, relative_error, run, truth_for

ROOT = Path(__file__).resolve().parents[1]
has_triton = pytest.mark.needs("triton")
# The interpreter is chosen when kernels are imported, so it needs a process of its own: the first test starts it.
interpreted = pytest.mark.needs("interpreter")
not_interpreted = pytest.mark.needs("no interpreter")
CUDA = torch.device("cuda")
TILES = [field.name for field in fields(triton_tiles.Tiles)]


def version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


@has_triton
@pytest.mark.skipif(
    machine.why_not("triton") is None and version("triton") < (3, 7) and version("numpy") >= (2, 4),
    reason="Triton 3.6's interpreter fails with NumPy 2.4",
)
@not_interpreted
def test_the_contract_holds_in_the_interpreter() -> None:
    arguments = (
        "tests/test_backends.py",
        "tests/test_transforms.py",
        "tests/test_triton.py",
        "-k",
        "triton",
        "-p",
        "no:cacheprovider",
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) > 50, result.stdout[-1000:]


@interpreted
@settings(max_examples=8, deadline=None)
@given(
    tokens=st.integers(1, 80),
    features=st.integers(1, 40),
    outputs=st.integers(1, 80),
    grid=st.integers(2, 20),
    width=st.floats(0.5, 20.0),
    seed=st.integers(0, 2**16),
)
def test_any_shape_across_tiles(tokens: int, features: int, outputs: int, grid: int, width: float, seed: int) -> None:
    torch.manual_seed(seed)
    layer = random_layer(features, outputs, grid, width, "triton")
    x = inputs_of_every_kind(-(-tokens // 6), features, grid, width)
    x = x[x.abs().amax(1) < 100 * width]  # far outside is test_backends' matter
    dy = torch.randn(len(x), outputs)
    for value, truth in zip(run(layer, x, dy), truth_for(layer, x, dy), strict=True):
        assert relative_error(value, truth) < 2e-5


@interpreted
def test_unused_control_points_get_exactly_no_gradient() -> None:
    layer = random_layer(5, 6, 9, 4.0, "triton")
    x = torch.rand(200, 5) * 0.99 + 0.005  # in cells 4 and 5 of 0 … 7
    _, _, dw = run(layer, x, torch.randn(200, 6))
    used = (dw != 0).any(dim=2).any(dim=0)
    assert used.tolist() == [g in (4, 5, 6) for g in range(9)]


@pytest.fixture
def fresh_launches() -> Iterator[None]:
    """Launches are kept by size; these of another table must not be."""
    triton.Launch.of.cache_clear()
    yield
    triton.Launch.of.cache_clear()


@interpreted
@pytest.mark.usefixtures("fresh_launches")
@pytest.mark.parametrize("grid", [2, 3, 4, 5, 6, 8, 9, 10, 17, 32])
def test_groups_of_ramps_and_hats_as_on_hopper(grid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole groups, groups with places beyond the last cell, one group and several."""
    hopper = triton_tiles.HALF["hopper"]
    small = {name: replace(getattr(hopper, name), tokens=16, outputs=32) for name in TILES}
    monkeypatch.setattr(triton_tiles, "IEEE", triton_tiles.Tiles(**small))
    layer = random_layer(5, 6, grid, 4.0, "triton")
    x = inputs_of_every_kind(4, 5, grid, 4.0)[:20]  # without those far outside
    dy = torch.randn(len(x), 6)
    for value, truth in zip(run(layer, x, dy), truth_for(layer, x, dy), strict=True):
        assert relative_error(value, truth) < 2e-6


@interpreted
@pytest.mark.usefixtures("fresh_launches")
def test_the_sum_over_parts_of_the_tokens_is_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer(3, 4, 5, 4.0, "triton")
    x, dy = torch.randn(300, 3), torch.randn(300, 4)
    whole = run(layer, x, dy)[2]
    for splits in (2, 7):
        triton.Launch.of.cache_clear()
        monkeypatch.setattr(triton_tiles, "token_splits", lambda *_, splits=splits: splits)
        torch.testing.assert_close(run(layer, x, dy)[2], whole, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cells_whose_numbers_need_more_than_a_byte(dtype: torch.dtype) -> None:
    grid = triton_tiles.BYTE_CELLS + 20
    layer = random_layer(4, 3, grid, 4.0, "triton").to(dtype)
    x, dy = (torch.randn(10, 4) * 1.2).to(dtype), torch.randn(10, 3).to(dtype)
    _, dx, _ = run(layer, x, dy)
    assert relative_error(dx, truth_for(layer, x, dy)[1]) < max(1e-5, 3 * torch.finfo(dtype).eps)


@interpreted
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_input_has_the_slope_of_an_end_cell(bad: float) -> None:
    """As in every other backend: its gradient is finite, and that of W shows that something is wrong."""
    grid = 5
    layer, x, dy = random_layer(3, 4, grid, 4.0, "triton"), torch.randn(6, 3), torch.randn(6, 4)
    x[2, 1] = bad
    _, dx, dw = run(layer, x, dy)
    with torch.no_grad():
        edge = layer.weight[1, -2:] if bad == float("inf") else layer.weight[1, :2]
        slope = (dy[2] * (edge[1] - edge[0])).sum() * (grid - 1) / 4.0
    torch.testing.assert_close(dx[2, 1], slope)
    assert not dw[1].isfinite().all() and dw[[0, 2]].isfinite().all()


@interpreted
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_the_gradients_that_are_wanted(wanted: tuple[bool, bool]) -> None:
    layer = random_layer(4, 5, 6, 4.0, "triton")
    x, dy = torch.randn(20, 4), torch.randn(20, 5)
    _, dx, dw = run(layer, x, dy)
    x.requires_grad_(wanted[0])
    layer.weight.requires_grad_(wanted[1])
    layer(x).backward(dy)
    for gradient, want, truth in zip((x.grad, layer.weight.grad), wanted, (dx, dw), strict=True):
        assert (gradient is not None) == want
        if gradient is not None:
            torch.testing.assert_close(gradient, truth)


@interpreted
def test_the_operator_keeps_pytorch_s_rules_for_operators() -> None:
    x, weight = torch.randn(6, 3, requires_grad=True), torch.randn(3, 5, 4, requires_grad=True)
    tables = triton.tables(weight.detach(), torch.float32)
    for tokens in (6, 0):
        torch.library.opcheck(torch.ops.splinegpt.triton.default, (x[:tokens], weight, *tables, 4.0))


@interpreted
@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.randn(4, 3), torch.randn(2, 5, 4), r"x must be \(N, I\).*got \(4, 3\) and \(2, 5, 4\)"),
        (torch.randn(4, 3, 2), torch.randn(2, 5, 4), r"x must be \(N, I\)"),
        (torch.randn(4, 2), torch.randn(2, 1, 4), "at least 2 control points"),
        (torch.randn(4, 2).double(), torch.randn(2, 5, 4), "float32, bfloat16 or float16; got torch.float64"),
        (torch.randn(4, 2).bfloat16(), torch.randn(2, 5, 4), "interpreter computes bfloat16 wrongly"),
    ],
)
def test_the_operator_refuses_what_the_kernels_would_misread(
    x: torch.Tensor, weight: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        torch.ops.splinegpt.triton(x, weight, *triton.tables(weight, torch.float32), 4.0)


@settings(max_examples=200, deadline=None)
@given(grid=st.integers(2, 1025), width=st.floats(1e-3, 1e4), seed=st.integers(0, 2**16))
def test_edges_part_the_float32_numbers_as_float64_does(grid: int, width: float, seed: int) -> None:
    edges = triton.cell_edges(grid, width, torch.device("cpu"))
    assert len(edges) == grid and edges[0] == -torch.inf and edges[-1] == torch.inf
    torch.manual_seed(seed)
    knots = torch.linspace(-width / 2, width / 2, grid)
    beside = [knots.nextafter(torch.full_like(knots, sign * torch.inf)) for sign in (1, -1)]
    x = torch.cat((knots, *beside, torch.randn(100) * width, torch.zeros(1)))
    cell = find_cell(knot_units(x, grid, width), grid)
    assert torch.equal(torch.searchsorted(edges, x, right=True) - 1, cell)


@given(
    programs=st.integers(1, 5000),
    tokens=st.integers(1, 10**6),
    block=st.sampled_from([16, 32, 64, 128]),
    processors=st.integers(1, 160),
)
def test_splits_fill_the_processors_and_leave_parts_of_some_size(
    programs: int, tokens: int, block: int, processors: int
) -> None:
    def use(splits: int) -> float:
        return programs * splits / (np.ceil(programs * splits / processors) * processors)

    splits = triton_tiles.token_splits(programs, tokens, block, processors)
    assert splits == 1 or (splits <= 16 and tokens // splits >= 4 * block)
    assert use(splits) >= use(1)
    if programs >= 20 * processors:
        assert splits == 1  # the last round is of no account


@given(
    major=st.sampled_from([(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]),
    dtype=st.sampled_from(triton.DTYPES),
    precision=st.sampled_from(["tf32", "ieee"]),
    tokens=st.integers(1, 10**6),
    inputs=st.integers(1, 5000),
    points=st.integers(2, 1025),
    outputs=st.integers(1, 5000),
)
def test_tiles_suit_the_kernels(
    major: tuple[int, int], dtype: torch.dtype, precision: str, tokens: int, inputs: int, points: int, outputs: int
) -> None:
    chosen = triton_tiles.tiles(major, dtype, precision, tokens, (inputs, points, outputs))
    assert chosen.forward.span % chosen.forward.group == 0
    assert chosen.forward.span < 2 * max(4, points - 1)
    assert triton_tiles.ROW % chosen.forward.inputs == 0  # it reads whole tiles
    launches = triton_tiles.launches_of_hats(chosen, points, inputs)
    ends = [hats.first + hats.groups * hats.tile.group for hats in launches]
    assert [hats.first for hats in launches] == [0, *ends[:-1]]  # each hat in one of them
    assert points <= ends[-1] < max(points + 4, 1.5 * points)  # few zeros
    assert all(hats.first % hats.tile.group == 0 for hats in launches)
    for tile in (chosen.forward, chosen.grad_x, *(hats.tile for hats in launches)):
        for block, size in ((tile.tokens, tokens), (tile.inputs, inputs), (tile.outputs, outputs)):
            assert block >= 16 and block.bit_count() == 1  # what tl.arange and tensor cores take
            assert block == 16 or block < 2 * size  # no tile is mostly empty


def problem(device: torch.device = CUDA) -> backends.Problem:
    return backends.Problem(8, 5, 8, device)


@not_interpreted
def test_a_cpu_is_refused_in_one_sentence() -> None:
    with pytest.raises(
        ValueError, match=r"impl 'triton' cannot be used here: it is for CUDA GPUs, .* on cpu; use auto"
    ):
        backends.choose("triton", problem(torch.device("cpu")))


@has_triton
@not_interpreted
def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    reason = backends.availability(problem())["triton"]
    assert reason == "its kernels need a GPU of compute capability 8.0 (Ampere) or newer, and this one has 7.5"


@not_interpreted
def test_a_missing_triton_only_switches_off_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backends.availability(problem())["triton"] == "triton is not installed (pip install triton)"
