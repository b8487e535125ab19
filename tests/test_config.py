"""A configuration means the same in TOML, on the command line and in a checkpoint. Invalid ones are a UserError."""

import ast
import dataclasses
import inspect
import tempfile
import textwrap
import typing
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from backends import IMPLS
from common.command_line import option_groups
from common.errors import UserError
from feed_forward import FEED_FORWARDS
from kan_layer import VARIANTS
from model_options import ARCHITECTURES, PAIRS
from splines.pair_basis import VARIANTS as PAIR_VARIANTS
from tests.runs import ROOT, call
from train import main
from training import config as config_module
from training.config import Config, from_dict, parse, save

FIELDS = [field.name for field in dataclasses.fields(Config)]
TYPES = typing.get_type_hints(Config)
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
PATH = TEXT.filter(lambda text: not text.startswith("~"))  # ~ is expanded whenever an option is read
SPECIAL: dict[str, st.SearchStrategy[Any]] = {  # options whose type does not tell their values
    "ffn": st.sampled_from(sorted(FEED_FORWARDS)),
    "kan_impl": st.sampled_from(IMPLS),
    "kan_variant": st.sampled_from(VARIANTS),
    "min_lr": st.just(-1.0),  # others depend on learning_rate
    "out_dir": PATH,
    "init_from": PATH,
    "kan_refine": st.just(""),  # others depend on num_control_points
}


def is_accepted(name: str, value: float) -> bool:
    try:
        Config(**{name: value})
    except ValueError:
        return False
    return True


@cache
def values_of(name: str) -> st.SearchStrategy[Any]:
    """Values of an option. Config itself tells the bounds of numbers; test_a_value_that_does_not_fit… tests these."""
    kind = TYPES[name]
    if name in SPECIAL:
        return SPECIAL[name]
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(next(least for least in range(9) if is_accepted(name, least)), 10**9)
    if kind is float:
        least = next(least for least in (0.0, 1e-12) if is_accepted(name, least))
        top = next(top for top in (1e12, 1 - 1e-12) if is_accepted(name, top))
        return st.floats(least, top) | st.just(getattr(Config(), name))
    if kind is str:
        return TEXT
    if bool in typing.get_args(kind):
        return st.sampled_from(["auto", True, False])
    return st.sampled_from(typing.get_args(kind))


@st.composite
def configs(draw: st.DrawFn) -> Config:
    values = {name: draw(values_of(name)) for name in FIELDS}
    values["n_head"] = draw(st.integers(1, 16))
    values["n_embd"] = values["n_head"] * 2 * draw(st.integers(1, 16))
    if values["ffn"] == PAIRS:
        values["kan_variant"] = draw(st.sampled_from(PAIR_VARIANTS))
    if values["kan_zero_centred"]:
        values["num_control_points"] |= 1  # odd
        values["kan_variant"] = "B-spline"
    if draw(st.booleans()):
        values["num_control_points"] = min(values["num_control_points"], 10**8 + 1)  # a stage has up to nine digits
        values["kan_refine"] = f"{2 * values['num_control_points'] - 1}@7"
    if values["fsdp"]:  # shards cannot be refined or penalised
        values.update(kan_refine="", kan_smoothness=0.0)
    if draw(st.booleans()):
        values["min_lr"] = draw(st.floats(0, values["learning_rate"]))
    return Config(**values)


def in_toml(text: str | bytes) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "some.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        found, file = parse([str(path)])
        assert file == path
        return found


@settings(deadline=None, max_examples=40)
@given(configs())
@example(Config(wandb_project="two\nlines"))
@example(Config(wandb_project="\x7f 🙂"))
@example(Config(wandb_project="--out_dir"))
@example(Config(wandb_project="-h"))
@example(Config(wandb_project='C:\\new "run"'))
def test_a_saved_configuration_is_read_back_equal(config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        save(config, path)
        assert parse([str(path)])[0] == config
        assert parse([], saved=path)[0] == config


@settings(deadline=None, max_examples=40)
@given(configs())
@example(Config(wandb_project="-h"))
def test_the_command_line_and_a_checkpoint_mean_the_same(config: Config) -> None:
    values = dataclasses.asdict(config)
    assert parse([f"--{name}={value}" for name, value in values.items()]) == (config, None)
    assert from_dict(values, "a checkpoint") == config


@pytest.mark.parametrize(
    "arguments",
    [["--n_layer", "7"], ["--n-layer", "7"], ["--n_layer=7"], ["--n-layer=7"], ["--n_layer", "3", "--n-layer=7"]],
)
def test_every_spelling_of_an_option_means_the_same(arguments: list[str]) -> None:
    assert parse(arguments) == (Config(n_layer=7), None)


def test_the_command_line_beats_the_file_and_the_file_beats_the_saved_run(tmp_path: Path) -> None:
    file, saved = tmp_path / "some.toml", tmp_path / "saved.toml"
    save(Config(n_layer=5, n_head=2, block_size=9), saved)
    file.write_text("n_layer = 6\nn_head = 8\n")
    found, _ = parse([str(file), "--n_layer", "7"], saved=saved)
    assert found == Config(n_layer=7, n_head=8, block_size=9)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("n_layers", "n_layer"), ("learning-rte", "learning_rate"), ("max_iter", "max_iters"), ("kan_imp", "kan_impl")],
)
def test_a_misspelled_option_gets_the_right_suggestion(wrong: str, meant: str) -> None:
    with pytest.raises(UserError, match=rf"unknown option .*did you mean {meant}\?") as on_command_line:
        parse([f"--{wrong}", "3"])
    with pytest.raises(UserError, match=rf"some.toml: unknown option .*did you mean {meant}\?"):
        in_toml(f"{wrong} = 3\n")
    assert "\n" not in str(on_command_line.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_layer", "2.5"),
        ("n_layer", "two"),
        ("n_layer", ""),
        ("n_layer", "--help"),
        ("learning_rate", "fast"),
        ("learning_rate", "nan"),
        ("learning_rate", "inf"),
        ("learning_rate", "0"),
        ("muon_learning_rate", "0"),
        ("muon_weight_decay", "inf"),
        ("optimizer", "sgd"),
        ("weight_decay", "nan"),
        ("weight_decay", "inf"),
        ("grad_clip", "-1"),
        ("beta1", "1"),
        ("dropout", "1"),
        ("dropout", "nan"),
        ("resume", "perhaps"),
        ("compile", "maybe"),
        ("schedule", "linear"),
        ("ffn", "moe"),
        ("wandb", "yes"),
        ("min_lr", "1"),
        ("batch_size", "0"),
        ("eval_interval", "0"),
        ("keep_checkpoints", "0"),
        ("seed", "-1"),
        ("spline_width", "nan"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(UserError, match=name) as refused:
        parse([f"--{name}={value}"])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("arguments", [["--n_layer"], ["--n_layer", "--n_head", "2"], ["--n_layer", "2", "stray"]])
def test_a_command_line_with_a_gap_or_a_stray_word_is_refused(arguments: list[str]) -> None:
    with pytest.raises(UserError):
        parse(arguments)


@pytest.mark.parametrize("text", ["n_layer = [1]", "[n_layer]\nx = 1", "n_layer", "n_layer = 1\nn_layer = 2", b"\xff"])
def test_a_file_that_is_no_flat_toml_is_refused(text: str | bytes) -> None:
    with pytest.raises(UserError, match=r"some\.toml"):
        in_toml(text)


# -h and --help would ask for help. Every other token is data, and no argument can hold a zero byte.
TOKENS = st.one_of(
    st.sampled_from([f"--{name}" for name in FIELDS]),
    st.sampled_from([f"--{name}=".replace("_", "-") for name in FIELDS]),
    st.sampled_from(
        ["--", "-", "--=", "=", "-1", "1", "1e9999", "0x10", "True", "auto", "nan", "None", "--n_layer=-h"]
    ),
    st.builds("--{}={}".format, st.sampled_from(FIELDS), st.text(max_size=8)),
    st.text(max_size=8),
).filter(lambda token: token not in ("-h", "--help") and "\0" not in token)


@settings(deadline=None, max_examples=400)
@given(st.lists(TOKENS, max_size=6))
@example(["--n_layer", "1" * 5000])
@example(["a" * 5000])
def test_no_command_line_does_anything_but_parse_or_say_why_not(tokens: list[str]) -> None:
    try:
        found, _ = parse(tokens)
    except UserError as error:
        assert str(error)
    else:
        assert isinstance(found, Config)


TOML_VALUES = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(['"-h"', '"--help"', '"--n_layer"', "true", "[]", "{}", "1979-05-27", '"""a\nb"""', "0b1", "''"]),
    st.text(max_size=6).map(lambda text: f'"{text}"'),
)
TOML_LINES = st.one_of(
    st.builds("{} = {}".format, st.sampled_from(FIELDS), TOML_VALUES),
    st.text(max_size=12),
)


@settings(deadline=None, max_examples=400)
@given(st.lists(TOML_LINES, max_size=4).map("\n".join))
@example('dataset = "-h"')
@example('dataset = "--help"')
@example("n_layer = " + "1" * 5000)
@example("n_layer = " + "[" * 3000)
def test_no_toml_does_anything_but_parse_or_say_why_not(text: str) -> None:
    try:
        found = in_toml(text.encode(errors="surrogatepass"))
    except UserError as error:
        assert str(error)
    else:
        assert isinstance(found, Config)


def documented_fields(cls: type) -> dict[str, str]:
    """The fields of a dataclass that are followed by a string in its source, with that string."""
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    found = {}
    for field, text in pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            found[field.target.id] = text.value.value
    return found


def test_every_field_has_a_help_text_and_help_shows_it() -> None:
    texts = {name: text for group in option_groups(Config) for name, text in documented_fields(group).items()}
    assert set(texts) == set(FIELDS) and all(text.strip() for text in texts.values())
    shown = call(main, "--help")
    assert shown.code == 0 and not shown.err
    letters = "".join(filter(str.isalnum, shown.out))
    for name, text in texts.items():
        assert "".join(filter(str.isalnum, name)) in letters
        assert "".join(filter(str.isalnum, text)) in letters, name


def test_help_and_saved_options_have_the_same_headings_in_order(tmp_path: Path) -> None:
    headings = ["model", "splines", "splines in training", "data", "optimization", "machine", "evaluation and records"]
    save(Config(), tmp_path / "config.toml")
    written = [line[2:] for line in (tmp_path / "config.toml").read_text().splitlines() if line.startswith("# ")]
    shown = call(main, "--help").out
    assert written == headings
    assert sorted(headings, key=lambda heading: shown.index(f" {heading.replace(' ', '-')} options")) == headings


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("own", [{}, {"position": "learned", "qk_norm": "True"}, {"norm": "rmsnorm"}])
def test_an_architecture_sets_four_options_unless_they_are_given(architecture: str, own: dict[str, str]) -> None:
    chosen = {"architecture": architecture, **own}
    found, _ = parse([f"--{name}={value}" for name, value in chosen.items()])
    expected = {**ARCHITECTURES[architecture], **{name: value == "True" or value for name, value in own.items()}}
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_config_parses(path: Path) -> None:
    assert isinstance(parse([str(path)])[0], Config)
    assert config_module.parse([str(path), "--ffn", "mlp"])[0].ffn == "mlp"
