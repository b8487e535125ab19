"""bench/layer.py --device cuda: what it decides, records and survives; measured where there is a GPU, else imitated."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import layer
from bench.shared import machine, timing
from bench.shared.case import Case
from bench.shared.contestants import line_up
from bench.shared.peers import PEERS, CannotRun, load_peers
from bench.shared.result import Measurement, Result, header
from common.errors import UserError
from tests.runs import assert_one_sentence, call, run_command

ONE_CASE = ("--tokens=16", "--widths=8", "--grids=8", "--repeats=3", "--threads=1")
NEVER_FITS = """
import torch
class ChebyKANLayer(torch.nn.Module):
    def __init__(self, input_dim, output_dim, degree):
        super().__init__()
    def forward(self, x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 PiB.")
"""
FITS_ALONE = """
import torch
class FastKANLayer(torch.nn.Linear):
    def __init__(self, input_dim, output_dim, grid_min, grid_max, num_grids):
        super().__init__(input_dim, output_dim)
        self.calls = 0
    def forward(self, x):
        self.calls += 1
        if self.calls > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB.")
        return super().forward(x)
"""


def test_defaults_go_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu, cpu = layer.Options(device="cuda"), layer.Options()
    assert gpu.cases() == [Case(65_536, 768, 5, "bfloat16"), Case(65_536, 768, 8, "bfloat16")]
    assert gpu.impl_list() == ["triton", "chunked", "semi_structured", "dense", "csr"] and gpu.compiled is True
    assert [(case.tokens, case.width) for case in cpu.cases()[::5]] == [(768, 128), (4096, 384)]
    assert "native" in cpu.impl_list() and cpu.compiled is False and cpu.dtype_list() == ["float32"]


def test_what_is_asked_for_stands_on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    told = layer.Options(device="cuda", grids="3", impls="auto,csr", compiled=False)
    assert [case.grid for case in told.cases()] == [3]
    assert told.impl_list() == ["auto", "csr"] and told.compiled is False
    assert layer.Options(compiled=True).record()["compiled"] is True


def test_without_a_gpu_that_is_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_one_sentence(call(layer.main, "--device=cuda"), "device", "where there is a GPU")


@pytest.mark.parametrize(("grid", "others"), [(5, ["mlp 4x", "swiglu"]), (8, ["swiglu"])])
def test_the_usual_mlp_is_there_where_it_is_another(grid: int, others: list[str]) -> None:
    width = 24
    able, unable = line_up(timing.Passes(Case(4, width, grid, "float32"), "cpu"), [], {}, compiled=False)
    assert [contestant.name for contestant in able] == ["mlp", *others] and not unable
    parameters = {contestant.name: contestant.parameters for contestant in able}
    assert parameters["mlp"] == parameters["swiglu"] == grid * width**2
    assert parameters.get("mlp 4x", 8 * width**2) == 8 * width**2
    assert all(contestant.memory is None for contestant in able)  # only CUDA counts it


def test_contestants_that_run_out_of_memory_are_only_skipped(tmp_path: Path) -> None:
    for path, code in (("cheby/ChebyKANLayer.py", NEVER_FITS), ("fast/fastkan/fastkan.py", FITS_ALONE)):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(code)
        (tmp_path / path).with_name("__init__.py").touch()
    peers = f"--peers=cheby-kan={tmp_path}/cheby,fast-kan={tmp_path}/fast"
    record = tmp_path / "times.json"
    command = run_command("bench/layer.py", *ONE_CASE, "--impls=dense", peers, "--output", record)
    assert command.code == 0 and command.err == "", command
    results, skipped = (json.loads(record.read_text())[name] for name in ("results", "skipped"))
    assert [result["contestant"] for result in results] == ["mlp", "swiglu", "dense"]
    reason = "OutOfMemoryError: CUDA out of memory. Tried to allocate 1 {}iB."
    assert {one["contestant"]: one["reason"] for one in skipped} == {
        "cheby-kan": reason.format("P"),
        "fast-kan": reason.format("T"),
    }
    assert all(one["grid"] == 8 for one in skipped)


def test_an_mlp_that_fails_while_it_is_timed_ends_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = timing.Passes(Case(4, 8, 8, "float32"), "cpu")
    able, _ = line_up(passes, [], {}, compiled=False)
    monkeypatch.setattr(passes, "training", raising(torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(UserError, match="mlp, which others are compared with, fails at 4 tokens x 8, G=8"):
        layer.time_case(passes, able, machine.Peaks({"float32": 1.0}, 1.0), 1)


def raising(error: Exception) -> Callable[..., Any]:
    def function(*arguments: object) -> None:
        raise error

    return function


def test_whose_failure_leaves_the_gpu_unusable_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", raising(RuntimeError("an illegal memory access\nwas encountered")))
    timing.release_memory("anyone", "cpu")
    with pytest.raises(UserError, match=r"^lmkan has left the GPU unusable \(RuntimeError: an illegal memory access\)"):
        timing.release_memory("lmkan", "cuda")


def test_memory_is_what_a_training_pass_adds_at_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = timing.Passes(Case(4, 8, 5, "float32"), "cpu")
    module, seen = torch.nn.Linear(8, 8), []
    assert passes.memory_of_training(module) is None
    passes.device = "cuda"
    answers = {
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 100,
        "max_memory_allocated": 350,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda name=name, answer=answer: (seen.append(name), answer)[1])
    module.register_forward_hook(lambda *_: seen.append("run"))
    assert passes.memory_of_training(module) == 250
    counted = [name for name in seen if name != "synchronize"]
    assert counted == ["reset_peak_memory_stats", "memory_allocated", "run", "max_memory_allocated"]


def test_the_table_has_a_column_for_memory_where_it_is_measured() -> None:
    measurement = Measurement(1.0, 3, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5)
    rows = {
        device: Result(Case(4, 8, 5, "float32"), "dense", 320, measurement, measurement, memory, None).row(3)
        for device, memory in (("cpu", None), ("cuda", 3 * 2**20))
    }
    assert "memory" not in header("cpu")
    assert rows["cuda"] == rows["cpu"] + "         3 MiB" + "-".rjust(15) + "-".rjust(10)
    assert [len(line) for line in header("cuda").splitlines()] == [len(rows["cuda"])] * 2


class QueueOfAGpu:
    """Imitates CUDA: launches take the host's time, kernels run one after the other, a synchronization waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.idle_from = 0.0  # seconds
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: SimpleNamespace(**self.event()))

    def synchronize(self) -> None:
        self.now = max(self.now, self.idle_from)

    def event(self) -> dict[str, Any]:
        stamp: list[float] = []
        return {
            "record": lambda: stamp.append(max(self.now, self.idle_from)),
            "elapsed_time": lambda end: 1000 * (end.stamp[0] - stamp[0]),
            "stamp": stamp,
        }

    def run(self, host: float, kernel: float) -> None:
        self.now += host
        self.idle_from = max(self.now, self.idle_from) + kernel


def test_queued_runs_take_the_longer_of_the_hosts_and_the_gpus_time(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = QueueOfAGpu(monkeypatch)
    ms = {"quick": (0.25, 4.0), "late": (4.0, 0.25), "slow": (1.0, 2500.0)}  # the host's, and the GPU's
    runs = {
        name: lambda host=host, gpu_ms=gpu_ms: gpu.run(host / 1e3, gpu_ms / 1e3) for name, (host, gpu_ms) in ms.items()
    }
    times = timing.take_turns(runs, 3, "cuda")
    for name, (host, gpu_ms) in ms.items():
        assert times[name].ms == pytest.approx(host + gpu_ms), name
    assert times["quick"].queued_ms == pytest.approx(4.0) and times["late"].queued_ms == pytest.approx(4.0)
    assert times["slow"].queued_ms is None, "ten more of these would take too long"
    assert timing.QUEUED >= 10


def test_both_times_are_recorded_and_in_the_table() -> None:
    peaks, case = machine.Peaks({"float32": 1.0}, 1.0), Case(4, 8, 5, "float32")
    mlp, it = timing.Median(8.0, 3, 6.0), timing.Median(10.0, 3, 4.0)
    found = Measurement.of(it, mlp, case.spline_work(True), "float32", peaks)
    assert (found.ms, found.mlp_over_it, found.queued_ms, found.queued_mlp_over_it) == (10.0, 0.8, 4.0, 1.5)
    result = Result(case, "dense", 320, found, found, 2**20, None)
    assert result.row(3).split()[-4:] == ["MiB", "4.00", "ms", "1.50"]
    assert result.record()["training"]["queued_ms"] == 4.0


def test_what_is_to_be_known_of_a_way_is_in_its_row_and_record() -> None:
    passes = timing.Passes(Case(4, 16, 5, "float32"), "cpu")
    able, _ = line_up(passes, ["dense", "semi_structured"], {}, compiled=False)
    results, _ = layer.time_case(passes, able, machine.Peaks({"float32": 1.0}, 1.0), 1)
    notes = {result.contestant: result.note for result in results}
    assert notes["dense"] is None and "zeros written out" in (notes["semi_structured"] or "")
    assert results[-1].row(1).endswith(notes["semi_structured"] or "")
    assert results[-1].record()["note"] == notes["semi_structured"]


def test_the_record_names_the_gpu_and_all_that_computes_on_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    card = SimpleNamespace(name="A card", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 570.1\necho 570.1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    record = machine.gpu_record()
    known = {"name": "A card", "compute_capability": "9.0", "memory_gib": 80.0, "driver": "570.1"}
    assert known.items() <= record.items() and record["float32_products"] == "TF32"
    assert set(record) == {*known, "cuda", "triton", "float32_products"}
    json.dumps(record)


@pytest.mark.parametrize("code", [None, "#!/bin/sh\nexit 9\n", "#!/bin/sh\n"])
def test_without_nvidias_tool_there_is_no_driver_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str | None
) -> None:
    if code is not None:
        (tmp_path / "nvidia-smi").write_text(code)
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.driver_version() is None


class Rational(torch.nn.Module):
    """As FlashKAT's, which takes (B, T, features)."""

    def __init__(self, in_features: int, mode: str, **_: int) -> None:
        super().__init__()
        self.in_features = in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.ndim == 3 and x.shape[-1] == self.in_features
        return x


class Lookup(torch.nn.Module):
    """As lmKAN's, which takes (features, N)."""

    def __init__(self, num_grids: int, input_dim: int, output_dim: int) -> None:
        super().__init__()
        assert num_grids >= 3  # else it fails to set its grid up
        self.weight = torch.nn.Parameter(torch.randn(num_grids + 1, num_grids + 1, output_dim, input_dim // 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape == (16, 5) and x.is_contiguous()
        return x * self.weight.sum()


@pytest.mark.parametrize(
    ("name", "stand_in", "grid", "parameters_of_grid"),
    [("flashkat", Rational, grid, grid) for grid in (2, 5, 8, 32)]
    + [("lmkan", Lookup, grid, max(8, grid)) for grid in (2, 5, 8, 18, 32)],  # these are halves of squares
)
def test_peers_of_other_shapes_are_adapted(
    name: str, stand_in: type[torch.nn.Module], grid: int, parameters_of_grid: int
) -> None:
    peer, case = PEERS[name], Case(5, 16, grid, "float32")
    module = peer.build(stand_in, case, peer.modes(grid)[""])
    assert module(torch.randn(5, 16)).shape == (5, 16)
    assert sum(parameter.numel() for parameter in module.parameters()) == 16 * parameters_of_grid * 16


def test_features_that_do_not_make_equal_groups_are_refused() -> None:
    peer, case = PEERS["flashkat"], Case(5, 12, 8, "float32")
    with pytest.raises(CannotRun, match="12 and 48 features do not make 8 equal groups"):
        peer.build(Rational, case, peer.modes(8)[""])


def test_a_peer_whose_extension_is_not_built_is_missing(tmp_path: Path) -> None:
    (tmp_path / "lmKAN").mkdir()
    (tmp_path / "lmKAN" / "__init__.py").touch()
    (tmp_path / "lmKAN" / "lmKAN_2d.py").write_text("import lmKAN_kernels\nclass LMKAN2DLayer: pass")
    layers, missing = load_peers(f"lmkan={tmp_path}")
    assert not layers and "lmKAN_kernels" in missing["lmkan"]
    (tmp_path / "lmKAN_kernels.py").touch()
    layers, missing = load_peers(f"lmkan={tmp_path}")
    assert list(layers) == ["lmkan"] and not missing


@pytest.mark.cuda
def test_the_bench_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    shape = ("--device=cuda", "--tokens=256", "--widths=64", "--grids=5", "--impls=triton,dense")
    command = run_command(
        "bench/layer.py", *shape, "--repeats=2", "--peers=", "--output", path, timeout=280
    )  # most of it compiles
    assert command.code == 0, command
    record = json.loads(path.read_text())
    assert record["gpu"]["name"] and record["gpu"]["triton"] and record["gpu"]["float32_products"] == "TF32"
    timed = {result["contestant"]: result for result in record["results"]}
    ways = ("mlp", "mlp 4x", "swiglu", "triton", "dense")
    assert {*ways, *(f"{name} compiled" for name in ways)} <= set(timed)
    assert all(result["memory"] > 0 for result in timed.values())
