"""The cores of this machine: how many this process may use, and how much of them all processes do use."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


def usable_cores(root: Path = Path("/")) -> int:
    """How many this process may use at a time, at least 1: those that it is bound to, less where a quota allows less.

    A quota that ends within a core is rounded up: of one and a half, half would lie idle otherwise.
    """
    return max(1, math.ceil(min(affine_cores(), cpu_quota(root))))


def affine_cores() -> int:
    """How many cores this process is bound to: all of the machine, unless someone has said otherwise (taskset)."""
    return len(_affinity())


@functools.cache  # so that figures of two times are of the same cores, whatever is done to the process between
def _affinity() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):  # not on macOS, and not on Windows
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def cpu_quota(root: Path = Path("/")) -> float:
    """Cores' worth of time that the control groups of this process may use; infinity without a limit.

    Of nested groups the smallest counts. `root` is where the file system begins, so that tests can make one up.
    """
    return min((_quota_of(folder) for folder in _groups(root)), default=math.inf)


def _groups(root: Path) -> Iterator[Path]:
    """The folders of this process's groups that can limit its time (version 2, and `cpu` of version 1), outward."""
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
    """Of the hierarchy with these controllers: the group at the top of each mount, and where it is mounted.

    The lines are those of proc(5): `31 23 0:28 /group /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu,cpuacct`.
    """
    for line in lines:
        mount, _, file_system = line.partition(" - ")
        kind, _, options = file_system.split(" ", 2)
        is_it = kind == "cgroup" and "cpu" in options.split(",") if controllers else kind == "cgroup2"
        if is_it:
            shown, mount_point = mount.split(" ")[3:5]
            yield PurePosixPath(shown), PurePosixPath(mount_point)


def _quota_of(folder: Path) -> float:
    """In cores; infinity for a group without a limit, or without these files."""
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
    """Seconds on a clock, and how long cores were busy up to then: for this process, and for all on its cores."""

    clock: float
    own: float
    all: float
    """NaN where it cannot be told."""

    @staticmethod
    def now() -> Usage:
        return Usage(time.perf_counter(), time.process_time(), busy_seconds())

    def others_since(self, earlier: Usage) -> float:
        """Cores that other processes used on average since then; NaN where it cannot be told."""
        others = (self.all - self.own) - (earlier.all - earlier.own)
        return max(0.0, others / (self.clock - earlier.clock)) if others == others else math.nan


def busy_seconds(root: Path = Path("/")) -> float:
    """How long the cores that this process is bound to were busy since the machine started; NaN except on Linux."""
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
