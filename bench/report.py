"""Time how a run's splines are recorded, drawn and shown in its report: `python bench/report.py RUN`.

RUN is the directory of a run with splines. Its dataset must still be there. --picture FILE also takes a picture of the
page's explorer, --model-picture FILE one of its live model.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone, before this folder

import common.threads  # noqa: F401  before torch

import torch
import tyro

from bench.shared.chromium import Browser, why_not
from bench.shared.machine import machine_name
from common.command_line import OptionParser
from common.errors import UserError, exit_on_user_error
from corpus.batches import evaluation_batches
from corpus.dataset import Dataset, ensure_prepared
from pictures.run_pictures import SplinePictures
from report import write_report
from splines.records import SplineRecords
from training.checkpoint import load_checkpoint
from training.metrics import read_metrics
from training.spline_recorder import SplineRecorder
from training.tracker import Tracker
from webpage.run_data import read_run

USAGE = "python bench/report.py RUN [--key value …]"
HOVER_MS = WRITE_MS = 3000
READY = "const done = arguments[0], look = () => live.model ? done() : setTimeout(look, 5); look()"
WRITE = """
const done = arguments[1];
$('write').click();
setTimeout(() => {
  const { count, since } = live.writing;
  done(count / (performance.now() - since) * 1000);
}, arguments[0]);
"""
PASS = """
const one = new Reading(live.model, live.model.splines);
one.take(Array.from({ length: 500 }, (_, k) => k % live.model.spec.vocabulary.length));
const milliseconds = [];
while (!one.isDone) { const start = performance.now(); one.advance(); milliseconds.push(performance.now() - start); }
return milliseconds.sort((a, b) => a - b)[Math.floor(milliseconds.length / 2)];
"""
HOVER = """
const done = arguments[1], limit = arguments[0], area = document.querySelector('.map');
document.documentElement.style.scrollBehavior = 'auto';
area.scrollIntoView({ block: 'center' });
const box = $('map').getBoundingClientRect(), start = performance.now(), slow = [];
let last = start;
const step = () => {
  const now = performance.now(), t = now - start;
  slow.push(now - last); last = now;
  if (t > limit) {
    slow.sort((a, b) => a - b);
    done([slow.length / t * 1000, slow[Math.floor(0.99 * slow.length)]]);
    return;
  }
  const clientX = box.left + box.width * (0.5 + 0.49 * Math.sin(t / 90));
  const clientY = box.top + box.height * (0.5 + 0.49 * Math.cos(t / 131));
  area.dispatchEvent(new PointerEvent('pointermove', { bubbles: true, pointerType: 'mouse', clientX, clientY }));
  requestAnimationFrame(step);
};
requestAnimationFrame(step);
"""


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[Path]
    """The run's directory."""
    repeats: int = 5
    """Repetitions, of which the median is reported."""
    threads: int = 1
    """CPU threads."""
    picture: Path | None = None
    """A file for a picture of the page's explorer (.png)."""
    model_picture: Path | None = None
    """A file for a picture of the page's live model (.png)."""

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.threads < 1:
            raise UserError("repeats and threads must be at least 1")


@exit_on_user_error
def main() -> None:
    options = OptionParser(Options, USAGE, positional="run").parse(sys.argv[1:])
    torch.set_num_threads(options.threads)
    print(f"{machine_name('cpu')}, torch {torch.__version__}, {options.threads} threads, median of {options.repeats}")
    record_s = time_recording(options)
    between_s = time_between_evaluations(options.run)
    print(f"recording the splines   {1000 * record_s:>8.0f} ms a checkpoint")
    print(f"training between two    {1000 * between_s:>8.0f} ms: {100 * record_s / between_s:.2f} % longer")
    print(f"drawing all pictures    {1000 * time_drawing(options):>8.0f} ms, once, at the end")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        seconds = median(lambda: write_report([options.run], page), options.repeats)
        print(f"writing the report      {1000 * seconds:>8.0f} ms, {page.stat().st_size / 1e6:.1f} MB")
        if why_not():
            print(f"in the browser: not measured, {why_not()}")
            return
        for name, value in in_browser(page, options).items():
            print(f"{name:23} {value}")


def time_recording(options: Options) -> float:
    """Seconds that recording the splines adds to a checkpoint: run text through the model, measure and write."""
    checkpoint = load_checkpoint(options.run)
    dataset = Dataset.open(ensure_prepared(checkpoint.config.dataset), verify=False)
    config = replace(checkpoint.config, wandb="disabled", splines=True)
    with tempfile.TemporaryDirectory() as folder:
        tracker = Tracker(config, Path(folder), None)
        recorder = SplineRecorder(Path(folder), config, dataset.tokens("val"), tracker)
        if recorder.record(checkpoint.model, 1) is None:
            raise UserError(f"{options.run} has no splines")
        return median(lambda: recorder.record(checkpoint.model, 1), options.repeats)


def time_between_evaluations(run: Path) -> float:
    steps = [line["step_ms"] for line in read_metrics(run) if line.get("step_ms")]
    if not steps:
        raise UserError(f"{run} has no timed steps in its metrics.jsonl; train longer")
    return statistics.median(steps) / 1000 * read_run(run).config.eval_interval


def time_drawing(options: Options) -> float:
    records = SplineRecords(options.run)
    snapshots = records.read(records.steps()[-1])
    with tempfile.TemporaryDirectory() as folder:
        return median(lambda: SplinePictures(folder).draw(0, snapshots), 1)


def median(action: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def in_browser(page: Path, options: Options) -> dict[str, str]:
    with Browser() as browser:
        browser.emulate(1280, 900)
        browser.open(page)
        paint = browser.run("return performance.getEntriesByName('first-contentful-paint')[0].startTime")
        unpacking = browser.run(
            "const start = performance.now(); DATA.splines.steps.forEach((_, k) => layersAt(k));"
            "return performance.now() - start"
        )
        frames, slow = browser.wait(HOVER, HOVER_MS)
        if options.picture:
            take_portrait(browser, page, options.picture, "#splines", 1010)
        writing = live_model(browser, page) if browser.run("return DATA.model !== null") else {}
        if options.model_picture and writing:
            take_portrait(browser, page, options.model_picture, "#model", 950, validation_text(options.run))
    return {
        "first paint": f"{paint:>8.0f} ms",
        "unpacking all steps": f"{unpacking:>8.0f} ms",
        "hovering": f"{frames:>8.0f} frames a second, 99 of 100 within {slow:.0f} ms",
        **writing,
    }


def live_model(browser: Browser, page: Path) -> dict[str, str]:
    browser.open(page)
    browser.wait(READY)
    one = browser.run(PASS)
    speed = browser.wait(WRITE, WRITE_MS)
    return {
        "the model's weights": f"{browser.run('return $(DATA.model.block).textContent.length') / 1e6:>8.1f} MB",
        "one character": f"{one:>8.2f} ms, a forward pass",
        "writing": f"{speed:>8.0f} characters a second",
    }


def validation_text(run: Path) -> str:
    """Some lines that the model has not been trained on."""
    checkpoint = load_checkpoint(run)
    tokens = Dataset.open(ensure_prepared(checkpoint.config.dataset), verify=False).tokens("val")
    windows, _ = next(evaluation_batches(tokens, 280, 1, 7))
    return checkpoint.tokenizer.decode(windows[0].tolist())


def take_portrait(browser: Browser, page: Path, picture: Path, section: str, height: int, text: str = "") -> None:
    """A section of the page, at half as many pixels again."""
    browser.emulate(1240, height, "light", scale=1.5)
    browser.open(page)
    browser.run(
        "document.documentElement.style.scrollBehavior = 'auto'; document.querySelector(arguments[0]).scrollIntoView()",
        section,
    )
    browser.wait("setTimeout(arguments[0], 300)")
    if section == "#model":
        browser.wait(READY)
        browser.run("$('text').value = arguments[0]; takeText(); $('read-text').focus()", text)
        browser.press(*["left"] * 24)
        browser.wait(
            "const done = arguments[0], look = () => (routes.list.length && !live.jobs.length) "
            "? done() : setTimeout(look, 100); setTimeout(look, 1500)"
        )
        browser.run("document.activeElement.blur(); scrollTo(0, $('model').offsetTop - 8)")
    picture.parent.mkdir(parents=True, exist_ok=True)
    browser.screenshot(picture)


if __name__ == "__main__":
    main()
