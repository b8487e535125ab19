"""The program still works, if slower, when a private name of PyTorch is gone in a later release."""

import ast
import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import backends
from backends import Problem, standard
from bench.shared.timing import compile_without_limit
from kan_layer import KANLayer
from tests.runs import ROOT, make_dataset, options, read_metrics, train_until
from training.distributed import World
from training.optimizer import AdamW
from training.sharded_checkpoint import sharded_state, write_sharded

# All private names of PyTorch and Triton that the program uses. A test of this file removes each.
USED = {
    "torch._C",  # whether torch.func is active
    "torch._dynamo",  # bench/ lifts limits there, public from PyTorch 2.14 on
    "torch._sparse_semi_structured_mm",
    "torch.cpu._is_amx_tile_supported",
    "torch.cpu._is_avx2_supported",
    "torch.cpu._is_avx512_bf16_supported",
    "torch.cpu._is_avx512_supported",
    "torch.utils._python_dispatch",  # bench/beside_kernels.py counts memory by it
}

# A process that removes them. PyTorch itself needs the last one, so it is restored after the program is imported.
WITHOUT = """
import json, sys, types
import torch
from torch.distributed.checkpoint import filesystem

for kind in (torch.optim.Optimizer, torch.optim.Adam, torch.optim.AdamW):
    for method in vars(kind).values():
        if isinstance(method, types.FunctionType):
            vars(method).pop("__wrapped__", None)
gone = [(torch.cpu, f"_is_{what}_supported") for what in ("amx_tile", "avx2", "avx512")]
for module, name in (*gone, (torch, "_sparse_semi_structured_mm")):
    if hasattr(module, name):
        delattr(module, name)
place = filesystem.__dict__.pop("_StorageInfo", None)
import train
from training import optimizer, sharded_checkpoint
filesystem._StorageInfo = place

runs, checkpoint, copy = json.loads(sys.argv[1])
for arguments in runs:
    sys.argv = ["train.py", *arguments]
    try:
        train.main()
    except SystemExit as end:
        assert not end.code
state = sharded_checkpoint.ShardedCheckpoint.open(sharded_checkpoint.Path(checkpoint)).read_state()
torch.save({"model": state["model"], "optimizer": state["optimizer"]}, copy)
"""


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs trained with and without the names, and a sharded checkpoint that was read without them."""
    folder = tmp_path_factory.mktemp("names")
    dataset = make_dataset(folder / "words")
    runs = []
    for optimizer in ("adamw", "muon"):
        train_until(options(dataset, folder / optimizer, optimizer=optimizer, compile=False))
        runs.append(options(dataset, folder / f"{optimizer}-without", optimizer=optimizer, compile=False))
    model, optimizer = a_step()
    write_sharded(folder / "sharded", sharded_state({}, model, optimizer), World())
    given = json.dumps([runs, str(folder / "sharded"), str(folder / "copy.pt")])
    done = subprocess.run([sys.executable, "-c", WITHOUT, given], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def a_step() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = nn.Linear(5, 4)
    optimizer = AdamW(model.parameters(), lr=0.1)
    model(torch.randn(2, 5)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def test_training_gives_the_same_numbers(without: Path) -> None:
    for optimizer, tolerance in (("adamw", 0.0), ("muon", 1e-2)):  # muon multiplies in float32 if it finds no bfloat16
        losses, expected = (
            [record["train_loss"] for record in read_metrics(without / name)]
            for name in (f"{optimizer}-without", optimizer)
        )
        assert len(losses) > 3 and losses == pytest.approx(expected, rel=tolerance, abs=0), optimizer


def test_a_sharded_checkpoint_is_read(without: Path) -> None:
    model, optimizer = a_step()
    copy = torch.load(without / "copy.pt")
    assert all(torch.equal(copy["model"][name], tensor) for name, tensor in model.state_dict().items())
    for index, moments in optimizer.state_dict()["state"].items():
        assert all(torch.equal(copy["optimizer"]["state"][index][name], moments[name]) for name in moments)


def test_without_signs_of_transforms_results_are_right_or_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, x = KANLayer(6, 5, num_control_points=4), torch.randn(3, 6)
    expected = layer(x)
    monkeypatch.setattr(standard, "forward_ad", types.SimpleNamespace())
    torch.testing.assert_close(layer(x), expected)
    monkeypatch.undo()
    monkeypatch.setattr(standard, "_torch_func_is_active", lambda: False)
    if layer.resolved_impl == "native":
        with pytest.raises(RuntimeError):
            torch.func.vmap(torch.func.grad(lambda row: layer(row).sum()))(x)


def test_limits_of_compiling_are_lifted_wherever_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("recompile_limit", "accumulated_recompile_limit")
    compile_without_limit()
    assert [getattr(torch._dynamo.config, name) for name in names] == [1000, 1000]
    for public, private in ((True, False), (False, True)):
        configs = [types.SimpleNamespace(**dict.fromkeys(names, 8) if has else {}) for has in (public, private)]
        monkeypatch.setattr("torch.compiler.config", configs[0])
        monkeypatch.setattr("torch._dynamo.config", configs[1])
        compile_without_limit()
        assert [getattr(configs[private], name) for name in names] == [1000, 1000]


def test_without_its_2_4_product_the_zeros_are_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(major=8))
    monkeypatch.delattr(torch, "_sparse_semi_structured_mm", raising=False)
    _, why = backends.choose("semi_structured", Problem(16, 5, 16, torch.device("cuda")))
    assert "with its zeros written out, as this PyTorch has no 2:4 product" in why


def test_memory_is_not_counted_without_the_way_to_count_it() -> None:
    code = 'import sys, torch; sys.modules["torch.utils._python_dispatch"] = None; import bench.beside_kernels'
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: this PyTorch has no ") and done.stderr.count("\n") == 1


def test_a_layer_follows_its_weight_to_another_device_by_any_way() -> None:
    """Most ways call nn.Module._apply, which is private; some do not."""
    here, x = KANLayer(6, 5, num_control_points=4), torch.randn(3, 6)
    layer = KANLayer(6, 5, num_control_points=4, device="meta")
    layer.load_state_dict(here.state_dict(), assign=True)
    assert layer.resolved_impl == here.resolved_impl and layer.why_this_impl == here.why_this_impl
    assert torch.equal(layer(x), here(x))
    assert layer.to("meta").resolved_impl == KANLayer(6, 5, num_control_points=4, device="meta").resolved_impl


def test_every_private_name_is_known() -> None:
    folders = [folder for folder in ROOT.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    files = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    program = [path for path in files if path.relative_to(ROOT).parts[0] != "tests"]
    assert len(program) > 50
    found = {name for path in program for name in private_names(ast.parse(path.read_text(encoding="utf-8")))}
    assert found == USED


def test_private_names_are_found_however_they_are_used() -> None:
    source = """
import torch._a
from torch._b import c
from torch.d import _e as f
torch._g.h.i = torch.j(k)._l
getattr(torch.m, "_n", None)
torch.optim.AdamW.o(self._p, torch.__version__, np._q)
"""
    expected = {"torch._a", "torch._b", "torch.d._e", "torch._g", "torch.m._n"}
    assert set(private_names(ast.parse(source))) == expected


def private_names(tree: ast.AST) -> Iterator[str]:
    """Private names of PyTorch and Triton in `tree`, up to their first private part."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            of, name = node.args[:2]
            names = [f"{ast.unparse(of)}.{name.value}"] if isinstance(name, ast.Constant) else []
        for name in names:
            parts = name.split(".")
            private = [k for k, part in enumerate(parts) if part.startswith("_") and not part.startswith("__")]
            if parts[0] in ("torch", "triton") and private and all(part.isidentifier() for part in parts):
                yield ".".join(parts[: private[0] + 1])
