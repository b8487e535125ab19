"""`native`, the C++ kernel: exact up to rounding, deterministic, sparing with memory, and clean under sanitizers."""

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from backends import instruction_set, native, native_build
from tests import spline_reference
from tests.runs import ROOT

pytestmark = [pytest.mark.machine, pytest.mark.needs("kernel")]

Types = tuple[torch.dtype, ...]
NARROW = (torch.float32, torch.bfloat16)
FLOAT32 = (torch.float32,) * 3  # types of x, weight and y
MEMORY_SHAPE = os.environ.get("SPLINEGPT_MEMORY_SHAPE", "16384,384,384,8")  # N, I, O, G


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(x: Tensor, weight: Tensor, dy: Tensor, width: float = 4.0) -> tuple[Tensor, Tensor, Tensor]:
    """Run forward and backward: y in the dtype of dy, dx and dW."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = native.spline_sum(x, weight, width, dy.dtype)
    return (y.detach(), *torch.autograd.grad(y, (x, weight), dy))


def assert_the_definition(x: Tensor, weight: Tensor, dy: Tensor, width: float = 4.0) -> None:
    """Allow an error of a few parts in 10⁷ of a typical sum, for float32 arithmetic, and one rounding of the result."""
    x64, w64, dy64 = (tensor.double().numpy() for tensor in (x, weight, dy))
    truths = (spline_reference.spline_sum(x64, w64, width), *spline_reference.gradients(x64, w64, width, dy64))
    (N, I), (_, G, O) = x.shape, weight.shape  # noqa: E741  the names of the definition
    reach = 1 + max(np.abs(spline_reference.cells(column, G, width)[1]).max(initial=0) for column in x64.T)
    most_w, most_dy = np.abs(w64).max(), np.abs(dy64).max(initial=0)
    y_size, dw_size = reach * most_w * math.sqrt(I), reach * most_dy * math.sqrt(N)
    sizes = (y_size, most_dy * most_w * math.sqrt(O) * (G - 1) / width, dw_size)
    for value, truth, size, like in zip(run(x, weight, dy, width), truths, sizes, (dy, x, weight), strict=True):
        assert value.shape == truth.shape and value.dtype is like.dtype
        rounding = torch.finfo(torch.bfloat16).eps / 2 * np.abs(truth) if value.dtype is torch.bfloat16 else 0
        assert (np.abs(value.double().numpy() - truth) <= rounding + 1e-6 * size).all()


def draw(
    tokens: int, features: int, outputs: int, grid: int, types: Types = FLOAT32, spread: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Random x, weight and dy. x has standard deviation `spread`."""
    x, weight = torch.randn(tokens, features) * spread, torch.randn(features, grid, outputs)
    return x.to(types[0]), weight.to(types[1]), torch.randn(tokens, outputs).to(types[2])


def assert_bits_equal(values: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> None:
    for value, other in zip(values, others, strict=True):
        assert value.dtype is other.dtype
        assert torch.equal(value.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.integers(0, 300) | st.integers(0, 5),
    features=st.integers(1, 40) | st.sampled_from([15, 16, 17, 31, 32, 33]),
    outputs=st.integers(1, 200) | st.sampled_from([15, 16, 17, 32, 63, 64, 65, 127, 128, 129, 130, 192, 257]),
    grid=st.integers(2, 70) | st.sampled_from([129, 1025]),
    width=st.floats(0.1, 50),
    spread=st.sampled_from([0.1, 0.5]),
    types=st.tuples(*[st.sampled_from(NARROW)] * 3),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_types_give_the_definition(
    tokens: int, features: int, outputs: int, grid: int, width: float, spread: float, types: Types, seed: int
) -> None:
    torch.manual_seed(seed)
    assert_the_definition(*draw(tokens, features, outputs, grid, types, spread * width), width)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1023, 1024, 1025, 2047, 2048, 2049, 4100])
def test_blocks_of_tokens_join(vectors: None, tokens: int) -> None:
    for features, outputs, grid in ((17, 33, 8), (3, 16, 129), (2, 65, 2)):
        assert_the_definition(*draw(tokens, features, outputs, grid))


@pytest.mark.parametrize("types", list(itertools.product(NARROW, repeat=3)), ids=str)
def test_strips_of_outputs_join(vectors: None, types: Types) -> None:
    for outputs in (1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 63, 64, 65, 127, 128, 129, 130, 192, 257):
        for tokens, grid in ((3, 70), (70, 5)):  # a grid with more points than tokens is read in place
            assert_the_definition(*draw(tokens, 5, outputs, grid, types))


def test_bfloat16_is_float32_rounded_once_to_nearest_even() -> None:
    x, weight, dy = draw(3000, 3, 20, 5)
    x = x.round()  # knots, so that sums of few bfloat16 lie halfway between two of them as often as not
    x[7, 1], weight[:, :, 3] = math.nan, 2.5e38  # which three features add up to infinity
    half = tuple(tensor.bfloat16() for tensor in (x, weight, dy))
    rounded = tuple(value.bfloat16() for value in run(*(tensor.float() for tensor in half)))
    torch.testing.assert_close(run(*half), rounded, rtol=0, atol=0, equal_nan=True)
    assert rounded[0][7].isnan().all() and rounded[0].isinf().any()


def test_strides_and_places_in_memory_do_not_matter() -> None:
    xs = torch.randn(9, 34).t(), torch.randn(68, 20)[::2, 1:19:2], torch.randn(9).expand(34, 9)
    weights = torch.randn(16, 7, 9).permute(2, 1, 0), torch.randn(9, 7, 32)[..., ::2], torch.randn(16).expand(9, 7, 16)
    gradients = torch.randn(16, 34).t(), torch.ones(()).expand(34, 16), torch.randn(34, 1).expand(34, 16)
    shifted = (torch.randn(math.prod(shape) + 1)[1:].view(shape) for shape in ((34, 9), (9, 7, 16), (34, 16)))
    xs, weights, gradients = ((*some, one) for some, one in zip((xs, weights, gradients), shifted, strict=True))
    for x, weight, dy in itertools.product(xs, weights, gradients):
        packed = run(*(tensor.clone(memory_format=torch.contiguous_format) for tensor in (x, weight, dy)))
        assert_bits_equal(run(x, weight, dy), packed)
        assert_the_definition(x, weight, dy)


SHAPES = [(300, 33, 130, 8), (4100, 16, 64, 70), (70, 40, 257, 129), (1, 384, 384, 8), (2500, 7, 31, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", NARROW)
def test_any_number_of_threads_gives_the_same_bits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = draw(*shape, types=(dtype, torch.float32, dtype))
    torch.set_num_threads(1)
    once = run(*arguments)
    for threads in (1, 2, 3, 5, 5):
        torch.set_num_threads(threads)
        assert_bits_equal(run(*arguments), once)


def test_calls_from_several_threads_at_once_do_not_meet() -> None:
    problems = [draw(*shape) for shape in SHAPES] * 2
    alone = [run(*arguments) for arguments in problems]
    with ThreadPoolExecutor(4) as pool:
        for together, value in zip(pool.map(lambda arguments: run(*arguments), problems), alone, strict=True):
            assert_bits_equal(together, value)


@pytest.mark.parametrize("grid", [2, 8, 33, 70, 600])  # read in place by few tokens; packed, wide and narrow, by many
@pytest.mark.parametrize("outputs", [7, 64, 129])
def test_a_token_does_not_depend_on_its_batch(vectors: None, grid: int, outputs: int) -> None:
    x, weight, dy = draw(530, 19, outputs, grid)
    y, dx, _ = run(x, weight, dy)
    for rows in (slice(0, 1), slice(77, 78), slice(529, 530), slice(3, 60), slice(100, 450)):
        assert_bits_equal(run(x[rows], weight, dy[rows])[:2], (y[rows], dx[rows]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e38, -3e38])
@pytest.mark.parametrize(("grid", "outputs"), [(4, 5), (40, 64), (4, 64), (40, 5)])
def test_a_bad_token_spoils_only_its_row_and_its_feature(bad: float, grid: int, outputs: int) -> None:
    x, weight, dy = draw(20, 18, outputs, grid)
    y, dx, dw = run(x, weight, dy)
    x[7, 16] = bad
    bad_y, bad_dx, bad_dw = run(x, weight, dy)
    tokens, features = torch.arange(20) != 7, torch.arange(18) != 16
    assert_bits_equal((bad_y[tokens], bad_dx[tokens]), (y[tokens], dx[tokens]))
    assert_bits_equal((bad_dw[features], bad_dx[:, features]), (dw[features], dx[:, features]))
    assert math.isfinite(bad) or not bad_y[7].isfinite().any()


@pytest.mark.parametrize("types", list(itertools.product((torch.float16, torch.float32, torch.float64), repeat=3)))
def test_other_floating_types_work(types: Types) -> None:
    x, weight, dy = draw(30, 6, 5, 9, types)
    exact = run(*(tensor.double() for tensor in (x, weight, dy)))
    for value, truth, dtype in zip(run(x, weight, dy), exact, (types[2], *types[:2]), strict=True):
        assert value.dtype is dtype
        eps = torch.finfo(torch.float16 if torch.float16 in types else torch.float32).eps
        torch.testing.assert_close(value.double(), truth, rtol=3 * eps, atol=3 * eps * float(truth.abs().max()))


def test_gradients_not_wanted_are_not_given_and_the_others_are_right() -> None:
    x, weight, dy = draw(30, 6, 5, 9)
    _, dx, dw = run(x, weight, dy)
    for wanted, gradient in ((x, dx), (weight, dw)):
        wanted.requires_grad_()
        native.spline_sum(x, weight, 4.0, torch.float32).backward(dy)
        assert_bits_equal((wanted.grad,), (gradient,))
        wanted.requires_grad_(False)
    assert torch.equal(x.grad, dx)  # the second backward left it alone


def test_the_backward_operator_alone_refuses_to_be_differentiated() -> None:
    x, weight, dy = draw(3, 4, 5, 6)
    dx, _ = native.spline_sum_backward(dy.requires_grad_(), x, weight, 4.0)
    with pytest.raises(RuntimeError, match="has no derivative"):
        dx.sum().backward()


def test_nothing_is_saved_but_x_and_the_weights() -> None:
    x, weight = (tensor.requires_grad_() for tensor in draw(30, 6, 5, 9)[:2])
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        native.spline_sum(x, weight, 4.0, torch.bfloat16)
        assert [tensor.data_ptr() for tensor in saved] == [x.data_ptr(), weight.data_ptr()]
        with torch.no_grad():
            y = native.spline_sum(x, weight, 4.0, torch.float32)
    assert len(saved) == 2 and not y.requires_grad


@pytest.mark.parametrize("types", [FLOAT32, (torch.bfloat16,) * 3, (torch.bfloat16, *NARROW)], ids=str)
def test_the_operators_keep_pytorch_s_rules(types: Types) -> None:
    x, weight, dy = draw(12, 4, 3, 5, types)
    torch.library.opcheck(torch.ops.splinegpt.native_backward.default, (dy, x, weight, 4.0))
    arguments = (x.requires_grad_(), weight.requires_grad_(), 4.0, types[2])
    torch.library.opcheck(torch.ops.splinegpt.native.default, arguments)


def test_autocast_does_not_change_the_operator() -> None:
    arguments = draw(40, 6, 5, 9)
    outside = run(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert_bits_equal(run(*arguments), outside)


def python(script: str, *arguments: str) -> list[float]:
    """Run a script in its own process and return the numbers that it prints."""
    command = [sys.executable, "-c", "import os, re, sys, torch\nfrom backends import native\n" + script, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr
    return [float(word) for word in result.stdout.split()]


THREADS = """
x, weight = torch.randn(4096, 96, requires_grad=True), torch.randn(96, 8, 192, requires_grad=True)
for threads in (1, 3):
    torch.set_num_threads(threads)
    torch.ones(1 << 22, requires_grad=True).exp().sum().backward()  # so that PyTorch starts its threads
    before = len(os.listdir("/proc/self/task"))
    native.spline_sum(x, weight, 4.0, torch.float32).sum().backward()
    print(before, len(os.listdir("/proc/self/task")))
print(len(set(re.findall(r"/\\S*/lib(?:g|i)?omp5?\\b[^/\\s]*", open("/proc/self/maps").read()))))
"""


@pytest.mark.needs("proc")
def test_threads_are_pytorch_s_and_as_many_as_it_says() -> None:
    alone, alone_after, three, three_after, openmp_libraries = python(THREADS)
    assert alone_after == alone and three_after == three == alone + 2
    assert openmp_libraries == 1


MEMORY = """
def resident(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))
def arguments(N, I, O, G):
    return torch.randn(N, I, requires_grad=True), torch.randn(I, G, O, requires_grad=True), torch.randn(N, O)
def step(x, weight, dy):
    native.spline_sum(x, weight, 4.0, torch.float32).backward(dy)
step(*arguments(64, 48, 80, 5))
x, weight, dy = arguments(*map(int, sys.argv[1].split(",")))
before = resident("VmRSS")
step(x, weight, dy)
print(resident("VmHWM") - before, 4 * (x.numel() + dy.numel()))
"""


@pytest.mark.slow
@pytest.mark.needs("proc")
def test_memory_is_that_of_the_results_and_little_more() -> None:
    growth, x_and_dy = python(MEMORY, MEMORY_SHAPE)
    print(f"{MEMORY_SHAPE}: {growth / 2**20:.0f} MiB beyond {x_and_dy / 2**20:.0f} MiB of x and dy")
    assert growth < 2 * x_and_dy


@pytest.mark.slow
@pytest.mark.parametrize("instructions", [instruction_set.chosen(), instruction_set.GENERIC])
def test_no_access_out_of_bounds_nor_undefined_behaviour(tmp_path: Path, instructions: str) -> None:
    sanitizers = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
    flags = [flag for flag in native_build.FLAGS if flag not in ("-shared", "-O2")]
    command = [native_build.find_compiler(), *flags, "-O1", "-g", *sanitizers]
    (tmp_path / "empty.cpp").write_text("int main() {}")
    for optional in native_build.optional_flags(instructions):
        probe = subprocess.run([*command, *optional, "empty.cpp"], cwd=tmp_path, capture_output=True, text=True)
        if probe.returncode == 0:
            command += optional
            break
    else:
        pytest.skip(f"the compiler lacks sanitizers: {probe.stderr.splitlines()[:1]}")
    subprocess.run([*command, ROOT / "tests" / "native_sweep.cpp", "-o", tmp_path / "sweep"], check=True)
    filled = {"ASAN_OPTIONS": "max_malloc_fill_size=1000000000:malloc_fill_byte=255"}  # 0xFFFFFFFF is NaN
    sweep = subprocess.run([tmp_path / "sweep"], env=os.environ | filled, capture_output=True, text=True)
    assert sweep.returncode == 0 and sweep.stderr == "", sweep.stderr


@pytest.mark.parametrize(
    "x, control_points, width",
    [
        ((3, 4), (5, 8, 2), 4.0),
        ((3, 4), (4, 1, 2), 4.0),
        ((3, 4), (4, 8, 0), 4.0),
        ((3, 0), (0, 8, 2), 4.0),
        ((3, 4), (4, 8), 4.0),
        ((3, 4), (4, 8, 2), 0.0),
        ((3, 4), (4, 8, 2), float("nan")),
    ],
)
def test_operators_refuse_what_the_kernel_would_read_out_of_bounds(
    x: tuple, control_points: tuple, width: float
) -> None:
    arguments = torch.zeros(x), torch.zeros(control_points), width
    with pytest.raises(ValueError, match="must be"):
        torch.ops.splinegpt.native(*arguments, torch.float32)
    with pytest.raises(ValueError, match="must be"):
        torch.ops.splinegpt.native_backward(torch.zeros(3, 2), *arguments)


def test_the_backward_operator_refuses_gradients_of_another_shape() -> None:
    with pytest.raises(ValueError, match="grad must be"):
        torch.ops.splinegpt.native_backward(torch.zeros(3, 1), torch.zeros(3, 4), torch.zeros(4, 8, 2), 4.0)


def test_operators_refuse_other_types() -> None:
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        torch.ops.splinegpt.native(torch.zeros(3, 4).double(), torch.zeros(4, 8, 2), 4.0, torch.float32)
