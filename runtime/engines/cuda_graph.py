"""A CUDA graph: everything that one call queues, recorded once and launched as one thing.

Through libcuda itself: pycuda 2026.1 has no capture, and both libraries' streams are the driver's streams.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

_THREAD_LOCAL = 1
"CU_STREAM_CAPTURE_MODE_THREAD_LOCAL of cuda.h: what other threads do meanwhile does not break the recording"


class CudaGraph:
    """Record `work` on a stream; `launch` repeats it. Addresses are recorded too: buffers must stay where they are."""

    def __init__(self, stream: int, work: Callable[[], None], library: Any = None) -> None:
        """Raises: RuntimeError when something in `work` cannot be recorded."""
        self._library = library or ctypes.CDLL("libcuda.so.1")
        self._stream = ctypes.c_void_p(stream)
        self._executable = ctypes.c_void_p()
        graph = ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", self._stream, _THREAD_LOCAL)
        try:
            work()
        finally:  # a stream that stays in recording would be lost
            ended = self._library.cuStreamEndCapture(self._stream, ctypes.byref(graph))
        if ended or not graph.value:
            raise RuntimeError(f"cuStreamEndCapture: CUDA error {ended}")
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(self._executable), graph, ctypes.c_ulonglong(0))
        finally:
            self._library.cuGraphDestroy(graph)

    def launch(self) -> None:
        """Queue the recorded work."""
        self._call("cuGraphLaunch", self._executable, self._stream)

    def close(self) -> None:
        """Free it; a second call does nothing."""
        if self._executable.value:
            self._library.cuGraphExecDestroy(self._executable)
            self._executable = ctypes.c_void_p()

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._library, name)(*arguments):
            raise RuntimeError(f"{name}: CUDA error {code}")
