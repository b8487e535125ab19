"""The model: nanoGPT's arithmetic, the KV cache, causality, parameter counts."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from embeddings import PairEmbedding
from feed_forward import FEED_FORWARDS
from kan_layer import KANLayer
from model import GPT, GPTConfig
from model_options import PAIRS

NANOGPT = {"position": "learned", "norm": "layernorm", "qk_norm": False, "zero_init_projections": False, "ffn": "mlp"}
EVERY_KIND = [
    {},
    *({"ffn": name} for name in FEED_FORWARDS if name != "splines"),  # that is the default
    {"position": "learned"},
    {"norm": "layernorm", "qk_norm": False, "bias": True},
    {"tie_embeddings": False, "num_control_points": 8},
    {"ffn": "gated_splines", "num_control_points": 4},
    {"ffn": "gated_splines", "kan_zero_centred": True, "ffn_norm": True, "bias": True},
    {"ffn": "swiglu", "ffn_norm": True},
    {"ffn": "swiglu", "token_shift": True},
    {"token_shift": True},
    {"pair_rows": 1000, "token_shift": True},
    {"pair_rows": 7, "position": "learned"},
    {"attention_gate": True, "ffn": "mlp"},
    {"attention_gate": True, "token_shift": True, "ffn": "gated_splines", "num_control_points": 3},
    {"ffn": "gated_splines", "num_control_points": 4, "token_shift": True},
]


def tiny(**options) -> GPT:
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 11}
    model = GPT(GPTConfig(**{**shape, **options})).eval()
    for parameter in model.parameters():  # zeros would hide the inputs that they multiply
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def nanogpt_logits(weights: dict[str, Tensor], tokens: Tensor, n_layer: int, n_head: int) -> Tensor:
    """nanoGPT's GPT-2, computed from the weights with attention written out."""
    T = tokens.shape[1]
    width = weights["token_embedding.weight"].shape[1]
    x = weights["token_embedding.weight"][tokens] + weights["position_embedding.weight"][:T]
    for layer in range(n_layer):
        w = {name.removeprefix(f"blocks.{layer}."): value for name, value in weights.items()}
        h = F.layer_norm(x, (width,), w["norm_1.weight"], w.get("norm_1.bias"))
        q, k, v = (h @ w["attn.c_attn.weight"].T + w.get("attn.c_attn.bias", 0)).split(width, dim=2)
        heads = []
        for part in zip(*(m.split(width // n_head, dim=2) for m in (q, k, v)), strict=True):
            scores = part[0] @ part[1].transpose(1, 2) / math.sqrt(width // n_head)
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
            heads.append(scores.softmax(-1) @ part[2])
        x = x + torch.cat(heads, 2) @ w["attn.c_proj.weight"].T + w.get("attn.c_proj.bias", 0)
        h = F.layer_norm(x, (width,), w["norm_2.weight"], w.get("norm_2.bias"))
        h = h @ w["ffn.c_fc.weight"].T + w.get("ffn.c_fc.bias", 0)
        h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
        x = x + h @ w["ffn.c_proj.weight"].T + w.get("ffn.c_proj.bias", 0)
    x = F.layer_norm(x, (width,), weights["norm.weight"], weights.get("norm.bias"))
    return x @ weights["token_embedding.weight"].T


@pytest.mark.parametrize("bias", [False, True])
def test_with_nanogpt_s_options_it_is_nanogpt(bias: bool) -> None:
    model = tiny(**NANOGPT, bias=bias)
    tokens = torch.randint(11, (3, 12))
    expected = nanogpt_logits(dict(model.state_dict()), tokens, n_layer=2, n_head=2)
    torch.testing.assert_close(model(tokens)[0], expected, rtol=1e-4, atol=1e-4)


def test_nanogpt_s_parameter_count_and_init_scale() -> None:
    model = GPT(GPTConfig(**NANOGPT, n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65))
    assert model.num_parameters() == 795_904  # nanoGPT prints 0.80M for its CPU recipe
    assert model.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[1].ffn.c_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.05)


@pytest.mark.parametrize("options", EVERY_KIND, ids=str)
@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 1, 5], [3, 4, 5]], ids=str)
def test_kv_cache_equals_the_full_forward(options: dict, pieces: list[int]) -> None:
    model = tiny(**options)
    tokens = torch.randint(11, (2, 12))
    cache = model.new_cache(batch_size=2)
    stepwise = torch.cat([model(part, cache=cache)[0] for part in tokens.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(stepwise, model(tokens)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", EVERY_KIND, ids=str)
def test_no_token_sees_the_future(options: dict) -> None:
    model = tiny(**options)
    tokens = torch.randint(11, (1, 12))
    changed = tokens.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 11
    torch.testing.assert_close(model(tokens)[0][:, :7], model(changed)[0][:, :7])
    assert not torch.allclose(model(tokens)[0][:, 7:], model(changed)[0][:, 7:])


def test_rotary_attention_depends_on_distance_only() -> None:
    rope = tiny().blocks[0].attn.rope
    q, k = torch.randn(8), torch.randn(8)
    at = lambda vector, position: rope(vector.view(1, 1, 1, 8), position).flatten()  # noqa: E731
    for shift in range(5):
        torch.testing.assert_close(at(q, 6 - shift) @ at(k, 5 - shift), at(q, 1) @ at(k, 0), rtol=1e-4, atol=1e-5)


def test_loss_is_the_mean_cross_entropy_and_starts_at_that_of_guessing() -> None:
    model = GPT(GPTConfig(vocab_size=65)).eval()
    tokens, targets = torch.randint(65, (4, 64)), torch.randint(65, (4, 64))
    logits, loss = model(tokens, targets)
    chosen = logits.log_softmax(-1).gather(2, targets.unsqueeze(2))
    torch.testing.assert_close(loss, -chosen.mean())
    # A little above: the tied embedding favours repeating the token, by |e|·√width = 0.02·128 logits.
    assert loss.item() == pytest.approx(math.log(65), abs=0.25)


@pytest.mark.parametrize("ffn", ["mlp", "relu2", "swiglu"])
def test_twins_have_the_parameters_of_the_4x_mlp(ffn: str) -> None:
    twin = GPT(GPTConfig(vocab_size=65, n_embd=96, ffn=ffn)).num_ffn_parameters()
    assert twin == pytest.approx(4 * 8 * 96 * 96, rel=0.01)


def test_eight_control_points_are_the_parameters_of_the_usual_mlp() -> None:
    kan = GPT(GPTConfig(vocab_size=65, ffn="splines", num_control_points=8))
    mlp = GPT(GPTConfig(vocab_size=65, ffn="mlp"))
    assert kan.num_parameters() == mlp.num_parameters()
    assert kan.flops_per_token() < mlp.flops_per_token()


def test_zero_splines_leave_the_residual_stream_alone() -> None:
    model = GPT(GPTConfig(vocab_size=11, kan_init="zero"))
    assert all(isinstance(layer, KANLayer) and not layer.control_points().any() for layer in model.spline_layers())


def test_context_beyond_block_size_is_refused() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="context of 13 tokens is longer than block_size=12"):
        model(torch.zeros(1, 13, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_embd": 30, "n_head": 4}, "n_embd must be a multiple of n_head; got n_embd=30 and n_head=4"),
        ({"n_embd": 12, "n_head": 4}, "n_embd / n_head must be even; got 3"),
        ({"n_layer": 0}, "n_layer must be an integer of at least 1; got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1; got 1.0"),
        ({"num_control_points": 1}, "num_control_points must be an integer of at least 2; got 1"),
        ({"spline_width": -1.0}, "spline_width must be a finite number above 0; got -1.0"),
        ({"ffn": "magic"}, "ffn must be one of splines, gated_splines, pair_splines, mlp, .*; got 'magic'"),
        ({"kan_impl": "magic"}, "kan_impl must be one of auto, .*; got 'magic'"),
        ({"kan_variant": "magic"}, "kan_variant must be one of B-spline, .*; got 'magic'"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**options)


@pytest.mark.parametrize(
    "options", [{}, {"num_control_points": 3, "kan_zero_centred": True}, {"num_control_points": 8}], ids=str
)
@pytest.mark.parametrize("norm", [False, True])
def test_a_gated_block_is_its_definition_and_has_the_mlp_s_parameters(options: dict, norm: bool) -> None:
    config = GPTConfig(vocab_size=11, n_embd=128, n_head=2, ffn="gated_splines", ffn_norm=norm, **options)
    twin = GPTConfig(vocab_size=11, n_embd=128, n_head=2, ffn="mlp")
    block, mlp = FEED_FORWARDS["gated_splines"](config), FEED_FORWARDS["mlp"](twin)
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in (block, mlp)]
    assert abs(sizes[0] / sizes[1] - 1) < 0.01
    x = torch.randn(5, 128)
    hidden = block.splines(x) * (x @ block.c_gate.weight.T)
    if norm:
        hidden = hidden / (hidden.square().mean(1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(block(x), hidden @ block.c_proj.weight.T)
    assert block.splines(x).any(), "with splines that start at zero, nothing would ever be learnt"


@pytest.mark.parametrize("ffn", [name for name in FEED_FORWARDS if name != PAIRS])  # tests/test_pair_layer.py has it
def test_a_feed_forward_layer_takes_each_token_by_itself(ffn: str) -> None:
    block = tiny(ffn=ffn).blocks[0].ffn
    x = torch.randn(2, 6, 16)
    y, order = block(x), torch.randperm(6)
    assert y.shape == x.shape and y.std() > 0
    torch.testing.assert_close(block(x[:, order]), y[:, order])


@pytest.mark.parametrize("ffn", [name for name in FEED_FORWARDS if name != PAIRS])  # tests/test_pair_layer.py has it
def test_a_feed_forward_layer_has_the_parameters_of_the_4x_mlp_and_trains_all_of_them(ffn: str) -> None:
    model = GPT(GPTConfig(vocab_size=11, n_layer=1, ffn=ffn, num_control_points=8, zero_init_projections=False))
    assert model.num_ffn_parameters() == pytest.approx(8 * model.config.n_embd**2, rel=0.02)
    tokens = torch.randint(11, (4, 64))
    model(tokens, tokens)[1].backward()
    assert all(parameter.grad.any() for parameter in model.blocks[0].ffn.parameters())


def test_relu2_is_its_definition() -> None:
    block = FEED_FORWARDS["relu2"](GPTConfig(vocab_size=11, n_embd=16, n_head=2, ffn="relu2"))
    x = torch.randn(5, 16)
    torch.testing.assert_close(block(x), (x @ block.c_fc.weight.T).clamp_min(0) ** 2 @ block.c_proj.weight.T)


@pytest.mark.parametrize("options", [{"ffn": "mlp"}, {"ffn": "swiglu"}, {"ffn": "gated_splines"}], ids=str)
def test_token_shift_mixes_in_the_token_before(options: dict) -> None:
    model = tiny(token_shift=True, **options)
    block, x = model.blocks[0], torch.randn(2, 6, 16)
    block.attn.c_proj.weight.data.zero_()  # leaves the feed-forward part alone
    h = block.norm_2(x)
    before = torch.zeros_like(h)
    before[:, 1:] = h[:, :-1]
    mixed = (1 - block.token_shift.share) * h + block.token_shift.share * before
    expected = block.ffn(mixed) if options == {"ffn": "mlp"} else block.ffn(h, mixed)
    torch.testing.assert_close(block(x, None), x + expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"ffn": "mlp"}, {"ffn": "swiglu"}, {"ffn": "gated_splines"}], ids=str)
def test_an_attention_gate_takes_its_parameters_from_the_feed_forward_layer(options: dict) -> None:
    shape = {"vocab_size": 65, "n_layer": 2, "num_control_points": 3}
    sizes = [GPT(GPTConfig(**shape, **options, attention_gate=gate)).num_parameters() for gate in (False, True)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


def test_an_attention_gate_multiplies_and_one_of_zero_splines_changes_nothing() -> None:
    attention, x = tiny(attention_gate=True, ffn="gated_splines").blocks[0].attn, torch.randn(2, 6, 16)
    attention.c_proj.weight.data.copy_(torch.eye(16))
    gated, factor = attention(x, None), 1 + attention.gate.splines(x)
    attention.gate.splines.weight.data.zero_()
    plain = attention(x, None)
    torch.testing.assert_close(gated, plain * factor)
    attention.gate = None
    torch.testing.assert_close(attention(x, None), plain)


@pytest.mark.parametrize("rows", [121, 1000])
def test_each_pair_of_tokens_has_an_embedding_of_its_own_if_rows_suffice(rows: int) -> None:
    embedding = tiny(pair_rows=rows).pair_embedding
    every = torch.cartesian_prod(torch.arange(11), torch.arange(11))  # (121, 2)
    embedded = embedding(every, None)
    assert not embedded[:, 0].any(), "the first token has none before it"
    assert len(embedded[:, 1].unique(dim=0)) == len(embedding.table.weight) == 121
    torch.testing.assert_close(embedding(every[:, 1:], every[:, :1]), embedded[:, 1:])


@pytest.mark.parametrize(("vocab", "rows"), [(64, 64), (64, 100), (60, 3000), (256, 1024), (50_304, 65_536)])
def test_pairs_that_share_rows_do_so_as_if_at_random(vocab: int, rows: int) -> None:
    embedding, known = PairEmbedding(vocab, rows, 1), torch.arange(0, vocab, max(1, vocab // 60))
    embedding.table.weight.data[:, 0] = torch.arange(rows)
    expected = rows * (1 - (1 - 1 / rows) ** len(known))  # expected number of different rows in that many draws
    for fixed in known[:5]:
        same = fixed.expand(len(known))
        for pairs in torch.stack((same, known), dim=1), torch.stack((known, same), dim=1):
            found = embedding(pairs[:, 1:], pairs[:, :1])[:, 0, 0]
            assert found.min() >= 0 and found.max() < rows and len(found.unique()) > 0.75 * expected


def test_a_cache_keeps_the_token_before_when_the_caller_reuses_its_buffer() -> None:
    model, tokens = tiny(pair_rows=121), torch.randint(11, (1, 5))
    cache, buffer, logits = model.new_cache(), torch.zeros(1, 1, dtype=torch.long), []
    for token in tokens[0]:
        buffer.fill_(token)
        logits.append(model(buffer, cache=cache)[0])
    torch.testing.assert_close(torch.cat(logits, dim=1), model(tokens)[0], rtol=1e-4, atol=1e-4)
