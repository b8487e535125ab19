"""A snapshot describes a layer and its activations. Records bound its size, keep it, and give it back."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from model import GPT, GPTConfig
from splines import records as records_module
from splines.records import SplineRecords, bounded
from splines.snapshot import MIN_COUNT, Snapshot
from tests.layers import random_layer
from tests.report_runs import look_at
from training.activations import take_snapshots


def assert_same(first: Snapshot, second: Snapshot) -> None:
    for field in dataclasses.fields(Snapshot):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(second, field.name), err_msg=field.name)


@settings(max_examples=30, deadline=None)
@given(
    features=st.integers(1, 4),
    knots=st.integers(2, 9),
    width=st.floats(0.5, 8),
    spread=st.floats(0.1, 6),
    seed=st.integers(0, 99),
)
def test_cells_and_token_means_are_those_of_the_definition(features, knots, width, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, features, generator=generator) * spread
    tokens = torch.randint(7, (200,), generator=generator)
    snapshot = random_layer(features, 2, knots, width).snapshot(x, tokens, number=3)
    edges = np.linspace(-width / 2, width / 2, knots)
    for i in range(features):
        counts, _ = np.histogram(x[:, i].double().numpy(), edges)
        np.testing.assert_allclose(snapshot.cells[i], counts / 200, atol=0.0051)  # a value on a knot is in either cell
    np.testing.assert_allclose(snapshot.outside, (x.abs() > width / 2).float().mean(0), atol=1e-6)
    for token, means in zip(snapshot.tokens, snapshot.token_means, strict=True):
        np.testing.assert_allclose(means, x[tokens == int(token)].mean(0), rtol=1e-4, atol=1e-5)
    seen = torch.bincount(tokens, minlength=7)
    assert set(snapshot.tokens.tolist()) == {t for t in range(7) if seen[t] >= MIN_COUNT}
    assert float((x.abs() <= snapshot.reach).float().mean()) == pytest.approx(0.99, abs=0.006)


def test_records_give_back_what_they_were_given(tmp_path: Path) -> None:
    records = SplineRecords(tmp_path)
    before = [look_at(random_layer(5, 7, 6)), random_layer(4, 4, 3, width=2.0).snapshot(number=1)]
    records.write(30, before)
    records.write(7, before[:1])
    assert records.steps() == [7, 30]
    for old, new in zip(before, records.read(30), strict=True):
        assert_same(old, new)
    assert not before[1].has_activations and not list(tmp_path.rglob("*.tmp"))
    records.forget_after(7)
    assert records.steps() == [7]


def test_what_is_not_a_record_is_refused_in_a_sentence(tmp_path: Path) -> None:
    records = SplineRecords(tmp_path)
    path = records.write(10, [look_at(random_layer(3, 3, 4))])
    with pytest.raises(UserError, match="no record of step 11; there are steps 10"):
        records.read(11)
    whole = path.read_bytes()
    for damaged in (b"", b"no zip", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged"):
            records.read(10)
    np.savez(path, count=np.array([{"a pickle": 1}], dtype=object))
    with pytest.raises(UserError, match="is damaged"):
        records.read(10)


@pytest.mark.parametrize("shape", [(40, 30), (3, 200), (200, 3), (100, 100)])
def test_a_large_layer_is_recorded_in_part_the_same_part_each_time(tmp_path: Path, monkeypatch, shape) -> None:
    monkeypatch.setattr(records_module, "MAX_VALUES", 2000)
    layer = random_layer(*shape, knots=5)
    records = SplineRecords(tmp_path)
    for step in (1, 2):
        records.write(step, [look_at(layer)])
    first, second = records.read(1)[0], records.read(2)[0]
    assert first.control_points.size <= 2000
    assert first.control_points.size > 1000, "most of what is allowed is used"
    assert_same(first, second)
    points = layer.control_points().detach().numpy()
    np.testing.assert_array_equal(first.control_points, points[first.inputs][:, :, first.outputs])
    assert (first.in_features, first.out_features) == shape
    assert len(set(first.inputs.tolist())) == len(first.inputs)


def test_a_small_layer_is_recorded_whole() -> None:
    snapshot = look_at(random_layer(8, 8, 4))
    assert bounded(snapshot, 8 * 4 * 8) is snapshot


def test_layers_are_named_by_block_where_a_block_has_several() -> None:
    config = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 11}
    one, two = GPT(GPTConfig(**config)), GPT(GPTConfig(**config, attention_gate=True))
    tokens = [torch.randint(11, (40, 8))]
    assert [snapshot.name for snapshot in take_snapshots(one, tokens)] == ["layer 0", "layer 1"]
    named = {snapshot.name: snapshot for snapshot in take_snapshots(two, tokens)}
    places = [f"block {block}, {place}" for block in (0, 1) for place in ("attention gate", "feed-forward")]
    assert sorted(named) == sorted(places)
    for block in (0, 1):
        layer = two.blocks[block].ffn
        points = named[f"block {block}, feed-forward"].control_points
        np.testing.assert_array_equal(points, layer.control_points().detach().numpy())
