"""A sharded model (FSDP2) in bfloat16 computes its splines from the same control points as a model in one process."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from model import GPT, GPTConfig
from training.device import Device
from training.distributed import ALONE
from training.parallel import shard

BFLOAT16 = Device(torch.device("cpu"), torch.bfloat16, False, "a test")
BLOCKS = {
    "splines": {"ffn": "splines"},
    "gated": {"ffn": "gated_splines", "attention_gate": True, "token_shift": True},
    "balanced": {"ffn": "splines", "kan_variant": "balanced"},
    "pairs": {"ffn": "pair_splines", "kan_variant": "balanced", "num_control_points": 4, "token_shift": True},
}


@pytest.fixture
def group_of_one() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def small_gpt(**block: object) -> GPT:
    sizes = {"vocab_size": 50, "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "num_control_points": 17}
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**sizes, **block}, kan_init="random_normal", zero_init_projections=False))  # type: ignore[arg-type]


def spline_layers(model: GPT) -> list[nn.Module]:
    return [*model.spline_layers(), *model.pair_layers()]


@pytest.mark.parametrize("block", BLOCKS)
def test_spline_layers_see_float32_and_others_bfloat16(block: str, group_of_one: None) -> None:
    model = small_gpt(**BLOCKS[block])
    seen: dict[str, torch.dtype] = {}

    def note(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, __: tuple[Tensor, ...]) -> None:
            seen[name] = next(module.parameters()).dtype

        module.register_forward_pre_hook(hook)

    shard(model, BFLOAT16, ALONE)
    names = {id(layer): name for name, layer in model.named_modules()}
    splines = {names[id(layer)] for layer in spline_layers(model)}
    for name, module in model.named_modules():
        if name in splines or isinstance(module, nn.Linear):
            note(name, module)
    x = torch.randint(50, (4, 16))
    with BFLOAT16.autocast():
        model(x, x)
    assert splines and {seen[name] for name in splines} == {torch.float32}
    assert {dtype for name, dtype in seen.items() if name not in splines} == {torch.bfloat16}


@pytest.mark.parametrize("block", BLOCKS)
def test_a_sharded_layer_computes_what_it_computes_in_one_process(block: str, group_of_one: None) -> None:
    """Bit for bit, from the inputs that it gets."""
    whole, model = small_gpt(**BLOCKS[block]), small_gpt(**BLOCKS[block])
    inputs: list[list[Tensor]] = []
    outputs: list[Tensor] = []
    shard(model, BFLOAT16, ALONE)
    for layer in spline_layers(model):
        layer.register_forward_hook(
            lambda _, given, y: (inputs.append([x.detach() for x in given]), outputs.append(y))[1]
        )
    x = torch.randint(50, (4, 16))
    with BFLOAT16.autocast():
        model(x, x)
        expected = [layer(*given) for layer, given in zip(spline_layers(whole), inputs, strict=True)]
    assert outputs and all(torch.equal(y, other) for y, other in zip(outputs, expected, strict=True))


@pytest.mark.parametrize(
    ("block", "compile"),
    [*((block, False) for block in BLOCKS), pytest.param("gated", True, marks=pytest.mark.needs("torch.compile"))],
)
def test_the_gradient_is_about_that_of_one_process(block: str, compile: bool, group_of_one: None) -> None:
    whole, model = small_gpt(**BLOCKS[block]), small_gpt(**BLOCKS[block])
    shard(model, replace(BFLOAT16, compile=compile), ALONE)
    x = torch.randint(50, (4, 16))
    losses = []
    for each in (whole, model):
        with BFLOAT16.autocast():
            loss = each(x, x)[1]
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    for layer, other in zip(spline_layers(model), spline_layers(whole), strict=True):
        found, expected = layer.weight.grad.full_tensor(), other.weight.grad  # type: ignore[union-attr]
        assert (found - expected).norm() < 0.03 * expected.norm()
