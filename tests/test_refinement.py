"""Training coarse to fine: refined runs continue with the same functions, can be resumed, and compile again."""

from pathlib import Path

import numpy as np
import pytest
import torch

import train
from kan_layer import KANLayer
from model import GPT, GPTConfig
from sample import generate
from splines.parametrisation import VARIANTS, inverse_basis
from tests.runs import (
    assert_one_sentence,
    call,
    make_dataset,
    make_trainer,
    options,
    read_metrics,
    resume_options,
    train_until,
)
from tests.test_resume import assert_identical, outcome
from training.checkpoint import load_checkpoint, read_state, step_path
from training.config import Config
from training.optimizer import make_optimizer
from training.refinement import Stage, gradient_transfer, parse_stages, points_after, refine_model

STAGES = "5@0,9@5,17@8"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "words")


def test_stages() -> None:
    assert parse_stages("5@0, 9@1000,17@1500", 5) == (Stage(5, 0), Stage(9, 1000), Stage(17, 1500))
    assert parse_stages("9@10", 5) == (Stage(5, 0), Stage(9, 10))
    assert parse_stages("", 7) == (Stage(7, 0),)
    stages = parse_stages("5@0,9@3", 5)
    assert [points_after(stages, step) for step in (0, 2, 3, 4)] == [5, 5, 9, 9]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5", "kan_refine has '5' for a stage"),
        ("5@0,x@3", "kan_refine has 'x@3' for a stage"),
        ("5@0,8@3", "cannot go from 5 to 8 control points.*as with 9 or 13"),
        ("5@0,5@3", "cannot go from 5 to 5"),
        ("5@0,9@3,17@3", "rising steps; got 3 behind 3"),
        ("9@0,17@3", "give --num_control_points 9"),
    ],
)
def test_bad_stages_are_one_sentence(tmp_path: Path, dataset: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(kan_refine=text)
    assert_one_sentence(call(train.main, *options(dataset, tmp_path, kan_refine=text)), "kan_refine")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_loss_does_not_move_when_refined(tmp_path: Path, dataset: Path, variant: str, optimizer: str) -> None:
    """Refine 5 → 9 → 17 → 33 in the middle of training; logits stay the same to 1e-5."""
    trainer = make_trainer(options(dataset, tmp_path, kan_variant=variant, optimizer=optimizer))
    x, y = trainer.batches.batch(0)
    for points in (9, 17, 33):
        for _ in range(3):
            trainer.step()
        before = trainer.model(x, y)[1].item()
        assert refine_model(trainer.model, points, trainer.optimizer)
        after = trainer.model(x, y)[1].item()
        assert abs(after - before) < 1e-5
        assert {layer.num_control_points for layer in trainer.model.spline_layers()} == {points}
    first = trainer.model(x, y)[1].item()
    trained = [layer.weight.detach().clone() for layer in trainer.model.spline_layers()]
    trainer.step()
    for layer, old in zip(trainer.model.spline_layers(), trained, strict=True):
        assert not torch.equal(layer.weight, old), "the optimizer does not train the new parameters"
    assert trainer.model(x, y)[1].item() < first + 0.1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grid", [9, 16])
def test_a_carried_gradient_is_nearly_that_of_the_finer_grid(variant: str, grid: int) -> None:
    """First moments must be near autograd's gradients of the new control points, for smooth functions."""
    torch.manual_seed(0)
    x = (torch.rand(4000, 2, dtype=torch.float64) - 0.5) * 4
    dy = torch.stack((x[:, 0].sin(), x[:, 1] ** 2 - 1, x.sum(dim=1).cos()), dim=1)
    layer = KANLayer(2, 3, num_control_points=grid, variant=variant, dtype=torch.float64)
    coarse, before = gradient(layer, x, dy), layer.grid
    layer.refine(2 * grid - 1)
    carried = torch.from_numpy(gradient_transfer(layer, before)) @ coarse
    of_coefficients = torch.from_numpy(inverse_basis(variant, 2 * grid - 1).T)
    carried, exact = of_coefficients @ carried, of_coefficients @ gradient(layer, x, dy)
    assert (carried - exact).norm() < 0.25 * exact.norm()


def gradient(layer: KANLayer, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(layer(x), layer.weight, dy)[0]


def test_hats_carry_their_gradient_as_a_density() -> None:
    """The sum over the grid is the gradient of a constant. It stays except at the ends; so does that of a line."""
    layer = KANLayer(1, 1, num_control_points=9)
    before = KANLayer(1, 1, num_control_points=5).grid
    transfer = gradient_transfer(layer, before)
    np.testing.assert_allclose(transfer[:, 1:-1].sum(axis=0), 1)  # for each inner knot
    np.testing.assert_allclose(layer.grid.knots() @ transfer[:, 1:-1], before.knots()[1:-1], atol=1e-12)


@pytest.mark.parametrize("more", [{}, {"optimizer": "muon"}, {"kan_variant": "balanced"}, {"ffn": "gated_splines"}])
def test_a_run_resumed_across_refinements_is_the_uninterrupted_one(
    tmp_path: Path, dataset: Path, more: dict[str, str]
) -> None:
    run_options = {"kan_refine": STAGES, **more}
    train_until(options(dataset, tmp_path / "whole", **run_options))
    for stop in (3, 5, 8, 11):  # before, at both, and after
        run = tmp_path / f"stopped_{stop}"
        train_until(options(dataset, run, **run_options), stop)
        train_until(resume_options(run))
        assert_identical(outcome(run), outcome(tmp_path / "whole"), f"stopped at {stop}")


def test_checkpoints_of_every_stage_can_be_used(tmp_path: Path, dataset: Path) -> None:
    train_until(options(dataset, tmp_path, kan_refine=STAGES, keep_checkpoints=12, eval_interval=1))
    for step, points in ((1, 5), (4, 5), (5, 9), (7, 9), (8, 17), (12, 17)):
        weight = read_state(step_path(tmp_path, step))["model"]["blocks.0.ffn.weight"]
        assert weight.shape[1] == points
        checkpoint = load_checkpoint(tmp_path, str(step))
        assert checkpoint.model.spline_layers()[0].num_control_points == points
        tokens = list(generate(checkpoint.model, [0], 4, 1.0, 0, 1.0, torch.Generator(), 5))
        assert len(tokens) == 4


def test_the_validation_loss_is_continuous_in_a_real_run(tmp_path: Path, dataset: Path) -> None:
    """A run with a refinement after its last step ends with the same loss as one without."""
    losses = []
    for stages in ("5@0", "5@0,33@12"):
        run = tmp_path / stages
        train_until(options(dataset, run, kan_refine=stages))
        losses.append(read_metrics(run)[-1]["val_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_another_kan_refine_cannot_resume_a_run(tmp_path: Path, dataset: Path) -> None:
    train_until(options(dataset, tmp_path, kan_refine=STAGES), 6)
    result = call(train.main, *resume_options(tmp_path), "--kan_refine", "5@0,9@4")
    assert_one_sentence(result, "kan_refine=5@0,9@4")


@pytest.mark.needs("torch.compile")
def test_compiled_models_survive_it(dataset: Path) -> None:
    """A compiled model has the gradients of the eager one, also after refining."""
    torch.compiler.reset()
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=20, kan_init="random_normal"))
    compiled = torch.compile(model)
    optimizer = make_optimizer(model, Config())
    x, y = random_batch()
    for points in (5, 9):
        refine_model(model, points, optimizer)
        gradients = []
        for step_model in (model, compiled):
            step_model(x, y)[1].backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            optimizer.zero_grad()
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
        optimizer.step()


def random_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(20, (4, 17), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def test_the_penalty_smooths_and_is_logged(tmp_path: Path, dataset: Path) -> None:
    """Stronger penalties give smoother splines. The logged training loss does not include the penalty."""
    rough = []
    for weight in (0, 1e-6, 1e5):
        run = tmp_path / str(weight)
        trainer = train_until(options(dataset, run, kan_smoothness=weight, num_control_points=17))
        rough.append(torch.stack([layer.smoothness_penalty() for layer in trainer.model.spline_layers()]).mean().item())
        metrics = read_metrics(run)
        assert metrics[-1]["train_loss"] < 5
        assert ("smoothness" in metrics[-1]) is (weight > 0)
        if weight:
            assert metrics[-1]["smoothness"] == pytest.approx(rough[-1])
    assert rough[2] < rough[1] * 0.5
    assert rough[1] == pytest.approx(rough[0], rel=0.05)
