"""Every backend computes the definition: values, both gradients, shapes, dtypes, odd inputs, compilation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import backends
from backends import csr
from kan_layer import KANLayer
from tests import spline_reference
from tests.layers import random_layer

IMPLS = [pytest.param(name, id=name) for name in backends.BACKENDS]
every_impl = pytest.mark.parametrize("impl", IMPLS)
pytestmark = pytest.mark.machine


def relative_error(value: torch.Tensor, truth: np.ndarray) -> float:
    scale = max(np.abs(truth).max(initial=0.0), 1e-30)
    return float(np.abs(value.detach().double().cpu().numpy() - truth).max(initial=0.0) / scale)


def inputs_of_every_kind(tokens: int, features: int, grid: int, width: float) -> torch.Tensor:
    """Rows inside the grid, exactly at knots, beside knots, at the ends, outside and far outside."""
    inside = (torch.rand(tokens, features) - 0.5) * width
    knots = torch.linspace(-width / 2, width / 2, grid)[torch.randint(grid, (tokens, features))]
    beside = torch.nextafter(knots, torch.full_like(knots, float("inf")))
    ends = torch.where(torch.rand(tokens, features) < 0.5, -width / 2, width / 2)
    outside = torch.randn(tokens, features) * 3 * width
    far = torch.randn(tokens, features) * 1000 * width
    return torch.cat((inside, knots, beside, ends, outside, far))


def run(layer: KANLayer, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    dx, dw = torch.autograd.grad(y, (x, layer.weight), dy)
    return y, dx, dw


def truth_for(layer: KANLayer, x: torch.Tensor, dy: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x64, w64, dy64 = (tensor.detach().double().cpu().numpy() for tensor in (x, layer.control_points(), dy))
    y = spline_reference.spline_sum(x64, w64, layer.spline_width)
    return (y, *spline_reference.gradients(x64, w64, layer.spline_width, dy64))


@every_impl
@pytest.mark.parametrize("kind", range(6), ids=["inside", "knots", "beside", "ends", "outside", "far"])
@pytest.mark.parametrize("grid", [2, 5, 8, 33])
def test_float32_equals_the_float64_definition(impl: str, kind: int, grid: int, device: torch.device) -> None:
    layer = random_layer(7, 9, grid, 4.0, impl, device=device)
    x = inputs_of_every_kind(11, 7, grid, 4.0).chunk(6)[kind].to(device)
    dy = torch.randn(len(x), 9, device=device)
    for value, truth in zip(run(layer, x, dy), truth_for(layer, x, dy), strict=True):
        assert relative_error(value, truth) < 1e-5


@every_impl
@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 5),
    features=st.integers(1, 6),
    outputs=st.integers(1, 6),
    grid=st.integers(2, 40),
    width=st.floats(0.1, 50.0),
    seed=st.integers(0, 2**16),
)
def test_any_shape_in_float64(
    impl: str, tokens: int, features: int, outputs: int, grid: int, width: float, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = random_layer(features, outputs, grid, width, impl, dtype=torch.float64)
    x = (torch.randn(tokens, features) * width / 2).double()
    dy = torch.randn(tokens, outputs, dtype=torch.float64)
    for value, truth in zip(run(layer, x, dy), truth_for(layer, x, dy), strict=True):
        assert relative_error(value, truth) < 1e-10


@every_impl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [2, 5, 16])
def test_half_precision_within_its_rounding(impl: str, dtype: torch.dtype, grid: int, device: torch.device) -> None:
    layer = random_layer(16, 12, grid, 4.0, impl, device=device).to(dtype)
    x = (torch.randn(300, 16, device=device) * 1.2).to(dtype)
    dy = torch.randn(300, 12, device=device).to(dtype)
    for value, truth in zip(run(layer, x, dy), truth_for(layer, x, dy), strict=True):
        assert value.dtype is dtype
        assert relative_error(value, truth) < 3 * torch.finfo(dtype).eps


@every_impl
def test_autocast_keeps_master_weights_and_float32_cells(impl: str, device: torch.device) -> None:
    layer = random_layer(16, 12, 8, 4.0, impl, device=device)
    x, dy = torch.randn(200, 16, device=device), torch.randn(200, 12, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y, dx, dw = run(layer, x, dy.bfloat16())
    assert y.dtype is torch.bfloat16 and dx.dtype is torch.float32 and dw.dtype is torch.float32
    for value, truth in zip((y, dx, dw), truth_for(layer, x, dy.bfloat16()), strict=True):
        assert relative_error(value, truth) < 3 * torch.finfo(torch.bfloat16).eps


@every_impl
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5), (2, 0, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shapes_are_those_of_a_linear_layer(impl: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = random_layer(5, 4, 6, 4.0, impl)
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = layer(x)
    assert y.shape == (*shape[:-1], 4) and y.dtype is dtype
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape and layer.weight.grad is not None
    rows = layer(x.reshape(-1, 5)).reshape(y.shape)
    torch.testing.assert_close(rows, y, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)


@every_impl
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_a_bad_token_spoils_only_its_own_row(impl: str, bad: float, device: torch.device) -> None:
    layer = random_layer(5, 4, 6, 4.0, impl, device=device)
    x = torch.randn(6, 5, device=device)
    clean_y, clean_dx, _ = run(layer, x, torch.ones(6, 4, device=device))
    x[2, 3] = bad
    y, dx, _ = run(layer, x, torch.ones(6, 4, device=device))
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(y[others], clean_y[others])
    torch.testing.assert_close(dx[others], clean_dx[others])
    if abs(bad) != 1e38:
        assert not y[2].isfinite().any()


@every_impl
def test_gradcheck(impl: str) -> None:
    layer = random_layer(4, 3, 5, 4.0, impl, dtype=torch.float64)
    x = ((torch.rand(6, 4, dtype=torch.float64) - 0.5) * 8).requires_grad_()
    width, weight = layer.spline_width, layer.weight
    spline_sum = backends.BACKENDS[impl].spline_sum
    assert torch.autograd.gradcheck(lambda x, w: spline_sum(x, w, width, torch.float64), (x, weight))
    if impl not in ("embedding_bag", "native", "amx", "triton"):  # these go through embedding_bag in float64
        assert torch.autograd.gradgradcheck(lambda x, w: spline_sum(x, w, width, torch.float64), (x, weight))


@every_impl
def test_noncontiguous_arguments(impl: str) -> None:
    layer = random_layer(6, 5, 7, 4.0, impl)
    x, dy = torch.randn(6, 9).t(), torch.randn(5, 9).t()
    layer.weight.data = torch.randn(5, layer.num_control_points, 6).permute(2, 1, 0)
    for value, truth in zip(run(layer, x, dy), truth_for(layer, x, dy), strict=True):
        assert relative_error(value, truth) < 1e-5


@every_impl
@pytest.mark.slow
@pytest.mark.needs("torch.compile")
def test_compiles_whole_without_recompiling_for_each_batch(impl: str, device: torch.device) -> None:
    testing = pytest.importorskip("torch._dynamo.testing", reason="it is private, and gone")
    torch.compiler.reset()
    layer = random_layer(6, 5, 7, 4.0, impl, device=device)
    counter = testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for tokens in (64, 33, 17, 96, 2):
        x, dy = torch.randn(tokens, 6, device=device), torch.randn(tokens, 5, device=device)
        for value, truth in zip(run(compiled, x, dy), truth_for(layer, x, dy), strict=True):
            assert relative_error(value, truth) < 1e-5
    assert counter.frame_count <= 2  # one graph for the first shape, and one for any shape


@pytest.mark.needs("mkl")
def test_the_csr_operator_keeps_pytorch_s_rules_for_operators() -> None:
    values = torch.rand(12, requires_grad=True)
    columns = torch.tensor([0, 1, 3, 4, 1, 2, 4, 5, 0, 1, 4, 5], dtype=torch.int32)
    table = torch.randn(6, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.splinegpt.csr_matmul.default, (values, columns, 4, table, torch.float32))


@pytest.mark.parametrize("grid", [5, 64])
def test_csr_in_half_precision_has_gradients_without_noise(grid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where sparse products take bfloat16: here they are imitated by dense ones."""

    def dense(values: torch.Tensor, columns: torch.Tensor, row_nonzeros: int, width: int) -> torch.Tensor:
        rows = values.unflatten(0, (-1, row_nonzeros))
        return rows.new_zeros(len(rows), width).scatter_add_(1, columns.view_as(rows).long(), rows)

    monkeypatch.setattr(csr, "takes", lambda dtype, device: True)
    monkeypatch.setattr(csr, "times", lambda *basis: dense(*basis[:3], len(basis[3])) @ basis[3])
    monkeypatch.setattr(csr, "transposed_times", lambda *basis: dense(*basis[:3], basis[4]).t() @ basis[3])
    layer = random_layer(16, 12, grid, 4.0, "csr")
    x, dy = torch.rand(300, 16) * 4 - 2, torch.randn(300, 12).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, dx, dw = run(layer, x, dy)
    assert y.dtype is torch.bfloat16 and dx.dtype is torch.float32
    assert relative_error(dx, truth_for(layer, x, dy)[1]) < 1e-5  # the sampled product is float32's
    assert relative_error(dw, truth_for(layer, x, dy)[2]) < 3 * torch.finfo(torch.bfloat16).eps


def test_registry_says_why_a_backend_cannot_be_used() -> None:
    huge = backends.Problem(4096, 8, 4096, torch.device("cpu"), tokens=65_536)
    reasons = backends.availability(huge)
    assert reasons["dense"] is None and "GiB" in str(reasons["embedding"])
    with pytest.raises(ValueError, match=r"embedding.*cannot be used.*GiB.*dense"):
        backends.choose("embedding", huge)
    with pytest.raises(ValueError, match=r"impl must be one of auto, .*csr.*got 'cuda'"):
        backends.choose("cuda", huge)


@pytest.mark.parametrize("grid", [2, 8, 64, 1025])
def test_auto_always_finds_something(grid: int, device: torch.device) -> None:
    backend, why = backends.choose("auto", backends.Problem(8, grid, 8, device))
    assert backend.why_not(backends.Problem(8, grid, 8, device)) is None and why
