"""TensorRT: an engine of the graph on an NVIDIA GPU; built, refitted or taken from BUNDLE/engines."""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from ...artefacts.bundle import Bundle
from ..engines.build import Options
from ..engines.engine_cache import EngineCache
from ..engines.engine_session import EngineSession
from ..engines.memory import Memory, open_memory
from ..engines.product import find_gpu, find_tensorrt
from ..model import Model
from ..runner import INT8_TENSORRT, Runner, choose_graph


def open_tensorrt(
    bundle: Bundle,
    graph: str = "student",
    precision: str | None = None,
    options: Options | None = None,
    rebuild: bool = False,
    may_build: bool = True,
    cuda_graph: bool = True,
) -> Runner:
    """Load one graph of a bundle as a TensorRT engine, `TensorRTEngine`.

    Args:
        graph: "student", "query" or "prompted". precision: of a graph that the bundle has; None: fp32.
        options: for a build; None takes the engine that is there, whatever it was built with.
        rebuild: build whatever is there. may_build: False raises where a build or a refit would be needed.
        cuda_graph: launch each call as one CUDA graph; with a free batch axis there is none.

    Raises: InputError when there is no GPU, no TensorRT or none new enough, no way to its memory, or no engine that
        passes; see `runtime.engines.engine_cache.EngineCache.fetch`.
    """
    gpu = find_gpu()  # first of all: without a driver TensorRT may crash instead of raising
    trt = find_tensorrt()
    chosen = choose_graph(bundle, graph, precision, INT8_TENSORRT)

    def make(model: Model) -> TensorRTEngine:
        memory = open_memory()
        check = chosen.check_signature
        engine_cache = EngineCache(trt, gpu, memory, bundle, chosen.key, graph, chosen.precision, check, cuda_graph)
        try:
            session, sidecar = engine_cache.fetch(options, rebuild, may_build)
        except BaseException:
            memory.close()
            raise
        return TensorRTEngine(
            session, memory, engine_cache.engine, sidecar, chosen.precision, str(trt.__version__), gpu.name
        )

    return Runner.open(chosen, make)


class TensorRTEngine:
    """A TensorRT engine with its session and memory; see `open_tensorrt` and `runtime.runner.Engine`."""

    def __init__(
        self,
        session: EngineSession,
        memory: Memory,
        path: Path,
        sidecar: dict[str, Any],
        precision: str,
        version: str,
        gpu: str,
    ) -> None:
        self._turn = Lock()  # one context, one set of buffers: calls wait for each other
        self._session: EngineSession | None = session
        self._memory: Memory | None = memory
        self.path = path
        "the plan, in BUNDLE/engines"
        self.sidecar = sidecar
        "what is known about the engine"
        self._precision, self._version, self._gpu = precision, version, gpu

    def call(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One call; see `runtime.runner.Engine`."""
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
            "version": self._version,
            "precision": self._precision,
            "gpu": self._gpu,
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

    Raises: InputError, as open_tensorrt.
    """
    runner = open_tensorrt(bundle, graph, precision, options or Options(), rebuild)
    runner.close()
    engine = runner.engine
    assert isinstance(engine, TensorRTEngine)
    return {"engine": str(engine.path), "seconds": round(runner.load_ms / 1e3, 1), "sidecar": engine.sidecar}
