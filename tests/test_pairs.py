"""Splines of pairs of features: values and gradients against a float64 definition, for the kernel and without it."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from backends import standard_pairs
from backends.pairs import pair_sum
from tests import pair_reference

PairSum = Callable[[Tensor, Tensor, Tensor, float], Tensor]
FORMS = [pytest.param(standard_pairs.pair_sum, id="standard"), pytest.param(pair_sum, id="chosen")]
every_form = pytest.mark.parametrize("form", FORMS)


def draw(
    tokens: int, features: int, outputs: int, points: int, dtype: torch.dtype = torch.float32, width: float = 4.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random x, z, control points and dy. A quarter of the inputs lie outside; in float32, some at knots or diagonals.

    In float64 one rounding decides on which side of a knot that float64 cannot represent an input lies.
    """
    x, z = torch.randn(2, tokens, features, dtype=dtype) * (0.45 * width)
    spacing = width / (points - 1)
    special = 0.1 if dtype is torch.float32 else 0.0
    knots = torch.arange(points, dtype=dtype) * spacing - width / 2
    for each in (x, z):
        at_knot = torch.rand_like(each) < special
        each[at_knot] = knots[torch.randint(points, (int(at_knot.sum()),))]
    diagonal = torch.rand_like(x) < special
    z[diagonal] = x[diagonal]
    return x, z, torch.randn(features, points, points, outputs, dtype=dtype), torch.randn(tokens, outputs, dtype=dtype)


def run(
    form: PairSum, x: Tensor, z: Tensor, weight: Tensor, dy: Tensor, width: float = 4.0, autocast: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, dx, dz and dW."""
    x, z, weight = (tensor.detach().requires_grad_() for tensor in (x, z, weight))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = form(x, z, weight, width)
    return (y.detach(), *torch.autograd.grad(y, (x, z, weight), dy.to(y.dtype)))


def reach(x: Tensor, z: Tensor, points: int, width: float) -> float:
    """How many times as large as W a value may be: beyond the grid it grows with the distance in cells."""
    furthest = max((float(each.abs().max()) for each in (x, z) if each.numel()), default=0.0)
    return 1 + 2 * max(0.0, furthest - width / 2) * (points - 1) / width


def assert_the_definition(form: PairSum, x: Tensor, z: Tensor, weight: Tensor, dy: Tensor, width: float = 4.0) -> None:
    arrays = [tensor.double().numpy() for tensor in (x, z, weight)]
    dy64 = dy.double().numpy()
    places = np.float64 if x.dtype is torch.float64 else np.float32
    truths = (
        pair_reference.pair_sum(*arrays, width),
        *pair_reference.gradients(*arrays, width, dy64, places),
    )
    tokens, features = x.shape
    points, outputs = weight.shape[2:]
    most_w, most_dy = np.abs(arrays[2]).max(), np.abs(dy64).max(initial=0)
    slope = most_dy * most_w * math.sqrt(outputs) * (points - 1) / width
    sizes = (most_w * math.sqrt(features), slope, slope, most_dy * math.sqrt(tokens))
    eps = 1e-13 if x.dtype is torch.float64 else 1e-6
    for value, truth, size in zip(run(form, x, z, weight, dy, width), truths, sizes, strict=True):
        assert value.shape == truth.shape and value.dtype is x.dtype
        assert (np.abs(value.double().numpy() - truth) <= eps * reach(x, z, points, width) * size).all()


def assert_bits_equal(values: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> None:
    for value, other in zip(values, others, strict=True):
        assert torch.equal(value.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@every_form
@settings(max_examples=60)
@given(
    tokens=st.integers(0, 60),
    features=st.integers(1, 20),
    outputs=st.integers(1, 40) | st.sampled_from([63, 64, 65, 127, 128, 129, 200]),
    points=st.integers(2, 9),
    width=st.floats(0.1, 50),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_gives_the_definition(
    form: PairSum, tokens: int, features: int, outputs: int, points: int, width: float, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    assert_the_definition(form, *draw(tokens, features, outputs, points, dtype, width), width)


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("points", [2, 3, 5, 9])  # whose knots are exact, so that diagonals are
def test_knots_diagonals_ends_and_beyond_them(form: PairSum, dtype: torch.dtype, points: int) -> None:
    line = torch.cat([torch.linspace(-2, 2, 4 * (points - 1) + 1), torch.tensor([-2.5, 2.5, -9, 7])]).to(dtype)
    x, z = (each.reshape(-1, 1) for each in torch.meshgrid(line, line, indexing="ij"))
    assert_the_definition(form, x, z, torch.randn(1, points, points, 7, dtype=dtype), torch.randn(len(x), 7).to(dtype))


@every_form
def test_planes_are_exact_everywhere(form: PairSum) -> None:
    knots = torch.linspace(-2, 2, 5, dtype=torch.float64)
    a, b, c = torch.randn(3, 2, 1, 1, 6, dtype=torch.float64)
    weight = a * knots.reshape(1, 5, 1, 1) + b * knots.reshape(1, 1, 5, 1) + c
    x, z = torch.randn(2, 200, 2, dtype=torch.float64) * 3
    truth = x @ a[:, 0, 0] + z @ b[:, 0, 0] + c.sum((0, 1, 2))
    torch.testing.assert_close(form(x, z, weight, 4.0), truth, rtol=1e-12, atol=1e-12)
    single = form(x.float(), z.float(), weight.float(), 4.0)
    torch.testing.assert_close(single, truth.float(), rtol=1e-5, atol=1e-4)


@every_form
def test_functions_are_continuous_across_edges(form: PairSum) -> None:
    x, z, weight, _ = draw(400, 1, 5, 6, torch.float64)
    for each in (x, z):  # some at an end of the grid, some at a knot
        each[::3] = each[::3].clamp(-2, 2)
        each[::4] = each[::4].clamp(-2, 2).mul(2).round() / 2
    step = 1e-9
    y = form(x, z, weight, 4.0)
    for aside in ((step, 0), (-step, 0), (0, step), (0, -step), (step, -step)):
        moved = form(x + aside[0], z + aside[1], weight, 4.0)
        assert (moved - y).abs().max() < 20 * step * weight.abs().max()


def between_kinks(tokens: int, features: int, points: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pairs away from knots and diagonals, some outside."""
    cell = torch.randint(-1, points, (2, tokens, features))
    t = torch.where(torch.rand(tokens, features) < 0.5, 0.3, 0.7) + 0.1 * torch.rand(tokens, features)
    x, z = ((cell + torch.stack([t, 1.02 - t])) * (4.0 / (points - 1)) - 2.0).to(dtype)
    return x, z


@pytest.mark.parametrize("outputs", [3, 20])  # gathered, and by a product with the basis
def test_derivatives_of_first_and_second_order(outputs: int) -> None:
    x, z = between_kinks(5, 2, 4, torch.float64)
    arguments = tuple(t.requires_grad_() for t in (x, z, torch.randn(2, 4, 4, outputs, dtype=torch.float64)))
    assert torch.autograd.gradcheck(lambda *tensors: pair_sum(*tensors, 4.0), arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *tensors: pair_sum(*tensors, 4.0), arguments)


def second_derivatives(form: PairSum, *tensors: Tensor) -> tuple[Tensor, ...]:
    x, z, weight, dy, *directions = tensors
    leaves = [tensor.detach().requires_grad_() for tensor in (x, z, weight, dy)]
    first = torch.autograd.grad(form(*leaves[:3], 4.0), leaves[:3], leaves[3], create_graph=True)
    return torch.autograd.grad(sum((g * d).sum() for g, d in zip(first, directions, strict=True)), leaves)


def test_second_derivatives_of_the_kernel_are_those_of_standard_operators() -> None:
    x, z, weight, dy = draw(30, 6, 40, 5)
    tensors = (x, z, weight, dy, *(torch.randn_like(tensor) for tensor in (x, z, weight)))
    wide = second_derivatives(standard_pairs.pair_sum, *(tensor.double() for tensor in tensors))
    for value, truth in zip(second_derivatives(pair_sum, *tensors), wide, strict=True):
        torch.testing.assert_close(value, truth.float(), rtol=1e-4, atol=1e-4 * float(truth.abs().max()))


@every_form
def test_beyond_the_grid_functions_go_on_straight(form: PairSum) -> None:
    weight = torch.randn(1, 5, 5, 6, dtype=torch.float64)
    inside = torch.rand(300, 1, dtype=torch.float64) * 4 - 2
    for x, z, dx, dz in ((1.0, None, 1.0, 0.0), (-1.0, None, 1.0, 0.0), (None, 1.0, 0.0, 1.0), (1.0, -1.0, 1.0, 0.0)):
        x, z = (inside if sign is None else sign * (2.2 + torch.rand_like(inside) * 9) for sign in (x, z))
        steps = [form(x + step * dx, z + step * dz, weight, 4.0) for step in (0.0, 0.1, -0.1)]
        torch.testing.assert_close(steps[1] + steps[2], 2 * steps[0])
        assert ((steps[1] - steps[0]).abs() > 1e-3).any()


@every_form
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e38, -3e38])
@pytest.mark.parametrize("outputs", [5, 64])
def test_a_bad_input_spoils_only_its_row_and_its_feature(form: PairSum, bad: float, outputs: int) -> None:
    for which in range(2):
        x, z, weight, dy = draw(20, 18, outputs, 4)
        before = run(form, x, z, weight, dy)
        (x, z)[which][7, 16] = bad
        after = run(form, x, z, weight, dy)
        tokens, features = torch.arange(20) != 7, torch.arange(18) != 16
        assert_bits_equal(tuple(v[tokens] for v in after[:3]), tuple(v[tokens] for v in before[:3]))
        assert_bits_equal((after[3][features],), (before[3][features],))
        if math.isnan(bad):
            assert after[0][7].isnan().all()


HALF = (torch.float16, torch.bfloat16)


@every_form
@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
@pytest.mark.parametrize("weight_dtype", [*HALF, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes(form: PairSum, dtype: torch.dtype, weight_dtype: torch.dtype, autocast: bool) -> None:
    x, z, weight, dy = draw(30, 6, 40, 5)
    x, z, weight = x.to(dtype), z.to(dtype), weight.to(weight_dtype)
    y, *gradients = run(form, x, z, weight, dy, autocast=autocast)
    assert y.dtype is (torch.float32 if dtype in HALF else dtype)
    exact = run(standard_pairs.pair_sum, *(tensor.double() for tensor in (x, z, weight)), dy)
    torch.testing.assert_close(y, exact[0].to(y.dtype), rtol=1e-5, atol=1e-5)
    for value, truth, like in zip(gradients, exact[1:], (x, z, weight), strict=True):
        assert value.dtype is like.dtype
        eps = max(torch.finfo(like.dtype).eps, 1e-6)
        torch.testing.assert_close(value.double(), truth, rtol=eps, atol=eps * float(truth.abs().max()))


@every_form
def test_transforms(form: PairSum) -> None:
    x, z, weight, dy = draw(3, 4, 30, 5)

    def loss(x: Tensor, z: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
        return (form(x[None], z[None], weight, 4.0) * dy).sum()

    each = vmap(grad(loss, argnums=(0, 1, 2)), in_dims=(0, 0, None, 0))(x, z, weight, dy)
    _, dx, dz, dw = run(standard_pairs.pair_sum, x, z, weight, dy)
    for value, truth in zip((each[0], each[1], each[2].sum(0)), (dx, dz, dw), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-5)
    tangents = tuple(torch.randn_like(tensor) for tensor in (x, z, weight))
    _, tangent = jvp(lambda *tensors: form(*tensors, 4.0), (x, z, weight), tangents)
    truth = sum((tensor * gradient).sum() for tensor, gradient in zip(tangents, (dx, dz, dw), strict=True))
    torch.testing.assert_close((tangent * dy).sum(), truth, rtol=1e-4, atol=1e-4)


@every_form
def test_compiled(form: PairSum) -> None:
    arguments = draw(33, 5, 40, 5)
    torch._dynamo.reset()
    compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
    for value, truth in zip(run(compiled, *arguments), run(form, *arguments), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outputs", [3, 40])
def test_what_is_exported_to_onnx_is_made_of_standard_operators(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, z, weight, _ = draw(33, 5, outputs, 5)
    y = pair_sum(x, z, weight, 4.0)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    graph = make_fx(lambda *tensors: pair_sum(*tensors, 4.0))(x, z, weight)
    assert all(str(node.target).startswith("aten.") for node in graph.graph.nodes if node.op == "call_function")
    torch.testing.assert_close(graph(x, z, weight), y, rtol=1e-5, atol=1e-5)


@every_form
def test_shapes_are_known_without_computing(form: PairSum) -> None:
    leaves = tuple(tensor.to("meta").requires_grad_() for tensor in draw(3, 4, 7, 5)[:3])
    y = form(*leaves, 4.0)
    assert y.shape == (3, 7)
    assert [gradient.shape for gradient in torch.autograd.grad(y.sum(), leaves)] == [leaf.shape for leaf in leaves]


@pytest.mark.parametrize(
    "x, z, weight, width",
    [
        ((3, 4), (3, 5), (4, 5, 5, 2), 4.0),
        ((3, 4), (3, 4), (5, 5, 5, 2), 4.0),
        ((3, 4), (3, 4), (4, 5, 4, 2), 4.0),
        ((3, 4), (3, 4), (4, 1, 1, 2), 4.0),
        ((3, 4), (3, 4), (4, 25, 2), 4.0),
        ((3, 4), (3, 4), (4, 5, 5, 0), 4.0),
        ((3, 0), (3, 0), (0, 5, 5, 2), 4.0),
        ((3, 4), (3, 4), (4, 5, 5, 2), 0.0),
        ((3, 4), (3, 4), (4, 5, 5, 2), math.nan),
    ],
)
def test_what_does_not_fit_is_refused(x: tuple, z: tuple, weight: tuple, width: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        pair_sum(torch.zeros(x), torch.zeros(z), torch.zeros(weight), width)
