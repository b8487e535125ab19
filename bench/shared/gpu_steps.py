"""One step of `bench/gpu.py`, in a process of its own: `python -m bench.shared.gpu_steps STEP FOLDER SECONDS REHEARSE`.

What it finds goes into FOLDER/STEP.json as it comes, so that what was measured stays when the step ends early.
"""

from __future__ import annotations

import json
import sys
import sysconfig
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from shutil import which
from typing import Any

from bench.shared.gpu_setting import Setting

OPTIONAL = {
    "triton": "the Triton kernels and torch.compile",
    "pytest": "the step tests",
    "hypothesis": "the step tests",
    "pytest_timeout": "the step tests",
    "kanditioned": "its rows in the step layer",
}


def preflight(setting: Setting) -> None:
    """Versions, and what is missing and what for. RuntimeError without a GPU."""
    import torch

    from bench.shared.machine import cpu_name, gpu_record

    versions = {name: version_of(name) for name in ("torch", "numpy", *OPTIONAL)}
    missing = [f"{name} ({needed_for})" for name, needed_for in OPTIONAL.items() if versions[name] is None]
    if not any(which(name) for name in ("cc", "gcc", "clang")):
        missing.append("a C compiler (torch.compile and Triton)")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append("Python.h, of the package python3-dev (torch.compile and Triton)")
    setting.keep(python=sys.version.split()[0], versions=versions, missing=missing, cpu=cpu_name())
    print("missing:", "; ".join(missing) or "nothing", flush=True)
    for module in ("train", "sample", "bench.layer"):
        import_module(module)
    if not setting.rehearse:
        if not torch.cuda.is_available():
            raise RuntimeError("this PyTorch finds no CUDA GPU; --rehearse True goes through all steps on the CPU")
        torch.set_float32_matmul_precision("high")
        free, _ = torch.cuda.mem_get_info()
        setting.keep(gpu=gpu_record(), free_gib=round(free / 2**30, 1))
    from bench.shared.gpu_runs import dataset

    setting.keep(dataset=dataset(setting).name, summary=f"missing: {'; '.join(missing) or 'nothing'}")


def version_of(name: str) -> str | None:
    try:
        module = import_module(name)
    except Exception as error:  # one that is broken is as good as missing
        print(f"{name}: {error}")
        return None
    try:
        return getattr(module, "__version__", None) or metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


def tests(setting: Setting) -> None:
    """How many passed, failed and were skipped, and the names of those that failed."""
    report = setting.folder / "tests.xml"
    what = (
        ["tests/test_semi_structured.py"] if setting.rehearse else []
    )  # on a CPU all are skipped, and collecting takes time
    try:
        setting.call("-m", "pytest", "-m", "cuda", f"--junitxml={report}", "-p", "no:cacheprovider", *what)
    finally:
        if report.is_file():
            setting.keep(**outcome_of_tests(report.read_text(encoding="utf-8")))


def outcome_of_tests(xml: str) -> dict[str, Any]:
    """From a report in JUnit's format."""
    suites = list(ElementTree.fromstring(xml).iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    bad = [
        case for case in ElementTree.fromstring(xml).iter("testcase") if {"failure", "error"} & {c.tag for c in case}
    ]
    passed = total - failures - errors - skipped
    return {
        "passed": passed,
        "failed": failures + errors,
        "skipped": skipped,
        "failures": [f"{case.get('classname')}::{case.get('name')}" for case in bad],
        "summary": f"{passed} passed, {failures + errors} failed, {skipped} skipped",
    }


def layer(setting: Setting) -> None:
    """The tables of bench/layer.py, one grid at a time."""
    tiny = ("--device=cpu", "--tokens=48", "--widths=16", "--threads=1", "--repeats=1", "--impls=chunked,dense")
    full = ("--device=cuda", "--impls=triton,chunked,dense,semi_structured,csr,embedding_bag")
    tables: dict[str, Any] = {}
    for grid in (8,) if setting.rehearse else (8, 5, 32):
        if setting.left() < 15 and tables:
            break
        file = setting.folder / f"layer_{grid}.json"
        setting.call("bench/layer.py", f"--grids={grid}", f"--output={file}", *(tiny if setting.rehearse else full))
        tables[str(grid)] = json.loads(file.read_text(encoding="utf-8"))
        setting.keep(tables=tables, summary=f"G={', '.join(tables)}")


def step_of(name: str) -> Callable[[Setting], None]:
    """The function of a step; modules that need PyTorch are imported for the steps that do."""
    if name in ("peaks", "right", "times"):
        return getattr(import_module("bench.shared.gpu_kernels"), name)
    if name in ("shakespeare", "gpt2", "best", "paths"):
        return getattr(import_module("bench.shared.gpu_runs"), name)
    if name in ("group", "profile"):
        return getattr(import_module("bench.shared.gpu_training"), name)
    return {"preflight": preflight, "tests": tests, "layer": layer}[name]


def main(name: str, folder: str, seconds: str, rehearse: str) -> None:
    setting = Setting(name, Path(folder), float(seconds), rehearse == "1")
    setting.keep()
    try:
        step_of(name)(setting)
    except Exception as error:
        traceback.print_exc()
        first, *_ = str(error).strip().splitlines() or ["no message"]
        sys.exit(f"{type(error).__name__}: {first}")  # what the record says of it


if __name__ == "__main__":
    main(*sys.argv[1:])
