"""The backend `amx`: its kernel writes the ramps, hats and slopes of the definition, and `native` does other dtypes."""

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import backends
from backends import amx, dense, instruction_set
from backends.cells import locate
from backends.operators import Operator

pytestmark = [pytest.mark.machine, pytest.mark.needs("kernel")]
EPS = torch.finfo(torch.bfloat16).eps
problems = given(
    tokens=st.integers(0, 40),
    features=st.integers(1, 40),
    grid=st.integers(2, 9),
    width=st.floats(0.1, 50),
    half=st.booleans(),
    seed=st.integers(0, 2**16),
)


def inputs(tokens: int, features: int, width: float, half: bool, seed: int) -> Tensor:
    x = torch.randn(tokens, features, generator=torch.Generator().manual_seed(seed)) * width / 3
    return x.bfloat16() if half else x


@settings(deadline=None, max_examples=60)
@problems
def test_ramps_and_hats_are_those_of_the_dense_basis(
    tokens: int, features: int, grid: int, width: float, half: bool, seed: int
) -> None:
    x = inputs(tokens, features, width, half, seed)
    cell, place = locate(x.double(), grid, width)
    ramps = dense.ramps(cell + place, grid)  # (N, G-1, I)
    for hats, expected in ((False, ramps), (True, dense.hats(ramps))):
        found = amx.basis(x, grid, width, hats).view(expected.shape).double()
        torch.testing.assert_close(found, expected, rtol=EPS, atol=1e-6)


@settings(deadline=None, max_examples=60)
@problems
def test_the_gradient_of_x_is_that_of_the_ramp_of_its_cell(
    tokens: int, features: int, grid: int, width: float, half: bool, seed: int
) -> None:
    x = inputs(tokens, features, width, half, seed)
    grad = torch.randn(tokens, grid - 1, features).bfloat16()
    cell, _ = locate(x.double(), grid, width)
    expected = grad.double().gather(1, cell.unsqueeze(1)).squeeze(1) * (grid - 1) / width
    found = amx.slopes(x, grad.flatten(1), grid, width)
    assert found.dtype is x.dtype
    torch.testing.assert_close(found.double(), expected, rtol=EPS, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_native_computes_other_dtypes(dtype: torch.dtype) -> None:
    x, control_points = torch.randn(9, 5).to(dtype), torch.randn(5, 4, 6).to(dtype)
    found, expected = (module.spline_sum(x, control_points, 3.0, dtype) for module in (amx, backends.native))
    assert torch.equal(found, expected)


def test_operators_are_well_formed() -> None:
    x, grad = torch.randn(7, 5), torch.randn(7, 15).bfloat16()
    torch.library.opcheck(amx.basis.overload, (x, 4, 3.0, True))
    torch.library.opcheck(amx.slopes.overload, (x, grad, 4, 3.0))


def test_auto_takes_it_for_small_grids_where_there_is_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(instruction_set.VARIABLE, raising=False)
    for supported in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda supported=supported: supported, raising=False)
        for grid in (3, backends.LARGEST_AMX_GRID + 1):
            backend, _ = backends.choose("auto", backends.Problem(8, grid, 8, torch.device("cpu")))
            assert backend.name == ("amx" if supported and grid == 3 else "native")


def test_second_derivatives_are_those_of_dense() -> None:
    x, weight = torch.randn(30, 4, requires_grad=True), torch.randn(4, 3, 6, requires_grad=True)
    found, expected = (second_derivatives(module, x, weight) for module in (amx, dense))
    for value, truth in zip(found, expected, strict=True):
        assert (value - truth).norm() < 4 * EPS * truth.norm()


def second_derivatives(module: ModuleType, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    y = module.spline_sum(x, weight, 4.0, torch.bfloat16)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return torch.autograd.grad(dx.square().sum(), (x, weight))


@pytest.mark.parametrize("operator", [amx.basis, amx.slopes])
def test_the_operators_alone_refuse_to_be_differentiated(operator: Operator[..., Tensor]) -> None:
    x, grad = torch.randn(7, 5, requires_grad=True), torch.randn(7, 15).bfloat16()
    y = operator(x, 4, 3.0, True) if operator is amx.basis else operator(x, grad, 4, 3.0)
    with pytest.raises(RuntimeError, match="has no derivative"):
        y.sum().backward()
