"""Checks the files that a benchmark is asked to write before its work, not after hours of it."""

from __future__ import annotations

from pathlib import Path

FORMATS = (".png", ".pdf", ".svg")


def check_output_files(output: str, *plots: str) -> None:
    """Raise ValueError if the record or a picture cannot be written ("" for none), or its format is unknown."""
    for plot in filter(None, plots):
        if not plot.endswith(FORMATS):
            raise ValueError(f"plot must end with one of {', '.join(FORMATS)}; got {plot!r}")
    for path in filter(None, (output, *plots)):
        if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path} cannot be written: it is a folder, or its folder does not exist")
