"""Memory, stream and events of the GPU behind one small face: pycuda where it is, else cuda-python.

Both are imported here only, when they are asked for; pycuda.autoinit never is (it would own a context of its own).
Both stand on the GPU's primary context, the one that TensorRT uses.
"""

from __future__ import annotations

import ctypes
import importlib
from types import ModuleType, TracebackType
from typing import Any, Protocol

import numpy as np

from ... import jetson
from ...errors import InputError

_EVENTS = 9
"that cuda-python keeps and uses again; pycuda's are freed by Python"


class Memory(Protocol):
    """What a session needs of CUDA. Everything but `name` and `stream` is called inside a `with` block.

    The block makes the GPU current in the calling thread; blocks may be nested.
    """

    name: str
    stream: int
    "the handle of the one stream that copies and kernels run on, in order"

    def __enter__(self) -> Memory: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def device(self, nbytes: int) -> int:
        """The address of fresh device memory. Raises: InputError when there is not enough."""

    def host(self, nbytes: int) -> np.ndarray:
        """Fresh page-locked host memory, uint8 (nbytes,). Raises: InputError when there is not enough."""

    def upload(self, address: int, source: np.ndarray) -> None:
        """Queue a copy from page-locked memory to the device."""

    def download(self, target: np.ndarray, address: int) -> None:
        """Queue a copy from the device to page-locked memory."""

    def mark(self) -> Any:
        """Queue a time stamp; good until eight more were queued."""

    def between_ms(self, begin: Any, end: Any) -> float:
        """Milliseconds between two time stamps that have been reached."""

    def synchronize(self) -> None:
        """Wait for all that was queued."""

    def close(self) -> None:
        """Free all; a second call does nothing."""


class PyCuda:
    """pycuda: what JetPack's users have."""

    name = "pycuda"

    def __init__(self, driver: ModuleType) -> None:
        driver.init()
        self._driver: Any = driver
        self._context: Any = driver.Device(0).retain_primary_context()
        self._kept: list[Any] = []
        with self:
            self._stream: Any = driver.Stream()
        self.stream = int(self._stream.handle)

    def __enter__(self) -> PyCuda:
        self._context.push()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._driver.Context.pop()

    def device(self, nbytes: int) -> int:
        """See Memory."""
        try:
            self._kept.append(self._driver.mem_alloc(nbytes))
        except self._driver.MemoryError as error:
            raise _full("device", nbytes, error) from error
        return int(self._kept[-1])

    def host(self, nbytes: int) -> np.ndarray:
        """See Memory."""
        try:
            array: np.ndarray = self._driver.pagelocked_empty(nbytes, np.uint8)
        except self._driver.MemoryError as error:
            raise _full("page-locked host", nbytes, error) from error
        self._kept.append(array)
        return array

    def upload(self, address: int, source: np.ndarray) -> None:
        """See Memory."""
        self._driver.memcpy_htod_async(address, source, self._stream)

    def download(self, target: np.ndarray, address: int) -> None:
        """See Memory."""
        self._driver.memcpy_dtoh_async(target, address, self._stream)

    def mark(self) -> Any:
        """See Memory."""
        event = self._driver.Event()
        event.record(self._stream)
        return event

    def between_ms(self, begin: Any, end: Any) -> float:
        """See Memory."""
        return float(begin.time_till(end))

    def synchronize(self) -> None:
        """See Memory."""
        self._stream.synchronize()

    def close(self) -> None:
        """See Memory."""
        if self._context is not None:
            with self:  # pycuda frees with the context current only
                self._kept.clear()
                self._stream = None
            self._context = None


class CudaPython:
    """cuda-python: wheels for x86_64 and aarch64, imports without a driver."""

    name = "cuda-python"

    def __init__(self, runtime: ModuleType) -> None:
        self._runtime: Any = runtime
        self._device: list[int] = []
        self._host: list[int] = []
        self._events: list[Any] = []
        with self:
            self._stream: Any = self._call("cudaStreamCreate")
        self.stream = int(self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        """A function of CUDA's runtime: its result, or RuntimeError with CUDA's name for what went wrong."""
        code, *results = getattr(self._runtime, name)(*arguments)
        if int(code) != 0:
            raise CudaError(f"{name}: {code.name}")
        return results[0] if results else None

    def __enter__(self) -> CudaPython:
        self._call("cudaSetDevice", 0)  # a thread's current device; the primary context comes with it
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def device(self, nbytes: int) -> int:
        """See Memory."""
        try:
            self._device.append(int(self._call("cudaMalloc", nbytes)))
        except CudaError as error:
            raise _full("device", nbytes, error) from error
        return self._device[-1]

    def host(self, nbytes: int) -> np.ndarray:
        """See Memory."""
        try:
            self._host.append(int(self._call("cudaMallocHost", nbytes)))
        except CudaError as error:
            raise _full("page-locked host", nbytes, error) from error
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self._host[-1]))

    def upload(self, address: int, source: np.ndarray) -> None:
        """See Memory."""
        self._copy(address, source.ctypes.data, source.nbytes, "cudaMemcpyHostToDevice")

    def download(self, target: np.ndarray, address: int) -> None:
        """See Memory."""
        self._copy(target.ctypes.data, address, target.nbytes, "cudaMemcpyDeviceToHost")

    def _copy(self, target: int, source: int, nbytes: int, kind: str) -> None:
        direction = getattr(self._runtime.cudaMemcpyKind, kind)
        self._call("cudaMemcpyAsync", target, source, nbytes, direction, self._stream)

    def mark(self) -> Any:
        """See Memory."""
        if len(self._events) < _EVENTS:
            self._events.append(self._call("cudaEventCreate"))
            event = self._events[-1]
        else:
            self._events.append(event := self._events.pop(0))
        self._call("cudaEventRecord", event, self._stream)
        return event

    def between_ms(self, begin: Any, end: Any) -> float:
        """See Memory."""
        duration = float(self._call("cudaEventElapsedTime", begin, end))
        return duration

    def synchronize(self) -> None:
        """See Memory."""
        self._call("cudaStreamSynchronize", self._stream)

    def close(self) -> None:
        """See Memory."""
        if self._stream is not None:
            with self:
                for address in self._device:
                    self._call("cudaFree", address)
                for address in self._host:
                    self._call("cudaFreeHost", address)
                for event in self._events:
                    self._call("cudaEventDestroy", event)
                self._call("cudaStreamDestroy", self._stream)
            self._device, self._host, self._events, self._stream = [], [], [], None


class CudaError(RuntimeError):
    """CUDA refused something that it should be able to do."""


def open_memory() -> Memory:
    """pycuda, or cuda-python where pycuda is absent. Raises: InputError when neither can be imported."""
    reasons = []
    makers: tuple[tuple[str, Any], ...] = (("pycuda.driver", PyCuda), ("cuda.bindings.runtime", CudaPython))
    for module, maker in makers:
        try:
            library = importlib.import_module(module)
        except ImportError as error:
            reasons.append(f"{module}: {str(error).splitlines()[0] if str(error) else 'absent'}")
            continue
        memory: Memory = maker(library)
        return memory
    raise InputError(
        "the GPU's memory cannot be reached",
        got="; ".join(reasons),
        expected="pycuda or cuda-python",
        fix=f"{jetson.get_cuda_python()}, or: pip install pycuda (JetPack has CUDA's headers)"
        if jetson.on_jetson()
        else "pip install 'cdl-edge[tensorrt]', or pip install pycuda where CUDA's headers are",
    )


def _full(kind: str, nbytes: int, error: Exception) -> InputError:
    return InputError(
        f"not enough {kind} memory",
        got=str(error),
        expected=f"{nbytes} bytes",
        fix="close other programs, or export the bundle for a smaller batch",
    )
