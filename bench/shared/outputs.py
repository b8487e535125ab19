"""The files that a benchmark is asked to write: refused before the work if they could not be written after it."""

from __future__ import annotations

from pathlib import Path

FORMATS = (".png", ".pdf", ".svg")


def check_outputs(output: str, plot: str) -> None:
    """ValueError unless the record and the picture, where given, can be written and the picture's format is known."""
    if plot and not plot.endswith(FORMATS):
        raise ValueError(f"plot must end with one of {', '.join(FORMATS)}; got {plot!r}")
    for path in filter(None, (output, plot)):
        if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path} cannot be written: it is a folder, or is in one that does not exist")
