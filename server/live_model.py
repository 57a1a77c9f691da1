"""The student that answers now: callable from any thread, with a bounded queue, exchanged without losing a call."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..artefacts.bundle import Bundle, open_bundle
from ..cores import usable_cores
from ..errors import GateError
from ..runtime import load
from ..runtime.runner import Engine, Runner
from ..runtime.selftest import extremes, prove, prove_answers, prove_finite, reference

WARMUP = 3
"calls of each runner before it answers: the first ones allocate and choose kernels"
LOAD_S, BUILD_S = 120.0, 1800.0
"seconds until a new version has to have passed its self-test; on a backend that first builds an engine"
BUILDERS = ("tensorrt", "trt", "ort-tensorrt")
Result = TypeVar("Result")


class Busy(RuntimeError):
    """Too much is asked at once; nothing was computed. Ask again after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def version_name(bundle: Bundle) -> str:
    """What answers are signed with: the first 16 hex digits of the manifest's hash, which covers every file."""
    return bundle.manifest.version


class _Pooled:
    """Engines of one graph as one: each call has one of them to itself, for an engine serves one call at a time."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = tuple(engines)
        self._free: queue.LifoQueue[Engine] = queue.LifoQueue()  # last in, first out: whose memory is in the cache
        for engine in self._engines:
            self._free.put(engine)
        self._lock = threading.Lock()
        self._running: dict[int, float] = {}

    def call(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One call, by the engine that was used last of those that are free."""
        engine, me = self._free.get(), threading.get_ident()
        with self._lock:
            self._running[me] = time.monotonic()
        try:
            return engine.call(feeds)
        finally:
            with self._lock:
                del self._running[me]
            self._free.put(engine)

    def longest_s(self) -> float:
        """Seconds that the oldest of the calls that run now has been running; 0 when none does."""
        with self._lock:
            return time.monotonic() - min(self._running.values()) if self._running else 0.0

    def describe(self) -> dict[str, Any]:
        """What the engines say of themselves, and "runners": how many there are."""
        return {**self._engines[0].describe(), "runners": len(self._engines)}

    def close(self) -> None:
        """Free every engine; a second call does nothing."""
        for engine in self._engines:
            engine.close()


class Pool(Runner):
    """N runners of one graph behind the face of one, for any number of threads; see `runtime.runner.Runner`.

    Args:
        make: loads one runner; called `count` times.

    Raises: InputError, as `make`.
    """

    def __init__(self, make: Callable[[], Runner], count: int = 1) -> None:
        with ExitStack() as stack:
            self.runners = [stack.enter_context(make()) for _ in range(count)]
            stack.pop_all()
        self._pooled = _Pooled([runner.engine for runner in self.runners])
        super().__init__(self.runners[0].graph, self._pooled, sum(runner.load_ms for runner in self.runners))

    def longest_s(self) -> float:
        """Seconds that the oldest of the calls that run now has been running; 0 when none does."""
        return self._pooled.longest_s()


class _Version:
    """One loaded bundle with the threads that work on it; freed when it is retired and its last call has ended."""

    def __init__(self, pool: Pool, workers: int) -> None:
        self.pool, self.name = pool, version_name(pool.bundle)
        self.workers = ThreadPoolExecutor(workers, thread_name_prefix=f"cdl-edge-{self.name}")
        self.users = 0
        "calls that were accepted and have not ended"
        self.retired = False

    def free(self) -> None:
        self.workers.shutdown(wait=False)
        self.pool.close()


class LiveModel:
    """Holds one version of a bundle and computes with it on threads of its own, until `swap` puts another in.

        with LiveModel("bundle") as live:
            future = live.submit(lambda runner: predict(runner, [picture]))
            live.swap("newer-bundle")
            future.result()  # by the version that was current when it was submitted

    Args:
        backend, threads, precision: see `runtime.load`.
        runners: sessions that compute side by side; each has its own memory, and `threads` threads.
        queue: calls that may wait; one more is refused with Busy.
        limit_s: a call of the engine that takes longer than this makes `health` say "stuck".
        load_s: a new version that has not passed its self-test after this is given up; None: by the backend.

    Raises: InputError when the bundle cannot be loaded, or does not compute what its self-test says.
    """

    def __init__(
        self,
        bundle: Bundle | Path | str,
        backend: str = "auto",
        threads: int | None = None,
        precision: str | None = None,
        runners: int = 1,
        queue: int = 32,
        limit_s: float = 10.0,
        load_s: float | None = None,
    ) -> None:
        self.backend, self.threads, self.precision, self._runners = backend, threads, precision, runners
        self.limit_s = limit_s
        self.load_s = (BUILD_S if backend in BUILDERS else LOAD_S) if load_s is None else load_s
        # One more worker than runners, so that a picture is decoded while another is computed.
        self._workers = max(runners + 1, usable_cores())
        self.capacity = self._workers + queue
        "calls that are accepted at a time, running or waiting"
        self._lock = threading.Condition()
        self._swapping = threading.Lock()
        self._closed = False
        self._retiring: list[_Version] = []
        self._given_up: list[Future[_Version]] = []
        self.swaps = 0
        self.failing: str | None = None
        "why the last answer that was asked for did not come, for `health`; None: it came"
        opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        self._current = self._load(opened, trust=not opened.manifest.selftest)

    @property
    def runner(self) -> Pool:
        """The current version. Calls on it are outside of queue and swap: for its facts, `bundle` and `describe`."""
        return self._current.pool

    def submit(self, work: Callable[[Runner], Result]) -> Future[Result]:
        """Have `work` done with the current version: what it returns or raises comes with the Future.

        Raises: Busy when `capacity` calls are in, RuntimeError once closed.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the live model is closed")
            version = self._current
            if version.users >= self.capacity:
                raise Busy(f"too many calls at once\n  got:      {version.users} waiting or running\n  do:       wait")
            version.users += 1  # from here on a swap leaves it open
        future = version.workers.submit(work, version.pool)
        future.add_done_callback(lambda _: self._leave(version))
        return future

    def swap(self, bundle: Bundle | Path | str) -> dict[str, Any]:
        """Load another bundle, compare it with its self-test, warm it up; only then does it become the current one.

        Calls that were accepted before are answered by the version they were accepted for; it is freed after the last.

        Returns: {"previous", "version": names, "seconds", "selftest": see `runtime.selftest.check`}.

        Raises: InputError when the new one cannot be loaded, has no self-test or fails it (GateError), and Busy during
            another swap. The old one goes on then.
        """
        if not self._swapping.acquire(blocking=False):
            raise Busy("another swap is going on\n  do:       wait for its end", 2)
        try:
            begin = time.monotonic()
            new = self._load_in_time(bundle if isinstance(bundle, Bundle) else open_bundle(bundle))
            with self._lock:
                if self._closed:
                    new.free()
                    raise RuntimeError("the live model is closed")
                old, self._current = self._current, new
                self.swaps += 1
                self.failing = None
            self._retire(old)
            seconds = round(time.monotonic() - begin, 3)
            return {"previous": old.name, "version": new.name, "seconds": seconds, "selftest": self.selftest}
        finally:
            self._swapping.release()

    def _load_in_time(self, bundle: Bundle) -> _Version:
        """`_load` on a thread of its own, which is given up after load_s: a graph may never end."""
        worker = ThreadPoolExecutor(1, thread_name_prefix="cdl-edge-load")
        future = worker.submit(self._load, bundle)
        worker.shutdown(wait=False)
        try:
            return future.result(self.load_s)
        except FutureTimeout:  # of Python 3.10 another one than TimeoutError
            if future.done():  # it was its own
                raise
            self._given_up.append(future)
            future.add_done_callback(lambda late: None if late.exception() else late.result().free())
            raise GateError(
                f"{bundle.path}: the new version does not come to an answer",
                got=f"none after {self.load_s:g} s",
                expected="the answers of its self-test",
                fix="do not use it",
            ) from None

    def _load(self, bundle: Bundle, trust: bool = False) -> _Version:
        """A version that was proven and is warm. trust: without a self-test, finite outputs are enough."""
        options = (self.backend, self.threads, "student", True, self.precision)
        pool = Pool(lambda: load(bundle, *options), self._runners)
        try:
            self.selftest = _prove(pool, trust)
            size = bundle.preprocessing.size
            for runner in pool.runners:
                for _ in range(WARMUP):
                    runner.run(np.zeros((1, size, size, 3), np.uint8))
        except BaseException:
            pool.close()
            raise
        return _Version(pool, self._workers)

    def _retire(self, version: _Version) -> None:
        with self._lock:
            version.retired = True
            idle = version.users == 0
            if not idle:
                self._retiring.append(version)
        if idle:
            version.free()

    def _leave(self, version: _Version) -> None:
        with self._lock:
            version.users -= 1
            last = version.retired and version.users == 0
            if last:
                self._retiring.remove(version)
            self._lock.notify_all()
        if last:
            version.free()

    def health(self) -> dict[str, Any]:
        """{"status", "reason", "version", "in_flight", "capacity", "longest_call_s", "retiring"}.

        "status" is "ok", "stuck", "failing" or "closed".

        "stuck": a call of the engine has been running for more than `limit_s`; a swap or a restart mends it.
        "failing": the last answer that was asked for did not come, "reason" says why.
        "in_flight": calls accepted by the current version; "retiring": older versions whose last calls still run.
        """
        with self._lock:
            version, retiring, closed = self._current, len(self._retiring), self._closed
        longest = version.pool.longest_s()
        return {
            "status": "closed"
            if closed
            else "stuck"
            if longest > self.limit_s
            else "failing"
            if self.failing
            else "ok",
            "reason": self.failing,
            "version": version.name,
            "in_flight": version.users,
            "capacity": self.capacity,
            "longest_call_s": round(longest, 3),
            "retiring": retiring,
        }

    def close(self, timeout_s: float = 30.0) -> bool:
        """Accept nothing more and wait for what was accepted. Returns: whether all of it ended in time."""
        with self._lock:
            first, self._closed = not self._closed, True
        if first:
            self._retire(self._current)
        with self._lock:
            ended = self._lock.wait_for(lambda: not self._retiring, timeout_s)
        return ended and all(future.done() for future in self._given_up)

    def __enter__(self) -> LiveModel:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _prove(pool: Pool, trust: bool) -> dict[str, Any]:
    """Every runner on its own. Raises: GateError, InputError without a self-test unless `trust`."""
    if trust:
        feeds, found = {"images": extremes(pool)}, [prove_finite(runner) for runner in pool.runners]
    else:
        feeds, expected = reference(pool.bundle)
        found = [prove(runner, feeds, expected) for runner in pool.runners]
    prove_answers(pool, next(iter(feeds.values())))
    return found[-1]
