"""bench/gpu.py: its steps fit the time, one that fails costs itself alone, and its checks see what is wrong."""

import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import backends
from bench import gpu
from bench.shared import gpu_kernels, gpu_steps
from bench.shared.gpu_plan import STEPS, Step, limits, named
from bench.shared.gpu_setting import Setting
from tests import spline_reference
from tests.runs import ROOT, assert_one_sentence, call, run_command

GROUPS = (
    "preflight,peaks,right,tests,times",
    "layer,shakespeare,gpt2",
    "best,paths,group,profile",
)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.mark.slow
@pytest.mark.parametrize("steps", GROUPS)
def test_a_rehearsal_goes_through_all_steps_on_a_cpu(steps: str, rehearsal: Path) -> None:
    assert {name for group in GROUPS for name in group.split(",")} == {step.name for step in STEPS}
    command = run_command("bench/gpu.py", "--rehearse=True", f"--only={steps}", f"--output={rehearsal}", timeout=280)
    assert command.code == 0 and command.err == "", command
    record = json.loads((rehearsal / "gpu.json").read_text())
    outcomes = {name: record["steps"][name] for name in steps.split(",")}
    assert {outcome["status"] for outcome in outcomes.values()} == {"done"}, outcomes
    assert all(outcome["result"] for outcome in outcomes.values())
    assert record["rehearsal"] and record["complete"] is (len(record["steps"]) == len(STEPS))
    assert str(rehearsal) not in json.dumps(record) and str(ROOT) not in json.dumps(record)


@given(minutes=st.floats(0.1, 600), first=st.integers(0, len(STEPS) - 1))
def test_the_steps_that_are_left_share_the_time_that_is_left(minutes: float, first: int) -> None:
    shared = limits(STEPS[first:], 60 * minutes)
    assert sum(shared) == pytest.approx(60 * minutes) and min(shared) > 0


def test_twenty_minutes_are_enough_for_every_step() -> None:
    assert all(limit >= step.least for step, limit in zip(STEPS, limits(STEPS, 1200), strict=True))
    command = call(gpu.main, "--plan=True")
    lines = command.out.splitlines()
    assert [line.split()[0] for line in lines] == [step.name for step in STEPS]
    assert sum(float(line.split()[1]) for line in lines) == 1200


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--only=layers"], ["only must be some of preflight", "'layers'"]),
        (["--minutes=0"], ["minutes", "above 0"]),
        (["--plan=True", "--page=True"], ["give one of them"]),
        (["--table=True", "--record=nowhere.json"], ["nowhere.json cannot be read as a record"]),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], parts: list[str]) -> None:
    assert_one_sentence(call(gpu.main, *arguments), *parts)


def test_what_it_cannot_do_without_is_named_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tyro" else True)
    with pytest.raises(SystemExit, match="error: tyro must be installed first; pip install tyro"):
        runpy.run_path(str(ROOT / "bench" / "gpu.py"))


def test_without_a_gpu_the_first_step_says_so_and_is_the_last(tmp_path: Path) -> None:
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    command = run_command("bench/gpu.py", "--only=preflight,peaks", f"--output={tmp_path}", env=hidden, timeout=120)
    assert command.code == 1 and "finds no CUDA GPU; --rehearse True" in command.out, command
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert list(record["steps"]) == ["preflight"] and record["steps"]["preflight"]["status"] == "failed"
    assert record["steps"]["preflight"]["result"]["versions"]["torch"] == torch.__version__, "what it found before"


# ---- processes -------------------------------------------------------------------------------------------------------

Fate = tuple[int | None, str]


def imitate(patch: pytest.MonkeyPatch, folder: Path, fates: dict[str, Fate]) -> list[str]:
    """Steps end as their fate says, an exit status (None: out of time) and a last line, having found something."""
    started: list[str] = []

    def supervise(command: list[str], limit: float, output: Any, env: dict[str, str]) -> int | None:
        name = command[3]
        started.append(name)
        (folder / f"{name}.json").write_text(json.dumps({"found": name}))
        code, line = fates.get(name, (0, ""))
        output.write(f"before\n{line}\n")
        return code

    patch.setattr(gpu, "supervise", supervise)
    return started


def test_a_step_that_crashes_or_hangs_costs_itself_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fates: dict[str, Fate] = {"right": (-11, f"CUDA error in {tmp_path}/x"), "layer": (None, "half of it")}
    started = imitate(monkeypatch, tmp_path, fates)
    command = call(gpu.main, f"--output={tmp_path}")
    assert command.code == 1 and "not done: right, layer" in command.out
    assert started == [step.name for step in STEPS]
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert not record["complete"] and not record["rehearsal"]
    for step in STEPS:
        outcome = record["steps"][step.name]
        status = {"right": "failed", "layer": "timed out"}.get(step.name, "done")
        assert outcome["status"] == status and outcome["result"] == {"found": step.name}
    assert record["steps"]["right"]["why"] == "CUDA error in OUTPUT/x", "no paths of this machine"
    assert record["steps"]["layer"]["last_lines"] == ["before", "half of it"]

    fates.clear()
    assert call(gpu.main, f"--output={tmp_path}", "--only=right,layer").code == 0
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["complete"] and started[len(STEPS) :] == ["right", "layer"]


def test_the_record_is_rewritten_after_each_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[list[str]] = []
    imitate(monkeypatch, tmp_path, {})
    imitated: Callable[..., Any] = gpu.supervise

    def look(*arguments: Any) -> Any:
        path = tmp_path / "gpu.json"
        seen.append(list(json.loads(path.read_text())["steps"]) if path.is_file() else [])
        return imitated(*arguments)

    monkeypatch.setattr(gpu, "supervise", look)
    call(gpu.main, f"--output={tmp_path}")
    names = [step.name for step in STEPS]
    assert seen == [names[:k] for k in range(len(names))]


def test_without_time_left_a_step_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = imitate(monkeypatch, tmp_path, {})
    assert call(gpu.main, f"--output={tmp_path}", "--only=tests,peaks", "--minutes=1.5").code == 0
    assert started == ["peaks", "tests"]
    assert call(gpu.main, f"--output={tmp_path}", "--only=tests", "--minutes=0.5").code == 0
    outcome = json.loads((tmp_path / "gpu.json").read_text())["steps"]["tests"]
    assert outcome["status"] == "skipped" and outcome["why"] == "30 s are left for it, and it needs 60"


def test_a_rehearsal_does_not_go_into_the_record_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    imitate(monkeypatch, tmp_path, {})
    call(gpu.main, f"--output={tmp_path}")
    assert_one_sentence(call(gpu.main, "--rehearse=True", "--only=peaks", f"--output={tmp_path}"), "no rehearsal")


@pytest.mark.needs("proc")
def test_the_time_limit_ends_a_command_and_all_that_it_started(tmp_path: Path) -> None:
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    with (tmp_path / "log").open("w") as output:
        code = gpu.supervise([sys.executable, "-c", child], 3.0, output, dict(os.environ))
    assert code is None
    pid = int((tmp_path / "log").read_text())
    deadline = time.monotonic() + 20
    while is_running(pid):
        assert time.monotonic() < deadline, "the grandchild outlived its limit"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- what the steps find ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 3, 2, 4), (50, 7, 5, 6), (5000, 4, 9, 3)])
def test_the_truth_is_the_definition(shape: tuple[int, int, int, int]) -> None:
    problem = gpu_kernels.Arguments(shape, "cpu")
    x, w, dy = (tensor.double().numpy() for tensor in (problem.x, problem.weight, problem.grad))
    y, dx, dw = problem.truth()
    dx_truth, dw_truth = spline_reference.gradients(x, w, gpu_kernels.WIDTH, dy)
    for value, truth in ((y, spline_reference.spline_sum(x, w, gpu_kernels.WIDTH)), (dx, dx_truth), (dw, dw_truth)):
        torch.testing.assert_close(value, torch.from_numpy(truth), rtol=1e-9, atol=1e-9)


def checked(impl: str, launches: int = 5) -> dict[str, Any]:
    problem = gpu_kernels.Arguments((40, 8, 5, 6), "cpu")
    return gpu_kernels.check(problem, impl, "float32", problem.truth(), launches)


def test_wrong_numbers_and_bits_that_change_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = checked("dense")
    assert right["same_bits"] and "wrong" not in right and max(right["errors"]) < 1e-6
    calls, honest = [], backends.BACKENDS["dense"].spline_sum

    def replace(spline_sum: Callable[..., torch.Tensor]) -> None:
        monkeypatch.setitem(backends.BACKENDS, "dense", backends.Backend("dense", spline_sum))

    replace(lambda x, w, width, dtype: honest(x, w, width, dtype) * (1 + 1e-3))
    assert "error of y" in checked("dense")["wrong"]
    replace(lambda x, w, width, dtype: (calls.append(0), honest(x, w, width, dtype) + 1e-6 * (len(calls) == 5))[1])
    assert checked("dense")["wrong"] == "5 launches differ"
    replace(lambda x, w, width, dtype: honest(x, w, width, dtype) * float("nan"))
    assert "error of y nan" in checked("dense")["wrong"]
    json.dumps(checked("dense"), allow_nan=False)


def test_outcomes_of_tests_are_counted_and_failures_named() -> None:
    xml = """<testsuites><testsuite tests="5" failures="1" errors="1" skipped="1">
    <testcase classname="tests.test_a" name="good"/><testcase classname="tests.test_a" name="bad"><failure/></testcase>
    <testcase classname="tests.test_b" name="broken"><error/></testcase><testcase classname="b" name="not"><skipped/>
    </testcase><testcase classname="b" name="fine"/></testsuite></testsuites>"""
    found = gpu_steps.outcome_of_tests(xml)
    assert (found["passed"], found["failed"], found["skipped"]) == (2, 2, 1)
    assert found["failures"] == ["tests.test_a::bad", "tests.test_b::broken"]


def test_a_command_that_fails_or_takes_too_long_says_so(tmp_path: Path) -> None:
    setting = Setting("paths", tmp_path, 60, rehearse=True)
    with pytest.raises(RuntimeError, match=r"^-c ended with status 3: the reason$"):
        setting.call("-c", "import sys; print('more\\nthe reason', file=sys.stderr); sys.exit(3)")
    with pytest.raises(RuntimeError, match=r"^-c was not done within 1 s$"):
        setting.call("-c", "import time; time.sleep(30)", limit=0.5)
    assert setting.call("-c", "print('fine')") == "fine\n"


def test_every_step_has_a_function() -> None:
    for step in STEPS:
        assert callable(gpu_steps.step_of(step.name)) and isinstance(named(step.name), Step)
