"""How the C library manages memory that programs free."""

from __future__ import annotations

import ctypes

# Names and numbers of mallopt (malloc.h of the GNU C library, whose older versions take at most 32 MiB for the second).
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST, SMALLER = 1 << 30, 32 << 20


def keep_freed_memory() -> None:
    """Keep memory that is freed for the next use. Does nothing where the C library is not GNU's.

    By default it is given back to the system, and asked for again, page by page, in the next training step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return
    if not mallopt(MMAP_THRESHOLD, LARGEST):
        mallopt(MMAP_THRESHOLD, SMALLER)
    mallopt(TRIM_THRESHOLD, LARGEST)
