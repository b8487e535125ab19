"""The 2:4 form of splines with five control points: its values, its positions, and cases that it refuses."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import backends
from backends import semi_structured
from kan_layer import KANLayer
from tests.layers import random_layer
from tests.test_backends import inputs_of_every_kind, relative_error, run, truth_for

CUDA = torch.device("cuda")


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 4),
    features=st.integers(1, 5),
    width=st.floats(0.1, 50.0),
    half=st.booleans(),
    seed=st.integers(0, 999),
)
def test_nonzeros_and_places_are_the_basis_in_cutlass_s_format(
    tokens: int, features: int, width: float, half: bool, seed: int
) -> None:
    conversions = pytest.importorskip("torch.sparse._semi_structured_conversions", reason="it is private, and gone")
    torch.manual_seed(seed)
    x = torch.randn(32 * tokens, 16 * features) * width / 2
    x[:2, :3] = torch.tensor([0.0, -0.0, 1e-45])
    pair = semi_structured.values(x, width).to(torch.float16 if half else torch.bfloat16)
    unpacked = conversions.sparse_semi_structured_to_dense_cutlass(pair.flatten(1), semi_structured.places(x))
    assert torch.equal(unpacked, semi_structured.basis(pair, x))


def test_the_basis_is_the_hats_of_all_but_the_middle_control_point() -> None:
    x = inputs_of_every_kind(20, 6, 5, 4.0).clamp(-40, 40)
    layer = random_layer(6, 6, 5, 4.0, "reference", dtype=torch.float64)
    basis = semi_structured.basis(semi_structured.values(x.double(), 4.0), x)
    for column, g in enumerate((0, 1, 3, 4)):
        layer.weight.data.zero_()
        layer.weight.data[range(6), g, range(6)] = 1.0
        torch.testing.assert_close(layer(x.double()), basis[:, column::4])


def test_at_most_two_of_four_are_stored_and_they_are_all_there_is() -> None:
    x = inputs_of_every_kind(50, 8, 5, 4.0)
    pair = semi_structured.values(x, 4.0)
    basis = semi_structured.basis(pair, x).unflatten(1, (8, 4))
    assert ((basis != 0).sum(-1) <= 2).all()
    torch.testing.assert_close(basis.sum(-1), pair.sum(-1))


@pytest.mark.cuda
@pytest.mark.parametrize("tokens", [1, 32, 77, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sparse_product_on_a_gpu(tokens: int, dtype: torch.dtype) -> None:
    layer = random_layer(64, 48, 5, 4.0, "semi_structured", device=CUDA).to(dtype)
    x, dy = (torch.randn(tokens, size, device=CUDA).to(dtype) for size in (64, 48))
    for value, truth in zip(run(layer, x, dy), truth_for(layer, x, dy), strict=True):
        assert relative_error(value, truth) < 3 * torch.finfo(dtype).eps


def test_other_grids_are_refused_in_one_sentence() -> None:
    with pytest.raises(
        ValueError, match=r"'semi_structured' cannot be used here: 2:4 sparsity needs num_control_points 5"
    ):
        KANLayer(16, 16, num_control_points=8, impl="semi_structured")


def test_it_says_where_the_zeros_are_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = KANLayer(16, 16, num_control_points=5, impl="semi_structured", device="cpu")
    assert layer.why_this_impl == (
        "asked for; with its zeros written out, as sparse tensor cores are in CUDA GPUs, and the layer is on cpu"
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=9))
    _, why = backends.choose("semi_structured", backends.Problem(16, 5, 16, CUDA))
    assert "compute capability 8.x" in why
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=8))
    _, why = backends.choose("semi_structured", backends.Problem(20, 5, 16, CUDA))
    assert "in_features a multiple of 16 and out_features of 8, not 20 and 16" in why


def test_the_product_is_tried_once_and_before_compilers_see_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=8))
    monkeypatch.setattr(semi_structured, "_WORKING", {})
    monkeypatch.setattr(semi_structured, "_product_works", lambda device: tried.append(device) or False)
    for _ in range(2):
        _, why = backends.choose("semi_structured", backends.Problem(16, 5, 16, CUDA))
        assert "2:4 product fails on this GPU" in why
    assert tried == [CUDA]


def test_the_operator_has_the_shape_that_compilers_are_told() -> None:
    nonzeros, metadata, table = torch.empty(64, 32), torch.empty(64, 4, dtype=torch.int16), torch.empty(64, 24)
    product = torch.ops.splinegpt.semi_structured_matmul(*(t.to("meta") for t in (nonzeros, metadata, table)))
    assert product.shape == (64, 24)
