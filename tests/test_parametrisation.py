"""Every variant has the same functions from other coefficients, with the documented condition numbers."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from bench.conditioning import conditions
from kan_layer import INITS, KANLayer
from model import GPT, GPTConfig
from splines.parametrisation import (
    MIN_KNOTS_FOR_HALVES,
    MIRRORED,
    VARIANTS,
    Parametrisation,
    basis,
    inverse_basis,
    mirrored_product,
)
from tests import spline_reference
from tests.test_backends import every_impl, relative_error

every_variant = pytest.mark.parametrize("variant", VARIANTS)
GRIDS = [*range(2, 18), 31, 32, 33, 64, 65, 129, 256, 257]


def second_difference_matrix(points: int) -> np.ndarray:
    """The matrix of second differences, (G-2, G), entry by entry."""
    matrix = np.zeros((points - 2, points))
    for row in range(points - 2):
        matrix[row, row : row + 3] = (1, -2, 1)
    return matrix


@every_variant
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("grid", [2, 3, 5, 8, 33, 64, 257])
def test_every_init_is_the_same_function_in_every_variant(variant: str, init: str, grid: int) -> None:
    layers = []
    for name in ("B-spline", variant):
        torch.manual_seed(3)
        layers.append(KANLayer(4, 4, init=init, num_control_points=grid, spline_width=5.0, variant=name))
    plain, other = layers
    torch.testing.assert_close(other.control_points(), plain.control_points(), rtol=1e-5, atol=2e-6)
    x = (
        torch.randn(50, 4) * 3
    )  # inside and outside the grid; outside, rounding of the last two control points is magnified
    torch.testing.assert_close(other(x), plain(x), rtol=1e-5, atol=4e-6 * max(grid, 8))


@every_variant
@settings(max_examples=15, deadline=None)
@given(grid=st.integers(2, 40), seed=st.integers(0, 999))
def test_any_control_points_can_be_stored(variant: str, grid: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = KANLayer(2, 3, num_control_points=grid, variant=variant, dtype=torch.float64)
    wanted = torch.randn(2, grid, 3, dtype=torch.float64)
    layer.weight.data = layer.parametrisation.coefficients(wanted)
    torch.testing.assert_close(layer.control_points(), wanted, rtol=1e-9, atol=1e-9)


@every_variant
@every_impl
def test_every_backend_serves_every_variant(variant: str, impl: str, device: torch.device) -> None:
    """Compare with the float64 definition; the chain rule gives its gradients in the coefficients."""
    layer = KANLayer(6, 7, num_control_points=5, variant=variant, impl=impl, device=device)
    torch.nn.init.normal_(layer.weight)
    x, dy = (torch.randn(40, 6, device=device) * 2).requires_grad_(), torch.randn(40, 7, device=device)
    y = layer(x)
    dx, dp = torch.autograd.grad(y, (x, layer.weight), dy)
    x64, p64, dy64 = (t.detach().double().cpu().numpy() for t in (x, layer.weight, dy))
    control_points = np.einsum("gk,iko->igo", basis(variant, 5), p64)
    truth_dx, truth_dw = spline_reference.gradients(x64, control_points, 4.0, dy64)
    pairs = (
        (y, spline_reference.spline_sum(x64, control_points, 4.0)),
        (dx, truth_dx),
        (dp, np.einsum("gk,igo->iko", basis(variant, 5), truth_dw)),
    )
    assert all(relative_error(value, truth) < 1e-5 for value, truth in pairs)


@every_variant
@pytest.mark.needs("torch.compile")
def test_compiles_whole_and_copies(variant: str) -> None:
    torch.compiler.reset()
    layer = KANLayer(6, 5, num_control_points=9, variant=variant)
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(9, 6)
    y = layer(x)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), y)
    torch.testing.assert_close(copy.deepcopy(layer)(x), y)
    other = KANLayer(6, 5, num_control_points=9, variant=variant)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), y)
    torch.testing.assert_close(layer.double()(x.double()).float(), y, rtol=1e-4, atol=1e-5)


@every_variant
@pytest.mark.parametrize("grid", GRIDS)
def test_bases_are_invertible(variant: str, grid: int) -> None:
    product = basis(variant, grid) @ inverse_basis(variant, grid)
    np.testing.assert_allclose(product, np.eye(grid), atol=1e-7)


@pytest.mark.parametrize("grid", [8, 9, 16, 33, 64, 100, 129, 256, 257])
def test_condition_of_the_penalty(grid: int) -> None:
    """It is 1 to within 1e-6 for sums of second differences and corrected cosines, and O(G⁴) for hats."""
    for variant in ("parallel_scan", "DCT", "linearDCT"):
        assert conditions(variant, grid).penalty == pytest.approx(1, abs=1e-6)
    # Hats: the largest eigenvalue of D Dᵀ tends to 16 (the highest frequency). The smallest tends to 500.56 / G⁴, that
    # of a beam clamped at both ends (Euler and Bernoulli).
    hats = conditions("B-spline", grid).penalty
    assert hats == pytest.approx(16 * grid**4 / 500.564, rel=0.15 if grid >= 64 else 0.6)


@pytest.mark.parametrize("variant", ["DCT", "linearDCT", "parallel_scan"])
@pytest.mark.parametrize("grid", [2, 3, 4, 5, 8, 9, 33, 64, 257])
def test_the_penalty_is_diagonal(variant: str, grid: int) -> None:
    """In these coefficients the penalty is a sum of squares: two have weight 0, all others have the same weight."""
    bent = second_difference_matrix(grid) @ basis(variant, grid)
    gram = bent.T @ bent
    free = [0, 1] if "DCT" in variant else [0, grid - 1]
    rest = [k for k in range(grid) if k not in free]
    assert np.abs(bent[:, free]).max(initial=0) < 1e-12
    if rest:
        scale = gram[rest[0], rest[0]]
        np.testing.assert_allclose(gram[np.ix_(rest, rest)] / scale, np.eye(len(rest)), atol=1e-9)


def test_the_scale_of_coefficients_does_not_depend_on_the_grid() -> None:
    """The same coefficients give nearly the same function on twice as many knots."""
    low = np.array([0.3, -0.5, 1.0, 0.7])
    for variant in ("DCT", "balanced", "Legendre"):
        coarse, fine = basis(variant, 129)[:, :4] @ low, basis(variant, 257)[:, :4] @ low
        assert np.abs(fine[::2] - coarse).max() < 0.1 * np.abs(coarse).max(), variant


@every_variant
@settings(max_examples=15, deadline=None)
@given(grid=st.integers(2, 20), seed=st.integers(0, 99))
def test_smoothness_penalty_is_the_mean_squared_second_difference(variant: str, grid: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = KANLayer(3, 2, num_control_points=grid, variant=variant, dtype=torch.float64)
    torch.nn.init.normal_(layer.weight)
    c = layer.control_points().detach().numpy()
    squares = [
        (c[i, g + 1, o] - 2 * c[i, g, o] + c[i, g - 1, o]) ** 2
        for i in range(3)
        for g in range(1, grid - 1)
        for o in range(2)
    ]
    assert layer.smoothness_penalty().item() == pytest.approx(np.mean(squares) if squares else 0.0)
    layer._set_lines(torch.randn(3, 2))
    assert layer.smoothness_penalty().item() == pytest.approx(0, abs=1e-18)


def test_a_model_of_every_variant_starts_as_the_same_function() -> None:
    tokens = torch.randint(11, (2, 8))
    logits = []
    for variant in VARIANTS:
        torch.manual_seed(0)
        options = {"n_layer": 1, "n_embd": 16, "n_head": 2, "num_control_points": 9, "kan_init": "random_normal"}
        logits.append(GPT(GPTConfig(vocab_size=11, kan_variant=variant, **options))(tokens)[0])
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", MIRRORED)
@pytest.mark.parametrize("grid", [2, 3, 8, 9, MIN_KNOTS_FOR_HALVES, MIN_KNOTS_FOR_HALVES + 1])
def test_products_by_halves_are_the_whole_product(variant: str, grid: int) -> None:
    matrix = torch.tensor(basis(variant, grid))
    weight = torch.randn(2, grid, 3, dtype=torch.float64, requires_grad=True)
    halves, whole = mirrored_product(matrix, weight), matrix @ weight
    torch.testing.assert_close(halves, whole)
    dy = torch.randn_like(whole)
    torch.testing.assert_close(*(torch.autograd.grad(y, weight, dy)[0] for y in (halves, whole)))
    layer = KANLayer(2, 3, num_control_points=grid, variant=variant, dtype=torch.float64)
    torch.testing.assert_close(layer.parametrisation.control_points(weight), whole)


class Products(TorchDispatchMode):
    """Notes the types that matrix products multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm):
            self.dtypes += [arg.dtype for arg in args if isinstance(arg, torch.Tensor)]
        return func(*args, **(kwargs or {}))


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "B-spline"])
@pytest.mark.parametrize("grid", [5, MIN_KNOTS_FOR_HALVES])
def test_on_cuda_no_product_for_control_points_may_be_in_tf32(variant: str, grid: int) -> None:
    """Nor in its first and second derivative, which are products, too."""
    parametrisation = Parametrisation(variant, grid, False, torch.empty(1))
    plain = torch.randn(2, grid, 3, requires_grad=True)
    weight = plain.as_subclass(OnCuda)  # type: ignore[type-var]
    with Products() as seen:
        points = parametrisation.control_points(weight)
        dy = torch.randn(points.shape, requires_grad=True)
        (gradient,) = torch.autograd.grad(points, plain, dy, create_graph=True)
        (second,) = torch.autograd.grad(gradient, dy, plain.detach())
    assert len(seen.dtypes) >= 6 and set(seen.dtypes) == {torch.float64}
    matrix = torch.tensor(basis(variant, grid))
    for found, truth in ((points, matrix @ plain.double()), (gradient, matrix.T @ dy.double()), (second, points)):
        assert found.dtype is torch.float32
        torch.testing.assert_close(found.as_subclass(torch.Tensor).double(), truth.double(), rtol=1e-4, atol=1e-4)


def test_zero_centred_splines_are_stored_as_they_are() -> None:
    with pytest.raises(ValueError, match=r"zero_centred needs the variant B-spline.*got 'DCT'"):
        KANLayer(3, 3, num_control_points=5, zero_centred=True, variant="DCT")
