"""Makes the standard streams of a command usable, however it was started."""

from __future__ import annotations

import io
import os
import sys

RAISING = ("strict", "surrogateescape")  # error handlers that raise for some or all characters an encoding lacks


def repair_streams() -> None:
    """Open closed standard streams on the null device, and write characters that an encoding lacks as escapes.

    For a closed stream (`python train.py >&-`) Python has None, so every print would fail. Its descriptor is free too:
    the next file that is opened, perhaps a checkpoint, would get it, and with it what libraries print.
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
