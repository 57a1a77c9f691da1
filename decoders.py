"""Pictures decoded in processes of their own: there a limit stops them, in time and memory, and a crash ends one.

A decoder runs in C on one thread, which nobody can stop: a JPEG of 30 kB can keep it busy for ten seconds. The server
decodes through here; a command that reads the user's own files does not need to.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import decoder
from .decoder import UnreadableImage
from .images import Preprocessing

START_S = 60.0
"for a new process, until it can decode: that is no fault of the picture"
SPARE_BYTES = 24 << 20
"""for the file itself and for conversions, beside decoder.MAX_BYTES and what Python takes: together below 600 MB"""
_REQUEST = struct.Struct("<II")
"bytes of the preprocessing as JSON, and of the picture; both follow"
_REPLY = struct.Struct("<BI")
"one of the answers below, and the bytes that follow: pixels, a message, or a trace"
_PIXELS, _REFUSED, _BUG = range(3)
_READY = b"+"


class Decoders:
    """Processes that decode pictures, as many as threads ask at the same time; started when needed, and kept.

    Args:
        limit_s: for one picture; a process that takes longer is killed, and the picture refused.

    To be closed in the end; without that the processes end with this one.
    """

    def __init__(self, limit_s: float = 10.0) -> None:
        self.limit_s = limit_s
        self._free: queue.LifoQueue[_Process] = queue.LifoQueue()
        self._all: set[_Process] = set()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Have a process ready, so that the first picture does not wait for one."""
        self._free.put(self._new())

    def read(self, preprocessing: Preprocessing, content: bytes, seconds: float | None = None) -> np.ndarray:
        """Decode as `preprocessing.read(content)` does: uint8 (size, size, 3). seconds: allowed, at most `limit_s`.

        Raises: UnreadableImage, as `Preprocessing.read`, and where the time is over, the memory does not do, or the
            decoder crashes.
        """
        limit = self.limit_s if seconds is None else min(seconds, self.limit_s)
        process = self._take()
        try:
            process.wait_ready()
            kind, reply = process.ask(json.dumps(preprocessing.to_json()).encode(), content, limit)
        except BaseException as error:
            code = self._end(process)
            if isinstance(error, TimeoutError):
                raise UnreadableImage(
                    "the image takes too long to decode",
                    got=f"not decoded after {limit:.3g} s",
                    expected=f"at most {self.limit_s:g} s",
                    fix="scale it down first, or save it as a plain JPEG",
                ) from None
            if isinstance(error, ConnectionError):
                raise UnreadableImage(
                    "the image: its decoder crashed", got=f"exit code {code}", fix="check the file, or save it anew"
                ) from None
            raise
        if kind == _BUG:
            self._end(process)
            raise RuntimeError(f"a bug in a decoder's process\n{reply.decode()}")
        self._free.put(process)
        if kind == _REFUSED:
            raise UnreadableImage(reply.decode())
        side = preprocessing.size
        return np.frombuffer(reply, np.uint8).reshape(side, side, 3)

    def processes(self) -> list[int]:
        """Their numbers in the system."""
        with self._lock:
            return [process.popen.pid for process in self._all]

    def close(self) -> None:
        """End all processes; a second call does nothing, and `read` starts new ones."""
        with self._lock:
            ending, self._all = self._all, set()
            self._free = queue.LifoQueue()
        for process in ending:
            process.kill()

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _take(self) -> _Process:
        while True:
            try:
                process = self._free.get_nowait()
            except queue.Empty:
                return self._new()
            if process.popen.poll() is None:
                return process
            self._end(process)  # somebody ended it while it had nothing to do

    def _new(self) -> _Process:
        process = _Process.start()
        with self._lock:
            self._all.add(process)
        return process

    def _end(self, process: _Process) -> int:
        with self._lock:
            self._all.discard(process)
        return process.kill()


@dataclass(eq=False)
class _Process:
    popen: subprocess.Popen[bytes]
    socket: socket.socket
    ready: bool = False

    @classmethod
    def start(cls) -> _Process:
        ours, theirs = socket.socketpair()
        with theirs:
            popen = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,  # decoders print there what they think of a file
                cwd="/",
                env=surroundings(),
                start_new_session=True,  # Ctrl-C is for the server, which first answers what is in
            )
        return cls(popen, ours)

    def wait_ready(self) -> None:
        """Raises: RuntimeError when it does not come up."""
        if self.ready:
            return
        try:
            self.ready = self._receive(len(_READY), time.monotonic() + START_S) == _READY
        except (TimeoutError, ConnectionError) as error:
            code = self.kill()
            raise RuntimeError(f"a process for decoding did not start: exit code {code}") from error

    def ask(self, preprocessing: bytes, content: bytes, seconds: float) -> tuple[int, bytes]:
        """Raises: TimeoutError, ConnectionError."""
        end = time.monotonic() + seconds
        self.socket.settimeout(max(seconds, 1e-3))
        self.socket.sendall(_REQUEST.pack(len(preprocessing), len(content)) + preprocessing)
        self.socket.sendall(content)
        kind, length = _REPLY.unpack(self._receive(_REPLY.size, end))
        return kind, self._receive(length, end)

    def _receive(self, count: int, end: float) -> bytes:
        got = bytearray()
        while len(got) < count:
            self.socket.settimeout(max(end - time.monotonic(), 1e-3))
            more = self.socket.recv(count - len(got))
            if not more:
                raise ConnectionResetError("the process has ended")
            got += more
        return bytes(got)

    def kill(self) -> int:
        """Returns: the exit code."""
        self.socket.close()
        self.popen.kill()
        return self.popen.wait()


def surroundings() -> dict[str, str]:
    """The environment of a process of ours: what is importable here is there, too, and its arithmetic has one thread.

    The working folder is not importable: whoever may write there shall not be imported.
    """
    places = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
    return {**os.environ, "PYTHONPATH": places}


# -- the process ------------------------------------------------------------------------------------------------------


def main() -> None:
    """Decode what comes through stdin until its other end is closed."""
    for number in (signal.SIGTERM, signal.SIGINT):  # systemd sends them to all; the server ends this one in the end
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=os.dup(0)) as stream, suppress(ConnectionError):
        decoder.prepare()
        _bound_memory(decoder.MAX_BYTES + SPARE_BYTES)
        stream.sendall(_READY)
        while True:
            first, second = _REQUEST.unpack(_exactly(stream, _REQUEST.size))
            fields, content = _exactly(stream, first), _exactly(stream, second)
            try:
                kind, reply = _PIXELS, Preprocessing.from_json(json.loads(fields)).read(content).tobytes()
            except UnreadableImage as error:
                kind, reply = _REFUSED, str(error).encode("utf-8", "replace")
            except BaseException:
                trace = traceback.format_exc().encode("utf-8", "replace")
                stream.sendall(_REPLY.pack(_BUG, len(trace)) + trace)
                raise
            stream.sendall(_REPLY.pack(kind, len(reply)) + reply)


def _exactly(stream: socket.socket, count: int) -> bytes:
    got = bytearray(count)
    view = memoryview(got)
    while view:
        taken = stream.recv_into(view)
        if not taken:
            raise ConnectionResetError
        view = view[taken:]
    return bytes(got)


def _bound_memory(more: int) -> None:
    """Let this process take so many bytes more than it has, where the system can (Linux); and end it first of all."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + more
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    with suppress(OSError):  # where memory runs out this process goes first, not the server
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    main()
