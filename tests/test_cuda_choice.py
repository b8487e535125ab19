"""What `auto` takes on a CUDA GPU, imitated: the table's impl, never one that cannot be used or trusted, and why."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import backends
from backends import cuda_choice, triton
from backends.cuda_choice import Entry

CUDA = torch.device("cuda")
GENERATIONS = {(7, 5): "any", (8, 0): "ampere", (8, 9): "consumer", (9, 0): "hopper", (10, 0): "blackwell"}
MEASURED = {
    "hopper": [Entry(8, 4096, "triton", "fast"), Entry(8, 1, "dense", "few tokens")],
    "any": [Entry(None, 1, "chunked", "calculated")],
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A Hopper with the newest Triton and a table of which triton is part."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(triton, "why_not_on", lambda device: None)
    monkeypatch.setattr(cuda_choice, "table", lambda: MEASURED)
    monkeypatch.setattr(cuda_choice, "triton_version", lambda: "3.7.1")
    return monkeypatch


def choose(grid: int, tokens: int | None = None) -> tuple[str, str]:
    backend, why = backends.choose("auto", backends.Problem(16, grid, 16, CUDA, tokens))
    return backend.name, why


@pytest.mark.parametrize("capability", GENERATIONS)
@given(points=st.integers(2, 2000), tokens=st.none() | st.integers(1, 10**6))
def test_every_problem_has_an_entry_that_says_whether_it_was_measured(
    capability: tuple[int, int], points: int, tokens: int | None
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        assert cuda_choice.generation(CUDA) == GENERATIONS[capability]
        name, why = choose(points, tokens)
    assert name in backends.BACKENDS and why.startswith("auto: ")
    assert ("not measured" in why) != (" ms " in why)


@pytest.mark.parametrize(
    ("grid", "tokens", "impl", "why"),
    [
        (8, None, "triton", "auto: fast"),
        (8, 4096, "triton", "auto: fast"),
        (8, 4095, "dense", "auto: few tokens"),
        (9, 9999, "chunked", "auto: calculated"),
    ],
)
def test_the_first_entry_that_suits(gpu: pytest.MonkeyPatch, grid: int, tokens: int, impl: str, why: str) -> None:
    assert choose(grid, tokens) == (impl, why)


@pytest.mark.parametrize(
    ("version", "impl"),
    [("3.5.1", "chunked"), ("3.6.0", "triton"), ("3.7.0+git", "triton"), ("3.8.0", "chunked"), ("4.0.0", "chunked")],
)
def test_a_triton_that_nobody_has_checked_is_not_taken(gpu: pytest.MonkeyPatch, version: str, impl: str) -> None:
    gpu.setattr(cuda_choice, "triton_version", lambda: version)
    name, why = choose(5)
    assert name == impl and (f"nobody has checked what Triton {version} makes" in why) == (impl == "chunked")


def test_what_the_table_names_must_be_usable(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(triton, "why_not_on", lambda device: "triton is not installed")
    assert choose(5) == ("chunked", "auto: triton would be taken, but triton is not installed")
