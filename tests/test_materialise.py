"""Models from the meta device or from a pickle compute the same as the original."""

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable

import pytest
import torch

import backends
from backends import native_build
from kan_layer import KANLayer
from model import GPT, GPTConfig
from splines.parametrisation import VARIANTS

MODELS = [
    *({"kan_variant": variant} for variant in VARIANTS),
    {"ffn": "gated_splines", "attention_gate": True, "token_shift": True, "kan_zero_centred": True, "pair_rows": 50},
    {"ffn": "mlp", "kan_swap": "blocks.*.ffn.c_fc", "kan_variant": "balanced", "position": "learned"},
    {"ffn": "mlp_tanh"},
    {"ffn": "relu2"},
    {"ffn": "swiglu"},
]
every_model = pytest.mark.parametrize("options", MODELS, ids=str)
TOKENS = torch.arange(18).reshape(2, 9) % 11


def config(options: dict) -> GPTConfig:
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 11, "block_size": 12}
    return GPTConfig(**sizes, **options, kan_init="random_normal", zero_init_projections=False)


def filled(model: GPT, state: dict) -> GPT:
    model.to_empty(device="cpu").load_state_dict(state)
    return model


def assigned(model: GPT, state: dict) -> GPT:
    model.load_state_dict(state, assign=True)
    return model


@every_model
@pytest.mark.parametrize("fill", [filled, assigned])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_from_the_meta_device_is_its_checkpoint(options: dict, fill: Callable, dtype: torch.dtype) -> None:
    model = GPT(config(options)).to(dtype)
    with torch.device("meta"):
        empty = GPT(config(options)).to(dtype)
    assert all(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    again = fill(empty, model.state_dict())
    assert torch.equal(again(TOKENS)[0], model(TOKENS)[0])
    assert [layer.resolved_impl for layer in again.spline_layers()] == [
        layer.resolved_impl for layer in model.spline_layers()
    ]
    assert again.state_dict().keys() == model.state_dict().keys()


@every_model
def test_new_memory_for_a_model_that_had_some(options: dict) -> None:
    model = GPT(config(options))
    other = GPT(config(options))
    for buffer in other.buffers():
        buffer.fill_(float("nan"))  # new memory may hold anything
    assert torch.equal(filled(other, model.state_dict())(TOKENS)[0], model(TOKENS)[0])


def test_tables_do_not_lose_precision_on_the_way_through_half() -> None:
    model = GPT(config({"kan_variant": "DCT"}))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for name, buffer in model.bfloat16().float().named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_moving_nowhere_keeps_the_very_tables() -> None:
    model = GPT(config({"kan_variant": "DCT"}))
    before = list(model.buffers())
    model.to("cpu").float()
    assert all(one is other for one, other in zip(before, model.buffers(), strict=True))


@pytest.mark.parametrize("impl", ["auto", *(name for name in backends.BACKENDS if name != "semi_structured")])
def test_any_impl_can_be_asked_for_on_the_meta_device(impl: str) -> None:
    layer = KANLayer(4, 3, num_control_points=6, impl=impl, device="meta")
    reason = None if impl == "auto" else backends.BACKENDS[impl].why_not(backends.Problem(4, 6, 3, torch.device("cpu")))
    if reason is None:
        assert (
            layer.to_empty(device="cpu").resolved_impl == KANLayer(4, 3, num_control_points=6, impl=impl).resolved_impl
        )
    else:
        with pytest.raises(ValueError, match=f"impl '{impl}' cannot be used here"):
            layer.to_empty(device="cpu")


@every_model
def test_models_can_be_pickled_and_saved_whole(options: dict) -> None:
    model = GPT(config(options))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert torch.equal(copied(TOKENS)[0], model(TOKENS)[0])
        assert str(copied) == str(model)


def _answer(layer: KANLayer, x: torch.Tensor, queue: multiprocessing.Queue) -> None:
    queue.put(layer(x).detach().numpy())


def test_a_layer_goes_to_a_process_of_its_own() -> None:
    context = multiprocessing.get_context("spawn")
    layer, x, queue = KANLayer(4, 3, num_control_points=6, variant="balanced"), torch.randn(5, 4), context.Queue()
    process = context.Process(target=_answer, args=(layer, x, queue))
    process.start()
    result = queue.get(timeout=100)
    process.join()
    torch.testing.assert_close(torch.from_numpy(result), layer(x).detach())


def test_a_pickle_can_be_read_where_its_impl_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = KANLayer(4, 3, num_control_points=6, impl="dense"), torch.randn(5, 4)
    layer.impl = "native"
    pickled = pickle.dumps(layer)
    monkeypatch.setattr(native_build, "why_not", lambda: "there is no compiler")
    with pytest.warns(
        UserWarning, match="'native' cannot be used here: there is no compiler; .*; auto is used instead"
    ):
        read = pickle.loads(pickled)
    assert read.impl == "auto"
    torch.testing.assert_close(read(x), layer(x))


def test_a_pickle_names_no_backend() -> None:
    assert b"spline_sum" not in pickle.dumps(KANLayer(4, 3, impl="dense"))


@pytest.mark.parametrize("backend", backends.BACKENDS.values(), ids=list(backends.BACKENDS))
def test_backends_can_be_pickled(backend: backends.Backend) -> None:
    assert pickle.loads(pickle.dumps(backend)) == backend
