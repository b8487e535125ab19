"""What is drawn of the splines is true of the layer, and the pictures of a run can be compared."""

import json
import math
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kan_layer import KANLayer
from model import GPT, GPTConfig
from pictures import sheets
from pictures.run_pictures import Axes, SplinePictures
from splines import views
from training.activations import MAX_TOKENS, layer_inputs, take_snapshots

ROOT = Path(__file__).resolve().parents[1]


def random_layer(in_features: int, out_features: int, knots: int, width: float = 4.0, seed: int = 0) -> KANLayer:
    layer = KANLayer(in_features, out_features, num_control_points=knots, spline_width=width)
    with torch.no_grad():
        layer.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return layer


def small_model(ffn: str = "splines", scale: float = 0.05) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=11, ffn=ffn))
    with torch.no_grad():
        for layer in model.spline_layers():
            layer.weight.normal_(std=scale)
    return model


def token_batches(count: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    tokens = torch.randint(11, (count, 4, 9), generator=torch.Generator().manual_seed(1))
    return [(batch[:, :-1], batch[:, 1:]) for batch in tokens]


def slow_importance(layer: KANLayer, activations: torch.Tensor | None) -> np.ndarray:
    """By the definition, token by token, in float64."""
    values = layer.weight.detach().double().numpy()
    knots = np.linspace(-layer.spline_width / 2, layer.spline_width / 2, layer.num_control_points)
    step = knots[1] - knots[0]
    result = np.zeros((layer.in_features, layer.out_features))
    for i in range(layer.in_features):
        use = np.full(len(knots), 1 / len(knots))
        if activations is not None:
            inside = np.clip(activations[:, i].double().numpy(), knots[0], knots[-1])
            use = np.maximum(0, 1 - np.abs(inside[:, None] - knots) / step).mean(0)
        bends = values[i, :-2] - 2 * values[i, 1:-1] + values[i, 2:]
        result[i] = np.sqrt((use[1:-1, None] * bends**2).sum(0))
    return result


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(2, 9)),
    width=st.floats(0.1, 20),
    tokens=st.integers(0, 30),
    spread=st.floats(0, 10),
    seed=st.integers(0, 1000),
)
def test_importance_is_that_of_the_definition(shape, width, tokens, spread, seed):
    layer = random_layer(shape[0], shape[1], shape[2], width, seed)
    activations = torch.randn(tokens, shape[0], generator=torch.Generator().manual_seed(seed)) * spread
    snapshot = layer.snapshot(activations)
    expected = slow_importance(layer, activations if tokens else None)
    np.testing.assert_allclose(views.edge_importance(snapshot), expected, rtol=1e-3, atol=2e-3)
    np.testing.assert_allclose(snapshot.use.sum(1), 1, rtol=1e-5)
    assert (snapshot.use >= 0).all()


def test_straight_lines_have_no_importance_and_no_curved_variation():
    layer = KANLayer(5, 4, num_control_points=9)
    assert views.edge_importance(layer.snapshot(torch.randn(100, 5))).max() < 1e-6
    view = views.layer_view(layer.snapshot(torch.randn(100, 5)), 3)
    assert view.curved < 1e-9
    assert view.curved_shares[0] == 1


def test_a_kink_amid_symmetric_activations_is_all_curved_variation():
    layer = KANLayer(1, 1, num_control_points=5)
    with torch.no_grad():
        layer.weight[0, :, 0] = layer.knots().abs()
    view = views.layer_view(layer.snapshot(torch.linspace(-2, 2, 101)[:, None]), 1)
    assert view.curved == pytest.approx(1)
    assert view.curved_shares[-1] == 1


def test_the_view_and_its_continuation_are_the_layers_function():
    layer = random_layer(3, 2, 6, width=3.0)
    for view in views.most_curved(layer.snapshot(), 6):
        alone = KANLayer(3, 2, "zero", 6, 3.0)
        with torch.no_grad():
            alone.weight[view.input, :, view.output] = layer.weight[view.input, :, view.output]
        lines = sheets.extrapolations(view, x_end=2.25, limit=100)
        xs = np.concatenate([np.random.default_rng(0).uniform(-1.5, 1.5, 50), *(x for x, _ in lines)])
        ys = np.concatenate([np.interp(xs[:50], view.grid.knots(), view.control_points), *(y for _, y in lines)])
        x = torch.zeros(len(xs), 3)
        x[:, view.input] = torch.from_numpy(xs)
        np.testing.assert_allclose(alone(x)[:, view.output].detach(), ys, atol=1e-5)


def test_extrapolations_end_at_the_panel():
    view = views.most_curved(random_layer(1, 1, 2, seed=3).snapshot())[0]
    limit = float(np.abs(view.control_points).max())
    for x, y in sheets.extrapolations(view, 3.0, limit):
        assert np.abs(x).max() <= 3.0 + 1e-6
        assert np.abs(y).max() <= limit * (1 + 1e-6)


def test_the_most_curved_are_varied_until_nothing_else_is_left():
    importance = np.zeros((6, 6))
    importance[0] = 10 + np.arange(6)  # one feature dominates
    importance[1:, 1:] = 1
    top = views.varied_top(importance, 6)
    assert top[:2] == [(0, 5), (0, 4)]
    assert all(sum(edge[axis] == k for edge in top) <= 2 for axis in (0, 1) for k in range(6))
    everything = views.varied_top(importance, 100)
    assert len(everything) == len(set(everything)) == 36
    assert len(views.varied_top(np.ones((1, 5)), 4)) == 4


def test_the_histogram_accounts_for_all_activations():
    layer = random_layer(2, 2, 5)
    snapshot = layer.snapshot(torch.randn(2000, 2) * 3)
    np.testing.assert_allclose(snapshot.histogram.sum(1) + snapshot.below + snapshot.above, 1, atol=1e-5)
    assert (snapshot.below > 0).all() and (snapshot.above > 0).all()
    np.testing.assert_allclose(snapshot.cells.sum(1) + snapshot.outside, 1, atol=1e-5)


def test_a_wide_heat_map_keeps_its_maximum():
    values = np.random.default_rng(0).random((300, 50))
    pooled = views.max_pool(values, 128)
    assert pooled.shape == (128, 50)
    assert pooled.max() == np.float32(values.max())
    np.testing.assert_array_equal(pooled.max(0), values.max(0).astype(np.float32))


def test_layer_inputs_are_what_the_layers_saw_and_leave_the_model_as_it_was():
    model = small_model()
    model.train()
    state = torch.get_rng_state()
    seen, read = layer_inputs(model, token_batches(3))
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert [tuple(x.shape) for x in seen] == [(96, 16)] * 2
    assert not any(layer._forward_pre_hooks for layer in model.spline_layers())
    tokens = torch.cat([x for x, _ in token_batches(3)])
    block = model.blocks[0]
    x = model.token_embedding(tokens)
    expected = block.norm_2(x + block.attn(block.norm_1(x), None)).flatten(0, 1)
    torch.testing.assert_close(seen[0], expected)
    assert read is not None and torch.equal(read, tokens.flatten())
    many, _ = layer_inputs(model, [torch.zeros(900, 8, dtype=torch.long)])
    assert len(many[0]) == MAX_TOKENS


@pytest.mark.parametrize(
    ("value", "limit"), [(0, 0.1), (0.1, 0.1), (0.11, 0.2), (0.3, 0.5), (0.003, 0.005), (1, 1), (7, 10), (99.0, 100)]
)
def test_nice_limits(value, limit):
    assert sheets.nice_limit(value) == limit


def picture_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def draw(pictures: SplinePictures, step: int, model: GPT, batches: list) -> Path:
    """Record and draw, as a run does."""
    snapshots = take_snapshots(model, batches)
    pictures.records.write(step, snapshots)
    return pictures.draw(step, snapshots)


def test_all_pictures_of_a_run_share_axes(tmp_path):
    pictures = SplinePictures(tmp_path)
    first = draw(pictures, 100, small_model(scale=0.03), token_batches())
    assert first == tmp_path / "splines" / "step_000100"
    names = {"layer_00.png", "layer_01.png", "overview.png"}
    before = picture_bytes(first)
    assert set(before) == names
    narrow = pictures.axes()

    second = draw(pictures, 200, small_model(scale=0.02), token_batches())
    assert pictures.axes() == narrow and picture_bytes(first) == before  # smaller: nothing to redraw

    draw(pictures, 300, small_model(scale=1.0), token_batches())
    wide = pictures.axes()
    assert wide.spline_limit > narrow.spline_limit and wide.importance_limit > narrow.importance_limit
    after = picture_bytes(first)
    assert all(before[name] != after[name] for name in names)
    draw(pictures, 100, small_model(scale=0.03), token_batches())
    assert picture_bytes(first) == after  # redrawing from the record is drawing
    assert not list((tmp_path / "splines").rglob("*.tmp"))
    assert set(picture_bytes(second)) == names


def test_lost_axes_are_made_again_from_all_steps(tmp_path):
    pictures = SplinePictures(tmp_path)
    draw(pictures, 100, small_model(scale=1.0), token_batches())
    axes = pictures.axes()
    (tmp_path / "splines" / "axes.json").write_text("{")
    assert pictures.axes() == Axes()
    draw(pictures, 200, small_model(scale=0.03), [])
    assert pictures.axes() == axes
    assert set(json.loads((tmp_path / "splines" / "axes.json").read_text())) == {"spline_limit", "importance_limit"}


def test_a_model_without_splines_has_no_snapshots():
    assert take_snapshots(small_model(ffn="mlp"), token_batches()) == []


def test_splines_that_are_zero_can_be_drawn_and_settle_no_axes(tmp_path):
    pictures = SplinePictures(tmp_path)
    folder = draw(pictures, 0, small_model(scale=0.0), token_batches())
    assert (folder / "overview.png").is_file()
    draw(pictures, 1, small_model(scale=0.001), token_batches())
    assert pictures.axes().spline_limit == 0.005


@pytest.mark.parametrize("shape", [(2, 3), (40, 30), (1, 9)])
def test_everything_is_one_axes_with_every_spline(tmp_path, shape):
    layer = random_layer(*shape, knots=5)
    figure = layer.plot(everything=True, activations=torch.randn(3, 7, shape[0]), save_path=tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 1000
    assert len(figure.axes) == 1
    curves = [path for c in figure.axes[0].collections for path in c.get_paths() if len(path.vertices) == 5]
    assert len(curves) >= shape[0] * shape[1]
    layer.visualize_all_mappings(tmp_path / "same.png")
    assert (tmp_path / "same.png").is_file()


def panel_labels(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts if text.get_text().count(" → ") == 1]


def panel_edges(figure) -> list[tuple[int, int]]:
    labels = [label for label in panel_labels(figure) if label.split(" → ")[0].isdigit()]
    return [(int(i), int(o)) for i, o in (label.split(" → ") for label in labels)]


def test_inputs_and_outputs_restrict_what_is_drawn():
    layer = random_layer(20, 30, 5)
    assert len(panel_edges(layer.plot())) == 12
    assert {i for i, _ in panel_edges(layer.plot(3))} == {3}
    assert {i for i, _ in panel_edges(layer.plot(inputs=[3]))} == {3}
    assert {o for _, o in panel_edges(layer.plot(outputs=[4, 29]))} == {4, 29}
    assert panel_edges(layer.plot([19, 0], [1, 2])) == [(19, 1), (19, 2), (0, 1), (0, 2)]
    assert len(panel_edges(layer.plot(range(8), range(8)))) == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": [20]}, "inputs must be from 0 to 19; got 20"),
        ({"outputs": [2, -1]}, "outputs must be from 0 to 29; got -1"),
        ({"inputs": []}, "inputs must name at least one"),
        ({"inputs": range(8), "outputs": range(9)}, "at most 64"),
        ({"inputs": [1], "everything": True}, "leave out inputs and outputs"),
        ({"style": "sepia"}, "style must be one of light, dark, print"),
        ({"activations": torch.zeros(3, 21)}, "in_features=20"),
        ({"activations": torch.full((3, 20), math.nan)}, "finite"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        random_layer(20, 30, 5).plot(**arguments)


def test_nothing_is_shown_unasked(monkeypatch):
    import matplotlib.pyplot as plt

    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(True))
    layer = random_layer(2, 2, 4)
    layer.plot()
    layer.plot(everything=True)
    assert not shown and not plt.get_fignums()
    plt.switch_backend("Agg")
    layer.plot(show=True)
    assert shown == [True]
    plt.close("all")


def test_drawing_does_not_import_pyplot(tmp_path):
    code = (
        "import sys; from kan_layer import KANLayer; from pictures import sheets\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"KANLayer(3, 3).plot(save_path={str(tmp_path / 'sheet.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_wide_layer_is_looked_at_without_much_memory():
    layer = random_layer(384, 384, 8)
    activations = torch.randn(4096, 384)
    tracemalloc.start()
    view = views.layer_view(layer.snapshot(activations), 12)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert view.heat_map.shape == (128, 128)
    assert len(view.splines) == 12
    assert peak < 200e6  # tokens x I x O would be 2.4e9
