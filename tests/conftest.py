"""Fixtures and settings for all tests: devices, a fixed seed, and which tests this machine skips."""

import common.threads  # noqa: F401  before torch

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck

from backends import BACKENDS, instruction_set, native_build, triton
from tests import machine

# Hypothesis would fail an example that takes 200 ms, and any may take that long on a busy machine.
hypothesis.settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis.settings.load_profile("any machine")

FOR_CPUS = ("native", "amx")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = why_skipped(item)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def why_skipped(item: pytest.Item) -> str | None:
    """Why this machine skips a test, by its marks and by its backend, or None."""
    on_gpu = item.get_closest_marker("cuda") is not None
    needs = [need for mark in item.iter_markers("needs") for need in mark.args] + ["cuda"] * on_gpu
    lacking = next((reason for need in needs if (reason := machine.why_not(need))), None)
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    impl = params.get("impl")
    if lacking or impl not in BACKENDS:
        return lacking
    if impl in FOR_CPUS and torch.device(params.get("device", "cpu")).type != "cpu":
        return "a kernel for CPUs"
    if impl == "triton" and triton.interpreted() and (params.get("dtype") is torch.bfloat16 or "autocast" in item.name):
        return "Triton's interpreter computes bfloat16 wrongly"
    return machine.why_not_impl(impl, "cuda" if on_gpu else "cpu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=["the machine's", instruction_set.GENERIC, instruction_set.AVX2])
def vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel with another vector length; skips if this machine cannot run it."""
    if request.param not in instruction_set.FLAGS:
        return
    if request.param == instruction_set.AVX2:
        machine.require("avx2")
    folder = request.getfixturevalue("tmp_path_factory").getbasetemp()
    library = native_build.load_from(folder, native_build.find_compiler(), request.param)
    monkeypatch.setattr(native_build, "load", lambda: library)
