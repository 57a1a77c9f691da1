"""TensorRT: an engine of the graph on an NVIDIA GPU; built, refitted or taken from BUNDLE/engines."""

from __future__ import annotations

from threading import Lock
from typing import Any, ClassVar

import numpy as np

from ...artefacts.bundle import Bundle
from ..engines.build import Options
from ..engines.engine_cache import EngineCache
from ..engines.engine_session import EngineSession
from ..engines.memory import Memory, open_memory
from ..engines.product import find_gpu, find_tensorrt
from ..runner import Runner


class TensorRTRunner(Runner):
    """One graph of a bundle as a TensorRT engine; see `runtime.runner.Runner`.

    Args:
        graph: "student", "query" or "prompted". precision: of a graph that the bundle has; None: fp32.
        options: for a build; None takes the engine that is there, whatever it was built with.
        rebuild: build whatever is there. may_build: False raises where a build or a refit would be needed.
        cuda_graph: launch each call as one CUDA graph; with a free batch axis there is none.

    Raises: InputError when there is no GPU, no TensorRT or none new enough, no way to its memory, or no engine that
        passes; see `runtime.engines.engine_cache.EngineCache.fetch`.
    """

    int8: ClassVar[str] = "int8-trt"
    _session: EngineSession | None = None
    _memory: Memory | None = None

    def __init__(
        self,
        bundle: Bundle,
        graph: str = "student",
        precision: str | None = None,
        options: Options | None = None,
        rebuild: bool = False,
        may_build: bool = True,
        cuda_graph: bool = True,
    ) -> None:
        self._turn = Lock()  # one context, one set of buffers: calls wait for each other
        self._gpu = find_gpu()  # first of all: without a driver TensorRT may crash instead of raising
        self._trt = find_tensorrt()
        self._graph, self._cuda_graph = graph, cuda_graph
        self._options, self._rebuild, self._may_build = options, rebuild, may_build
        self.sidecar: dict[str, Any] = {}
        "what is known about the engine"
        super().__init__(bundle, graph, precision)

    def _open(self) -> None:
        self._memory = open_memory()
        engine_cache = EngineCache(
            self._trt,
            self._gpu,
            self._memory,
            self.bundle,
            self.key,
            self._graph,
            self.precision,
            self.check_signature,
            self._cuda_graph,
        )
        try:
            self._session, self.sidecar = engine_cache.fetch(self._options, self._rebuild, self._may_build)
        except BaseException:
            self.close()
            raise
        self.engine = engine_cache.engine

    def _call(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with self._turn:
            if self._session is None:
                raise RuntimeError("the runner is closed")
            return self._session.compute(feeds)

    def timed(self, feeds: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """One call with the times of its stages; see `runtime.engines.engine_session.EngineSession.timed`."""
        with self._turn:
            if self._session is None:
                raise RuntimeError("the runner is closed")
            return self._session.timed(feeds)

    def describe(self) -> dict[str, Any]:
        """{"backend", "providers", "threads", "version", "precision", "gpu", "achieved", "memory", "cuda_graph"}."""
        return {
            "backend": "tensorrt",
            "providers": ["TensorRT"],
            "threads": 1,
            "version": str(self._trt.__version__),
            "precision": self.precision,
            "gpu": self._gpu.name,
            "achieved": self.sidecar.get("achieved"),
            "memory": f"page-locked, {self._memory.name}" if self._memory is not None else None,
            "cuda_graph": self._session is not None and self._session.cuda_graph,
        }

    def close(self) -> None:
        """Free session and memory; a second call does nothing."""
        with self._turn:
            if self._session is not None:
                self._session.close()
            if self._memory is not None:
                self._memory.close()
            self._session = self._memory = None


def build_engine(
    bundle: Bundle,
    graph: str = "student",
    precision: str | None = None,
    options: Options | None = None,
    rebuild: bool = False,
) -> dict[str, Any]:
    """Have an engine ready for one graph of a bundle, before it is needed: what `cdl-edge build` does.

    Engines are best built in a process of their own: TensorRT gives memory back to the system only when it ends.

    Returns: {"engine": path, "seconds": of this call, "sidecar": what is known about it}.

    Raises: InputError, as TensorRTRunner.
    """
    runner = TensorRTRunner(bundle, graph, precision, options or Options(), rebuild)
    runner.close()
    return {"engine": str(runner.engine), "seconds": round(runner.load_ms / 1e3, 1), "sidecar": runner.sidecar}
