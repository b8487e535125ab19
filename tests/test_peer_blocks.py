"""Other projects' layers in our blocks, and nanoGPT's checkpoints as our models, for races."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench.shared import nanogpt, peer_blocks
from bench.shared.race import Race
from feed_forward import FEED_FORWARDS
from model import GPT, GPTConfig
from tests.test_model import NANOGPT, tiny


class StandIn(nn.Module):
    """A layer with efficient-kan's arguments and number of parameters, and an init of its own."""

    def __init__(self, inputs: int, outputs: int, grid_size: int, spline_order: int, **keywords: object) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.spline_weight = nn.Parameter(torch.full((outputs, inputs, grid_size + spline_order), 3.0))
        nn.init.constant_(self.linear.weight, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.spline_weight.sum()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FEED_FORWARDS, "efficient-kan", lambda config: nn.Identity())
    peer_blocks.register({"efficient-kan": StandIn})


@pytest.mark.usefixtures("stand_in")
def test_a_peer_takes_the_mlp_s_place_with_its_parameters_and_its_own_init() -> None:
    shape = {"vocab_size": 65, "n_layer": 2}
    model, twin = GPT(GPTConfig(ffn="efficient-kan", **shape)), GPT(GPTConfig(ffn="mlp", **shape))
    assert model.num_parameters() == pytest.approx(twin.num_parameters(), rel=0.02)
    assert not (model.blocks[0].ffn.linear.weight == 2).all()  # GPT's init has replaced it
    peer_blocks.restore_own_init(model, seed=1)
    for block in model.blocks:
        assert (block.ffn.linear.weight == 2).all() and (block.ffn.spline_weight == 3).all()


@pytest.mark.usefixtures("stand_in")
def test_a_peer_does_not_shift_the_random_numbers_of_the_rest() -> None:
    torch.manual_seed(0)
    peer_blocks.peer_block("efficient-kan", StandIn, GPTConfig(vocab_size=65))
    after = torch.rand(1)
    torch.manual_seed(0)
    StandIn(128, 128, 4, 3)
    assert torch.equal(after, torch.rand(1))


def test_a_race_leaves_out_the_peers_that_are_not_there() -> None:
    race = Race("r", "", {}, {}, 0, [1], {"a": {"ffn": "mlp"}, "b": {"ffn": "efficient-kan"}, "c": {}})
    able, missing = race.without_missing_peers()
    assert list(able.contestants) == ["a", "c"] and missing == ["efficient-kan"]


def test_nanogpt_s_checkpoint_computes_the_same_as_one_of_ours() -> None:
    """Rename a model of ours to nanoGPT's names; it must be read back unchanged."""
    model = tiny(**NANOGPT, bias=True)
    theirs = {rename(name): weight for name, weight in model.state_dict().items()}
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 11, "bias": True, "dropout": 0.0}
    tokens = torch.randint(11, (3, 12))
    torch.testing.assert_close(nanogpt.as_ours(theirs, shape).eval()(tokens)[0], model(tokens)[0])


def rename(name: str) -> str:
    """nanoGPT's name for one of our weights."""
    tops = {"token_embedding": "transformer.wte", "position_embedding": "transformer.wpe", "norm": "transformer.ln_f"}
    first, _, rest = name.partition(".")
    if first in tops:
        return f"{tops[first]}.{rest}"
    if first == "head":
        return f"lm_head.{rest}"
    layer, _, rest = rest.partition(".")
    parts = {"norm_1": "ln_1", "norm_2": "ln_2", "ffn": "mlp", "attn": "attn"}
    part, _, rest = rest.partition(".")
    return f"transformer.h.{layer}.{parts[part]}.{rest}"


def test_an_unprepared_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no train\.py"):
        nanogpt.check_checkout(tmp_path)
    (tmp_path / "train.py").touch()
    with pytest.raises(ValueError, match=r"not prepared; run python data/shakespeare_char/prepare\.py"):
        nanogpt.check_checkout(tmp_path)
