"""The model in the page computes what PyTorch does: logits, gradients, what is written, what changes to splines do."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import report
from bench.shared.chromium import Browser, why_not
from kan_layer import KANLayer
from model import GPT
from sample import generate
from splines.parametrisation import VARIANTS
from splines.records import SplineRecords
from splines.snapshot import Snapshot
from tests.report_runs import LETTERS, make_model_run
from tests.runs import PLAIN, call
from training.checkpoint import load_checkpoint
from training.config import Config
from webpage.weights import PackedModel, pack_model

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

TEXTS = 50
SMALL: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "num_control_points": 5}
NANOGPT = {"position": "learned", "norm": "layernorm", "qk_norm": False, "bias": True}
EXTRAS = {"attention_gate": True, "token_shift": True, "ffn_norm": True}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "the default": {name: getattr(Config(), name) for name in PLAIN if name not in SMALL},
    "nanoGPT's": {**NANOGPT, "ffn": "mlp", "tie_embeddings": False},
    "nanoGPT's with splines": {**NANOGPT, **EXTRAS},
    "gated": {"ffn": "gated_splines"},
    "gated, with all extras": {
        "ffn": "gated_splines", **EXTRAS, "pair_rows": 10_000, "kan_zero_centred": True, "num_control_points": 3,
        "spline_width": 3.0,
    },
    "gated, pairs share rows": {"ffn": "gated_splines", **EXTRAS, "pair_rows": 7, "norm": "layernorm"},
    "an odd width and three heads": {"n_head": 3, "n_embd": 21, **NANOGPT, "ffn": "gated_splines", "ffn_hidden": 23},
    "a padded vocabulary": {"vocab_size": 32, "pair_rows": 50, "tie_embeddings": False},
    "one token of context": {"block_size": 1, "token_shift": True},
    **{f"{ffn}, with all extras": {"ffn": ffn, **EXTRAS} for ffn in ("mlp", "mlp_tanh", "relu2", "swiglu")},
    **{variant: {"kan_variant": variant, "num_control_points": 6} for variant in VARIANTS if variant != "B-spline"},
    "swapped": {**NANOGPT, "ffn": "mlp_tanh", "kan_swap": "blocks.*.ffn.c_fc"},
    "all swapped": {"ffn": "swiglu", "attention_gate": True, "kan_swap": "*c_*,head", "vocab_size": 16},
}  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as window:
        yield window


def open_live(browser: Browser, run: Path) -> None:
    """The report of `run`, its model unpacked."""
    report.write_report([run])
    browser.messages()
    browser.open(run / "report.html")
    browser.wait("const done = arguments[0], look = () => live.model ? done() : setTimeout(look, 5); look()")
    browser.run("live.jobs = []; clearTimeout(resting)")


LOGITS = """const [texts, splines] = arguments;
return texts.map((tokens) => {
  const one = new Reading(live.model, splines ? eval(splines) : live.model.splines);
  one.take(tokens);
  while (!one.isDone) one.advance();
  return one.places.map(({ logits }) => [...logits]);
});"""


def random_texts(count: int, most: int, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(len(LETTERS), size=generator.integers(1, most + 1)).tolist() for _ in range(count)]


@torch.no_grad()
def assert_same_logits(model: GPT, texts: list[list[int]], found: list[Any], atol: float = 1e-3) -> None:
    for tokens, logits in zip(texts, found, strict=True):
        expected = model(torch.tensor([tokens]))[0][0, :, : len(LETTERS)]
        np.testing.assert_allclose(np.array(logits), expected.numpy(), atol=atol, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_pytorchs(browser: Browser, tmp_path: Path, name: str) -> None:
    options = {**SMALL, **MODELS[name]}
    model = make_model_run(tmp_path / "run", records=name != "swapped", **options)
    open_live(browser, tmp_path / "run")
    texts = random_texts(TEXTS, options["block_size"])
    spread = torch.cat([model(torch.tensor([tokens]))[0][0] for tokens in texts]).std()
    assert spread > 0.3, "logits that differ, or their equality would say little"
    assert_same_logits(model, texts, browser.run(LOGITS, texts), atol=1e-4)  # ten times as near as promised
    if model.spline_layers():
        tokens = texts[0]
        place, target = len(tokens) - 1, 3
        found = browser.run(
            """const [tokens, place, target] = arguments, one = new Reading(live.model, live.model.splines);
            one.take(tokens);
            while (!one.isDone) one.advance();
            return outputGradients(one, place, one.again(place), target).map((gradient) => [...gradient]);""",
            tokens, place, target,
        )  # fmt: skip
        for ours, theirs in zip(found, gradients(model, tokens, place, target), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-3)
    assert browser.messages() == []


def gradients(model: GPT, tokens: list[int], place: int, target: int) -> list[np.ndarray]:
    """Of a log-probability, by the outputs of each spline layer at that place."""
    outputs: list[Tensor] = []

    def keep(_: Any, __: Any, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    hooks = [layer.register_forward_hook(keep) for layer in model.spline_layers()]
    logits = model(torch.tensor([tokens]))[0][0, place, : len(LETTERS)]
    logits.log_softmax(0)[target].backward()
    for hook in hooks:
        hook.remove()
    by_layer = {id(layer): output for layer, output in zip(order_of_calls(model), outputs, strict=True)}
    return [by_layer[id(layer)].grad[0, place].numpy() for layer in model.spline_layers()]  # type: ignore[index]


def order_of_calls(model: GPT) -> list[KANLayer]:
    called: list[KANLayer] = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, _: called.append(module)) for layer in model.spline_layers()
    ]
    model(torch.tensor([[0]]))
    for hook in hooks:
        hook.remove()
    return called


@pytest.fixture(scope="module")
def gated(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT, list[Snapshot]]:
    run = tmp_path_factory.mktemp("live") / "run"
    model = make_model_run(run, **{**SMALL, **MODELS["gated, pairs share rows"], "n_embd": 12})
    open_live(browser, run)
    return model, SplineRecords(run).read(10)


@pytest.mark.parametrize("prompt", [[0], [1, 2, 3], [5] * 12])
def test_it_writes_what_sample_py_writes(
    browser: Browser, gated: tuple[GPT, list[Snapshot]], prompt: list[int]
) -> None:
    """At temperature 0, for several contexts."""
    model, _ = gated
    found = browser.run(
        """const one = new Reading(live.model, live.model.splines);
        let tokens = arguments[0];
        while (tokens.length < 60) {
          one.take(tokens);
          while (!one.isDone) one.advance();
          tokens = [...tokens, drawToken(one.places.at(-1).logits, 0, 0.5)];
        }
        return tokens;""",
        prompt,
    )
    count = 60 - len(prompt)
    expected = list(generate(model, prompt, count, 0, 0, 1.0, torch.Generator(), len(LETTERS)))
    assert found == [*prompt, *expected]


def test_an_edited_text_is_read_as_if_it_were_new(browser: Browser, gated: tuple[GPT, list[Snapshot]]) -> None:
    generator = np.random.default_rng(1)
    texts = [generator.integers(len(LETTERS), size=40).tolist()]
    for _ in range(12):  # cut somewhere, go on otherwise
        cut = int(generator.integers(0, len(texts[-1]) + 1))
        texts.append(texts[-1][:cut] + generator.integers(len(LETTERS), size=generator.integers(0, 30)).tolist())
    edited, fresh = browser.run(
        """const texts = arguments[0], one = new Reading(live.model, live.model.splines);
        const finish = (reading) => {
          while (!reading.isDone) reading.advance();
          return reading.places.map(({ logits }) => [...logits]);
        };
        const edited = texts.map((tokens, k) => {
          one.take(tokens);
          if (k % 3 !== 1) return finish(one);
          for (let n = 0; n < 5 && !one.isDone; n++) one.advance();
          return null;  // the next text comes before this one has been read
        });
        const fresh = texts.map((tokens) => {
          const other = new Reading(live.model, live.model.splines);
          other.take(tokens);
          return finish(other);
        });
        return [edited, fresh];""",
        texts,
    )
    for ours, theirs in zip(edited, fresh, strict=True):
        assert ours is None or ours == theirs


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_characters_are_drawn_with_their_probabilities(
    browser: Browser, gated: tuple[GPT, list[Snapshot]], temperature: float
) -> None:
    logits = torch.linspace(-2, 1, 8, dtype=torch.float64)
    found = browser.run(
        """const counts = new Array(8).fill(0);
        for (let k = 0; k < 10000; k++) counts[drawToken(arguments[0], arguments[1], (k + 0.5) / 10000)]++;
        return counts;""",
        logits.tolist(), temperature,
    )  # fmt: skip
    expected = 10_000 * (logits / temperature).softmax(0)
    np.testing.assert_allclose(found, expected.numpy(), atol=1.01)


CHANGES = [
    {"layer": 1, "input": 3, "output": 2, "mode": "off"},
    {"layer": 1, "input": 3, "output": 2, "mode": "straight"},
    {"layer": 0, "input": 2, "output": None, "mode": "off"},
    {"layer": 2, "input": None, "output": 4, "mode": "straight"},
    {"layer": 3, "input": None, "output": None, "mode": "straight"},
    {"layer": 1, "input": None, "output": None, "mode": "off"},
]


@pytest.mark.parametrize("changes", [[change] for change in CHANGES] + [CHANGES], ids=str)
def test_a_change_is_what_pytorch_makes_of_it(
    browser: Browser, gated: tuple[GPT, list[Snapshot]], changes: list[dict[str, Any]]
) -> None:
    model, snapshots = gated
    other = copy.deepcopy(model)
    for change in changes:
        layer, snapshot = other.spline_layers()[change["layer"]], snapshots[change["layer"]]
        points = layer.control_points().detach().numpy().copy()
        inputs = range(layer.in_features) if change["input"] is None else [change["input"]]
        outputs = range(layer.out_features) if change["output"] is None else [change["output"]]
        for i in inputs:
            for o in outputs:
                degree = 1 if change["mode"] == "straight" else 0
                line = np.polyfit(
                    snapshot.grid.knots(), points[i, :, o], degree, w=np.sqrt(snapshot.use[i].astype(float))
                )
                points[i, :, o] = np.polyval(line, snapshot.grid.knots())
        layer.set_control_points(torch.from_numpy(points))
    texts = random_texts(10, SMALL["block_size"])
    script = LOGITS.replace("eval(splines)", "changedSplines(live.model, splines, live.uses)")
    assert_same_logits(other, texts, browser.run(script, texts, changes), atol=1e-4)


def test_a_contribution_is_what_the_prediction_loses_without_the_spline(
    browser: Browser, gated: tuple[GPT, list[Snapshot]]
) -> None:
    model, snapshots = gated
    tokens, place, target = random_texts(1, 12, seed=4)[0], 6, 2
    tokens = (tokens * 12)[:9]
    found = browser.run(
        """const [tokens, place, target] = arguments, one = new Reading(live.model, live.model.splines);
        one.take(tokens);
        while (!one.isDone) one.advance();
        const means = live.model.splines.map((layer, k) => splineMeans(layer, live.uses[k]));
        const found = routeCandidates(one, place, target, means);
        return found.map((route) => ({ ...route, effect: contribution(one, place, target, route) }));""",
        tokens, place, target,
    )  # fmt: skip
    assert len(found) == 48
    whole = log_probability(model, tokens, place, target)
    for route in found[::6]:
        layer, snapshot = model.spline_layers()[route["layer"]], snapshots[route["layer"]]
        i, o = route["input"], route["output"]
        mean = float(snapshot.use[i].astype(float) @ layer.control_points()[i, :, o].detach().numpy())

        at_zero = float(np.interp(0.0, snapshot.grid.knots(), snapshot.control_points[i, :, o]))
        hook = layer.register_forward_hook(without(place, i, o, at_zero, mean))
        expected = whole - log_probability(model, tokens, place, target)
        hook.remove()
        assert route["effect"] == pytest.approx(expected, abs=1e-5)


def without(place: int, i: int, o: int, at_zero: float, mean: float) -> Any:
    """A hook that puts `mean` in place of the spline from i to o, `at_zero` for an input of zero."""

    def hook(layer: KANLayer, args: tuple[Tensor], output: Tensor) -> Tensor:
        x = args[0][0, place].detach()
        other = x.clone()
        other[i] = 0.0
        value = at_zero + splines_alone(layer, x)[o] - splines_alone(layer, other)[o]
        output = output.clone()
        output[0, place, o] -= value - mean
        return output

    return hook


@torch.no_grad()
def splines_alone(layer: KANLayer, x: Tensor) -> Tensor:
    """The layer's output, without whoever watches it."""
    return type(layer).forward(layer, x)


@torch.no_grad()
def log_probability(model: GPT, tokens: list[int], place: int, target: int) -> float:
    return float(model(torch.tensor([tokens]))[0][0, place].log_softmax(0)[target])


def test_splines_are_not_stored_twice(tmp_path: Path) -> None:
    """Those of the newest recorded step serve the model too; without a record, or with another, it has its own."""
    model = make_model_run(tmp_path / "run", **{**SMALL, "n_embd": 32})
    checkpoint = load_checkpoint(tmp_path / "run")
    newest = SplineRecords(tmp_path / "run").read(10)
    shared, own = pack_model(checkpoint, newest), pack_model(checkpoint, [])
    other = pack_model(checkpoint, [newest[1], newest[0]])
    tight = pack_model(checkpoint, newest, budget=10_000)
    assert all(isinstance(each, PackedModel) for each in (shared, own, other, tight))
    numbers = sum(layer.weight.numel() for layer in model.spline_layers())
    assert len(own.block) - len(shared.block) == pytest.approx(4 * numbers, abs=4)  # type: ignore[union-attr]
    assert other.block == own.block == tight.block  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"ffn": "mlp"}, None),
        ({"ffn": "mlp", "n_embd": 512, "n_layer": 1, "block_size": 2, "ffn_hidden": 2048}, r"would take 1\d MB"),
    ],
)
def test_a_model_too_large_is_said_to_be(tmp_path: Path, changes: dict[str, Any], sentence: str | None) -> None:
    make_model_run(tmp_path / "run", records=False, **{**SMALL, **changes})
    assert call(report.main, tmp_path / "run").code == 0
    page = (tmp_path / "run/report.html").read_text()
    assert ('id="weights"' in page) == (sentence is None)
    assert sentence is None or re.search(f"There is no live model here: [^<]*{sentence}", page)


def test_old_runs_and_other_tokens_get_a_sentence(tmp_path: Path) -> None:
    make_model_run(tmp_path / "run", records=False, **SMALL, ffn="mlp")
    for damaged in (b"no checkpoint", None):
        (file,) = (tmp_path / "run/checkpoints").iterdir()
        file.unlink() if damaged is None else file.write_bytes(damaged)
        assert call(report.main, tmp_path / "run").code == 0
        page = (tmp_path / "run/report.html").read_text()
        assert "There is no live model here: " in page and 'id="weights"' not in page
    facts = tmp_path / "run/run.json"
    facts.write_text(re.sub(r'"tokenizer": \{.*?\}', '"tokenizer": {"name": "gpt2"}', facts.read_text()))
    assert call(report.main, tmp_path / "run").code == 0
    assert "reads GPT-2&#x27;s byte pairs" in (tmp_path / "run/report.html").read_text()
