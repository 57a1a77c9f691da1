"""How many threads are worth starting: what this process may use of the machine, and what others leave of it."""

from __future__ import annotations

import math
import os
import time
from functools import cache
from pathlib import Path

SAMPLE_S = 0.1
"for which the cores are watched: ten ticks of the kernel's clock"
ROOT = Path("/")


def usable_cores(root: Path = ROOT) -> int:
    """Cores this process may use: taskset, a container's set of cores, or its quota may allow fewer than there are."""
    cores = len(_allowed())
    quota = cgroup_quota(root)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def cgroup_quota(root: Path = ROOT) -> float | None:
    """Cores' worth of time that the control group grants, its parents' included; None: no limit, or no Linux."""
    try:
        entries = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return None
    limits = []
    for _, controllers, path in (e for e in entries if len(e) == 3):
        old = "cpu" in controllers.split(",")
        if controllers and not old:
            continue
        base = root / ("sys/fs/cgroup/cpu" if old else "sys/fs/cgroup")
        parts = path.strip("/").split("/") if path.strip("/") else []
        for depth in range(len(parts) + 1):  # a container often sees itself as the root
            limit = _limit(base.joinpath(*parts[:depth]), old)
            if limit is not None:
                limits.append(limit)
    return min(limits, default=None)


def _limit(folder: Path, old: bool) -> float | None:
    """CPUs that one control group allows: from cpu.max of version 2, or the two files of version 1."""
    try:
        if old:
            words = [(folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")]
        else:
            words = (folder / "cpu.max").read_text().split()
        quota, period = int(words[0]), int(words[1])
    except (OSError, ValueError, IndexError):  # "max": no limit
        return None
    return quota / period if quota > 0 and period > 0 else None


def free_cores(root: Path = ROOT) -> int:
    """Cores this process may use that nothing else keeps busy now; 1 at least.

    More threads than that wait for each other: 20 minutes unfinished against 97 s with one thread, beside one other
    job on two cores (2026-11-27).
    """
    return max(1, min(usable_cores(root), round(_idle(root))))


@cache
def default_threads() -> int:
    """What commands take unless they are told: OMP_NUM_THREADS where it is set, otherwise the cores that are free.

    Looked up once a process: later, its own threads would count as busy.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(asked) if asked.isdecimal() and int(asked) > 0 else free_cores()


def _allowed() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _idle(root: Path) -> float:
    """Cores' worth of idle time among those that may be used, over SAMPLE_S; without /proc by the load average."""
    before = _ticks(root)
    time.sleep(SAMPLE_S if before else 0)
    after = _ticks(root)
    shares = []
    for core in _allowed() & set(before) & set(after):
        total, idle = (b - a for a, b in zip(before[core], after[core], strict=True))
        shares.append(min(1.0, idle / total) if total > 0 else 1.0)
    if shares:
        return sum(shares)
    return len(_allowed()) - (os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0)


def _ticks(root: Path) -> dict[int, tuple[int, int]]:
    """Core -> (ticks in all, ticks idle or waiting for a disk); empty outside of Linux."""
    try:
        lines = (root / "proc/stat").read_text().splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        name, *values = line.split() or [""]
        if name.startswith("cpu") and name[3:].isdecimal() and len(values) >= 5:
            numbers = [int(v) for v in values[:8]]  # guest time is part of user time
            found[int(name[3:])] = (sum(numbers), numbers[3] + numbers[4])
    return found
