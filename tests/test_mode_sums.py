"""Sums of products of modes by the kernel: their definition in float64, their gradient, and the operator's rules."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from backends import native_build
from backends.mode_sums import mode_sums
from tests.test_pairs import assert_bits_equal

pytestmark = [pytest.mark.machine, pytest.mark.needs("kernel")]


def draw(inputs: int, points: int, outputs: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((inputs, points, points, outputs), (points, points), (points, points))
    weight, modes, scales = (torch.randn(shape, generator=generator) for shape in shapes)
    return weight, modes, scales


def assert_the_definition(weight: Tensor, modes: Tensor, scales: Tensor) -> None:
    by_mode, m, s = (tensor.double().numpy() for tensor in (weight, modes, scales))
    truth = np.einsum("ac,bd,cd,icdo->iabo", m, m, s, by_mode)
    transposed = np.einsum("ac,bd,cd,iabo->icdo", m, m, s, by_mode)
    size = 1e-6 * np.abs(m).max() ** 2 * np.abs(s).max() * np.abs(by_mode).max() * modes.shape[0] ** 2
    assert np.abs(mode_sums(weight, modes, scales).numpy() - truth).max() <= size
    assert np.abs(mode_sums(weight, modes, scales, True).numpy() - transposed).max() <= size


@settings(max_examples=60)
@given(inputs=st.integers(1, 5), points=st.integers(2, 20), outputs=st.integers(1, 140), seed=st.integers(0, 2**16))
def test_any_shape_gives_the_definition(inputs: int, points: int, outputs: int, seed: int) -> None:
    assert_the_definition(*draw(inputs, points, outputs, seed))


def test_every_instruction_set_gives_the_definition(vectors: None) -> None:
    for points, outputs in ((2, 1), (5, 33), (9, 204)):
        assert_the_definition(*draw(3, points, outputs))


def test_the_gradient_is_the_transpose_of_any_order() -> None:
    weight, modes, scales = draw(3, 5, 21)
    weight.requires_grad_()
    direction, other = torch.randn_like(weight), torch.randn_like(weight)
    (gradient,) = torch.autograd.grad((mode_sums(weight, modes, scales) * direction).sum(), weight)
    torch.testing.assert_close(gradient, mode_sums(direction, modes, scales, True), rtol=0, atol=0)
    inner = (mode_sums(other, modes, scales) * direction).sum()
    torch.testing.assert_close((gradient * other).sum(), inner, rtol=1e-4, atol=1e-3)
    loss = mode_sums(weight.square(), modes, scales).square().sum()
    (first,) = torch.autograd.grad(loss, weight, create_graph=True)
    (second,) = torch.autograd.grad((first * direction).sum(), weight)
    wide = weight.detach().double().requires_grad_()
    sums = torch.einsum("ac,bd,cd,icdo->iabo", modes.double(), modes.double(), scales.double(), wide.square())
    (first,) = torch.autograd.grad(sums.square().sum(), wide, create_graph=True)
    (truth,) = torch.autograd.grad((first * direction.double()).sum(), wide)
    torch.testing.assert_close(second.double(), truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max()))


def test_without_a_kernel_the_operator_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = draw(3, 5, 40)
    before = [mode_sums(*arguments, transposed) for transposed in (False, True)]
    monkeypatch.setattr(native_build, "why_not", lambda: "no compiler")
    monkeypatch.delattr(native_build, "load")
    for transposed in (False, True):
        torch.testing.assert_close(mode_sums(*arguments, transposed), before[transposed], rtol=1e-4, atol=1e-4)
        torch.library.opcheck(torch.ops.splinegpt.mode_sums.default, (*arguments, transposed))


def test_the_number_of_threads_and_strides_do_not_matter() -> None:
    weight, modes, scales = draw(7, 5, 40)
    once = mode_sums(weight, modes, scales)
    strided = mode_sums(weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), modes.t().contiguous().t(), scales)
    before = torch.get_num_threads()
    torch.set_num_threads(3 - min(2, before))
    try:
        assert_bits_equal((mode_sums(weight, modes, scales), strided), (once, once))
    finally:
        torch.set_num_threads(before)


def test_the_operator_keeps_pytorch_s_rules_and_refuses_what_does_not_fit() -> None:
    weight, modes, scales = draw(3, 4, 5)
    with pytest.raises(RuntimeError, match="are constants"):
        mode_sums(weight, modes.clone().requires_grad_(), scales).sum().backward()
    for transposed in (False, True):
        operator = torch.ops.splinegpt.mode_sums.default
        torch.library.opcheck(operator, (weight.requires_grad_(), modes, scales, transposed))
    for wrong in (
        (weight[0], modes, scales),
        (weight, modes[:3], scales),
        (weight, modes, scales.t()[:2]),
        (weight[:, :0, :0], modes[:0, :0], scales[:0, :0]),
    ):
        with pytest.raises(ValueError, match="must be"):
            mode_sums(*wrong)
    with pytest.raises(ValueError, match="must be float32"):
        mode_sums(weight, modes.double(), scales)
