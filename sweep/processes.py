"""Cells as processes: which one may start, how many at a time, and what becomes of them when anything stops."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Protocol

from ..cores import usable_cores
from ..errors import InputError
from ..files import hold
from ..machine import read_line

if TYPE_CHECKING:
    from .grid import Cell  # which imports all of training

PAUSE_S = 0.1
"between two looks at the running cells"
PATIENCE_S = 10.0
"from asking a cell to stop until it is killed"
CELL_BYTES = 1_500_000_000
"memory that a cell is expected to need: 1.0 GB of the builtin pair, measured 2026-11-21; for large ViTs --parallel"
PR_SET_PDEATHSIG = 1
"prctl(2)"


class Schedule:
    """What may start next: the first cell of a group that needs a teacher makes it, while the others of it wait."""

    def __init__(self, cells: Sequence[Cell], finished: Collection[str] = ()) -> None:
        """finished: names of cells that are done."""
        self.waiting = [c for c in cells if c.name not in finished]
        self.running: list[Cell] = []
        self.taught = {c.group for c in cells if c.name in finished and c.needs_teacher}

    def next(self, busy: Collection[str] = ()) -> Cell | None:
        """The cell to start now, moved to `running`; None when nothing may.

        busy: names of cells that another process still works on.
        """
        at_work = [*self.running, *(c for c in self.waiting if c.name in busy)]
        being_taught = {c.group for c in at_work if c.needs_teacher} - self.taught
        ready = [c for c in self.waiting if not (c.needs_teacher and c.group in being_taught) and c.name not in busy]
        # Teachers first, so that the others of their groups need not wait for them at the end.
        ready.sort(key=lambda c: not (c.needs_teacher and c.group not in self.taught))
        if not ready:
            return None
        self.waiting.remove(ready[0])
        self.running.append(ready[0])
        return ready[0]

    def put_back(self, cell: Cell) -> None:
        """It could not be started now."""
        self.running.remove(cell)
        self.waiting.insert(0, cell)

    def done(self, cell: Cell, succeeded: bool) -> None:
        """It has ended. After a failure the next of its group makes the teacher."""
        self.running.remove(cell)
        if succeeded and cell.needs_teacher:
            self.taught.add(cell.group)


class Job(Protocol):
    """A cell that runs."""

    def poll(self) -> int | None:
        """Exit status; None while it runs."""

    def stop(self) -> None:
        """Ask it to end, make it end, wait until it has."""


@dataclass(frozen=True)
class Slot:
    """A place for one cell at a time."""

    threads: int
    gpu: str | None
    "its name for CUDA_VISIBLE_DEVICES; None: leave that alone"


def make_slots(devices: str, cells: int, parallel: int | None, threads: int | None) -> list[Slot]:
    """Places for cells: as many as asked for, or one a GPU, or one a core as far as the memory reaches."""
    gpus = _gpus() if devices != "cpu" else []
    cores = usable_cores()
    if parallel is None:
        parallel = len(gpus) or max(1, min(cores, _memory_bytes() // CELL_BYTES))
        parallel = min(parallel, cells)
    each = threads or max(1, cores // parallel)
    return [Slot(each, gpus[i % len(gpus)] if gpus else None) for i in range(parallel)]


def _gpus() -> list[str]:
    """What torch could use, under the names that CUDA_VISIBLE_DEVICES takes."""
    import torch

    if not torch.cuda.is_available():
        return []
    visible = [g.strip() for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g.strip()]
    return visible or [str(i) for i in range(torch.cuda.device_count())]


def _memory_bytes() -> int:
    """Memory that is free now; a large number where nobody says."""
    sizes = [1 << 50]
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                sizes.append(int(line.split()[1]) * 1024)
    limit = read_line("/sys/fs/cgroup/memory.max")
    if limit is not None and limit.isdigit():
        sizes.append(int(limit))
    return min(sizes)


class Process:
    """A cell as `cdl-edge train` in a process of its own, that ends with this one."""

    def __init__(self, cell: Cell, slot: Slot, options: Path, log: Path, lock: IO[str] | None) -> None:
        self.lock = lock
        command = [sys.executable, "-m", "cdl_edge.cli", "train", "--config", str(options)]
        command += ["--resume", "--no-pictures", "--json", "--threads", str(slot.threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(slot.threads)}
        if slot.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = slot.gpu
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as stream:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the sweep, which then stops its cells
                pass_fds=() if lock is None else (lock.fileno(),),  # the lock lasts as long as the cell does
                preexec_fn=_end_with_parent() if sys.platform == "linux" else None,
            )

    def poll(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        status = self.process.poll()
        if status is not None and self.lock is not None:
            self.lock.close()
        return status

    def stop(self) -> None:
        """SIGTERM to it and its children, SIGKILL when that is not enough."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(PATIENCE_S)
                break
        if self.lock is not None:
            self.lock.close()


def _end_with_parent() -> Callable[[], None]:
    """What a new process calls first, so that the kernel kills it when the sweep dies, however that happens."""
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()  # looked up here: after the fork little is allowed

    def call() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return call


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep a second sweep out of the folder. Raises: InputError when there is one."""
    lock = hold(folder / ".lock")
    if lock is None:
        raise InputError(f"{folder}: a sweep runs there now", fix="wait for it, or choose another --out")
    with lock:
        yield


def run_cells(
    schedule: Schedule,
    slots: Sequence[Slot],
    start: Callable[[Cell, Slot], Job | None],
    ended: Callable[[Cell, int], bool],
) -> None:
    """Run every waiting cell, as many at a time as there are slots.

    Args:
        start: begins a cell; None when it cannot be begun now, because another process still works on it.
        ended: told the exit status, answers whether the cell has succeeded.

    Raises: KeyboardInterrupt after SIGINT or SIGTERM, when every running cell has been stopped.
    """
    jobs: dict[int, tuple[Cell, Job]] = {}
    with _interrupted_by_sigterm():
        try:
            while schedule.waiting or jobs:
                busy: set[str] = set()
                free = [i for i in range(len(slots)) if i not in jobs]
                while free and (cell := schedule.next(busy)) is not None:
                    job = start(cell, slots[free[0]])
                    if job is None:
                        schedule.put_back(cell)
                        busy.add(cell.name)
                    else:
                        jobs[free.pop(0)] = (cell, job)
                time.sleep(PAUSE_S)
                for index, (cell, job) in list(jobs.items()):
                    status = job.poll()
                    if status is not None:
                        del jobs[index]
                        schedule.done(cell, ended(cell, status))
        finally:
            for _, job in jobs.values():
                job.stop()


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM as KeyboardInterrupt, so that both end a sweep in the same way."""
    if threading.current_thread() is not threading.main_thread():  # only there may a handler be set
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def last_lines(log: Path, count: int = 5) -> list[str]:
    """The end of a log, for the message about a failure."""
    try:
        with open(log, "rb") as stream:
            stream.seek(max(0, log.stat().st_size - 8192))
            text = stream.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    return [line for line in text.splitlines() if line.strip()][-count:]
