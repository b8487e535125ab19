"""Swapping linear layers for splines leaves outputs as they are, wherever the layers sit."""

import pytest
import torch
from torch import nn

from kan_layer import KANLayer, swap_linears
from model import GPT, GPTConfig
from splines.parametrisation import VARIANTS


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
