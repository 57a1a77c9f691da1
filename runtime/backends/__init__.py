"""Backends by name; each is imported only when it is asked for."""

from __future__ import annotations

from collections.abc import Callable

from ...artefacts.bundle import Bundle
from ...errors import choose
from ..runner import Runner


def _cpu(bundle: Bundle, graph: str, threads: int | None, precision: str | None) -> Runner:
    from .onnxruntime import open_onnxruntime

    return open_onnxruntime(bundle, graph, "cpu", threads, precision)


def _cuda(bundle: Bundle, graph: str, threads: int | None, precision: str | None) -> Runner:
    from .onnxruntime import open_onnxruntime

    return open_onnxruntime(bundle, graph, "cuda", threads, precision)


def _ort_tensorrt(bundle: Bundle, graph: str, threads: int | None, precision: str | None) -> Runner:
    from .onnxruntime import open_onnxruntime

    return open_onnxruntime(bundle, graph, "tensorrt", threads, precision)


def _openvino(bundle: Bundle, graph: str, threads: int | None, precision: str | None) -> Runner:
    from .openvino import open_openvino

    return open_openvino(bundle, graph, threads, precision)


def _tensorrt(bundle: Bundle, graph: str, threads: int | None, precision: str | None) -> Runner:
    from .tensorrt import open_tensorrt

    return open_tensorrt(bundle, graph, precision)


BACKENDS: dict[str, Callable[[Bundle, str, int | None, str | None], Runner]] = {
    # "auto" is the CPU: it is there on every machine, and a GPU that cannot be used must be an error, not a surprise.
    "auto": _cpu,
    "onnxruntime": _cpu,
    "ort": _cpu,
    "cpu": _cpu,
    "cuda": _cuda,
    "ort-tensorrt": _ort_tensorrt,
    "openvino": _openvino,
    "ov": _openvino,
    "tensorrt": _tensorrt,
    "trt": _tensorrt,
}


def open_runner(
    bundle: Bundle, backend: str, graph: str = "student", threads: int | None = None, precision: str | None = None
) -> Runner:
    """Load a graph of a checked bundle. Raises: InputError for an unknown backend or one that cannot run here."""
    return BACKENDS[choose("backend", backend, BACKENDS)](bundle, graph, threads, precision)
