"""The chunked backend: any cut of the tokens gives the same sums, memory does not grow, compilers make one kernel."""

import warnings
import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._inductor import metrics
from torch.utils._python_dispatch import TorchDispatchMode

from backends import chunked, dense
from kan_layer import KANLayer
from tests.test_backends import inputs_of_every_kind, random_layer, relative_error, run, truth_for


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 900),
    features=st.integers(1, 20),
    outputs=st.integers(1, 20),
    grid=st.integers(2, 12),
    seed=st.integers(0, 2**16),
)
def test_any_cut_into_chunks(tokens: int, features: int, outputs: int, grid: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = random_layer(features, outputs, grid, 4.0, "chunked")
    x = inputs_of_every_kind(-(-tokens // 6), features, grid, 4.0)
    x = x[x.abs().amax(1) < 100]
    dy = torch.randn(len(x), outputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "CPU_CHUNK_BYTES", 1)
        for value, truth in zip(run(layer, x, dy), truth_for(layer, x, dy), strict=True):
            assert relative_error(value, truth) < 2e-5


def test_half_precisions_are_summed_over_many_chunks_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer(8, 6, 5, 4.0, "chunked").to(torch.bfloat16)
    x, dy = torch.rand(40 * chunked.TILE, 8).bfloat16(), torch.rand(40 * chunked.TILE, 6).bfloat16()
    monkeypatch.setattr(chunked, "CPU_CHUNK_BYTES", 1)
    truths = truth_for(layer, x, dy)
    for value, truth in zip(run(layer, x, dy), truths, strict=True):
        assert relative_error(value, truth) < 3 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 5000, 65_536])
@pytest.mark.parametrize("cache", [1, 10_000, 50 * 2**20])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_chunks_are_even_and_fit_the_cache(tokens: int, cache: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    token_bytes = 768 * 8 * 2
    monkeypatch.setattr(chunked, "CPU_CHUNK_BYTES", cache)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=cache))
    size = chunked.chunk_tokens(tokens, token_bytes, torch.device(kind))
    fewest = chunked.FEWEST if kind == "cuda" else chunked.TILE
    assert size == tokens or size % chunked.TILE == 0
    assert size * token_bytes <= max(cache, fewest * token_bytes)
    chunks = -(-tokens // size)
    assert size - chunked.TILE < tokens / chunks, "no chunk is much smaller than the others"


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators make, and their peak; views of the `inputs` are none."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in inputs}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peaks(tokens: int, forward: Callable[..., Any], backward: Callable[..., Any]) -> tuple[int, int]:
    """Bytes at the peak of both passes beyond their results."""
    torch.manual_seed(0)
    x, weight, grad = torch.randn(tokens, 64), torch.randn(64, 9, 48), torch.randn(tokens, 48)
    with LiveBytes(x, weight) as of_forward:
        y = forward(x, weight, 4.0, torch.float32)
    with LiveBytes(grad, x, weight) as of_backward:
        gradients = backward(grad, x, weight)
    return of_forward.peak - y.nbytes, of_backward.peak - sum(gradient.nbytes for gradient in gradients)


def test_memory_does_not_grow_with_the_tokens() -> None:
    chunked._bounds(9, torch.device("cpu")), chunked.cell_edges(9, 4.0, torch.device("cpu"))  # kept for good

    def by_chunks(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> Any:
        return chunked.compute_gradients(grad, x, weight, 4.0, [True, True])

    def by_one_product(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> Any:
        return dense.gradients(grad, x, weight, 4.0, torch.float32, [True, True])

    few, many = (peaks(tokens, chunked.compute, by_chunks) for tokens in (4096, 4 * 4096))
    assert max(many[k] / few[k] for k in (0, 1)) < 1.02
    few, many = (peaks(tokens, dense.spline_sum, by_one_product) for tokens in (4096, 4 * 4096))
    assert min(many[k] / few[k] for k in (0, 1)) > 3, "the measure sees what grows"


@pytest.mark.slow
@pytest.mark.needs("torch.compile")
def test_compiled_each_is_one_kernel_for_all_tokens_and_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with gradients wanted, and after inference."""
    torch._dynamo.reset()
    monkeypatch.setattr(chunked, "elementwise", lambda name, chunks: chunked.compiled(name, *chunks.kind))
    monkeypatch.setattr(chunked, "CPU_CHUNK_BYTES", 1)
    made = []
    for tokens, width in ((200, 4.0), (333, 3.0), (150, 2.5), (77, 5.0)):
        layer = KANLayer(6, 5, num_control_points=7, spline_width=width, impl="chunked")
        x, dy = torch.randn(tokens, 6), torch.randn(tokens, 5)
        metrics.reset()
        if tokens == 200:
            with torch.inference_mode():
                layer(x)
            metrics.reset()
        for value, truth in zip(run(layer, x, dy), truth_for(layer, x, dy), strict=True):
            assert relative_error(value, truth) < 1e-5
        made.append(metrics.generated_kernel_count)
    assert made[0] <= 3 * 2 and made[-1] == 0, made


def test_grids_do_not_use_up_each_other_s_compilations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo compiles a function a limited number of times: here for the first size, and then for all of them."""
    torch._dynamo.reset()
    chunked.compiled.cache_clear()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    with torch._dynamo.config.patch(recompile_limit=3), warnings.catch_warnings():
        warnings.simplefilter("error")
        for points in (5, 6, 7, 8):
            bounds = chunked._bounds(points, torch.device("cpu"))
            for tokens, width in ((20, 4.0), (30, 4.0), (40, 3.0), (50, 2.0)):
                x, ramps = torch.randn(tokens, 3), torch.empty(tokens, points - 1, 3)
                chunked.compiled("ramps", points, 3)(x, bounds, points, width, ramps)
    chunked.compiled.cache_clear()
    assert counter.frame_count <= 3 * 4


def test_a_compiler_that_fails_is_reported_and_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> object:
        raise RuntimeError("no compiler\nmore about it")

    chunked.compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(chunked, "elementwise", lambda name, chunks: chunked.compiled(name, *chunks.kind))
    layer = random_layer(6, 5, 7, 4.0, "chunked")
    x, dy = torch.randn(20, 6), torch.randn(20, 5)
    with pytest.warns(UserWarning, match="chunked is slower than it could be.*: no compiler$"):
        values = run(layer, x, dy)
    for value, truth in zip(values, truth_for(layer, x, dy), strict=True):
        assert relative_error(value, truth) < 1e-5
    chunked.compiled.cache_clear()


def test_the_operators_keep_pytorch_s_rules_for_operators() -> None:
    x, weight = torch.randn(5, 3, requires_grad=True), torch.randn(3, 4, 2, requires_grad=True)
    torch.library.opcheck(torch.ops.splinegpt.chunked.default, (x, weight, 4.0, torch.float32))
