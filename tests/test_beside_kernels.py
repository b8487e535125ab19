"""bench/beside_kernels.py: memory is counted as it is held, and a call goes through Triton without a GPU."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are launched by triton, which is not installed")
from backends import triton
from bench import beside_kernels
from tests.runs import assert_one_sentence, call

MB = 10**6


def test_memory_is_what_is_held_at_a_time() -> None:
    given = torch.empty(MB, device="meta")
    with beside_kernels.Memory(given) as memory:
        torch.empty(8 * MB, dtype=torch.uint8, device="meta")  # gone at once
        kept = torch.empty(3 * MB, dtype=torch.uint8, device="meta")
        views = [kept.view(3, MB), kept[:5], given.view(-1, 1)]
        another = torch.empty(2 * MB, dtype=torch.uint8, device="meta")
        del kept, views
        torch.empty(4 * MB, dtype=torch.uint8, device="meta")
    assert memory.most == 8 * MB and another.nbytes == 2 * MB


@pytest.mark.parametrize("grid", [5, 8])
def test_the_kernels_backends_hold_little_more_than_they_return(grid: int) -> None:
    """The gradient of W in parts, or a chunk, must not be there beside both gradients: that is what these are for."""
    tokens, shape = 65_536, (768, grid, 768)
    x_bytes, w_bytes = 4 * tokens * 768, 4 * 768 * grid * 768
    returned, with_basis = beside_kernels.least_memory(tokens, shape)
    assert returned == 1.5 * x_bytes + w_bytes and with_basis - returned == 0.5 * grid * x_bytes
    found = {impl: beside_kernels.memory_of_training(impl, tokens, shape) for impl in beside_kernels.ROADS}
    cells, rises = x_bytes // 4, w_bytes // 2
    assert returned < found["triton"] < returned + cells + rises
    assert returned < found["chunked"] < returned + beside_kernels.L2_BYTES + 3 * w_bytes
    assert found["dense"] > with_basis
    if grid == 8:
        with beside_kernels.imitated_hopper():
            launch = triton.Launch.of(tokens, shape, 4.0, torch.bfloat16, "ieee", torch.device("cpu"))
        assert launch.splits * w_bytes > cells + rises, "whose parts would not fit into that"


@pytest.mark.needs("no interpreter")
def test_both_are_printed_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    printed = call(beside_kernels.main, "--grids=5", "--tokens=256", "--width=64", "--calls=20")
    assert printed.code == 0 and "No kernel runs" in printed.out
    us = [int(number) for number in re.findall(r"(\d+) µs", printed.out)]
    assert 0 < us[0] < us[1]
    assert_one_sentence(call(beside_kernels.main, "--grids=1"), "grids", "at least 2")
