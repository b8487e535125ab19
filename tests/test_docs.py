"""The documentation keeps up with the code: its links lead somewhere, its commands parse, its examples run."""

import dataclasses
import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.command_line import OptionParser
from common.errors import UserError
from tests.runs import ROOT
from training.config import PARSER, Config, parse

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README_LINES = 150
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
USAGE = re.compile(r"\[--?[^\]]*\]|\[configs/NAME\.toml\]|…$")  # in a synopsis: [--key value …]
# Paths that the pages name: in the code's own folders, and not patterns such as data/NAME/prepare.py.
PATH = re.compile(
    r"(?<![\w./~-])(?:backends|bench|common|configs|corpus|data|docs|pictures|splines|tests|training|webpage)"
    r"(?:/[a-z_0-9]+)+\.(?:py|toml|cpp|js|html|css)\b"
)

OPTIONS_OF_OTHERS = ("--no-deps", "--help")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page: Path) -> str:
    """The text of a page without its blocks of code."""
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall(page.read_text(encoding="utf-8")) if language in languages]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found: set[str] = set()
    seen: Counter[str] = Counter()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def commands(text: str) -> list[tuple[str, list[str]]]:
    """The Python scripts that shell text runs, each with its arguments."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        line = line.replace("'", "") if line.count("'") % 2 else line  # a line of a longer quotation
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        words = list(lexer)
        for k, word in enumerate(words):
            starts = k == 0 or Path(words[k - 1]).name in ("python", "python3") or "torchrun" in words[:k]
            if word.endswith(".py") and starts:
                arguments = words[k + 1 :]
                end = next(
                    (i for i, each in enumerate(arguments) if each and set(each) <= set("&|;<>")), len(arguments)
                )
                found.append((word, [each for each in arguments[:end] if not re.fullmatch(r"\$[a-z]+", each)]))
    return found


def commands_of(page: Path) -> list[tuple[str, list[str]]]:
    spans = [" ".join(span.split()) for span in SPAN.findall(prose(page))]
    spans = [span for span in spans if not span.endswith(".py")]  # a file is meant
    return [each for text in [*blocks(page, "sh", "bash"), *spans] for each in commands(USAGE.sub("", text))]


class Parsed(BaseException):
    """The command line has been read; the rest of the command must not run."""


def check_names_and_types(parser: OptionParser[Any], tokens: list[str]) -> None:
    """Whether values fit the machine (a GPU) or each other is not asked."""
    for name, value in parser.pairs(tokens):
        if name != parser.positional:
            parser._typed(name, value)
    raise Parsed


def check_arguments(parser: ArgumentParser, _parse: Callable[..., Any] = ArgumentParser.parse_args) -> None:
    _parse(parser)
    raise Parsed


def read_command_line(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse as the script does. UserError or SystemExit for an option or value that it does not have."""
    if script == "train.py":
        parse(arguments)
        return
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setattr(OptionParser, "parse", check_names_and_types)
    monkeypatch.setattr(ArgumentParser, "parse_args", check_arguments)
    if script.startswith("data/"):
        main = runpy.run_path(str(ROOT / script))["main"]
    else:
        main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
    with pytest.raises(Parsed):
        main.__wrapped__()


@each_page
def test_every_relative_link_and_anchor_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors(target), (
                f"{page.name} links to {link}; {target.name} has {sorted(anchors(target))}"
            )


@each_page
def test_no_heading_stands_twice(page: Path) -> None:
    headings = re.findall(r"^#+ .*$", prose(page), re.MULTILINE)
    assert headings and not {heading: n for heading, n in Counter(headings).items() if n > 1}


@each_page
def test_every_path_that_is_named_exists(page: Path) -> None:
    assert not [path for path in PATH.findall(page.read_text(encoding="utf-8")) if not (ROOT / path).exists()]


@each_page
def test_every_command_names_a_script_and_options_that_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for script, arguments in commands_of(page):
        assert (ROOT / script).is_file(), f"{page.name} runs {script}"
        line = shlex.join([script, *arguments])
        with monkeypatch.context() as patch:
            try:
                read_command_line(script, arguments, patch)
            except (UserError, SystemExit) as error:
                pytest.fail(f"{page.name}: {line}: {error}")


def every_option() -> set[str]:
    """The names of the options of all commands and benchmarks."""
    names = {field.name for field in dataclasses.fields(Config)}
    for path in [*ROOT.glob("*.py"), *(ROOT / "bench").glob("*.py")]:
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for group in (getattr(module, "Options", None), getattr(module, "Arguments", None)):
            names |= {field.name for field in dataclasses.fields(group)} if dataclasses.is_dataclass(group) else set()
    return names


@each_page
def test_every_option_that_a_sentence_names_exists(page: Path) -> None:
    known = every_option()
    for span in SPAN.findall(prose(page)):
        if span.startswith("--") and not span.startswith(OPTIONS_OF_OTHERS):
            for name, value in re.findall(r"(?<!\S)--([\w-]+)[\s=]*(\S*)", span):
                assert name.replace("-", "_") in known, f"{page.name} names --{name}"
                if hasattr(Config, name):
                    PARSER.known(name, value)  # UserError for a value of yesterday


def test_commands_are_found_in_blocks_and_sentences() -> None:
    text = "# first\npython a.py x --more 'b;c' \\\n  --d 1 && torchrun --n=2 b.py --e 2 | cat  # python c.py\n"
    assert commands(text) == [("a.py", ["x", "--more", "b;c", "--d", "1"]), ("b.py", ["--e", "2"])]
    assert sum(len(commands_of(page)) for page in PAGES) > 50


@pytest.mark.parametrize("line", ["train.py --ffn kan", "plot.py RUN --layers 1", "bench/gpt.py a.toml --tuned True"])
def test_a_command_of_yesterday_is_found_out(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ((script, arguments),) = commands(line)
    with pytest.raises(UserError):
        read_command_line(script, arguments, monkeypatch)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


def test_the_python_examples_run(tmp_path: Path) -> None:
    code = "\n".join(text for page in PAGES for text in blocks(page, "python"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert code.count("KANLayer(") > 1 and done.returncode == 0, done.stderr
