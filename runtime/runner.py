"""What every backend shares: its outputs, its face, and the check of its input."""

from __future__ import annotations

import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, ClassVar

import numpy as np

from ..artefacts.bundle import Bundle, Shape
from ..cores import default_threads
from ..errors import InputError, choose
from .confidence import Confidence
from .model import read_model

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


class Runner(ABC):
    """A loaded graph; made by `cdl_edge.runtime.load`, used in a `with` block.

    A backend opens the graph, computes one call, describes itself and frees what it holds; all else is shared. Any
    thread may call it at any time. It answers from the bytes that were hashed when it was made, see `runtime.model`.
    """

    int8: ClassVar[str] = "int8-x86" if platform.machine() in ("x86_64", "AMD64") else "int8-arm"
    "the flavour of 8-bit graph that this backend runs well: U8 activations on x86, symmetric S8 on ARM"
    hints: ClassVar[tuple[str, ...]] = ()
    "precisions that the engine computes the fp32 graph in by itself"

    def __init__(self, bundle: Bundle, graph: str = "student", precision: str | None = None) -> None:
        """graph: "student", "query" or "prompted". precision: a key of PRECISIONS; None: the bundle's choice, or fp32.

        Raises: InputError when the bundle has no such graph, or the graph reads a file that no hash covers.
        """
        if precision is not None:
            choose("precision", precision, PRECISIONS)
        self.bundle, self.precision = bundle, precision or self._recommended(bundle, graph)
        own = self.int8 if self.precision == "int8" else self.precision
        self.key = graph if own in ("fp32", *self.hints) else f"{graph}.{own}"
        self.path = bundle.graph(self.key)
        self.signature = bundle.signature(self.key)
        self.model = read_model(bundle, self.key)
        begin = time.perf_counter()
        self._open()
        self.load_ms = (time.perf_counter() - begin) * 1e3
        "time to create the session; reading the bundle and checking its hashes are left out"

    def _recommended(self, bundle: Bundle, graph: str) -> str:
        """What `calibrate` recommends, where this backend has a graph for it that answers like fp32; fp32 otherwise."""
        found = bundle.manifest.quantisation
        if found is None or found.recommended.get("precision") != "int8":
            return "fp32"
        scheme = found.flavours.get(self.int8)
        good = scheme is None or scheme.shortfall is None
        return "int8" if good and f"{graph}.{self.int8}" in bundle.manifest.graphs else "fp32"

    @cached_property
    def certainty(self) -> Confidence:
        """What the bundle knows about its own confidence. Raises: InputError, see Confidence.of."""
        return Confidence.of(self.bundle)

    @abstractmethod
    def _open(self) -> None:
        """Load `model` and compare it with `signature`. Raises: InputError."""

    @abstractmethod
    def _call(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One call of the graph: contiguous inputs of a batch that it takes -> outputs by name.

        Called by several threads at a time. Raises: InputError for a graph that the engine cannot compute.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """{"backend", "providers" (as resolved), "threads", "version", "precision"}."""

    @abstractmethod
    def close(self) -> None:
        """Free the session; a second call does nothing."""

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
            return self._call({name: np.ascontiguousarray(value) for name, value in feeds.items()})
        return in_batches(self._call, feeds, self.bundle.batch)

    def run(self, images: np.ndarray, **selection: np.ndarray) -> Outputs:
        """Compute uint8 (B, S, S, 3); selection: the other inputs of a "prompted" graph, "prompt_weights" (B, L, K).

        Raises: InputError for another shape or type, or for a graph without logits.
        """
        if "logits" not in self.signature.outputs:
            raise InputError(f"graph {self.key!r} gives no logits", got=list(self.signature.outputs), fix="use compute")
        outputs = self.compute({self.signature.images: images, **selection})
        return Outputs(outputs["logits"], outputs.get("prompt_weights"))

    def infer(self, images: np.ndarray) -> np.ndarray:
        """`run`, the logits only: float32 (B, C)."""
        return self.run(images).logits

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
