"""The head of the report: a sentence about the run, its main numbers, and a row of its splines."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from splines.snapshot import VISIBLE
from splines.views import SplineView
from training.progress import duration
from webpage.run_data import RunData

COLORS = 6  # as many as report.css has for runs: --run0 …


def kicker(runs: Sequence[RunData]) -> str:
    return "Report of a training run" if len(runs) == 1 else f"{len(runs)} training runs side by side"


KINDS = {
    "splines": "layers of learnable splines",
    "gated_splines": "gated layers of learnable splines",
    "pair_splines": "gated layers of functions of two inputs",
    "mlp": "MLPs",
    "swiglu": "SwiGLU layers",
}


def lead(runs: Sequence[RunData]) -> str:
    run = runs[0]
    if len(runs) > 1:
        return escape(f"Curves and options of all; splines and samples of {run.name}.")
    config = run.config
    kind = "learnable splines in place of linear layers" if config.kan_swap else KINDS.get(config.ffn, config.ffn)
    words = f"A GPT of {config.n_layer} layers and width {config.n_embd} with {kind}"
    done = (
        f"trained for {run.steps:,} of {config.max_iters:,} steps"
        if run.steps < config.max_iters
        else (f"trained for {run.steps:,} steps")
    )
    tokenizer = run.facts.get("tokenizer")
    is_char = isinstance(tokenizer, dict) and tokenizer.get("name") == "char"
    return escape(f"{words}, {done} on {'the characters of ' if is_char else ''}{Path(config.dataset).name}.")


def figures(run: RunData) -> str:
    """The main numbers of one run, in large type."""
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in main_numbers(run)
    )
    return f'<dl class="figures">{cells}</dl>'


def comparison(runs: Sequence[RunData]) -> str:
    """The same numbers for several runs, with a row for each."""
    columns = [main_numbers(run) for run in runs]
    names = list(dict.fromkeys(name for found in columns for name, _, _ in found))
    rows = ""
    for k, (run, found) in enumerate(zip(runs, columns, strict=True)):
        values = {name: (value, note) for name, value, note in found}
        cells = "".join(
            f"<td><b>{escape(value)}</b><br><span class=small>{escape(note)}</span></td>"
            for value, note in (values.get(name, ("–", "")) for name in names)
        )
        rows += f'<tr><th scope=row><i class="run{k % COLORS}"></i>{escape(run.name)}</th>{cells}</tr>'
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in ("Run", *names))
    return f'<div class="panel scroll comparison"><table><tr>{head}</tr>{rows}</table></div>'


def main_numbers(run: RunData) -> list[tuple[str, str, str]]:
    """Name, value and note of each main number."""
    found: list[tuple[str, str, str]] = []
    if run.best:
        found.append(("Best validation loss", f"{run.best['val_loss']:.4f}", f"at step {run.best['step']:,}"))
    if "parameters" in run.facts:
        ffn = run.facts["ffn_parameters"]
        where = "splines" if run.facts["splines"] else "feed-forward layers"
        found.append(("Parameters", short(run.facts["parameters"]), f"{short(ffn)} in {where}"))
    if run.facts.get("splines"):
        points = f"{run.config.num_control_points} control points each"
        found.append(("Splines", f"{run.facts['splines']:,}", points))
    speeds = [line["tokens_per_second"] for line in run.lines if line.get("tokens_per_second")]
    if speeds:
        found.append(("Throughput", short(median(speeds)), "tokens a second"))
    if run.lines and run.lines[-1].get("elapsed_s") is not None:
        found.append(("Time", duration(run.lines[-1]["elapsed_s"]), "in all"))
    return found


def short(value: float) -> str:
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.0f}"


def strip_html(views: Sequence[SplineView]) -> str:
    """A row of small pictures of splines, which are shown without any script."""
    if not views:
        return ""
    limit = max(float(np.abs(view.control_points).max()) for view in views) or 1.0
    pictures = "".join(spline_svg(view, limit) for view in views)
    return f'<div class="strip">{pictures}</div>'


def spline_svg(view: SplineView, limit: float) -> str:
    width, height = 150.0, 96.0
    end = VISIBLE * view.spline_width

    def path(x: Any, y: Any) -> str:
        across = (np.asarray(x) / end + 1) / 2 * width
        down = (1 - np.asarray(y) / (1.15 * limit)) / 2 * height
        return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(across, down, strict=True))

    knots, points = view.grid.knots(), view.control_points
    left, right = view.grid.values(points, np.array([-end, end]))
    peak = max(float(view.histogram.max()), 1e-12)
    step = width / len(view.histogram)
    tops = [height * (1 - 0.6 * float(share) / peak) for share in view.histogram]
    area = "".join(f"L{k * step:.1f} {y:.1f}L{(k + 1) * step:.1f} {y:.1f}" for k, y in enumerate(tops))
    label = f"Spline {view.input} to {view.output} of layer {view.layer}"
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">'
        f'<path class="area" d="M0 {height:g}{area}L{width:g} {height:g}Z"/>'
        f'<path class="beyond" d="{path([-end, knots[0]], [left, points[0]])}"/>'
        f'<path class="beyond" d="{path([knots[-1], end], [points[-1], right])}"/>'
        f'<path class="curve" d="{path(knots, points)}"/></svg>'
    )
