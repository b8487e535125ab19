"""The number of threads and how they wait are settled before torch loads, by the user or else by the machine."""

import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from common.threads import BY_QUOTA, CHOOSE_NUMBER, CHOOSE_SPIN, SPIN, configure, why_fewer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import threads
from common.cores import affine_cores, busy_seconds, cpu_quota, usable_cores
from tests.runs import ROOT, run_command

PROGRAMS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (*ROOT.glob("*.py"), *ROOT.glob("bench/*.py"))
    if "\nif __name__ == " in path.read_text(encoding="utf-8")
)
NEEDS_TWO_CORES = pytest.mark.skipif(affine_cores() < 2, reason="needs two cores")


def clean_environment(**more: str) -> dict[str, str]:
    """The environment of a user who has set none of the variables."""
    ours = (*CHOOSE_SPIN, *CHOOSE_NUMBER, BY_QUOTA)
    return {**{name: value for name, value in os.environ.items() if name not in ours}, **more}


def python(code: str, environment: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


SHOW_ENVIRONMENT_AS_TORCH_LOADS = """
import json, os, sys
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(json.dumps(dict(os.environ)), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder())
import PROGRAM
print(json.dumps(dict(os.environ)))  # a program that loads torch later
"""


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_bounds_the_spin_before_torch_loads(program: str) -> None:
    code = SHOW_ENVIRONMENT_AS_TORCH_LOADS.replace("PROGRAM", program)
    assert SPIN.items() <= json.loads(python(code, clean_environment())).items()


def test_the_runtime_of_torch_has_read_what_was_set() -> None:
    """libgomp prints its spin count as it loads; other runtimes do not."""
    code = "import common.threads, torch"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean_environment(OMP_DISPLAY_ENV="verbose"),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    said = [line for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not said:
        pytest.skip("this PyTorch does not load libgomp")
    assert f"'{SPIN['GOMP_SPINCOUNT']}'" in said[0]


@pytest.mark.parametrize("name", CHOOSE_SPIN)
def test_a_spin_that_the_user_has_chosen_stays(name: str, tmp_path: Path) -> None:
    environment = {name: "7"}
    configure(environment, tmp_path)
    assert environment == {name: "7"}


@pytest.mark.parametrize("name", CHOOSE_NUMBER)
def test_a_number_of_threads_that_the_user_has_chosen_stays(name: str, tmp_path: Path) -> None:
    control_groups(tmp_path, {"/": "50000 100000"})
    environment = {name: "7"}
    configure(environment, tmp_path)
    assert environment == {name: "7", **SPIN}


@NEEDS_TWO_CORES
def test_a_quota_limits_the_threads_and_child_processes_know_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control_groups(tmp_path, {"/": "100000 100000"})
    environment: dict[str, str] = {}
    configure(environment, tmp_path)
    assert environment["OMP_NUM_THREADS"] == "1"
    for name in CHOOSE_NUMBER:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert why_fewer(1).startswith("a quota of ")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert why_fewer(1).startswith("OMP_NUM_THREADS; ")
    assert why_fewer(1, asked=1).startswith("asked for; ")


@NEEDS_TWO_CORES
def test_without_a_quota_the_number_is_left_to_torch(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    configure(environment, tmp_path)
    assert environment == SPIN
    assert why_fewer(os.cpu_count() or 1) == ""


def control_groups(root: Path, limits: dict[str, str], group: str = "/", shown: str = "/") -> None:
    """Write the files of version 2 control groups for a process in `group`. `limits`: cpu.max by path in the mount."""
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(f"0::{group}\n")
    line = f"30 23 0:26 {shown} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
    (root / "proc/self/mountinfo").write_text("22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n" + line)
    for path, limit in limits.items():
        folder = root / "sys/fs/cgroup" / path.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.max").write_text(limit + "\n")


@pytest.mark.parametrize(
    ("group", "shown", "limits", "quota"),
    [
        ("/", "/", {}, math.inf),  # a group at the top has no file
        ("/", "/", {"/": "max 100000"}, math.inf),
        ("/", "/", {"/": "150000 100000"}, 1.5),
        ("/a/b", "/", {"/a/b": "max 100000", "/a": "200000 100000"}, 2.0),  # the limit of an outer group counts
        ("/a/b", "/", {"/a/b": "20000 10000", "/a": "300000 100000"}, 2.0),
        ("/a/b", "/", {"/a": "300000 100000", "/c": "1000 100000"}, 3.0),  # the limit of another group does not
        ("/docker/x", "/docker/x", {"/": "50000 100000"}, 0.5),  # a container without a namespace of its own
        ("/docker/x/y", "/docker/x", {"/y": "50000 100000", "/": "max 100000"}, 0.5),
        ("/../other", "/", {"/": "400000 100000"}, 4.0),  # outside the visible groups
        ("/", "/", {"/": "nonsense"}, math.inf),
        ("/", "/", {"/": "100 0"}, math.inf),
    ],
)
def test_the_quota_of_control_groups(
    tmp_path: Path, group: str, shown: str, limits: dict[str, str], quota: float
) -> None:
    control_groups(tmp_path, limits, group, shown)
    assert cpu_quota(tmp_path) == quota


@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct", "cpuacct,cpu"])
@pytest.mark.parametrize(("quota", "expected"), [("-1", math.inf), ("250000", 2.5)])
def test_the_quota_of_version_1(tmp_path: Path, controllers: str, quota: str, expected: float) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"5:cpuset:/x\n4:{controllers}:/jobs/7\n1:name=systemd:/\n0::/\n")
    (tmp_path / "proc/self/mountinfo").write_text(
        "31 23 0:28 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
        f"32 23 0:29 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,{controllers}\n"
        "33 23 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    )
    for folder, value in (("cpu/jobs/7", "-1"), ("cpu/jobs", quota), ("cpuset/x", "1000")):
        path = tmp_path / "sys/fs/cgroup" / folder
        path.mkdir(parents=True, exist_ok=True)
        (path / "cpu.cfs_quota_us").write_text(value + "\n")
        (path / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(tmp_path) == expected


@settings(deadline=None)
@given(quota=st.floats(0.01, 1000), period=st.sampled_from([1000, 100_000, 1_000_000]))
def test_cores_are_at_least_one_and_at_most_those_that_there_are(
    tmp_path_factory: pytest.TempPathFactory, quota: float, period: int
) -> None:
    root = tmp_path_factory.mktemp("root")
    granted = max(1, round(quota * period))
    control_groups(root, {"/": f"{granted} {period}"})
    cores = usable_cores(root)
    assert 1 <= cores <= affine_cores()
    assert cores == affine_cores() or cores - 1 < granted / period <= cores
    assert usable_cores(root / "nothing") == affine_cores()


def test_busy_seconds_count_the_cores_of_this_process(tmp_path: Path) -> None:
    assert math.isnan(busy_seconds(tmp_path))
    (tmp_path / "proc").mkdir()
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(affine_cores())
    lines = [f"cpu{number} 100 10 20 99999 88888 3 4 5 70 0" for number in mine]
    (tmp_path / "proc/stat").write_text("\n".join(["cpu 1 2 3 4 5 6 7 8 9 0", *lines, "intr 5 6", "ctxt 7"]) + "\n")
    assert busy_seconds(tmp_path) == pytest.approx(affine_cores() * 142 / os.sysconf("SC_CLK_TCK"))


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux")
def test_busy_seconds_grow_as_a_process_works() -> None:
    before, start, own = busy_seconds(), time.perf_counter(), time.process_time()
    while time.process_time() - own < 0.3:
        random.random()
    assert 0.25 <= busy_seconds() - before <= affine_cores() * (time.perf_counter() - start) + 0.1


@NEEDS_TWO_CORES
def test_a_busy_neighbour_does_not_stop_training() -> None:
    """By bench/busy.py, two threads beside a process that takes a core take about twice as long, not tens of times."""
    own = "GOMP_SPINCOUNT=300000"  # libgomp's default, which is measured anyway: one process fewer to start
    quick = ("--rounds=1", "--seconds=0.2", "--attempts=1", f"--settings={own}")
    done = run_command("bench/busy.py", *quick, env=clean_environment(), timeout=200)
    assert done.code == 0, done.err
    rows = [line.split() for line in done.out.splitlines() if "as the programs set it" in line]
    assert len(rows) == 2, done.out  # training and sampling
    for *_, quiet, busy, ratio, _ in rows:
        assert float(ratio) == pytest.approx(float(busy) / float(quiet), rel=0.05)
        assert float(ratio) < 10


def test_threads_is_of_the_standard_library_alone() -> None:
    code = "import sys, common.threads; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    assert python(code, clean_environment()).strip() == "[]"
    assert threads.SPIN
