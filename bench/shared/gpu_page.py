"""What is made from a record of `bench/gpu.py`: the section of docs/gpu.md, and the table that `auto` goes by."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backends import BACKENDS, triton_tiles
from backends.cuda_choice import ANY, Entry, table
from bench.shared.gpu_plan import STEPS
from common.errors import UserError
from common.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "gpu.md"
PUBLISHED = ROOT / "docs" / "results" / "gpu.json"
BEGIN, END = "<!-- made by bench/gpu.py --page True: begin -->", "<!-- made by bench/gpu.py --page True: end -->"
NEVER = """## Measured on a GPU

**SplineGPT has never run on a GPU.** Nothing is measured here; what this project says of GPUs is calculated or seen in
compiled code. Whoever has one for half an hour can change that:

```sh
python bench/gpu.py --minutes 20      # --plan True prints the steps
cp runs/gpu/gpu.json docs/results/gpu.json && python bench/gpu.py --page True
python bench/gpu.py --table True > choice.json && mv choice.json backends/cuda_choice.json
```
"""


def published(path: Path | None = None) -> dict[str, Any] | None:
    """The record at `path`, or the published one; None if there is none. UserError if it is no record of a GPU."""
    if path is None and not PUBLISHED.is_file():
        return None
    path = path or PUBLISHED
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        rehearsal = record["rehearsal"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as a record of bench/gpu.py ({error})") from error
    if rehearsal:
        raise UserError(f"{path} is of a rehearsal on a CPU, whose times mean nothing; give a record of a GPU")
    return record


def write(record: dict[str, Any] | None, page: Path = PAGE) -> Path:
    """Put the section into the page; its path."""
    text = with_section(page.read_text(encoding="utf-8") if page.is_file() else "", section(record))
    write_atomically(page, lambda path: path.write_text(text, encoding="utf-8"))
    return page


def with_section(page: str, text: str) -> str:
    """The page with the section in its place, or at its end if it has none."""
    marked = f"{BEGIN}\n{text.strip()}\n{END}\n"
    before, begin, rest = page.partition(BEGIN)
    if not begin:
        return f"{page.rstrip()}\n\n{marked}" if page.strip() else f"# GPUs\n\n{marked}"
    return before + marked + rest.partition(END)[2].lstrip("\n")


def section(record: dict[str, Any] | None) -> str:
    """Markdown, from a record alone."""
    if record is None:
        return NEVER
    found = result_of(record, "preflight")
    versions, gpu = found.get("versions", {}), found.get("gpu", {})
    lines = [
        "## Measured on a GPU",
        "",
        f"{gpu.get('name')}, driver {gpu.get('driver')}, CUDA {gpu.get('cuda')}, torch {versions.get('torch')}, triton "
        f"{versions.get('triton')}; by `python bench/gpu.py`.",
        "",
        *heading("step | status | seconds |"),
    ]
    for step in STEPS:
        outcome = record["steps"].get(step.name, {"status": "not run", "seconds": 0, "result": {}})
        words = outcome.get("why") or outcome["result"].get("summary", "")
        lines.append(f"| {step.name} | {outcome['status']} | {outcome['seconds']:.0f} | {cell(words)} |")
    for columns, rows_of in TABLES.items():
        rows = list(rows_of(record))
        lines += ["", *heading(columns), *rows] if rows else []
    return "\n".join(lines) + "\n"


def layer_rows(record: dict[str, Any]) -> Iterator[str]:
    tables = result_of(record, "layer").get("tables", {})
    for grid, each in tables.items():
        for row in each["results"]:
            memory = f"{row['memory'] / 2**20:,.0f}" if row["memory"] is not None else ""
            forward, training = row["forward"], row["training"]
            times = f"{forward['ms']:.2f} | {training['ms']:.2f} | {training['mlp_over_it']:.2f}"
            queued = " | ".join(number(training.get(name)) for name in ("queued_ms", "queued_mlp_over_it"))
            yield f"| {grid} | {cell(row['contestant'])} | {times} | {queued} | {memory} |"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def run_rows(record: dict[str, Any]) -> Iterator[str]:
    runs = [row for name in ("shakespeare", "gpt2", "best") for row in result_of(record, name).get("runs", [])]
    for row in runs:
        if "failed" in row:
            yield f"| {row['config']} | {row['run']} | {row['dataset']} | failed: {cell(row['failed'])} | | | | |"
            continue
        loss = row["best_val_loss"]
        speed = f"{row['step']} | {row['tokens_per_second']:,.0f} | {row['step_ms']:.1f}"
        losses = f"{row['train_loss']:.3f} | {f'{loss:.3f}' if loss is not None else ''}"
        yield f"| {row['config']} | {row['run']} | {row['dataset']} | {speed} | {losses} |"


def kernel_rows(record: dict[str, Any]) -> Iterator[str]:
    for row in result_of(record, "times").get("kernels", []):
        yield f"| {row['grid']} | {row['impl']} | {row['pass']} | {row['ms']:.3f} | {row['useful_tflops']:.0f} |"


def queued_rows(record: dict[str, Any]) -> Iterator[str]:
    for row in result_of(record, "times").get("layers", []):
        if "ms" in row:
            yield f"| {row['grid']} | {cell(row['contestant'])} | {row['ms']:.2f} |"


def profile_rows(record: dict[str, Any]) -> Iterator[str]:
    for row in result_of(record, "profile").get("kernels", []):
        yield f"| {cell(row['name'])} | {row['launches']} | {row['ms']:.1f} |"


TABLES = {
    "layer, G | contestant | forward, ms | both, ms | MLP / it | queued, ms | MLP / it | memory, MiB": layer_rows,
    "G | contestant | forward and backward, queued, ms": queued_rows,
    "run | | data | steps | tokens/s | step, ms | training loss | best validation loss": run_rows,
    "G | impl | pass | ms | useful TFLOP/s": kernel_rows,
    "kernel in three steps of gpt2_124m | launches | ms": profile_rows,
}


def heading(columns: str) -> tuple[str, str]:
    return f"| {columns} |", "|---" * (columns.count("|") + 1) + "|"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def result_of(record: dict[str, Any], step: str) -> dict[str, Any]:
    return record["steps"].get(step, {}).get("result", {})


# ---- what auto takes -------------------------------------------------------------------------------------------------


def table_text(record: dict[str, Any] | None) -> str:
    """backends/cuda_choice.json with the fastest impl of each grid that the record has. UserError if it has none."""
    tables = result_of(record, "layer").get("tables", {}) if record else {}
    if record is None or not tables:
        raise UserError("there are no measured layers to make the table from; run python bench/gpu.py first")
    gpu = next(iter(tables.values()))["gpu"]
    major, minor = map(int, gpu["compute_capability"].split("."))
    kind = triton_tiles.generation((major, minor)) if (major, minor) >= triton_tiles.OLDEST else ANY
    entries = [fastest(int(grid), tables[grid], gpu) for grid in sorted(tables, key=int)]
    whole = {**table(), kind: entries + (table()[ANY] if kind == ANY else [])}
    rows = {name: [dataclasses.asdict(entry) for entry in of_kind] for name, of_kind in whole.items()}
    return json.dumps(rows, indent=1) + "\n"


def fastest(grid: int, measured: dict[str, Any], gpu: dict[str, Any]) -> Entry:
    """Of our backends in training, compiled where that was timed, since training compiles on a GPU."""
    compiled = any(row["contestant"].endswith(" compiled") for row in measured["results"])
    times = {
        row["contestant"].removesuffix(" compiled"): row["training"].get("queued_ms") or row["training"]["ms"]
        for row in measured["results"]
        if row["contestant"].endswith(" compiled") is compiled
    }
    ours = sorted((ms, name) for name, ms in times.items() if name in BACKENDS)
    if not ours:
        raise UserError(f"no impl of ours was timed with {grid} control points; run python bench/gpu.py --only layer")
    (ms, name), *others = ours
    tokens, width = measured["results"][0]["tokens"], measured["results"][0]["width"]
    beside = f", {others[0][1]} {others[0][0]:.2f}" if others else ""
    versions = f"torch {measured['torch']}, Triton {gpu['triton']}"
    why = f"{ms:.2f} ms forward and backward{beside} ({gpu['name']}, {versions}, {tokens:,} x {width}, G={grid})"
    return Entry(grid, tokens // 16, name, why)
