"""Builds the report's HTML: fills in the templates and embeds styles, data and scripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from splines.views import SplineView
from training.config import Config
from webpage.head import COLORS, comparison, figures, kicker, lead, strip_html
from webpage.packing import PackedSplines
from webpage.run_data import RunData
from webpage.spline_table import advice, numbers
from webpage.weights import PackedModel

FOLDER = Path(__file__).parent / "assets"
SCRIPTS = (
    "theme.js", "drawing.js", "splines.js", "curves.js",
    "seriation.js", "families.js", "map.js", "kinds.js", "function.js", "explorer.js",
    "model.js", "reading.js", "sampler.js", "attribution.js", "changes.js", "live.js", "prediction.js", "routes.js",
    "maps.js", "main.js",
)  # fmt: skip
STRIP_SPLINES = 6
NOT_KNOWN = float("nan")


def build_page(
    runs: Sequence[RunData],
    packed: PackedSplines | None,
    strip: Sequence[SplineView],
    model: PackedModel | str,
    maps: dict[str, Any] | None,
    live: bool,
) -> str:
    """The page about `runs`. `packed`, `strip` and `model` (or why there is none) are those of the first one.

    `maps` are those of `webpage.maps.pack_maps`, of any of them.
    """
    first = runs[0]
    title = first.name if len(runs) == 1 else " · ".join(run.name for run in runs)
    data = {
        "runs": [run.script_data() for run in runs],
        "splines": packed.metadata if packed else None,
        "maps": maps,
        "model": None if isinstance(model, str) else model.metadata,
        "live": live,
    }
    blocks = dict(packed.blocks) if packed else {}
    if isinstance(model, PackedModel):
        blocks[model.metadata["block"]] = model.block
    parts = {
        "title": escape(title),
        "css": template("report.css"),
        "navigation": navigation(packed is not None, maps is not None, bool(first.samples)),
        "kicker": "Report of a run in progress, which this page follows" if live else kicker(runs),
        "lead": lead(runs),
        "model": model_section(first, model),
        "figures": figures(first) if len(runs) == 1 else comparison(runs),
        "strip": strip_html(strip),
        "legend": legend(runs),
        "loss_words": escape(loss_words(runs)),
        "loss_table": loss_table(runs),
        "splines": spline_section(first) if packed else "",
        "maps": maps_section(maps) if maps else "",
        "samples": SAMPLES if any(run.samples for run in runs) else "",
        "machine": machine(first),
        "commands": "".join(command_html(*pair) for pair in first.commands()),
        "configuration": configuration(runs),
        "footer": footer(packed),
        "data": script_json(data),
        "blocks": "\n".join(
            f'<script type="application/octet-stream" id="{name}">{block}</script>' for name, block in blocks.items()
        ),
        "scripts": "\n".join(template(name) for name in SCRIPTS),
    }
    return fill(template("report.html"), parts)


def template(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def fill(text: str, parts: dict[str, str]) -> str:
    """`text` with every {{name}} replaced. Values that contain {{…}} themselves are left as they are."""
    pieces = text.split("{{")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        filled += [parts[name], rest]
    return "".join(filled)


def script_json(data: Any) -> str:
    """JSON in which no text can end the script element around it."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def navigation(splines: bool, maps: bool, samples: bool) -> str:
    links = [("model", "The model"), ("curves", "Training")]
    links += [("splines", "Splines")] * splines + [("maps", "Maps")] * maps
    links += [("samples", "Samples")] * samples + [("run", "How it was made")]
    return "".join(f'<a href="#{anchor}">{text}</a>' for anchor, text in links)


def legend(runs: Sequence[RunData]) -> str:
    names = [(escape(run.name), k % COLORS) for k, run in enumerate(runs)]
    note = "<li>pale: training batches; strong: validation</li>"
    return "".join(f'<li><i class="run{color}"></i>{name}</li>' for name, color in names) + note


def loss_words(runs: Sequence[RunData]) -> str:
    words = [f"{run.name}: best {run.best['val_loss']:.4f} at step {run.best['step']}" for run in runs if run.best]
    return "Training and validation loss. " + "; ".join(words) + "."


def loss_table(runs: Sequence[RunData]) -> str:
    """The validation losses as a table, for readers who cannot see the chart."""
    columns = [{line["step"]: line["val_loss"] for line in run.evaluations} for run in runs]
    steps = sorted({step for losses in columns for step in losses})
    if not steps:
        return ""
    heads = "".join(f"<th scope=col>{escape(run.name)}</th>" for run in runs)
    rows = "".join(
        f"<tr><th scope=row>{step:,}</th>"
        + "".join(f"<td>{losses.get(step, NOT_KNOWN):.4f}</td>" for losses in columns)
        + "</tr>"
        for step in steps
    ).replace("nan", "–")
    return (
        f"<details><summary>Validation losses as a table</summary><div class=scroll><table>"
        f"<tr><th scope=col>Step</th>{heads}</tr>{rows}</table></div></details>"
    )


def model_section(run: RunData, model: PackedModel | str) -> str:
    if isinstance(model, str):
        return fill(template("no_model.html"), {"reason": escape(model)})
    of = f"{escape(run.name)} at step {model.metadata['step']:,}"
    return fill(
        template("model.html"), {"of": of, "splines": template("routes.html") if model.metadata["splines"] else ""}
    )


def spline_section(run: RunData) -> str:
    history = run.statistics
    return fill(template("splines.html"), {"advice": advice(history), "numbers": numbers(history)})


def maps_section(maps: dict[str, Any]) -> str:
    of = f"{escape(maps['run'])} at step {maps['step']:,}"
    options = "".join(f"<option value={number}>{number}</option>" for number in range(len(maps["blocks"])))
    return fill(template("maps.html"), {"of": of, "blocks": options})


SAMPLES = """<section id="samples" aria-labelledby="samples-title">
<h2 id="samples-title">What it writes</h2>
<p class="about">Drawn with the same seed at every checkpoint, so that the difference is what it has learnt.</p>
<div class="row"><label>Sample of <select id="sample-steps"></select></label></div>
<figure class="panel sample" style="margin-inline: 0"><figcaption class="sr" id="sample-caption"></figcaption>
<pre id="sample" tabindex="0"></pre></figure>
</section>"""


def machine(run: RunData) -> str:
    facts = run.facts
    if not facts:
        return ""
    impl = f", splines computed by {facts['splines_computed_by']}" if facts.get("splines_computed_by") else ""
    return escape(
        f"On {facts['machine']}, {facts['device']}{impl}; "
        f"torch {facts['torch']}, Python {facts['python']}. "
        f"{facts['train_tokens']:,} tokens to train on, {facts['val_tokens']:,} to validate."
    )


def command_html(about: str, text: str) -> str:
    return (
        f'<div class="command panel"><p>{escape(about)}</p><code>{escape(text)}</code>'
        f'<button class="copy" type="button">Copy</button></div>'
    )


def configuration(runs: Sequence[RunData]) -> str:
    """Every option of every run. Those that are not defaults, or differ between runs, come first."""
    default = asdict(Config())
    values = [asdict(run.config) for run in runs]
    special = [
        name
        for name in default
        if name not in ("out_dir", "resume")
        and any(v[name] != default[name] or v[name] != values[0][name] for v in values)
    ]
    rest = [name for name in default if name not in special and name != "resume"]
    head = "".join(f"<th scope=col>{escape(run.name)}</th>" for run in runs)

    def table(names: Sequence[str]) -> str:
        rows = ""
        for name in names:
            differs = len({str(v[name]) for v in values}) > 1
            cells = "".join(f"<td{' class=differs' * differs}>{escape(str(v[name]))}</td>" for v in values)
            rows += f"<tr><th scope=row>{name}</th>{cells}</tr>"
        return f'<div class="scroll"><table class="left"><tr><th scope=col>Option</th>{head}</tr>{rows}</table></div>'

    opened = f"<details open><summary>Options that are not the defaults</summary>{table(special)}</details>"
    return (opened if special else "") + f"<details><summary>All other options</summary>{table(rest)}</details>"


def footer(packed: PackedSplines | None) -> str:
    words = "One file that fetches nothing: keep it, send it, open it anywhere. "
    if packed:
        shown, there = len(packed.metadata["steps"]), packed.metadata["all_steps"]
        of = "all" if shown == there else f"{shown} of"
        words += (
            f"It holds {of} {there} recorded steps. Curves are the layers' own functions to within 10⁻⁶; "
            f"histograms are rounded to 1/65535."
        )
    return words
