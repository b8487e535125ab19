"""A run that compiles nothing does not load PyTorch's compiler, and its optimizer is PyTorch's."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.runs import ROOT, make_dataset, options
from training.adamw import AdamW

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
