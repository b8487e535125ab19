"""bench/options.py, sparse_layouts.py and cpu_limits.py: each prints all its rows, or one sentence for a mistake."""

from collections.abc import Callable

import pytest

from backends import native_build
from bench import cpu_limits, options, sparse_layouts
from tests.runs import assert_one_sentence, call

PAIRS = {
    "bucketize, float64": "arithmetic",
    "bucketize, float32": "arithmetic",
    "stacked bags": "interleaved bags",
    "tokens sorted": "tokens as they come",
    "native, x by feature": "native, x by token",
    "one gather, as_strided": "two gathers",
    "sparse gradient": "dense gradient",
}


def test_every_pair_is_compared() -> None:
    done = call(options.main, "--tokens=24", "--width=12", "--grid=5", "--threads=1", "--repeats=1")
    assert done.code == 0 and done.err == "", done
    lines = {line[21:44].strip(): line for line in done.out.splitlines()[3:]}
    assert {other: line[:20].strip() for other, line in lines.items()} == PAIRS
    for other, line in lines.items():
        if other.startswith("native") and native_build.why_not():
            assert "skipped: " in line
        else:
            assert line.count("x", 44) == (1 if other.startswith("bucketize") else 2), line


def test_gathers_that_need_too_much_memory_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backends.problem.LARGEST_GATHER_BYTES", 0)
    done = call(options.main, "--tokens=8", "--width=4", "--grid=2", "--threads=1", "--repeats=1")
    skipped = [line[:20].strip() for line in done.out.splitlines() if "skipped: it gathers" in line]
    assert done.code == 0 and skipped == ["two gathers", "dense gradient"]


@pytest.mark.needs("kernel")
def test_every_limit_is_measured() -> None:
    done = call(cpu_limits.main, "--millions=1", "--tokens=1000", "--width=100", "--threads=1")
    assert done.code == 0 and done.err == "", done
    named = (cpu_limits.REGISTERS, cpu_limits.FROM_L1, cpu_limits.FROM_L2, cpu_limits.UPDATES, cpu_limits.DOTS)
    for limit in named:
        rate = next(line.split()[-1] for line in done.out.splitlines() if line.startswith(limit.what))
        assert (rate == "none" and limit is cpu_limits.DOTS) or float(rate) > 0
    lanes = int(done.out.partition("vectors of ")[2].split()[0])
    rates = {line.rsplit(maxsplit=1)[0]: line.split()[-1] for line in done.out.splitlines()[1:]}
    least, rate = (float(rates[name + cpu_limits.FROM_L1.what]) for name in ("float32, ", ""))
    assert least == pytest.approx(2 * 1000 * 100**2 / lanes / rate / 1e6, rel=0.1)


def test_every_sparse_layout_is_timed_or_said_not_to_exist() -> None:
    done = call(sparse_layouts.main, "--tokens=40", "--width=6", "--grid=5", "--threads=1", "--repeats=1")
    assert done.code == 0 and done.err == "", done
    forward, _, transposed = done.out.partition("dW =")
    for part, layouts in ((forward, ("CSR", "COO", "CSC", "BSR")), (transposed, ("CSR", "CSC", "COO"))):
        for layout in layouts:
            line = next(line for line in part.splitlines() if line.startswith(f"  {layout}: "))
            assert (line.endswith("x") and float(line.split()[1]) > 0) or "Error: " in line


def test_without_a_compiler_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert_one_sentence(call(cpu_limits.main), "no-such-compiler")


@pytest.mark.parametrize(
    ("main", "argument", "part"),
    [
        (options.main, "--grid=1", "grid at least 2"),
        (options.main, "--threads=0", "threads"),
        (sparse_layouts.main, "--grid=1", "grid must be at least 2"),
        (sparse_layouts.main, "--device=tpu", "device must be cpu, or cuda"),
        (cpu_limits.main, "--tokens=0", "tokens"),
        (cpu_limits.main, "--width=wide", "wide"),
    ],
)
def test_an_impossible_option_is_refused(main: Callable[[], None], argument: str, part: str) -> None:
    assert_one_sentence(call(main, argument), part)
