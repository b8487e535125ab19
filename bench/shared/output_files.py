"""Checks the files that a benchmark is asked to write before its work, not after hours of it."""

from __future__ import annotations

from pathlib import Path

FORMATS = (".png", ".pdf", ".svg")


def check_output_files(output: str, plot: str) -> None:
    """Raise ValueError if the record or the picture cannot be written ("" for none), or the format is unknown."""
    if plot and not plot.endswith(FORMATS):
        raise ValueError(f"plot must end with one of {', '.join(FORMATS)}; got {plot!r}")
    for path in filter(None, (output, plot)):
        if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path} cannot be written: it is a folder, or its folder does not exist")
