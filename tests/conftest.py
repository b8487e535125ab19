"""Shared fixtures: devices, determinism, and a tiny prepared dataset that tests make themselves."""

import pytest
import torch

from backends import amx, triton

FOR_CPUS = ("native", "amx")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = why_skipped(item)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def why_skipped(item: pytest.Item) -> str | None:
    if "cuda" in item.keywords and not torch.cuda.is_available():
        return "needs a CUDA GPU"
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    if params.get("impl") in FOR_CPUS and torch.device(params.get("device", "cpu")).type != "cpu":
        return "a kernel for CPUs"
    if params.get("impl") == "amx" and not amx.is_supported():
        return "needs a CPU with AMX"
    if params.get("impl") != "triton":
        return None
    if not triton.interpreted():
        on_gpu = params.get("device") == "cuda"
        return None if on_gpu else "needs a CUDA GPU; test_triton.py repeats it in Triton's interpreter"
    if params.get("dtype") is torch.bfloat16 or "autocast" in item.name:
        return "Triton's interpreter computes bfloat16 wrongly"
    return None


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
