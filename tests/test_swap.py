"""Swapping linear layers for splines leaves the outputs unchanged, wherever the layers are."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import nn

from kan_layer import KANLayer
from model import GPT, GPTConfig
from splines.parametrisation import VARIANTS
from swap import swap_linears


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Sequential(nn.Linear(8, 8, bias=False)), nn.Linear(8, 3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_output_stays(variant: str) -> None:
    module, x = network(), torch.randn(50, 6)
    y = module(x)
    assert swap_linears(module, variant=variant, num_control_points=9) == ["0", "2.0", "3"]
    assert not any(isinstance(part, nn.Linear) for part in module.modules())
    torch.testing.assert_close(module(x), y, rtol=1e-5, atol=1e-5)


def test_where_chooses() -> None:
    assert swap_linears(network(), "0, 3") == ["0", "3"]
    assert swap_linears(network(), "2.*") == ["2.0"]
    assert swap_linears(network(), lambda name, linear: linear.bias is None) == ["2.0"]


def test_a_layer_used_twice_stays_one() -> None:
    linear = nn.Linear(4, 4)
    module, x = nn.Sequential(linear, nn.Tanh(), linear), torch.randn(5, 4)
    y = module(x)
    swap_linears(module)
    assert module[0] is module[2] and isinstance(module[0], KANLayer)
    torch.testing.assert_close(module(x), y)


@pytest.mark.parametrize(
    ("where", "options", "message"),
    [
        ("head", {}, "no linear layer matches 'head'; there are 0, 2.0, 3"),
        ("*", {"num_control_points": 1}, "num_control_points must be an integer of at least 2"),
        ("*", {"variant": "magic"}, "variant must be one of"),
    ],
)
def test_mistakes_change_nothing(where: str, options: dict, message: str) -> None:
    module, x = network(), torch.randn(5, 6)
    y = module(x)
    with pytest.raises(ValueError, match=message):
        swap_linears(module, where, **options)
    assert torch.equal(module(x), y)


@pytest.mark.parametrize("where", ["blocks.*.ffn.c_fc", "blocks.*.ffn.*", "blocks.*"])
def test_a_gpt_with_swapped_layers_starts_as_its_twin_and_can_learn_more(where: str) -> None:
    options = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 11, "ffn": "mlp", "bias": True}
    options["zero_init_projections"] = False
    tokens = torch.randint(11, (3, 9))
    torch.manual_seed(1)
    plain = GPT(GPTConfig(**options))
    torch.manual_seed(1)
    swapped = GPT(GPTConfig(**options, kan_swap=where, num_control_points=8, kan_variant="balanced"))
    torch.testing.assert_close(swapped(tokens)[0], plain(tokens)[0], rtol=1e-5, atol=1e-5)
    assert swapped.num_parameters() > plain.num_parameters()
    swapped(tokens, tokens)[1].backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in swapped.spline_layers())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("where", ["*", "*linear*", "layers.1.linear2"])
def test_pytorch_s_encoder_keeps_its_outputs(where: str, training: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder, x = nn.TransformerEncoder(layer, 2).train(training), torch.randn(3, 5, 8)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    with torch.no_grad():  # without gradients PyTorch would use its fused computation
        plain, padded = encoder(x), encoder(x, src_key_padding_mask=padding)
    left = "self_attn.out_proj: nn.MultiheadAttention reads its weight"
    with pytest.warns(UserWarning, match=left) if where == "*" else contextlib.nullcontext():
        names = swap_linears(encoder, where)
    assert len(names) == (1 if where == "layers.1.linear2" else 4)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(encoder(x), plain, rtol=1e-5, atol=1e-5)
            real = ~padding
            again = encoder(x, src_key_padding_mask=padding)
            torch.testing.assert_close(again[real], padded[real], rtol=1e-5, atol=1e-5)
    encoder.double()(x.double()).sum().backward()
    with pytest.raises(ValueError, match=r"none of the layers can be replaced by splines .*MultiheadAttention"):
        swap_linears(encoder, "*.out_proj")


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Tagged(nn.Linear):
    """A subclass that computes the same as its base."""


def with_patched_forward(linear: nn.Linear) -> nn.Linear:
    forward = linear.forward
    linear.forward = lambda x: 2 * forward(x)
    return linear


def with_hooked_weight(linear: nn.Linear) -> nn.Linear:
    linear.weight.register_hook(lambda grad: 2 * grad)
    return linear


def with_saving_hook(linear: nn.Linear) -> nn.Linear:
    linear.register_state_dict_post_hook(lambda *_: None)
    return linear


@pytest.mark.parametrize(
    ("special", "reason"),
    [
        (lambda: Scaled(4, 4), "forward of its own"),
        (lambda: with_patched_forward(nn.Linear(4, 4)), "forward of its own"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "weight is computed from other"),
        (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), "weight is computed from other"),
        (lambda: nn.LazyLinear(4), "no shape before the first input"),
        (lambda: with_hooked_weight(nn.Linear(4, 4)), "weight has hooks"),
        (lambda: with_saving_hook(nn.Linear(4, 4)), "hooks for saving"),
    ],
)
def test_layers_that_are_more_than_linear_are_left_and_named(special: Callable[[], nn.Module], reason: str) -> None:
    one = special()
    module = nn.Sequential(Tagged(4, 4), one)
    with pytest.warns(UserWarning, match=f"left as they are: 1: .*{reason}"):
        assert swap_linears(module) == ["0"]
    assert module[1] is one
    with pytest.raises(ValueError, match=f"cannot be replaced by splines: .*{reason}"):
        KANLayer.from_linear(one)


def test_hooks_still_see_inputs_and_outputs_and_can_be_removed() -> None:
    linear, seen = nn.Linear(4, 4), []
    handles = [
        linear.register_forward_pre_hook(lambda module, args: seen.append("before")),
        linear.register_forward_hook(lambda module, args, y, *, scale=3: scale * y, always_call=True),
        linear.register_forward_hook(lambda module, args, kwargs, y: seen.append(sorted(kwargs)), with_kwargs=True),
        linear.register_full_backward_pre_hook(lambda module, grad_y: seen.append("backward")),
        linear.register_full_backward_hook(lambda module, grad_x, grad_y: (5 * grad_x[0],)),
    ]
    module, x = nn.Sequential(linear), torch.randn(2, 4, requires_grad=True)

    def look() -> tuple[torch.Tensor, torch.Tensor, list]:
        seen.clear()
        y = module(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
        return y, dx, list(seen)

    y, dx, calls = look()
    swap_linears(module)
    y_after, dx_after, calls_after = look()
    torch.testing.assert_close((y_after, dx_after), (y, dx))
    assert calls_after == calls and len(calls) == 3
    for handle in handles:
        handle.remove()
    y_bare, _, none = look()
    assert none == []
    torch.testing.assert_close(3 * y_bare, y)


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias"), ()])
def test_what_is_frozen_stays_frozen(frozen: tuple[str, ...]) -> None:
    module = network()
    for name in frozen:
        module[0].get_parameter(name).requires_grad_(False)
    swap_linears(module, "0, 3")
    assert {name for name, parameter in module[0].named_parameters() if not parameter.requires_grad} == set(frozen)
    assert all(parameter.requires_grad for parameter in module[3].parameters())
