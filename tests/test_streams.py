"""Commands work with standard streams that are closed or whose encoding lacks characters."""

import io
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import convert
import export
import plot
import report
import sample
import simplify
import train
from bench import options as bench_options
from tests.runs import ROOT, call, command, make_dataset, options, resume_options
from training.checkpoint import load_checkpoint

WORDS = "春眠不觉晓 处处闻啼鸟 夜来风雨声 花落知多少\n" * 40
Call = tuple[Callable[[], None], list[object]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model writes Chinese."""
    folder = tmp_path_factory.mktemp("春")
    arguments = options(make_dataset(folder / "诗", WORDS), folder / "眠", splines=True)
    assert call(train.main, *arguments).code == 0
    return folder / "眠"


def commands(run: Path, folder: Path) -> dict[str, Call]:
    """Every command with arguments that make it print characters outside ASCII. It writes its files to `folder`."""
    text = folder / "晓.txt"
    text.write_text(WORDS, encoding="utf-8")
    prepare = runpy.run_path(str(ROOT / "data/text/prepare.py"))["main"]
    again = [*options(run.parent / "诗", folder / "晓", max_iters=2, splines=True)]
    return {
        "train": (train.main, again),
        "train, resumed": (train.main, [*resume_options(folder / "晓"), "--max_iters=4", "--eval_interval=2"]),
        "train --help": (train.main, ["--help"]),
        "sample": (sample.main, [run, "--prompt", "春", "--max_new_tokens", 20]),
        "plot": (plot.main, [run, "--layer", 0, "--output", folder / "花.png"]),
        "report": (report.main, [run, "--output", folder / "花.html"]),
        "simplify": (simplify.main, [run, "--output", folder / "落"]),
        "simplify --fit": (simplify.main, [run, "--fit", 2]),
        "convert": (convert.main, [run]),
        "export": (export.main, [run, "--output", folder / "出"]),
        "prepare --help": (prepare, ["--help"]),
        "prepare": (prepare, [text, "--name", "多少"]),
        "bench --help": (bench_options.main, ["--help"]),
    }


def exit_codes(calls: dict[str, Call], monkeypatch: pytest.MonkeyPatch, stream: Callable[[], object]) -> dict[str, int]:
    """Run each command with new streams as standard output and standard error, and return how it ended."""
    codes = {}
    for name, (main, arguments) in calls.items():
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["command.py", *map(str, arguments)])
            patch.setattr(sys, "stdout", stream())
            patch.setattr(sys, "stderr", stream())
            try:
                main()
                codes[name] = 0
            except SystemExit as end:
                codes[name] = end.code if isinstance(end.code, int) else int(end.code is not None)
    return codes


# Exit codes other than 0: convert finds a checkpoint that is one file already, prepare gets a name in other letters.
EXPECTED = {"convert": 2, "prepare": 2}


def test_every_command_ends_as_ever_where_its_output_and_errors_are_closed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = commands(run, tmp_path)
    codes = exit_codes(calls, monkeypatch, lambda: None)
    assert codes == {name: EXPECTED.get(name, 0) for name in calls}
    assert load_checkpoint(tmp_path / "晓").step == 4 and (tmp_path / "花.html").is_file()


@pytest.mark.parametrize(("encoding", "errors"), [("cp1252", "strict"), ("ascii", "surrogateescape")])
def test_every_command_writes_escapes_for_what_an_encoding_lacks(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, errors: str
) -> None:
    streams: list[io.TextIOWrapper] = []

    def stream() -> io.TextIOWrapper:
        streams.append(io.TextIOWrapper(io.BytesIO(), encoding, errors, write_through=True))
        return streams[-1]

    calls = commands(run, tmp_path)
    codes = exit_codes(calls, monkeypatch, stream)
    assert codes == {name: EXPECTED.get(name, 0) for name in calls}
    written = [each.buffer.getvalue() for each in streams]
    said = dict(zip(calls, zip(written[::2], written[1::2], strict=True), strict=True))
    assert said["sample"][0] == call(*sample_call(calls)).out.encode(encoding, "backslashreplace")
    for name in ("train", "train, resumed", "plot", "report", "simplify", "export"):
        assert re.search(rb"\\u[0-9a-f]{4}", said[name][0]), (name, said[name])
    assert rb"\u591a\u5c11" in said["prepare"][1]


def sample_call(calls: dict[str, Call]) -> tuple[object, ...]:
    main, arguments = calls["sample"]
    return main, *arguments


def test_a_handler_that_the_user_has_chosen_is_kept(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", "replace", write_through=True)
    assert exit_codes({"sample": (sample.main, [run, "--prompt", "春"])}, monkeypatch, lambda: stream) == {"sample": 0}
    written = stream.buffer.getvalue()
    assert written.startswith(b"?") and b"\\u" not in written


@pytest.mark.parametrize("redirections", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path, redirections: str) -> None:
    """Otherwise the output of a library or compiler could go into that file."""
    code = (
        "import os, subprocess, sys; from common.streams import repair_streams; repair_streams()\n"
        "with open(sys.argv[1], 'w') as file:\n"
        "    for number in (1, 2): os.write(number, b'noise\\n')\n"
        "    subprocess.run(['sh', '-c', 'echo noise; echo noise >&2'], check=True)\n"
        "    file.write('content')"
    )
    shell = ["sh", "-c", f'exec "$@" {redirections}', "sh", sys.executable, "-c", code, str(tmp_path / "file")]
    subprocess.run(shell, cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "file").read_text() == "content"


def test_a_process_without_any_stream_trains_a_whole_run(run: Path, tmp_path: Path) -> None:
    arguments = command("train.py", *options(run.parent / "诗", tmp_path / "run"))
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *arguments], env=os.environ, timeout=60)
    assert done.returncode == 0 and load_checkpoint(tmp_path / "run").step == 12


def test_every_command_begins_by_mending_its_streams() -> None:
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("bench/*.py"), *ROOT.glob("data/*/prepare.py")]
    texts = {script: script.read_text(encoding="utf-8") for script in scripts}
    there = {script for script, text in texts.items() if '__name__ == "__main__"' in text}
    assert len(there) > 20
    assert not [script for script in there if "@exit_on_user_error\ndef main() -> None:" not in texts[script]]
