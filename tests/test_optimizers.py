"""Every value of --optimizer trains, decays what multiplies, skips steps that overflow, and resumes bit for bit."""

import typing
from pathlib import Path

import pytest
import torch

from model import GPT, GPTConfig
from tests.runs import make_dataset, options, train_losses, train_until
from training.config import Config
from training.optimizer import make_optimizer

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 11}
OPTIMIZERS = typing.get_args(typing.get_type_hints(Config)["optimizer"])

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def model_and_optimizer(name: str, **changes: float) -> tuple[GPT, torch.optim.Optimizer]:
    model = GPT(GPTConfig(**SMALL))
    return model, make_optimizer(model, Config(**SMALL, optimizer=name, **changes))


@every_optimizer
def test_it_learns_one_batch(name: str) -> None:
    model, optimizer = model_and_optimizer(name, learning_rate=1e-2)
    tokens = torch.randint(11, (4, 9))
    losses = []
    for _ in range(60):
        loss = model(tokens[:, :-1], tokens[:, 1:])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@every_optimizer
def test_without_gradients_matrices_decay_and_vectors_stay(name: str) -> None:
    model, optimizer = model_and_optimizer(name, learning_rate=0.1, weight_decay=0.5, muon_weight_decay=0.5)
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter in model.parameters():
        assert (parameter < 1).all() if parameter.dim() >= 2 else (parameter == 1).all()


@every_optimizer
def test_an_overflown_step_of_float16_moves_nothing(name: str) -> None:
    model, optimizer = model_and_optimizer(name)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, float("inf"))
    scaler.scale(torch.zeros(()))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@every_optimizer
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, name: str) -> None:
    dataset = make_dataset(tmp_path / "words")
    changes = {"optimizer": name, "log_interval": 1, "eval_interval": 4, "decay_iters": 6}
    train_until(options(dataset, tmp_path / "whole", max_iters=8, **changes))
    train_until(options(dataset, tmp_path / "parts", max_iters=4, **changes))
    train_until(options(dataset, tmp_path / "parts", max_iters=8, **changes, resume=True))
    assert train_losses(tmp_path / "parts") == train_losses(tmp_path / "whole")
