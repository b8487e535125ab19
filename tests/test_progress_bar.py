"""The progress bar: in a real terminal it leaves the progress lines alone, and elsewhere it is not there."""

import io
import math
import os
import re
import signal
import subprocess
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runs import ROOT, command, make_dataset, options, read_metrics
from tests.terminal import Terminal, screen
from training.progress import Progress, Stopwatch
from training.progress_bar import BLOCKS, Curve, InPlaceOfBar, ProgressBar, bar_line, resampled, sparkline

PROGRESS_LINE = re.compile(r"step \d+/\d+ \d+% \| loss \d+\.\d{3} .*eta [\d:]+")
BAR_LINE = re.compile(r"[█░]+  \d+%  loss \d+\.\d{3} [▁▂▃▄▅▆▇█]+  eta [\d:]+")


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@given(
    st.integers(-1, 200),
    st.floats(0, 1),
    st.floats(allow_nan=True),
    st.lists(st.floats(0, 20), max_size=300),
    st.one_of(st.floats(0, 1e7), st.just(math.nan)),
    st.booleans(),
)
def test_a_line_fits_its_terminal(
    columns: int, share: float, loss: float, losses: list[float], eta_s: float, blocks: bool
) -> None:
    curve = Curve()
    for each in losses:
        curve.add(each)
    line = bar_line(columns, share, loss, curve, eta_s, blocks)
    assert len(line) <= max(0, columns) and line.isprintable()
    assert blocks or line.isascii()
    assert not any(unicodedata.east_asian_width(character) in "WF" for character in line)
    if columns >= 5:
        assert f"{math.floor(100 * share)}%" in line
    if columns >= 80 and math.isfinite(loss) and 0 <= loss < 1e9 and math.isfinite(eta_s):
        assert f"loss {loss:.3f}" in line and "eta " in line
        assert (set(line) & set(BLOCKS[:-1]) != set()) <= blocks


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=2000), st.integers(1, 40))
def test_the_curve_is_the_means_of_the_losses(losses: list[float], most: int) -> None:
    curve = Curve(limit=64)
    for loss in losses:
        curve.add(loss)
    curve.add(math.nan)
    found = curve.values(most)
    whole = losses[: len(losses) // curve.steps_each * curve.steps_each]  # the last few are not complete yet
    assert len(found) <= most and len(curve.values(10**9)) < 64
    if whole:
        assert min(whole) - 1e-9 <= min(found) and max(found) <= max(whole) + 1e-9
    assert sum(curve.values(10**9)) * curve.steps_each == pytest.approx(sum(whole), abs=1e-6)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=50))
def test_blocks_rise_with_their_values(values: list[float]) -> None:
    heights = [BLOCKS.index(block) for block in sparkline(values)]
    order = sorted(range(len(values)), key=values.__getitem__)
    assert [heights[k] for k in order] == sorted(heights) and len(heights) == len(values)
    assert resampled(values, len(values)) == values


def test_it_is_drawn_a_few_times_a_second_however_fast_the_steps() -> None:
    now, drawn = [0.0], []
    stream = Screen()
    stream.write = drawn.append  # type: ignore[method-assign,assignment]
    bar, progress = ProgressBar(stream, 10**6, clock=lambda: now[0]), Progress(train_loss=2.0)
    stopwatch = Stopwatch(1, clock=lambda: now[0])
    for _ in range(20_000):  # ten seconds of steps of half a millisecond
        now[0] += 0.0005
        progress.step += 1
        stopwatch.step()
        bar.update(progress, stopwatch)
    assert 35 <= len(drawn) <= 41


def test_other_text_takes_its_place_and_it_comes_back_below() -> None:
    now = [0.0]
    stream = Screen()
    bar, stopwatch = ProgressBar(stream, 100, clock=lambda: now[0]), Stopwatch(1)
    out, err = InPlaceOfBar(stream, bar), InPlaceOfBar(io.StringIO(), bar)

    def draw(step: int) -> None:
        now[0] += 1
        bar.update(Progress(step=step, train_loss=2.5), stopwatch)

    draw(10)
    print("a line", file=out)  # type: ignore[arg-type]
    draw(20)
    print("half", end="", file=out)  # type: ignore[arg-type]
    draw(30)  # not into a line that is not complete
    print(" a line", file=out)  # type: ignore[arg-type]
    draw(40)
    print("an error", file=err)  # type: ignore[arg-type]
    draw(50)
    assert screen(stream.getvalue())[:2] == ["a line", "half a line"]
    assert "50%" in screen(stream.getvalue())[2] and len(screen(stream.getvalue())) == 3
    bar.erase()
    assert screen(stream.getvalue()) == ["a line", "half a line", ""]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "words")


LONG = {"max_iters": 10**6, "eval_interval": 10**6, "log_interval": 300, "sample_tokens": 0}


def interrupting(terminal: Terminal, is_time: Callable[[str], object]) -> Callable[[str], None]:
    """Sends Ctrl-C once it is time."""
    sent: list[int] = []

    def during(shown: str) -> None:
        if not sent and is_time(shown):
            sent.append(1)
            terminal.process.send_signal(signal.SIGINT)

    return during


@pytest.mark.needs("terminal")
def test_in_a_terminal_lines_stay_whole_and_ctrl_c_is_read(dataset: Path, tmp_path: Path) -> None:
    terminal = Terminal("train.py", *options(dataset, tmp_path / "run", **LONG), columns=100)
    try:
        shown = terminal.read_all(interrupting(terminal, lambda text: text.count(" | loss ") > 3 and "\r░" in text))
        assert terminal.process.wait(30) == 130
    finally:
        terminal.close()
    lines = screen(shown.replace("\r\n", "\n"))
    steps = [line for line in lines if line.startswith("step ")]
    logged = [record["step"] for record in read_metrics(tmp_path / "run")]
    assert [int(line.split()[1].split("/")[0]) for line in steps] == logged and len(steps) > 2
    assert all(PROGRESS_LINE.fullmatch(line) for line in steps)
    assert "SIGINT: finishing the step, then saving; again to stop at once" in lines
    assert any(line.startswith("stopped by SIGINT at step") for line in lines)
    bars = [line for line in lines if line.startswith(("█", "░"))]
    assert len(bars) <= 1, "the one that was there when Ctrl-C came"
    assert any(BAR_LINE.match(piece) for piece in shown.split("\r"))


@pytest.mark.needs("terminal")
def test_a_terminal_may_be_narrow_or_become_so(dataset: Path, tmp_path: Path) -> None:
    terminal = Terminal("train.py", *options(dataset, tmp_path / "run", **LONG), columns=120)
    bars = re.compile(r"\r([█░]+  \d+%[^\r\n]*|\d+%[^\r\n]*)")
    seen: list[tuple[int, int]] = []
    narrow = interrupting(terminal, lambda text: len(seen) == 3)

    def during(shown: str) -> None:
        drawn = bars.findall(shown)
        if len(seen) < 3 and len(drawn) > 2 + (seen[-1][1] if seen else 0):
            columns = (40, 12, 4)[len(seen)]
            terminal.resize(columns)
            seen.append((columns, len(drawn)))
        if len(seen) == 3 and len(drawn) > seen[-1][1] + 2:
            narrow(shown)

    try:
        shown = terminal.read_all(during)
        assert terminal.process.wait(30) == 130
    finally:
        terminal.close()
    drawn = bars.findall(shown)
    assert len(drawn[0]) > 60
    for (columns, start), stop in zip(seen, [count for _, count in seen[1:]] + [len(drawn)], strict=True):
        assert all(len(line.rstrip()) < columns for line in drawn[start + 2 : stop]), (
            columns
        )  # the terminal may be ahead of this test


@pytest.mark.needs("terminal")
@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"TERM": "dumb"}], ids=str)
def test_lesser_terminals_get_less(environment: dict[str, str], dataset: Path, tmp_path: Path) -> None:
    arguments = options(dataset, tmp_path / "run", **{**LONG, "max_iters": 300, "log_interval": 100})
    terminal = Terminal("train.py", *arguments, **environment)
    try:
        shown = terminal.read_all()
        assert terminal.process.wait(30) == 0
    finally:
        terminal.close()
    shown = shown.replace("\r\n", "\n")
    assert ("\r" in shown) == ("TERM" not in environment)
    assert "#" in shown or "TERM" in environment
    assert not set(shown) & set(BLOCKS)
    assert sum(bool(PROGRESS_LINE.fullmatch(line)) for line in screen(shown)) == 3


def test_a_pipe_gets_not_one_control_character(dataset: Path, tmp_path: Path) -> None:
    arguments = options(dataset, tmp_path / "run", **{**LONG, "max_iters": 300, "log_interval": 100})
    done = subprocess.run(
        command("train.py", *arguments), capture_output=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    text = (done.stdout + done.stderr).decode()
    assert done.returncode == 0 and text.count("step ") >= 3
    assert all(character == "\n" or character.isprintable() for character in text)
