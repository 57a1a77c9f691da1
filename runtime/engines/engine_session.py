"""A plan that has been loaded: fixed buffers, one stream, one call after the other."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ...artefacts.bundle import Signature
from ...errors import InputError
from ..runner import Value, in_batches
from .build import SCORES
from .cuda_graph import CudaGraph
from .memory import Memory
from .product import logger


def deserialise(trt: ModuleType, plan: bytes, path: Path) -> tuple[Any, Any]:
    """(runtime, engine) of a plan that has been verified: it is executable code. The runtime has to outlive the engine.

    Raises: InputError when this TensorRT refuses it.
    """
    messages = logger(trt)
    messages.take()
    runtime = trt.Runtime(messages)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise InputError(
            f"{path}: TensorRT {trt.__version__} cannot load this engine",
            got="; ".join(messages.take()) or "no reason given",
            expected="an engine built here",
            fix="rebuild with: cdl-edge build BUNDLE --rebuild",
        )
    return runtime, engine


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    "the largest that the engine takes"
    address: int
    host: np.ndarray | None
    "page-locked, of `shape`; None for what nobody reads"


class EngineSession:
    """One execution context with its buffers; made for one thread at a time."""

    def __init__(
        self,
        trt: ModuleType,
        plan: bytes,
        path: Path,
        signature: Signature,
        memory: Memory,
        check: Callable[[dict[str, Value], dict[str, Value]], None],
        cuda_graph: bool = True,
    ) -> None:
        """check: ChosenGraph.check_signature. Raises: InputError when the plan cannot be loaded, or memory is short."""
        self.memory, self.signature, self._path = memory, signature, path
        self._graph: CudaGraph | None = None
        with memory:
            self._runtime, self.engine = deserialise(trt, plan, path)
            self._tensors = {name: self._tensor(trt, name) for name in self._names()}
            self.inputs = self._values(trt, trt.TensorIOMode.INPUT)
            "by name, as the engine has them"
            self.outputs = self._values(trt, trt.TensorIOMode.OUTPUT)
            check(self.inputs, self.outputs)
            self._context: Any = self.engine.create_execution_context()
            if self._context is None:
                raise InputError(
                    f"{path}: not enough GPU memory to run the engine",
                    got="; ".join(logger(trt).take()) or "no reason given",
                    expected=f"{self.engine.device_memory_size_v2} bytes beside its weights",
                    fix="close other programs, or export the bundle for a smaller batch",
                )
            for name, tensor in self._tensors.items():
                self._context.set_tensor_address(name, tensor.address)
            self.max_batch = self._tensors[signature.images].shape[0]
            "images in the largest call"
            self.free_batch = self.engine.get_tensor_shape(signature.images)[0] < 0
            self._batch = 0
            if cuda_graph:
                self._record()

    @property
    def cuda_graph(self) -> bool:
        """Whether calls are launched as a CUDA graph."""
        return self._graph is not None

    def compute(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Any number of images, in as many calls as they need -> outputs by name."""
        if not self.free_batch:
            return in_batches(self.run, feeds, self.max_batch)
        count, step = len(feeds[self.signature.images]), self.max_batch
        parts = [self.run({n: v[start : start + step] for n, v in feeds.items()}) for start in range(0, count, step)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One call: at most `max_batch` images (exactly as many when the batch is fixed) -> outputs by name."""
        with self.memory:
            batch = self._fill(feeds)
            self._upload(batch)
            self._compute()
            self._download(batch)
            self.memory.synchronize()
            return self._read(batch)

    def timed(self, feeds: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """`run` with {"h2d_ms", "gpu_ms", "d2h_ms"} from GPU time stamps and {"enqueue_ms"} of the CPU."""
        with self.memory:
            batch = self._fill(feeds)
            marks = [self.memory.mark()]
            self._upload(batch)
            marks.append(self.memory.mark())
            begin = time.perf_counter()
            self._compute()
            enqueue = (time.perf_counter() - begin) * 1e3
            marks.append(self.memory.mark())
            self._download(batch)
            marks.append(self.memory.mark())
            self.memory.synchronize()
            h2d, gpu, d2h = (self.memory.between_ms(a, b) for a, b in itertools.pairwise(marks))
            times = {"h2d_ms": h2d, "enqueue_ms": enqueue, "gpu_ms": gpu, "d2h_ms": d2h}
            return self._read(batch), times

    def close(self) -> None:
        """Free context, engine and graph, in this order; the memory is the caller's. A second call does nothing."""
        if self._context is not None:
            with self.memory:
                self.memory.synchronize()
                if self._graph is not None:
                    self._graph.close()
                self._graph = self._context = self.engine = self._runtime = None

    # -- one call -----------------------------------------------------------------------------------------------------

    def _fill(self, feeds: dict[str, np.ndarray]) -> int:
        if self._context is None:
            raise RuntimeError("the session is closed")
        batch = len(feeds[self.signature.images])
        if batch > self.max_batch or (not self.free_batch and batch != self.max_batch):
            raise ValueError(f"a batch of {batch}, the engine takes {'up to ' * self.free_batch}{self.max_batch}")
        for name, value in feeds.items():
            host = self._tensors[name].host
            assert host is not None
            np.copyto(host[:batch], value)
        if self.free_batch and batch != self._batch:
            for name in self.signature.inputs:
                self._context.set_input_shape(name, (batch, *self._tensors[name].shape[1:]))
            self._batch = batch
        return batch

    def _upload(self, batch: int) -> None:
        for name in self.signature.inputs:
            tensor = self._tensors[name]
            assert tensor.host is not None
            self.memory.upload(tensor.address, tensor.host[:batch])

    def _compute(self) -> None:
        if self._graph is not None:
            self._graph.launch()
        else:
            self._enqueue()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self.memory.stream):
            raise RuntimeError(f"{self._path}: TensorRT could not run the engine; its messages say why")

    def _download(self, batch: int) -> None:
        for name in self.signature.outputs:
            tensor = self._tensors[name]
            assert tensor.host is not None
            self.memory.download(tensor.host[:batch], tensor.address)

    def _read(self, batch: int) -> dict[str, np.ndarray]:
        found = {}
        for name in self.signature.outputs:
            host = self._tensors[name].host
            assert host is not None
            found[name] = host[:batch].copy()  # the buffer is overwritten by the next call
        return found

    # -- loading ------------------------------------------------------------------------------------------------------

    def _names(self) -> list[str]:
        return [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]

    def _tensor(self, trt: ModuleType, name: str) -> _Tensor:
        engine, kind = self.engine, self.engine.get_tensor_dtype(name)
        shape = tuple(engine.get_tensor_shape(name))
        if shape[:1] == (-1,):
            # One profile; its largest batch holds for the outputs too.
            largest = tuple(engine.get_tensor_profile_shape(self.signature.images, 0)[2])
            shape = (largest[0], *shape[1:])
        count = int(np.prod(shape, dtype=np.int64))
        known = name in self.signature.inputs or name in self.signature.outputs
        host = None
        if known:
            dtype = np.dtype(trt.nptype(kind))
            host = self.memory.host(count * dtype.itemsize).view(dtype).reshape(shape)
            host[...] = 0
        return _Tensor(shape, self.memory.device(count * kind.itemsize), host)

    def _values(self, trt: ModuleType, mode: Any) -> dict[str, Value]:
        found = {}
        for name, tensor in self._tensors.items():
            if not name.startswith(SCORES) and self.engine.get_tensor_mode(name) == mode:
                shape = tuple(None if size < 0 else size for size in self.engine.get_tensor_shape(name))
                kind = self.engine.get_tensor_dtype(name)
                found[name] = Value(str(tensor.host.dtype) if tensor.host is not None else str(kind), shape)
        return found

    def _record(self) -> None:
        """A CUDA graph of the computation; the copies stay outside, where they can be timed.

        With a free batch there is none: TensorRT ties a recording to the shapes that were set.
        """
        if self.free_batch:
            return
        self._enqueue()  # the first call prepares what may not happen while recording
        self.memory.synchronize()
        try:
            self._graph = CudaGraph(self.memory.stream, self._enqueue)
        except (RuntimeError, OSError) as error:
            print(f"{self._path}: no CUDA graph ({error}); the engine runs without one", file=sys.stderr)
