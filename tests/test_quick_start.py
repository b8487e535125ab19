"""A run that compiles nothing does not load PyTorch's compiler, and its AdamW equals PyTorch's."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.runs import ROOT, make_dataset, options
from training.optimizer import AdamW, MuonAdamW

TRAIN = """
import sys, train
try:
    train.main()
except SystemExit as end:
    assert not end.code
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon", "dtype": "bfloat16"}], ids=str)
def test_no_compiler_is_imported_where_nothing_is_compiled(changes: dict[str, str], tmp_path: Path) -> None:
    arguments = options(make_dataset(tmp_path / "words"), tmp_path / "run", compile=False, **changes)
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_is_pytorch_s_bit_for_bit(fused: bool) -> None:
    start = torch.randn(5, 7)
    trained = []
    for kind in (AdamW, torch.optim.AdamW):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = kind([parameter], lr=0.1, weight_decay=0.2, fused=fused)
        for step in range(4):
            (parameter.sin() * (step + 1)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert parameter.grad is None
        trained.append((parameter.detach(), optimizer.state_dict()["state"][0]["exp_avg_sq"]))
    for ours, theirs in zip(*trained, strict=True):
        assert torch.equal(ours, theirs)


def test_hooks_run_once_a_step() -> None:
    counts = []
    for kind in (AdamW, MuonAdamW, AdamW, MuonAdamW):  # each must work beside the other
        parameter = torch.nn.Parameter(torch.randn(4, 4))
        group = {"params": [parameter], "muon_pieces": [1]} if kind is MuonAdamW else {"params": [parameter]}
        optimizer, calls = kind([group]), []
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
        parameter.square().sum().backward()
        optimizer.step()
        counts.append(len(calls))
    assert counts == [1, 1, 1, 1]


@pytest.mark.parametrize("overflows", [False, True])
def test_a_gradient_scaler_skips_steps_that_overflow(overflows: bool) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = AdamW([parameter], lr=0.1, fused=True), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(parameter.sum() * (float("inf") if overflows else 1.0)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert (parameter == 1).all() == overflows
    assert scaler.get_scale() == (2.0 if overflows else 4.0)
