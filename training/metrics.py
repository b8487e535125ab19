"""metrics.jsonl, the log of a run: a JSON object for each step that was logged."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.files import write_atomically

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """Writes metrics.jsonl, one JSON object per line."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Open `path` to append. Lines after `resume_step` are removed, as the resumed run writes them again."""
        kept = [line for line, record in valid_lines(path) if record["step"] <= resume_step]
        text = "".join(line + "\n" for line in kept)
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  open for the whole run

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")  # JSON has no NaN and no infinity
        self._file.flush()

    def close(self) -> None:
        with suppress(OSError):  # the write that met a full disk has reported it
            self._file.close()


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite by None, in nested lists and dicts too."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Read the records of a run, in the order of their steps. Damaged lines are left out."""
    try:
        records = [record for _, record in valid_lines(directory / METRICS_FILE)]
    except OSError:
        return []
    return sorted(records, key=lambda record: record["step"])


def valid_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines that hold an object with a step, and these objects. A killed run may leave half a last line."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield line, record
