"""A leading ~ means the home directory in every path of an option or a config file."""

import importlib
import os
import runpy
from pathlib import Path

import pytest

import convert
import plot
import report
import sample
import simplify
import train
from backends import native_build
from common.command_line import OptionParser
from tests.runs import ROOT, assert_one_sentence, call, make_dataset, options, random_words
from training.config import parse

# The options of each command, its positional one, and those that name files and folders.
PATHS = {
    "training.config.Config": (None, ["out_dir", "init_from"]),
    "sample.Options": ("out_dir", ["out_dir", "prompt_file"]),
    "plot.Options": ("out_dir", ["out_dir", "output"]),
    "report.Options": ("out_dirs", ["out_dirs", "output"]),
    "simplify.Options": ("out_dir", ["out_dir", "output"]),
    "convert.Options": ("out_dir", ["out_dir", "output"]),
    "export.Options": ("out_dir", ["out_dir", "output"]),
    "bench.gpt.Arguments": ("race", ["race", "nanogpt", "output", "plot"]),
    "bench.grids.Arguments": (None, ["output", "plot"]),
    "bench.layer.Options": (None, ["output", "plot"]),
    "bench.report.Options": ("run", ["run", "picture"]),
    "bench.scaling.Options": (None, ["config"]),
    "bench.speedrun.Options": (None, ["config", "nanogpt"]),
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory. Commands start in another one, where a folder named ~ would be found."""
    for name in ("home", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv(
        "XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    )  # built kernels
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


@pytest.mark.parametrize("name", PATHS)
def test_every_path_option_of_every_command_is_expanded(home: Path, name: str) -> None:
    module, _, options = name.rpartition(".")
    positional, paths = PATHS[name]
    parser: OptionParser = OptionParser(getattr(importlib.import_module(module), options), "", positional)
    for path in paths:
        for text, meant in (
            ("~/a b", home / "a b"),
            ("~", home),
            ("x~/~", "x~/~"),
            ("~no-such-user/x", "~no-such-user/x"),
        ):
            assert parser.pairs([f"--{path}={text}"]) == parser.pairs([f"--{path}", text]) == [(path, str(meant))]
            if path == positional:
                assert parser.pairs([text]) == [(path, str(meant))]


def test_a_run_in_the_home_directory(home: Path) -> None:
    words = make_dataset(home / "words")
    assert call(train.main, *options("~/words", "~/r", splines=True, report="end")).code == 0
    assert call(train.main, "--out_dir=~/r", "--resume=True", "--max_iters=14").code == 0
    (home / "my.toml").write_text('out_dir = "~/s"\nffn = "mlp"')
    assert parse(["~/my.toml"])[0].out_dir == str(home / "s")
    without_out_dir = [option for option in options(words, "", ffn="mlp") if not option.startswith("--out_dir")]
    assert call(train.main, "~/my.toml", *without_out_dir).code == 0
    assert call(train.main, *options(words, "~/t", init_from="~/s", ffn="mlp")).code == 0
    for main, arguments in (
        (sample.main, ["~/r"]),
        (plot.main, ["~/r", "--layer=0", "--output=~/a.png"]),
        (report.main, ["~/r", "~/s", "--output", "~/a.html"]),
        (simplify.main, ["~/r", "--output=~/u"]),
    ):
        assert call(main, *arguments).code == 0, (main, arguments)
    assert_one_sentence(call(convert.main, "~/r"), str(home / "r"), "one file already")
    there = {path.name for path in home.iterdir() if not path.name.startswith(".")}
    assert there == {"words", "my.toml", "r", "s", "t", "u", "a.png", "a.html"}
    assert not list(Path.cwd().iterdir())


def test_a_text_in_the_home_directory_is_prepared(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "my.txt").write_text(random_words(600))
    for script in ("data/text/prepare.py", "data/openwebtext/prepare.py"):
        main = runpy.run_path(str(ROOT / script))["main"]
        given: list[Path] = []
        monkeypatch.setitem(main.__wrapped__.__globals__, "prepare", lambda path, *_, given=given: given.append(path))
        assert call(main, "~/my.txt").code == 0 and given == [home / "my.txt"]


def test_a_cache_in_the_home_directory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service or a container may set the variable without a shell, which would expand it."""
    monkeypatch.setenv("XDG_CACHE_HOME", "~/.kept")
    if native_build.sys.platform != "darwin":
        assert native_build.cache_directory() == home / ".kept/splinegpt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    native_build.cache_directory()
    assert not list(Path.cwd().iterdir())
