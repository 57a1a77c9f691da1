"""What every backend shares: its outputs, the check of its input, and batches; a `Runner` over an `Engine`."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from ..artefacts.bundle import Bundle, Shape, Signature
from ..cores import default_threads
from ..errors import InputError, choose
from .confidence import Confidence
from .model import Model, read_model

PRECISIONS = {
    "fp32": "as trained",
    "fp16": "half precision, LayerNorm and softmax in fp32",
    "bf16": "bfloat16, LayerNorm and softmax in fp32",
    "int8": "8-bit linear layers, made by `cdl-edge calibrate`",
}


@dataclass(frozen=True)
class Outputs:
    """What the student says about B images."""

    logits: np.ndarray
    "float32 (B, C), classes in the order of Bundle.classes"
    prompt_weights: np.ndarray | None
    "float32 (B, L, K): L prompted blocks, K learnt entries; None when the learner has no prompt selection"


@dataclass(frozen=True)
class Value:
    """Type and shape of an input or output, as the engine read them from the file."""

    dtype: str
    "numpy's name, or the engine's own for a type that numpy lacks"
    shape: Shape

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


INT8 = "int8-x86" if platform.machine() in ("x86_64", "AMD64") else "int8-arm"
"the 8-bit quantisation scheme that a CPU runs well: U8 activations on x86, symmetric S8 on ARM"
INT8_TENSORRT = "int8-trt"
"the 8-bit quantisation scheme that TensorRT takes"


@dataclass(frozen=True)
class ChosenGraph:
    """One graph of a bundle in one precision, as an engine is asked to load it; made by `choose_graph`."""

    bundle: Bundle
    precision: str
    "key of PRECISIONS"
    key: str
    "key of the manifest's graphs: `student`, `query.fp16`, `prompted.int8-x86`"

    @property
    def path(self) -> Path:
        """Path of the ONNX file."""
        return self.bundle.graph(self.key)

    @property
    def signature(self) -> Signature:
        """Inputs and outputs of the graph, as the manifest declares them."""
        return self.bundle.signature(self.key)

    def check_signature(self, inputs: Mapping[str, Value], outputs: Mapping[str, Value]) -> None:
        """Compare what the engine found in the file with what the manifest says. Raises: InputError."""
        wanted = self.signature
        if set(inputs) != set(wanted.inputs):
            raise self.mismatch("inputs", list(inputs), list(wanted.inputs))
        for name, shape in wanted.inputs.items():
            expected = Value("uint8" if name == wanted.images else "float32", shape)
            if inputs[name] != expected:
                raise self.mismatch(f"input {name!r}", inputs[name], expected)
        for name, shape in wanted.outputs.items():
            if name not in outputs:
                raise self.mismatch("outputs", list(outputs), list(wanted.outputs))
            got = outputs[name]
            if name == "logits" and got.shape[-1:] != (len(self.bundle.classes),):
                raise self.mismatch("class count mismatch", f"logits {got}", f"{len(self.bundle.classes)} classes")
            # The batch axis of an output follows from the inputs; not every engine derives it.
            if got.dtype != "float32" or len(got.shape) != len(shape) or got.shape[1:] != shape[1:]:
                raise self.mismatch(f"output {name!r}", got, Value("float32", shape))

    def mismatch(self, what: str, got: object, expected: object) -> InputError:
        """The error for a graph that is not what its manifest says."""
        return InputError(
            f"{self.path}: the graph does not fit its manifest: {what}",
            got=got,
            expected=expected,
            fix="export the bundle again",
        )


def choose_graph(
    bundle: Bundle,
    graph: str = "student",
    precision: str | None = None,
    int8: str = INT8,
    hints: Collection[str] = (),
    newest_opset: int | None = None,
    backend: str | None = None,
) -> ChosenGraph:
    """The graph that an engine computes for this precision.

    Args:
        graph: "student", "query" or "prompted". precision: a key of PRECISIONS; None: what `calibrate` recommends,
            where the bundle has a graph for it that this engine loads and that answers like fp32; fp32 otherwise.
        int8: the quantisation scheme of the 8-bit graphs that the engine runs well.
        hints: precisions that the engine computes the fp32 graph in by itself.
        newest_opset: of the 8-bit graphs that the engine loads; None: any.
        backend: the engine's name in a calibration's times. Where they have its 8 bits, and recommend another engine's,
            it computes in fp32; None: a recommendation is for every engine.

    Raises: InputError for an unknown precision, or when the bundle has no such graph.
    """
    if precision is not None:
        choose("precision", precision, PRECISIONS)
    precision = precision or _recommended(bundle, graph, int8, newest_opset, backend)
    own = int8 if precision == "int8" else precision
    chosen = ChosenGraph(bundle, precision, graph if own in ("fp32", *hints) else f"{graph}.{own}")
    bundle.graph(chosen.key)  # raises where there is none
    return chosen


def _recommended(bundle: Bundle, graph: str, int8: str, newest_opset: int | None, backend: str | None) -> str:
    found = bundle.manifest.quantisation
    if found is None or found.recommended.get("precision") != "int8":
        return "fp32"
    # One engine's 8 bits may be fast and right where another's are slow, or answer otherwise. On x86 alone there are
    # two that compute in 8 bits: what was measured there says nothing about another processor.
    measured = {entry.backend for entry in found.latency if entry.precision == "int8"}
    if int8 == "int8-x86" and backend in measured - {found.recommended.get("backend")}:
        return "fp32"
    scheme = found.schemes.get(int8)
    opset = scheme.opset if scheme and scheme.opset is not None else bundle.manifest.opset or 0
    if newest_opset is not None and opset > newest_opset:
        return "fp32"
    good = scheme is None or scheme.shortfall is None
    return "int8" if good and f"{graph}.{int8}" in bundle.manifest.graphs else "fp32"


class Engine(Protocol):
    """What a backend provides: one loaded graph. `Runner` checks the inputs before and cuts them into batches."""

    def call(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One call of the graph: contiguous inputs of a batch that it takes -> outputs by name.

        Called by several threads at a time. Raises: InputError for a graph that the engine cannot compute,
        RuntimeError once closed.
        """

    def describe(self) -> dict[str, Any]:
        """{"backend", "providers" (as resolved), "threads", "version", "precision"}."""

    def close(self) -> None:
        """Free the session; a second call does nothing."""


class Runner:
    """A loaded graph; made by `cdl_edge.runtime.load`, used in a `with` block.

    The engine computes one call; all that is common to engines is here. Any thread may call it at any time. It answers
    from the bytes that were hashed when it was made, see `runtime.model`.
    """

    def __init__(self, graph: ChosenGraph, engine: Engine, load_ms: float = 0.0) -> None:
        """load_ms: time to create the engine; reading the bundle and checking its hashes are left out."""
        self.graph, self.engine, self.load_ms = graph, engine, load_ms
        self.bundle, self.precision, self.key = graph.bundle, graph.precision, graph.key
        self.path, self.signature = graph.path, graph.signature

    @classmethod
    def open(cls, graph: ChosenGraph, make: Callable[[Model], Engine]) -> Runner:
        """Read the graph with its constants, and make an engine of them.

        Raises: InputError as `make`, and when the graph reads a file that no hash covers.
        """
        model = read_model(graph.bundle, graph.key)
        begin = time.perf_counter()
        engine = make(model)
        return cls(graph, engine, (time.perf_counter() - begin) * 1e3)

    @cached_property
    def certainty(self) -> Confidence:
        """What the bundle knows about its own confidence. Raises: InputError, see Confidence.of."""
        return Confidence.of(self.bundle)

    def describe(self) -> dict[str, Any]:
        """{"backend", "providers" (as resolved), "threads", "version", "precision"}, and what the engine adds."""
        return self.engine.describe()

    def close(self) -> None:
        """Free the engine; a second call does nothing."""
        self.engine.close()

    def compute(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Any number B of images through the graph: its inputs by name, (B, ...) each -> its outputs by name.

        Raises: InputError for inputs of other names, shapes or types, RuntimeError once closed.
        """
        wanted = self.signature.inputs
        if set(feeds) != set(wanted):
            raise InputError(f"{self.path.name}: inputs of other names", got=sorted(feeds), expected=sorted(wanted))
        images = feeds[self.signature.images]
        check_images(images, wanted[self.signature.images][1])
        for name, value in feeds.items():
            if name != self.signature.images:
                expected = (len(images), *wanted[name][1:])
                if value.dtype != np.float32 or value.shape != expected:
                    got = f"{value.dtype} {value.shape}"
                    raise InputError(f"{self.path.name}: input {name!r}", got=got, expected=f"float32 {expected}")
        if len(images) == 0:
            return {name: np.zeros((0, *shape[1:]), np.float32) for name, shape in self.signature.outputs.items()}
        if self.bundle.batch is None:
            return self.engine.call({name: np.ascontiguousarray(value) for name, value in feeds.items()})
        return in_batches(self.engine.call, feeds, self.bundle.batch)

    def run(self, images: np.ndarray, **selection: np.ndarray) -> Outputs:
        """Compute uint8 (B, S, S, 3); selection: the other inputs of a "prompted" graph, "prompt_weights" (B, L, K).

        Raises: InputError for another shape or type, or for a graph without logits.
        """
        if "logits" not in self.signature.outputs:
            raise InputError(f"graph {self.key!r} gives no logits", got=list(self.signature.outputs), fix="use compute")
        outputs = self.compute({self.signature.images: images, **selection})
        return Outputs(outputs["logits"], outputs.get("prompt_weights"))

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Logits of images uint8 (B, S, S, 3): float32 (B, C); `run` gives all outputs."""
        return self.run(images).logits

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_threads(threads: int | None) -> int:
    """CPU threads to use; None: the cores that are free, see cores.py. Raises: InputError below 1."""
    if threads is not None and threads < 1:
        raise InputError("the number of threads is wrong", got=threads, expected="1 or more")
    return threads or default_threads()


def check_images(images: np.ndarray, size: int) -> None:
    """Raises: InputError unless `images` is uint8 (B, size, size, 3)."""
    got = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (size, size, 3):
        raise InputError(
            "images of the wrong shape or type",
            got=got,
            expected=f"uint8 (B, {size}, {size}, 3), RGB, not normalised",
            fix="use bundle.preprocessing.read(path) and np.stack",
        )


def in_batches(
    compute: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], feeds: dict[str, np.ndarray], batch: int
) -> dict[str, np.ndarray]:
    """Feed a graph of fixed batch size: cut (B, ...) into pieces of `batch`, the last filled with zeros, and join."""
    pieces: list[dict[str, np.ndarray]] = []
    count = len(next(iter(feeds.values())))
    for start in range(0, count, batch):
        real = min(batch, count - start)
        piece = {name: np.ascontiguousarray(value[start : start + batch]) for name, value in feeds.items()}
        if real < batch:
            piece = {n: np.concatenate([v, np.zeros((batch - real, *v.shape[1:]), v.dtype)]) for n, v in piece.items()}
        pieces.append({name: output[:real] for name, output in compute(piece).items()})
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
