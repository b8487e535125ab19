"""Muon: it makes each matrix's update orthogonal, leaves the rest to AdamW, and resumes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kan_layer import KANLayer
from model import GPT, GPTConfig
from splines.parametrisation import VARIANTS
from tests.runs import make_dataset, options, train_losses, train_until
from training.config import Config
from training.optimizer import (
    ITERATIONS,
    LONG,
    MOMENTUM,
    QUINTIC,
    MuonAdamW,
    fast_dtype,
    is_long,
    make_optimizer,
    matrices,
    orthogonalize,
    set_learning_rate,
    step_through_gram,
)

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 11}


@settings(max_examples=50, deadline=None)
@given(stack=st.integers(1, 4), rows=st.integers(1, 40), columns=st.integers(1, 40), scale=st.floats(1e-6, 1e6))
def test_all_singular_values_become_about_one_and_directions_stay(
    stack: int, rows: int, columns: int, scale: float
) -> None:
    torch.manual_seed(rows * 41 + columns)
    # Singular values are within a factor of 10, because five iterations do not bring smaller ones to 1.
    u, _, v = torch.linalg.svd(torch.randn(stack, rows, columns, dtype=torch.float64), full_matrices=False)
    s = torch.rand(stack, min(rows, columns), dtype=torch.float64) * 0.9 + 0.1
    stack_of = (u * s.unsqueeze(1) @ v * scale).float()
    found = orthogonalize(stack_of).double()
    inside = u.mT @ found @ v.mT  # diagonal if the directions stayed
    diagonal = torch.diagonal(inside, dim1=1, dim2=2)
    assert ((diagonal > 0.6) & (diagonal < 1.3)).all()
    rounding = torch.finfo(fast_dtype(stack_of.device)).eps
    assert (inside - torch.diag_embed(diagonal)).abs().max() < 1e-3 + 10 * rounding


@settings(max_examples=30, deadline=None)
@given(short=st.integers(1, 24), times=st.integers(LONG, 9), tall=st.booleans(), log_condition=st.floats(0, 3))
def test_long_matrices_go_the_short_way_to_the_same_step(
    short: int, times: int, tall: bool, log_condition: float
) -> None:
    torch.manual_seed(short)
    u, _, v = torch.linalg.svd(torch.randn(2, short, short * times, dtype=torch.float64), full_matrices=False)
    update = 100 * u * torch.logspace(0, -log_condition, short, dtype=torch.float64) @ v
    update = update.mT if tall else update
    assert is_long(*update.shape[1:])
    before = torch.randn_like(update)
    expected = 0.9 * before - 0.1 * orthogonalized_in_numpy(update.numpy())
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        weights = before.to(dtype, copy=True)
        step_through_gram(weights, update.to(dtype), decay=0.9, rate=0.1)
        assert (weights - expected).abs().max() < tolerance


def orthogonalized_in_numpy(stack: np.ndarray) -> torch.Tensor:
    """Apply the quintic to the singular values themselves."""
    u, s, vt = np.linalg.svd(stack, full_matrices=False)
    s /= np.linalg.norm(s, axis=1, keepdims=True)
    for _ in range(ITERATIONS):
        s = sum(factor * s**power for factor, power in zip(QUINTIC, (1, 3, 5), strict=True))
    return torch.from_numpy(u * s[:, None, :] @ vt)


def test_what_is_a_matrix_of_its_own() -> None:
    spline, linear = torch.randn(6, 5, 4), torch.randn(12, 4)
    assert all(torch.equal(matrices(spline, None)[g], spline[:, g]) for g in range(5))
    assert torch.equal(matrices(spline, 1)[0], spline.reshape(30, 4))
    assert all(torch.equal(part, linear[4 * k : 4 * k + 4].t()) for k, part in enumerate(matrices(linear, 3)))


@pytest.mark.parametrize(("variant", "zero_centred"), [*((name, False) for name in VARIANTS), ("B-spline", True)])
def test_a_step_of_a_spline_layer_has_singular_values_of_one(variant: str, zero_centred: bool) -> None:
    """B-splines: in each control point's matrix. Others: in the matrix that maps all I·G features to the outputs."""
    layer = KANLayer(12, 8, num_control_points=5, variant=variant, zero_centred=zero_centred)
    before = layer.weight.detach().clone()
    group = {"params": [layer.weight], "muon_pieces": [layer.matrices], "weight_decay": 0.0, "lr": 1.0}
    layer.weight.grad = torch.randn_like(layer.weight)
    MuonAdamW([group], lr=1.0).step()
    step = (before - layer.weight.detach()).double()  # (I, G, O)
    parts = step.transpose(0, 1) if variant == "B-spline" else step.reshape(1, -1, 8)
    singular = torch.linalg.svdvals(parts)
    assert ((singular > 0.6) & (singular < 1.3)).all()


def test_a_step_is_that_of_the_definition() -> None:
    """Orthogonalise in NumPy, by singular vectors instead of iterations."""
    weight = torch.nn.Parameter(torch.randn(24, 8, dtype=torch.float64).float())
    before = weight.detach().double().numpy().copy()
    group = {"params": [weight], "muon_pieces": [3], "weight_decay": 0.1, "lr": 0.02}
    optimizer = MuonAdamW([group], lr=0.02)
    momentum, expected = np.zeros((24, 8)), before.copy()
    for seed in range(3):
        gradient = np.random.default_rng(seed).normal(size=(24, 8))
        weight.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        update = (1 - MOMENTUM) * gradient + MOMENTUM * momentum
        for part in range(3):
            rows = slice(8 * part, 8 * part + 8)
            u, _, v = np.linalg.svd(update[rows])
            expected[rows] = expected[rows] * (1 - 0.02 * 0.1) - 0.02 * u @ v
    moved = np.linalg.norm(expected - before)
    assert np.linalg.norm(weight.detach().numpy() - expected) < 0.3 * moved  # its singular values are 0.7 … 1.2


def test_what_muon_does_not_train_moves_as_with_adamw() -> None:
    """Compare steps with the same gradients. Muon must train exactly the matrices and splines of the blocks."""
    models = [GPT(GPTConfig(**SMALL)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [
        make_optimizer(m, Config(**SMALL, optimizer=o)) for m, o in zip(models, ("adamw", "muon"), strict=True)
    ]
    before = {name: p.detach().clone() for name, p in models[0].named_parameters()}
    for seed in range(3):
        for model in models:
            torch.manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
        for optimizer in optimizers:
            set_learning_rate(optimizer, 1e-3)
            optimizer.step()
    adamw, muon = (dict(model.named_parameters()) for model in models)
    for name in adamw:
        by_muon = name.startswith("blocks.") and adamw[name].dim() >= 2
        assert torch.equal(adamw[name], muon[name]) != by_muon, name
        assert not torch.equal(muon[name], before[name])


@pytest.mark.parametrize("ffn", ["splines", "gated_splines"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, ffn: str) -> None:
    dataset = make_dataset(tmp_path / "words")
    changes = {"optimizer": "muon", "ffn": ffn, "log_interval": 1, "eval_interval": 4}
    train_until(options(dataset, tmp_path / "whole", max_iters=8, decay_iters=6, **changes))
    train_until(options(dataset, tmp_path / "parts", max_iters=4, decay_iters=6, **changes))
    resumed = options(dataset, tmp_path / "parts", max_iters=8, decay_iters=6, **changes, resume=True)
    train_until(resumed)
    assert train_losses(tmp_path / "parts") == train_losses(tmp_path / "whole")
