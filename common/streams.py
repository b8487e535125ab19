"""The standard streams of a command: they can be written to, however it was started."""

from __future__ import annotations

import io
import os
import sys

RAISING = ("strict", "surrogateescape")  # handlers of what an encoding lacks that refuse some or all of it


def repair_streams() -> None:
    """Open the standard streams that were closed, on nothing, and write as escapes what an encoding lacks.

    For a closed stream (`python train.py >&-`) Python has None, whose methods are missing wherever text is written. Its
    descriptor is free too: the next file to be opened, a checkpoint maybe, would get it, and with it what libraries and
    compilers print.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  for the life of the process
        elif mode == "w" and isinstance(stream, io.TextIOWrapper) and stream.errors in RAISING:
            stream.reconfigure(errors="backslashreplace")
