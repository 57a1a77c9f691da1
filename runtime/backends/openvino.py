"""OpenVINO on the CPU: what x86 edge boxes run fastest, in fp32, in bf16 where the CPU has it, in int8."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from threading import Lock
from types import ModuleType
from typing import Any

import numpy as np

from ...artefacts.bundle import Bundle
from ...cores import usable_cores
from ...errors import InputError
from ...extras import command
from ..model import Model
from ..runner import INT8, PRECISIONS, ChosenGraph, Runner, Value, check_threads, choose_graph

DEVICE = "CPU"
NARROW = 64
"""width of a backbone up to which one thread has to do without fused kernels: for one thread OpenVINO also fuses layers
of at most 256 x 256, and where the projection, the residual and the MLP of a few rows meet, its compiler dies of a
segmentation fault (2026.4.1; TokenizeMLPSeqSnippets). Above, the MLP's 4 x width keep it from trying."""
CAPABILITIES = {"fp32": "FP32", "bf16": "BF16", "int8": "INT8"}
"precision -> what OpenVINO calls it in OPTIMIZATION_CAPABILITIES"


def open_openvino(
    bundle: Bundle, graph: str = "student", threads: int | None = None, precision: str | None = None
) -> Runner:
    """Compile one graph of a bundle with OpenVINO for the CPU.

    Args:
        graph: "student", "query" or "prompted".
        threads: of the CPU; None: see cores.default_threads.
        precision: "fp32", "bf16" (of the fp32 graph, the engine converts it) or "int8" (of a calibrated graph).

    Raises: InputError when openvino is missing, the CPU lacks the precision, the graph cannot be compiled, or its
        inputs and outputs are not those of the manifest.
    """
    count, openvino = check_threads(threads), import_openvino()
    found = core()
    offered = precisions(found)
    if precision in PRECISIONS and precision not in offered:
        raise InputError(
            f"OpenVINO does not compute in {precision!r} on this CPU",
            got=found.get_property(DEVICE, "FULL_DEVICE_NAME"),
            expected="one of " + ", ".join(offered),
            fix="choose another precision, or use --backend onnxruntime",
        )
    chosen = choose_graph(bundle, graph, precision, INT8, hints=("bf16",), backend="openvino")
    return Runner.open(chosen, lambda model: OpenVinoEngine(chosen, model, openvino, found, count))


class OpenVinoEngine:
    """One graph, compiled by OpenVINO for the CPU; see `open_openvino` and `runtime.runner.Engine`.

    fp32 is exact: by itself OpenVINO takes bfloat16 on every CPU that has it, and takes bfloat16 for a float16 that the
    CPU lacks. Here only what was asked for goes, and what was compiled is read back. The request and its memory are
    made once and used again: calls wait for each other. For calls side by side take a runner for each, see
    `server.live_model.Pool`.
    """

    def __init__(self, graph: ChosenGraph, model: Model, openvino: ModuleType, core: Any, threads: int) -> None:
        """openvino: the module. core: its Core. Raises: InputError, see open_openvino."""
        self._graph, self._openvino, self._threads = graph, openvino, threads
        self._turn = Lock()
        self._compiled: Any = None
        self._request: Any = None
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "bf16" if graph.precision == "bf16" else "f32",
            # Pinned and free took 26.6 and 26.5 ms (ViT-T/16 CODA + KDP, one thread of a 2-core EPYC, 2026-11-21):
            # free, the system may move a thread away from a core that something else keeps busy.
            "ENABLE_CPU_PINNING": False,
        }
        backbone = graph.bundle.manifest.backbone
        width = backbone.width if backbone else 0
        if width <= NARROW and min(threads, usable_cores()) == 1:  # OpenVINO takes no more than there are
            settings["SNIPPETS_MODE"] = "DISABLE"
        try:
            # The one documented way to give constants from memory is to give them inside of the graph.
            self._compiled = core.compile_model(core.read_model(model.whole()), DEVICE, settings)
            self._request = self._compiled.create_infer_request()
        except _errors(openvino) as error:
            raise InputError(
                f"{graph.path}: OpenVINO {self._version} cannot compile the graph",
                got=_reason(error),
                expected="a graph that OpenVINO's CPU device can run",
                fix="export it again with --profile openvino, or upgrade openvino",
            ) from error
        graph.check_signature(
            _values(self._compiled.inputs, graph.signature.inputs),
            _values(self._compiled.outputs, graph.signature.outputs),
        )
        if (compiled := self._compiled_precision()) != graph.precision:
            raise graph.mismatch("precision of the compiled graph", compiled, graph.precision)

    def _compiled_precision(self) -> str:
        """What was really compiled, by our name."""
        if self._graph.precision == "int8":
            # Layers are fused under changing names; weights that stay bytes are what an 8-bit layer cannot do without.
            nodes = [node.get_rt_info() for node in self._compiled.get_runtime_model().get_ops()]
            weights = {i["runtimePrecision"].astype(str) for i in nodes if i["layerType"].astype(str) == "Const"}
            return "int8" if weights & {"i8", "u8"} else "no weights of 8 bits"
        hint = self._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        return {"f32": "fp32", "f16": "fp16"}.get(hint, str(hint))

    def call(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One call; see `runtime.runner.Engine`."""
        with self._turn:
            if self._request is None:
                raise RuntimeError("the runner is closed")
            try:
                results = self._request.infer(feeds, share_inputs=True)
            except _errors(self._openvino) as error:
                raise InputError(
                    f"{self._graph.path}: OpenVINO {self._version} cannot compute the graph",
                    got=_reason(error),
                    expected="a graph that computes what its manifest says",
                    fix="do not use this bundle; export it again",
                ) from error
            return {name: results[name] for name in self._graph.signature.outputs}

    @property
    def _version(self) -> str:
        """Without the build number."""
        return str(self._openvino.__version__).split("-")[0]

    def describe(self) -> dict[str, Any]:
        """{"backend", "providers", "threads", "version", "precision"}, the last two as compiled."""
        compiled = self._compiled
        return {
            "backend": "openvino",
            "providers": list(compiled.get_property("EXECUTION_DEVICES")) if compiled is not None else [],
            "threads": compiled.get_property("INFERENCE_NUM_THREADS") if compiled is not None else self._threads,
            "version": self._version,
            "precision": self._graph.precision,
        }

    def close(self) -> None:
        """Free the compiled graph; a second call does nothing."""
        with self._turn:
            self._request = self._compiled = None


def import_openvino() -> ModuleType:
    """The engine. Raises: InputError when it cannot be imported."""
    try:
        import openvino
    except ImportError as error:
        raise InputError(
            "openvino cannot be imported",
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            expected="openvino 2025.0 or newer",
            fix=command("openvino"),
        ) from error
    return openvino


_only: list[Any] = []
_making = Lock()


def core() -> Any:
    """OpenVINO's Core, one for the whole process and never freed. Raises: InputError, see import_openvino.

    Its CPU plugin gives the thread an alternate signal stack and takes it back when the Core goes. Where two of them
    overlap in time the thread is left with a stack that is unmapped, and the next signal with a Python handler, Ctrl-C
    for one, ends the process with a segmentation fault (2026.4.1).
    """
    openvino = import_openvino()
    with _making:
        if not _only:
            _only.append(openvino.Core())
    return _only[0]


def precisions(core: Any) -> list[str]:
    """Of CAPABILITIES, those that this CPU computes in by its own instructions."""
    listed = core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
    return [name for name, capability in CAPABILITIES.items() if capability in listed]


def _errors(openvino: ModuleType) -> tuple[type[BaseException], ...]:
    """RuntimeError, and the exceptions of OpenVINO's C++ side: they share no base class but Exception."""
    found = vars(openvino._pyopenvino).values()
    return (*(v for v in found if isinstance(v, type) and issubclass(v, Exception)), RuntimeError, ValueError)


def _reason(error: BaseException) -> str:
    """The first line that says more than where in OpenVINO's sources it was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return (told or lines or [type(error).__name__])[0]


def _values(ports: Sequence[Any], wanted: Collection[str]) -> dict[str, Value]:
    """Inputs or outputs by name: OpenVINO gives a tensor every name that it has in the graph."""
    values = {}
    for port in ports:
        names = sorted(port.get_names(), key=lambda name: name not in wanted)
        shape = tuple(size.get_length() if size.is_static else None for size in port.partial_shape)
        kind = port.element_type.get_type_name()
        values[names[0]] = Value({"f32": "float32", "u8": "uint8"}.get(kind, kind), shape)
    return values
