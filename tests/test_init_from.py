"""--init-from starts from GPT-2, as transformers computes it, or from our own MLP runs, and swaps in splines."""

import os
from pathlib import Path

import pytest
import torch

import report
import train
from corpus.dataset import Dataset
from kan_layer import KANLayer
from swap import swap_linears
from tests.runs import assert_one_sentence, call, make_dataset, options, read_metrics, resume_options, train_until
from training.checkpoint import load_checkpoint, step_path
from training.init_from import read_source

transformers = pytest.importorskip(
    "transformers", reason="loading GPT-2 is tested where transformers is: pip install transformers"
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def vocab_size(dataset: Path) -> int:
    return Dataset.open(dataset, verify=False).tokenizer.vocab_size


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, vocab_size: int) -> Path:
    """A folder with a small random GPT-2, saved by transformers. Its norms have random parameters."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=16, n_embd=24, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder)
    return folder


def their_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()(tokens).logits


@pytest.mark.parametrize("more", [{"ffn": "mlp"}, {}, {"kan_swap": "blocks.*.ffn.*", "kan_variant": "balanced"}])
def test_it_computes_what_transformers_does_and_then_learns(
    tmp_path: Path, dataset: Path, gpt2: Path, vocab_size: int, more: dict[str, str]
) -> None:
    """Before the first step the run's model equals GPT-2 to 1e-5, swapped or not; afterwards it is better."""
    run = tmp_path / "run"
    assert call(train.main, *tuning(dataset, run, gpt2, max_iters=0, **more)).code == 0
    model = load_checkpoint(run).model
    tokens = torch.randint(vocab_size, (5, 16))
    torch.testing.assert_close(model(tokens)[0], their_logits(gpt2, tokens), rtol=1e-5, atol=1e-5)
    swapped = [name for name, part in model.named_modules() if isinstance(part, KANLayer)]
    names = {"blocks.*.ffn.*": ["c_fc", "c_proj"]}.get(more.get("kan_swap", ""), ["c_fc"] if not more else [])
    assert swapped == [f"blocks.{layer}.ffn.{name}" for layer in range(2) for name in names]
    result = call(train.main, *resume_options(run), "--max_iters", 12)
    assert result.code == 0, result
    losses = [record["val_loss"] for record in read_metrics(run) if record["val_loss"]]
    assert losses[-1] < losses[0] - 0.1


def tuning(dataset: Path, run: Path, source: Path, **more: object) -> list[str]:
    """Options of a tiny run that starts from `source`, without those of the architecture."""
    architecture = ("n_layer", "n_head", "n_embd", "block_size")
    arguments = options(dataset, run, **{"kan_fit_grid": -1, **more})
    return [a for a in arguments if not a.startswith(tuple(f"--{n}=" for n in architecture))] + [
        f"--init-from={source}"
    ]


def test_layers_of_transformers_itself_can_be_swapped(gpt2: Path, vocab_size: int) -> None:
    """transformers' Conv1D, whose weights are transposed."""
    model = transformers.GPT2LMHeadModel.from_pretrained(gpt2).eval()
    tokens = torch.randint(vocab_size, (3, 16))
    before = model(tokens).logits
    names = swap_linears(model, "*.mlp.c_fc, *.attn.c_proj", num_control_points=6, spline_width=7.0)
    assert len(names) == 4
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-5, atol=1e-5)


def test_grids_are_fitted_to_what_reaches_the_swapped_layers(tmp_path: Path, dataset: Path, gpt2: Path) -> None:
    trainer_run = tmp_path / "run"
    result = call(train.main, *tuning(dataset, trainer_run, gpt2, max_iters=1))
    assert "fitted to the activations" in result.out
    widths = {layer.spline_width for layer in load_checkpoint(trainer_run).model.spline_layers()}
    assert len(widths) == 2 and 4.0 not in widths
    call(train.main, *tuning(dataset, tmp_path / "unfitted", gpt2, max_iters=1, kan_fit_grid=0))
    unfitted = load_checkpoint(tmp_path / "unfitted").model
    assert {layer.spline_width for layer in unfitted.spline_layers()} == {4.0}


def test_an_mlp_run_of_our_own_goes_on_with_splines(tmp_path: Path, dataset: Path) -> None:
    trained = tmp_path / "mlp"
    train_until(options(dataset, trained, ffn="mlp", ffn_hidden=72))
    mlp = load_checkpoint(trained, "best").model
    for name, source in (("run", trained), ("file", step_path(trained, 12))):
        run = tmp_path / name
        assert call(train.main, *tuning(dataset, run, source, max_iters=0, num_control_points=5)).code == 0
        model = load_checkpoint(run).model
        assert len(model.spline_layers()) == 1
        tokens = torch.randint(5, (3, 16))
        torch.testing.assert_close(model(tokens)[0], mlp(tokens)[0], rtol=1e-5, atol=1e-5)
    twin = call(train.main, *tuning(dataset, tmp_path / "twin", trained, ffn="mlp"))
    assert twin.code == 0 and not load_checkpoint(tmp_path / "twin").model.spline_layers()


def test_it_resumes(tmp_path: Path, dataset: Path, gpt2: Path) -> None:
    """Resume without the source, which only the first step needs."""
    source = tmp_path / "gpt2"
    source.symlink_to(gpt2)
    call(train.main, *tuning(dataset, tmp_path / "run", source, max_iters=4))
    source.unlink()
    assert call(train.main, *resume_options(tmp_path / "run"), "--max_iters", 8).code == 0
    assert load_checkpoint(tmp_path / "run").step == 8


def test_mistakes_are_one_sentence(tmp_path: Path, dataset: Path, gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    other_data = make_dataset(tmp_path / "other", "abcdefgh" * 200)
    splines = tmp_path / "splines"
    train_until(options(dataset, splines, max_iters=1))
    (tmp_path / "empty").mkdir()
    for source, data, more, parts in (
        (gpt2, other_data, {}, ("choose another --dataset", "8 tokens (char)")),
        (splines, dataset, {}, ("has splines already",)),
        (gpt2, dataset, {"ffn": "swiglu"}, ("--ffn mlp_tanh", "got swiglu")),
        (gpt2, dataset, {"kan_swap": "nothing"}, ("no linear layer matches 'nothing'",)),
        (tmp_path / "empty", dataset, {}, ("cannot be loaded", "a folder saved by transformers")),
        (tmp_path / "there_is_none.pt", dataset, {}, ("does not exist",)),
    ):
        assert_one_sentence(call(train.main, *tuning(data, tmp_path / "run", source, **more)), *parts)


def test_without_transformers_a_sentence_says_what_to_install(gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(train.UserError, match="needs the package transformers"):
        read_source(str(gpt2))


def test_the_report_of_a_swapped_model_speaks_of_splines_and_offers_their_film(
    tmp_path: Path, dataset: Path, gpt2: Path
) -> None:
    run = tmp_path / "run"
    assert call(train.main, *tuning(dataset, run, gpt2, max_iters=2, splines=False)).code == 0
    assert call(report.main, run).code == 0
    page = (run / "report.html").read_text()
    assert "splines in place of linear layers" in page and "--film" in page and "splines-title" in page


@pytest.mark.parametrize(
    "name", ["scratch", "resume", "gpt3", "runs/no_such_run", "/no/such/run", "./gpt2", "~/x", "a/b/c"]
)
def test_no_hub_is_asked_for_what_is_none_of_its_names(
    name: str, tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("training.init_from._from_transformers", asked.append)
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    result = call(train.main, *tuning(dataset, tmp_path / "run", name))
    assert_one_sentence(result, f"--init_from {os.path.expanduser(name)}")
    assert not asked and not (tmp_path / "run").exists()


def test_a_hub_is_asked_for_its_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("training.init_from._from_transformers", asked.append)
    for name in ("gpt2", "distilgpt2", "openai-community/gpt2-xl"):
        read_source(name)
    assert asked == ["gpt2", "distilgpt2", "openai-community/gpt2-xl"]
