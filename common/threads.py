"""How many threads compute and how they wait, which OpenMP reads from the environment when torch loads it.

So import this before torch. What the user has set stays as it is.

A thread that has nothing to do spins before it sleeps, with libgomp for milliseconds. Where another process takes a
core, the thread that the others wait for is not running, and their spinning keeps it from running: a step takes tens
of times as long. A spin of microseconds costs nothing in quiet (docs/log.md, `python bench/busy.py`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

from common.cores import affine_cores, cpu_quota, usable_cores

SPIN = {"GOMP_SPINCOUNT": "2000"}  # rounds; GNU's libgomp, which PyTorch for Linux brings along; its own: 300000
if sys.platform != "darwin":  # not measured there
    # Milliseconds; the runtime of Intel and LLVM, whose own are 200. Any but 0 made steps beside a busy process long.
    SPIN["KMP_BLOCKTIME"] = "0"
CHOOSE_SPIN = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY", "OMP_WAIT_POLICY")
CHOOSE_NUMBER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
BY_QUOTA = "SPLINEGPT_THREADS_BY_QUOTA"
"""Set beside OMP_NUM_THREADS where a quota and not the user has chosen it, so that child processes know too."""


def configure(environment: MutableMapping[str, str], root: Path = Path("/")) -> None:
    """Bound the spin, and keep to the quota of a container, where OpenMP would start a thread for each core."""
    if not any(name in environment for name in CHOOSE_SPIN):
        environment.update(SPIN)
    if usable_cores(root) < affine_cores() and not any(name in environment for name in CHOOSE_NUMBER):
        environment["OMP_NUM_THREADS"] = environment[BY_QUOTA] = str(usable_cores(root))


def why_fewer(count: int, asked: int = 0) -> str:
    """Why there are fewer threads than cores; empty if there are not. `asked`: the number that an option asked for."""
    cores = os.cpu_count() or 1
    if count >= cores:
        return ""
    chosen = next((name for name in CHOOSE_NUMBER if os.environ.get(name)), None)
    if asked:
        reason = "asked for"
    elif chosen and os.environ.get(BY_QUOTA) == os.environ[chosen]:
        reason = f"a quota of {cpu_quota():.3g}"
    elif chosen:
        reason = chosen
    elif affine_cores() < cores:
        reason = f"bound to {affine_cores()} cores"
    else:
        reason = "PyTorch's choice"
    return f"{reason}; the machine has {cores} cores"


configure(os.environ)
