"""The kernel for splines of pairs: blocks and strips join, the same bits whatever the threads and the batch."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from backends import native_build, standard_pairs
from backends.pairs import pair_sum
from tests.test_pairs import assert_bits_equal, draw, reach, run

pytestmark = [pytest.mark.machine, pytest.mark.needs("kernel")]


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


SHAPES = [(300, 33, 130, 5), (2300, 16, 64, 9), (70, 40, 257, 7), (1, 64, 204, 5), (1500, 7, 31, 2)]


def assert_the_definition_in_float64(x: Tensor, z: Tensor, weight: Tensor, dy: Tensor) -> None:
    """Compare the kernel with standard operators in float64, which other tests compare with the definition."""
    sizes = (4, 20 * weight.shape[1], 20 * weight.shape[1], 4)
    counts = (x.shape[1], weight.shape[3], weight.shape[3], max(1, len(x)))
    truths = run(standard_pairs.pair_sum, *(tensor.double() for tensor in (x, z, weight, dy)))
    for value, truth, size, count in zip(run(pair_sum, x, z, weight, dy), truths, sizes, counts, strict=True):
        assert (value - truth).abs().max() <= 1e-6 * size * reach(x, z, weight.shape[1], 4.0) * math.sqrt(count)


@pytest.mark.parametrize("tokens", [1, 2, 15, 17, 63, 65, 1023, 1025, 2047, 2048, 2049, 4100])
def test_blocks_of_tokens_join(vectors: None, tokens: int) -> None:
    for features, outputs, points in ((17, 33, 5), (3, 16, 9), (2, 65, 2)):
        assert_the_definition_in_float64(*draw(tokens, features, outputs, points))


def test_strips_of_outputs_join(vectors: None) -> None:
    for outputs in (1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 63, 64, 65, 127, 128, 129, 130, 192, 204, 257):
        for tokens, points in ((3, 17), (70, 5)):  # a grid with more points than tokens is read in place
            assert_the_definition_in_float64(*draw(tokens, 5, outputs, points))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(shape: tuple[int, ...]) -> None:
    arguments = draw(*shape)
    torch.set_num_threads(1)
    once = run(pair_sum, *arguments)
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        assert_bits_equal(run(pair_sum, *arguments), once)


@pytest.mark.parametrize("points", [2, 5, 9, 17])
@pytest.mark.parametrize("outputs", [7, 64, 129])
def test_a_token_does_not_depend_on_its_batch(vectors: None, points: int, outputs: int) -> None:
    x, z, weight, dy = draw(530, 19, outputs, points)
    whole = run(pair_sum, x, z, weight, dy)[:3]
    for rows in (slice(0, 1), slice(77, 78), slice(529, 530), slice(3, 60), slice(100, 450)):
        part = run(pair_sum, x[rows], z[rows], weight, dy[rows])[:3]
        assert_bits_equal(part, tuple(value[rows] for value in whole))


def test_strides_do_not_matter() -> None:
    x, z = torch.randn(9, 34).t(), torch.randn(9).expand(34, 9)
    weight, dy = torch.randn(16, 5, 9, 5).permute(2, 3, 1, 0), torch.ones(()).expand(34, 16)
    packed = (tensor.clone(memory_format=torch.contiguous_format) for tensor in (x, z, weight, dy))
    assert_bits_equal(run(pair_sum, x, z, weight, dy), run(pair_sum, *packed))


def test_no_tokens_give_no_outputs_and_no_gradient() -> None:
    y, dx, dz, dw = run(pair_sum, *draw(0, 3, 5, 4))
    assert y.shape == (0, 5) and dx.shape == dz.shape == (0, 3) and not dw.any()


def test_without_a_kernel_the_operators_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = draw(33, 5, 40, 5)
    before = run(pair_sum, *arguments)
    monkeypatch.setattr(native_build, "why_not", lambda: "no compiler")
    monkeypatch.delattr(native_build, "load")
    for value, truth in zip(run(pair_sum, *arguments), before, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-5)


def test_the_operators_keep_pytorch_s_rules() -> None:
    x, z, weight, dy = draw(12, 4, 3, 5)
    torch.library.opcheck(torch.ops.splinegpt.pairs_backward.default, (dy, x, z, weight, 4.0))
    leaves = tuple(tensor.requires_grad_() for tensor in (x, z, weight))
    torch.library.opcheck(torch.ops.splinegpt.pairs.default, (*leaves, 4.0))


def test_operators_refuse_what_the_kernel_would_read_out_of_bounds() -> None:
    x, z, weight, dy = draw(3, 4, 2, 5)
    with pytest.raises(ValueError, match="must be"):
        torch.ops.splinegpt.pairs(x, z[:2], weight, 4.0)
    with pytest.raises(ValueError, match="must be float32"):
        torch.ops.splinegpt.pairs(x, z, weight.double(), 4.0)
    with pytest.raises(ValueError, match="must be"):
        torch.ops.splinegpt.pairs_backward(dy, x, z, weight[:3], 4.0)
    with pytest.raises(ValueError, match="grad must be"):
        torch.ops.splinegpt.pairs_backward(dy[:, :1], x, z, weight, 4.0)


def test_the_backward_operator_alone_refuses_to_be_differentiated() -> None:
    x, z, weight, dy = draw(3, 4, 5, 6)
    dx, _, _ = torch.ops.splinegpt.pairs_backward(dy.requires_grad_(), x, z, weight, 4.0)
    with pytest.raises(RuntimeError, match="has no derivative"):
        dx.sum().backward()
