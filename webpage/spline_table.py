"""Summarises the splines in numbers: a table with a row for each layer, and advice about bad grids."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pictures.sheets import capitalized
from splines import statistics as spline_statistics
from splines.statistics import LayerStatistics


def advice(history: Sequence[tuple[int, list[LayerStatistics]]]) -> str:
    """Advice about grids, from the last statistics."""
    if not history:
        return ""
    sentences = spline_statistics.grid_advice(history[-1][1]) + spline_statistics.curve_advice(history[-1][1])
    return "".join(f'<p class="advice">{escape(capitalized(text))}.</p>' for text in sentences)


def numbers(history: Sequence[tuple[int, list[LayerStatistics]]]) -> str:
    """A row for each layer: statistics of its splines at the end, and curves of two of them over the run."""
    if not history:
        return '<p class="about">metrics.jsonl holds no numbers of the splines.</p>'
    heads = (
        "Layer", "Curved share of variation", "Effectively linear", "Dead",
        "Activations outside the grid", "Cells in use", "Effective rank",
    )  # fmt: skip
    rows = ""
    for each in history[-1][1]:
        track = [next(s for s in layers if s.layer == each.layer) for _, layers in history]
        cells = each.num_control_points - 1
        rows += (
            f"<tr><th scope=row>{escape(capitalized(each.name))}</th>"
            f"<td>{spark([s.curved for s in track])} {share(each.curved)}</td>"
            f"<td>{share(each.linear)}</td><td>{share(each.dead)}</td>"
            f"<td>{spark([s.outside or 0.0 for s in track])} {share(each.outside)}</td>"
            f"<td>{'–' if each.used_cells is None else f'{each.used_cells:.1f}'} of {cells}</td>"
            f"<td>{each.effective_rank:.0f} of {each.max_rank}</td></tr>"
        )
    head = "".join(f"<th scope=col>{text}</th>" for text in heads)
    step = f"{history[-1][0]:,}"
    linear, dead, used = (
        share(value)
        for value in (1 - spline_statistics.LINEAR_SHARE, spline_statistics.DEAD_SHARE, spline_statistics.USED_CELL)
    )
    return (
        f'<div class="panel scroll"><table><tr>{head}</tr>{rows}</table></div>'
        f'<p class="small">At step {step}; the small curves run from the first evaluation to the last. '
        f"Effectively linear: a straight line explains at least {linear} of the variation. "
        f"Dead: less than {dead} of the standard deviation of a typical spline into the same output. "
        f"A cell is in use if {used} of the activations lie in it.</p>"
    )


def share(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.1 %" if 0 < value < 0.001 else f"{100 * value:.1f} %".replace(".0 %", " %")


def spark(values: Sequence[float]) -> str:
    """A curve of the size of a word. Its range is from 0 to its largest value."""
    top = max(values) or 1.0
    points = " ".join(
        f"{2 + 80 * k / max(1, len(values) - 1):.1f},{20 - 18 * value / top:.1f}" for k, value in enumerate(values)
    )
    return f'<svg viewBox="0 0 84 22" aria-hidden="true"><polyline class="spark" points="{points}"/></svg>'
