"""The CPU cores of this machine: how many this process may use, and how busy all processes keep them."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


def usable_cores(root: Path = Path("/")) -> int:
    """Number of cores that this process may use at a time, at least 1: its affinity, or its quota if that is smaller.

    A fractional quota is rounded up. With a quota of 1.5, one thread would leave half a core unused.
    """
    return max(1, math.ceil(min(affine_cores(), cpu_quota(root))))


def affine_cores() -> int:
    """Number of cores that this process is bound to: all, unless it was restricted, for example by taskset."""
    return len(_affinity())


@functools.cache  # so that measurements at two times concern the same cores, even if the affinity changes between them
def _affinity() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):  # not on macOS, and not on Windows
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def cpu_quota(root: Path = Path("/")) -> float:
    """CPU quota of this process's control groups, in cores; infinity without a limit.

    The smallest quota of nested groups counts. `root` is the root of the file system, which tests replace.
    """
    return min((_quota_of(folder) for folder in _groups(root)), default=math.inf)


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the control groups that can limit this process's time (version 2, and `cpu` of 1), innermost first."""
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:  # not Linux
        return
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)  # version 2 names no controllers
        if controllers and "cpu" not in controllers.split(","):
            continue
        for shown, mount_point in _mounts(mounts, controllers):
            inside = PurePosixPath(path)
            # In a container the mount may show only its group, by the path that the group has outside.
            inside = inside.relative_to(shown) if inside.is_relative_to(shown) else PurePosixPath()
            top = root / mount_point.relative_to("/")
            yield from (top / part for part in (inside, *inside.parents) if ".." not in part.parts)


def _mounts(lines: list[str], controllers: str) -> Iterator[tuple[PurePosixPath, PurePosixPath]]:
    """Find the mounts of the hierarchy with these controllers. Yields the group at a mount's top, and the mount point.

    Lines as in proc(5): `31 23 0:28 /group /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu,cpuacct`.
    """
    for line in lines:
        mount, _, file_system = line.partition(" - ")
        kind, _, options = file_system.split(" ", 2)
        is_it = kind == "cgroup" and "cpu" in options.split(",") if controllers else kind == "cgroup2"
        if is_it:
            shown, mount_point = mount.split(" ")[3:5]
            yield PurePosixPath(shown), PurePosixPath(mount_point)


def _quota_of(folder: Path) -> float:
    """The quota of one group in cores; infinity if it has no limit or no such files."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf  # version 1 has -1 for none
    except (OSError, ValueError, ZeroDivisionError):  # version 2 has "max" for none
        return math.inf


@dataclass(frozen=True)
class Usage:
    """The time, and how long cores have been busy until then: with this process, and with all processes. In seconds."""

    clock: float
    own: float
    all: float
    """NaN if the system does not tell."""

    @staticmethod
    def now() -> Usage:
        return Usage(time.perf_counter(), time.process_time(), busy_seconds())

    def others_since(self, earlier: Usage) -> float:
        """Number of cores that other processes used on average since `earlier`; NaN if the system does not tell."""
        others = (self.all - self.own) - (earlier.all - earlier.own)
        return max(0.0, others / (self.clock - earlier.clock)) if others == others else math.nan


def busy_seconds(root: Path = Path("/")) -> float:
    """Seconds that this process's cores have been busy since the machine started, in total; NaN except on Linux."""
    names = {f"cpu{number}" for number in _affinity()}
    try:
        lines = [line.split() for line in (root / "proc/stat").read_text().splitlines()]
        busy = 0
        for words in lines:
            if words[0] in names:  # proc(5); guests are counted in user and nice
                user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, words[1:9])
                busy += user + nice + system + irq + softirq + steal
    except (OSError, ValueError):
        return math.nan
    return busy / os.sysconf("SC_CLK_TCK")
