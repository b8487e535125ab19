"""The attention kernel: exact up to rounding, deterministic, causal, and in use wherever it can compute."""

import pickle
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attention import CausalSelfAttention, KVCache
from backends import fused_attention, instruction_set, native_build
from embeddings import RotaryEmbedding
from tests import machine

pytestmark = [pytest.mark.machine, pytest.mark.needs("kernel")]
ROUNDING = 3e-6  # of the largest value, for sums in float32


@pytest.fixture(params=["the machine's", instruction_set.GENERIC, instruction_set.AVX2], scope="module")
def vectors(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The kernel with another vector length; skips if this machine cannot run it."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param in instruction_set.FLAGS:
            if request.param == instruction_set.AVX2:
                machine.require("avx2")
            folder = tmp_path_factory.getbasetemp()
            library = native_build.load_from(folder, native_build.find_compiler(), request.param)
            patch.setattr(native_build, "load", lambda: library)
        yield


def definition(qkv: Tensor, angle: Tensor | None, heads: int, norm: bool) -> Tensor:
    """Causal attention in float64, with pairs of features as complex numbers: (B, T, 3·C) → (B, T, C)."""
    B, T, width = qkv.shape
    q, k, v = qkv.view(B, T, 3, heads, width // 3 // heads).unbind(2)  # (B, T, heads, size)
    if angle is not None:
        turn = torch.polar(torch.ones_like(angle), angle).unsqueeze(1)  # (T, 1, size / 2)
        half = q.shape[-1] // 2
        turned = (torch.complex(x[..., :half], x[..., half:]) * turn for x in (q, k))
        q, k = (torch.cat((x.real, x.imag), dim=-1) for x in turned)
    if norm:
        epsilon = torch.finfo(torch.float32).eps
        q, k = (x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() for x in (q, k))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).reshape(B, T, width // 3)


def draw(B: int, T: int, heads: int, size: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """qkv, the gradient of the result, and angles, (T, size // 2)."""
    return torch.randn(B, T, 3 * heads * size) * scale, torch.randn(B, T, heads * size), torch.randn(T, size // 2) * 3


def run(qkv: Tensor, dy: Tensor, angle: Tensor | None, heads: int, norm: bool) -> tuple[Tensor, Tensor]:
    qkv = qkv.detach().requires_grad_()
    y = fused_attention.attend(qkv, (angle.cos(), angle.sin()) if angle is not None else None, heads, norm)
    return y.detach(), torch.autograd.grad(y, qkv, dy)[0]


@given(
    st.integers(1, 3), st.integers(1, 100), st.integers(1, 3), st.integers(1, 40), st.booleans(), st.booleans(),
    st.sampled_from([1e-3, 1.0, 30.0]),
)  # fmt: skip
def test_any_shape_gives_the_definition(
    vectors: None, B: int, T: int, heads: int, half: int, rotate: bool, norm: bool, scale: float
) -> None:
    size = 2 * half if rotate else half
    qkv, dy, angle = draw(B, T, heads, size, scale)
    found = run(qkv, dy, angle if rotate else None, heads, norm)
    exact = qkv.double().requires_grad_()
    y = definition(exact, angle.double() if rotate else None, heads, norm)
    truth = y, torch.autograd.grad(y, exact, dy.double())[0]
    # Scores of scale² · √size are rounded in float32 before they are exponents.
    exponent = 1.0 if norm else max(1.0, scale**2 * size**0.5)
    for value, true in zip(found, truth, strict=True):
        largest = float(true.detach().abs().max())
        if value is found[1]:
            largest = max(largest, float(dy.abs().max()))
            if norm and size < 3:  # what is divided by a small norm cancels, all of it with one feature
                largest *= 1 + float(qkv.abs().max() / smallest_norm(qkv, heads))
        assert float((value - true).abs().max()) <= ROUNDING * exponent * largest


def smallest_norm(qkv: Tensor, heads: int) -> Tensor:
    """The smallest root mean square of a query or key."""
    q_and_k = qkv.unflatten(2, (3, heads, -1))[:, :, :2]
    return (q_and_k.square().mean(-1) + torch.finfo(torch.float32).eps).sqrt().min()


@pytest.mark.parametrize(("B", "T"), [(0, 5), (2, 0)])
def test_nothing_gives_nothing(B: int, T: int) -> None:
    y, gradient = run(*draw(B, T, 2, 4), 2, True)
    assert y.shape == (B, T, 8) and gradient.shape == (B, T, 24)


def test_no_token_depends_on_a_later_one_or_on_another_sequence() -> None:
    qkv, dy, angle = draw(3, 70, 2, 16)
    before, gradient = run(qkv, dy, angle, 2, True)
    changed = qkv.clone()
    changed[0] += 1
    changed[:, 41:] -= 1
    after = run(changed, dy, angle, 2, True)[0]
    assert torch.equal(after[1:, :41], before[1:, :41]) and not torch.equal(after[:, 41:], before[:, 41:])
    dy[:, :41] = 0
    assert not run(qkv, dy, angle, 2, True)[1][:, :41].equal(gradient[:, :41])
    dy[:, :] = 0
    dy[:, :41] = 1
    assert not run(qkv, dy, angle, 2, True)[1][:, 41:].any(), "and what comes later gets no gradient"


@pytest.mark.parametrize("shape", [(2, 70, 3, 20), (1, 256, 4, 32), (5, 3, 1, 8)])
def test_any_number_of_threads_gives_the_same_bits(shape: tuple[int, int, int, int]) -> None:
    qkv, dy, angle = draw(*shape)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(qkv, dy, angle, shape[2], True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", range(3))
def test_a_bad_value_is_not_hidden(bad: float, part: int) -> None:
    qkv, dy, angle = draw(1, 40, 1, 8)
    qkv[0, 35, 8 * part] = bad
    y, gradient = run(qkv, dy, angle, 1, True)
    assert not y[0, 35].isfinite().all() and not gradient.isfinite().all()
    assert y[0, :32].isfinite().all(), "what comes before, in other blocks, does not see it"


def layer(dropout: float = 0.0) -> CausalSelfAttention:
    return CausalSelfAttention(0, 24, 3, False, dropout, qk_norm=True, rope=RotaryEmbedding(8, 50))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_gives_what_pytorch_s_operators_give(dtype: torch.dtype) -> None:
    attention, x = layer(), torch.randn(2, 50, 24)
    results = []
    for attention._has_kernel in (True, False):
        x = x.detach().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            y = attention(x, None).float()
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, *attention.parameters()))))
    for fused, steps in zip(*results, strict=True):
        torch.testing.assert_close(fused, steps, rtol=0, atol=2 * torch.finfo(dtype).eps * 8 * float(steps.abs().max()))


def test_it_computes_whatever_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    attend = fused_attention.attend
    monkeypatch.setattr(fused_attention, "attend", lambda *arguments: calls.append(None) or attend(*arguments))  # type: ignore[func-returns-value]
    x = torch.randn(2, 6, 24)

    def used(attention: CausalSelfAttention, x: Tensor = x, cache: KVCache | None = None) -> bool:
        calls.clear()
        attention(x, cache)
        return bool(calls)

    assert used(layer()) and used(layer(0.1).eval()) and used(pickle.loads(pickle.dumps(layer())))
    assert not used(layer(0.1)), "dropout"
    assert not used(layer().double(), x.double())
    assert not used(layer(), cache=KVCache(1, 2, 3, 50, 8, x.device, x.dtype))
    calls.clear()
    torch.func.grad(lambda x: layer()(x, None).sum())(x)
    assert not calls


@pytest.mark.needs("torch.compile")
def test_it_compiles_into_one_graph() -> None:
    attention, x = layer(), torch.randn(2, 50, 24)
    compiled = torch.compile(attention, fullgraph=True)
    torch.testing.assert_close(compiled(x, None), attention(x, None))


def test_the_operators_keep_pytorch_s_rules() -> None:
    qkv, dy, angle = draw(2, 5, 2, 4)
    tables = (angle.cos(), angle.sin(), 2, True)
    statistics = fused_attention.attention(qkv, *tables)[1]
    torch.library.opcheck(torch.ops.splinegpt.attention_backward.default, (dy, statistics, qkv, *tables))
    torch.library.opcheck(torch.ops.splinegpt.attention.default, (qkv.requires_grad_(), *tables))


def test_the_operators_refuse_what_the_kernel_would_read_out_of_bounds() -> None:
    qkv, dy, angle = draw(2, 5, 2, 4)
    for bad, cosine, sine, heads in (
        (qkv[0], angle, angle, 2),
        (qkv, angle, angle, 5),
        (qkv, angle, angle, 0),
        (qkv, angle, None, 2),
        (qkv, angle[:4], angle[:4], 2),
        (qkv, angle, angle[:, :1], 2),
        (qkv, None, angle, 2),
        (qkv.double(), angle, angle, 2),
        (qkv.bfloat16(), angle, angle, 2),
    ):
        with pytest.raises(ValueError, match=r"qkv|cosine"):
            fused_attention.attention(bad, cosine, sine, heads, True)
    statistics = fused_attention.attention(qkv, angle, angle, 2, True)[1]
    for grad, kept in ((dy[:1], statistics), (dy, statistics[:, :1])):
        with pytest.raises(ValueError, match="grad and statistics"):
            fused_attention.attention_backward(grad, kept, qkv, angle, angle, 2, True)
