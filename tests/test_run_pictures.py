"""The pictures of a run show the activations of its model, and all have the same axes."""

import json
from pathlib import Path

import torch

from model import GPT, GPTConfig
from pictures.run_pictures import Axes, SplinePictures
from training.activations import MOST_TOKENS, layer_inputs, take_snapshots


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


def test_layer_inputs_are_what_the_layers_saw_and_leave_the_model_as_it_was() -> None:
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
    assert len(many[0]) == MOST_TOKENS


def test_a_model_without_splines_has_no_snapshots() -> None:
    assert take_snapshots(small_model(ffn="mlp"), token_batches()) == []


def picture_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def draw(pictures: SplinePictures, step: int, model: GPT, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> Path:
    """Record the splines and draw them, like a run."""
    snapshots = take_snapshots(model, batches)
    pictures.records.write(step, snapshots)
    return pictures.draw(step, snapshots)


def test_all_pictures_of_a_run_share_axes(tmp_path: Path) -> None:
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


def test_lost_axes_are_made_again_from_all_steps(tmp_path: Path) -> None:
    pictures = SplinePictures(tmp_path)
    draw(pictures, 100, small_model(scale=1.0), token_batches())
    axes = pictures.axes()
    (tmp_path / "splines" / "axes.json").write_text("{")
    assert pictures.axes() == Axes()
    draw(pictures, 200, small_model(scale=0.03), [])
    assert pictures.axes() == axes
    assert set(json.loads((tmp_path / "splines" / "axes.json").read_text())) == {"spline_limit", "importance_limit"}


def test_splines_that_are_zero_can_be_drawn_and_settle_no_axes(tmp_path: Path) -> None:
    pictures = SplinePictures(tmp_path)
    folder = draw(pictures, 0, small_model(scale=0.0), token_batches())
    assert (folder / "overview.png").is_file()
    draw(pictures, 1, small_model(scale=0.001), token_batches())
    assert pictures.axes().spline_limit == 0.005
