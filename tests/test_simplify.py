"""simplify.py: splines change within the limit, its checkpoints sample and resume, and it prints the model's losses."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sample
import simplify
import train
from kan_layer import KANLayer
from simplify import apply
from splines.grid import Grid
from splines.simplification import moments, plan
from tests.runs import assert_one_sentence, call, make_dataset, options, read_metrics
from training.checkpoint import load_checkpoint


def single(layer: KANLayer, x: torch.Tensor) -> np.ndarray:
    """Each spline's value for each activation by the definition, (M, I, O), float64."""
    points = layer.control_points().detach().double().numpy()
    G, width = layer.num_control_points, layer.spline_width
    u = (x.double().numpy() + width / 2) * (G - 1) / width
    j = np.clip(np.floor(u), 0, G - 2).astype(int)
    t = (u - j)[:, :, None]
    inputs = np.arange(layer.in_features)
    return (1 - t) * points[inputs, j] + t * points[inputs, j + 1]


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(2, 6)),
    tolerance=st.floats(0, 1.5),
    spread=st.floats(0.2, 4),
    bias=st.booleans(),
    centred=st.booleans(),
    seed=st.integers(0, 999),
)
def test_no_spline_changes_by_more_than_the_tolerance(shape, tolerance, spread, bias, centred, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs, half = shape
    layer = KANLayer(
        inputs, outputs, "random_normal", 2 * half + 1, 4.0, bias=bias or centred, zero_centred=centred
    ).double()
    with torch.no_grad():
        bends = 10 ** (-3 * torch.rand(inputs, 1, outputs, generator=generator, dtype=torch.float64))
        layer.weight += bends * torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
        layer.weight *= 10 ** (-2 * torch.rand(inputs, 1, outputs, generator=generator, dtype=torch.float64))
    x = torch.randn(300, inputs, generator=generator) * spread
    before, sums = single(layer, x), layer(x.double())
    found = plan(layer.control_points().detach().numpy(), moments(x.numpy(), Grid(2 * half + 1, 4.0)), tolerance)
    assert not (found.removed & found.straight).any()
    apply(found, layer)
    after = single(layer, x)
    change = (after - before) - (after - before).mean(0)  # constants move between splines and bias
    typical = np.sqrt(before.var(0).mean(0))
    assert (np.sqrt((change**2).mean(0)) <= tolerance * typical * (1 + 1e-6) + 1e-9).all()
    moved = layer(x.double()).mean(0) - sums.mean(0)
    assert moved.abs().max() < 1e-6, "on the average every output stays where it was"
    bent = np.abs(np.diff(layer.control_points().detach().numpy(), n=2, axis=1)).max(1) > 1e-9
    assert not (bent & ~found.kept).any(), "what was replaced has no bend left"


def test_a_tolerance_of_nothing_keeps_every_curve_and_a_large_one_none() -> None:
    layer = KANLayer(4, 3, num_control_points=6)
    with torch.no_grad():
        layer.weight.normal_()
    seen = moments(torch.randn(200, 4).numpy(), Grid(6, 4.0))
    assert plan(layer.control_points().detach().numpy(), seen, 0.0).kept.all()
    assert plan(layer.control_points().detach().numpy(), seen, 1e6).removed.all()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simplify")
    dataset = make_dataset(folder / "words")
    size = {"n_layer": 2, "learning_rate": 0.02, "splines": True, "eval_iters": 0}
    assert call(train.main, *options(dataset, folder / "run", **size)).code == 0
    return folder / "run"


def test_a_simplified_run_reports_its_loss_samples_and_resumes(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "simple"
    result = call(simplify.main, run, "--tolerance", 0.6, "--output", output)
    assert result.code == 0, result
    (line,) = [line for line in result.out.splitlines() if line.startswith("validation loss")]
    before, after = (float(word) for word in (line.split()[2], line.split()[4]))
    assert before == pytest.approx(read_metrics(run)[-1]["val_loss"], abs=1e-4), "as the run measured it"
    checkpoint = load_checkpoint(output)
    bent = [layer.control_points().diff(n=2, dim=1).abs().amax(1) > 1e-6 for layer in checkpoint.model.spline_layers()]
    shares = [float(each.float().mean()) for each in bent]
    table = [line.split() for line in result.out.splitlines()[1:3]]
    assert [float(row[1]) for row in table] == pytest.approx([100 * share for share in shares], abs=0.2)
    assert 0 < max(shares) < 1
    assert simplify.losses(checkpoint, [checkpoint.model])[0] == pytest.approx(after, abs=1e-4)
    assert call(sample.main, output, "--max-new-tokens", 5).code == 0
    resumed = call(train.main, "--out_dir", output, "--resume", "True", "--max_iters", 16)
    assert resumed.code == 0 and "resumed at step 12" in resumed.out
    assert read_metrics(output)[-1]["step"] == 16
    assert math.isfinite(read_metrics(output)[-1]["val_loss"])
    assert_one_sentence(call(simplify.main, run, "--output", output), str(output), "choose another")


def test_formulas_are_printed_for_the_most_curved_or_the_named(run: Path) -> None:
    most = call(simplify.main, run, "--fit", 4)
    assert most.code == 0 and sum(" → " in line for line in most.out.splitlines()[2:]) == 4
    named = call(simplify.main, run, "--layer", 1, "--inputs", "3,4", "--outputs", 5)
    rows = named.out.splitlines()[2:]
    assert named.code == 0 and next(row.split()[:4] for row in rows)[0] == "1" and len(rows) == 2
    assert all(0 <= float(row.split()[4]) <= 1 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--tolerance=-1"], ["tolerance"]),
        (["--fit=-1"], ["fit"]),
        (["--inputs", "3"], ["--layer"]),
        (["--fit", "2", "--layer", "7"], ["layer", "0 to 1"]),
        (["--layer", "0", "--inputs", "99"], ["inputs", "0 to 15"]),
        (["--step", "3"], ["step"]),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused(run: Path, arguments: list[str], parts: list[str]) -> None:
    assert_one_sentence(call(simplify.main, run, *arguments), *parts)


def test_models_without_splines_have_nothing_to_simplify(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "words")
    call(train.main, *options(dataset, tmp_path / "mlp", ffn="mlp", max_iters=2))
    assert_one_sentence(call(simplify.main, tmp_path / "mlp"), "no splines", "ffn=mlp")
    assert not (tmp_path / "mlp-simplified").exists()
