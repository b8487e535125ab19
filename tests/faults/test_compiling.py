"""If torch.compile cannot build, one sentence says so, and the run equals one without --compile, bit for bit."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from backends import native_build
from bench.shared.train_processes import TrainProcesses
from tests.runs import Result, call, make_dataset, options, resume_options, run_command, train_losses, train_until
from training import compiling
from training.checkpoint import load_checkpoint
from training.config import parse
from training.device import choose_device
from training.distributed import World

COMPILER = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
BUILD_NOTHING = 'while [ $# -gt 1 ]; do [ "$1" = -o ] && echo nothing > "$2"; shift; done'
RUN: dict[str, Any] = {"max_iters": 4, "kan_impl": "dense", "sample_tokens": 0, "log_interval": 1}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def eager(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    run = tmp_path_factory.mktemp("runs") / "eager"
    train_until(options(dataset, run, compile=False, **RUN))
    return train_losses(run)


def fake_compiler(path: Path, body: str) -> str:
    """A compiler that runs `body` instead of building for Inductor, to which it tells its version."""
    ours = native_build.SOURCE.name
    path.write_text(f'#!/bin/sh\ncase "$*" in --version|-v|*{ours}*) exec {COMPILER} "$@";; esac\n{body}\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts file systems with the given options. Only root can; otherwise the test is skipped."""
    folders: list[Path] = []

    def mount(how: str) -> Path:
        folder = tmp_path / how
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def assert_went_on(result: Result, run: Path, eager: dict[int, float]) -> None:
    assert result.code == 0 and "Traceback" not in result.out + result.err, result
    assert [line[:13] for line in result.out.splitlines() if line.startswith("compile:")] == ["compile: off,"]
    assert len(result.err.splitlines()) < 5, result.err
    assert train_losses(run) == eager
    assert "not compiled" in (run / "run.json").read_text()


@needs_compiler
@pytest.mark.parametrize("fault", ["no Python.h", "noexec", "space", "full"])
def test_a_compiler_that_cannot_do_its_work(
    tmp_path: Path, dataset: Path, eager: dict[int, float], mounted: Callable[[str], Path], fault: str
) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    environment = {
        "CXX": str(COMPILER),
    }
    if fault == "no Python.h":
        complaint = "echo 'fatal error: Python.h: No such file or directory' >&2; exit 1"
        environment["CXX"] = fake_compiler(tmp_path / "c++", complaint)
    elif fault == "noexec":  # the result cannot be loaded; a folder mounted with noexec would need a slow real build
        environment["CXX"] = fake_compiler(tmp_path / "c++", BUILD_NOTHING)
    elif fault == "space":
        cache = tmp_path / "two words"
    else:
        cache = mounted("size=64k")
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TMPDIR": str(cache if fault == "full" else tmp_path)}
    result = run_command("train.py", *options(dataset, run, compile=True, **RUN), env=environment, timeout=200)
    assert_went_on(result, run, eager)
    assert fault != "no Python.h" or "Python.h: No such file" in result.out


def compile_but_not_the_backward(model: Any) -> Any:
    """Call torch.compile with a backend that fails at the graph of the gradients, which it builds last."""
    from torch._dynamo.backends.common import aot_autograd

    def fail(graph: Any, inputs: Any) -> Any:
        raise OSError(28, "No space left on device")

    return real_compile(model, backend=aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=fail))


real_compile = torch.compile


def test_the_graph_of_the_gradients_counts_too(
    tmp_path: Path, dataset: Path, eager: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", compile_but_not_the_backward)
    result = call(train.main, *options(dataset, tmp_path, compile=True, gradient_accumulation_steps=1, **RUN))
    assert_went_on(result, tmp_path, eager)
    assert "No space left on device" in result.out


def test_of_several_processes_all_compile_or_none(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Meeting(World):
        def gather(self, value: Any) -> list[Any]:
            return [value, others]

    config = parse(options(dataset, "", compile=True))[0]
    monkeypatch.setattr(torch, "compile", lambda function: function)
    others = None
    assert compiling.check_together(choose_device(config), Meeting(size=2)).compile
    others = "its disk is full"
    device = compiling.check_together(choose_device(config), Meeting(size=2))
    assert not device.compile and not torch.are_deterministic_algorithms_enabled()


def test_deterministic_training_does_not_fill_new_memory(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch would write NaN into every new tensor, a hundred times a step."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    device = choose_device(parse(options(dataset, "", compile=True, device="cpu"))[0])
    assert torch.are_deterministic_algorithms_enabled() and operators_of_empty() == {"aten::empty"}
    device.uncompiled("the test is over")
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert "aten::fill_" in operators_of_empty(), "whoever asks PyTorch for them later gets all of its own checks"
    torch.use_deterministic_algorithms(False)


def operators_of_empty() -> set[str]:
    with torch.profiler.profile() as profile:
        torch.empty(8)
    return {event.key for event in profile.key_averages()}


@needs_compiler
def test_ctrl_c_while_the_compiler_runs_ends_the_run_in_order(
    tmp_path: Path, dataset: Path, eager: dict[int, float]
) -> None:
    """The terminal sends the signal to the compiler as well, which ends."""
    run, log, mark = tmp_path / "run", tmp_path / "log", tmp_path / "compiling"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", fake_compiler(tmp_path / "c++", f"test -e {mark} && exit 1; touch {mark}; exec sleep 200"))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
        with TrainProcesses(options(dataset, run, compile=True, **RUN), log, start_new_session=True) as process:
            assert process.wait_for(mark.exists), process.said()
            os.killpg(process.processes[0].pid, signal.SIGINT)
            assert process.wait() == [130], process.said()
            said = process.said()
    assert "stopped by SIGINT at step 0, which is saved" in said and "Traceback" not in said and "Error" not in said
    assert load_checkpoint(run).step == 0
    train_until([*resume_options(run), "--compile=False"])
    assert train_losses(run) == eager
