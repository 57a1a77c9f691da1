"""ONNX Runtime: on the CPU everywhere, on an NVIDIA GPU where onnxruntime-gpu and the driver are there."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ...artefacts.bundle import Bundle
from ...errors import InputError, choose
from ...machine import cuda_driver
from ..model import Model
from ..runner import INT8, INT8_TENSORRT, ChosenGraph, Runner, Value, check_threads, choose_graph
from ..secret import private_folder

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
WITHOUT_QDQ_23 = (1, 23)
"the newest release that has no QuantizeLinear of opset 23; the last one for Python 3.10"
WORKSPACE = 1 << 30
"bytes that TensorRT may use while it looks for kernels"
KEPT = 4
"versions whose TensorRT engines are kept, each of some ten megabytes"


def open_onnxruntime(
    bundle: Bundle,
    graph: str = "student",
    provider: str = "cpu",
    threads: int | None = None,
    precision: str | None = None,
) -> Runner:
    """Load one graph of a bundle into an ONNX Runtime session.

    Args:
        graph: "student", "query" or "prompted".
        provider: a key of PROVIDERS. One that cannot be had is an InputError: there is no silent fallback. "tensorrt"
            builds engines when the graph is loaded (minutes) and keeps them in the user's state folder; what it cannot
            take runs on CUDA.
        threads: of the CPU; None: see cores.default_threads.

    Raises: InputError when onnxruntime is missing, the provider cannot be had, the graph cannot be loaded, or its
        inputs and outputs are not those of the manifest.
    """
    count, ort = check_threads(threads), _import()
    wanted = PROVIDERS[choose("provider", provider, PROVIDERS)]
    if wanted not in ort.get_available_providers():
        raise _no_provider(wanted, "this onnxruntime was built without it: " + _listed(ort))
    int8 = INT8_TENSORRT if provider == "tensorrt" else INT8
    if provider == "cuda" and precision is None:
        precision = "fp32"  # what is recommended was measured on a CPU, and nothing of 8 bits is made for CUDA
    newest = 21 if is_old(ort.__version__) else None
    chosen = choose_graph(bundle, graph, precision, int8, newest_opset=newest, backend="onnxruntime")
    return Runner.open(chosen, lambda model: OrtEngine(chosen, model, ort, wanted, count))


class OrtEngine:
    """One graph in an ONNX Runtime session; see `open_onnxruntime` and `runtime.runner.Engine`."""

    def __init__(self, graph: ChosenGraph, model: Model, ort: ModuleType, provider: str, threads: int) -> None:
        """ort: the module. provider: its name for one. Raises: InputError, see open_onnxruntime."""
        self._graph, self._ort, self._wanted, self._threads = graph, ort, provider, threads
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        if threads == 1:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        else:  # between calls the other threads would go on spinning, against whatever decodes the next picture
            options.add_session_config_entry("session.force_spinning_stop", "1")
        # They are used where they lie, and have to live as long as the session.
        self._constants = model.constants()
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in self._constants.values()]
        try:
            options.add_external_initializers(list(self._constants), values)
            # Without the second attempt on the CPU that onnxruntime makes, and prints, by itself.
            again = {} if provider != PROVIDERS["cpu"] else {"enable_fallback": 0}
            self._session: Any = ort.InferenceSession(model.graph, options, providers=self._providers(), **again)
        except _errors(ort) as error:
            raise InputError(
                f"{graph.path}: onnxruntime {ort.__version__} cannot load the graph",
                got=_first_line(error),
                expected=f"a graph that {provider} can run",
                fix="calibrate it again with --opset 21, or use --precision fp32"
                if graph.precision == "int8" and is_old(ort.__version__)
                else "export it again, with a profile for this device, or upgrade onnxruntime",
            ) from error
        # get_available_providers() names what was compiled in, not what loads: only the session knows.
        if self._session.get_providers()[0] != provider:
            raise _no_provider(provider, f"onnxruntime fell back to {', '.join(self._session.get_providers())}")
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        graph.check_signature({i.name: _value(i) for i in inputs}, {o.name: _value(o) for o in outputs})

    def _providers(self) -> list[Any]:
        """In the order in which they may take nodes; the CPU for the few shape operators without a CUDA kernel."""
        cpu, cuda, tensorrt = PROVIDERS.values()
        if self._wanted == cpu:
            return [cpu]
        if self._wanted == cuda:
            return [cuda, cpu]
        # Engines are found again by the graph's structure alone: after an update with other weights the old engine
        # would answer. Each version of a bundle has a folder of its own, therefore. They are executable code, which
        # onnxruntime loads without a look at who wrote it: not in the bundle, then, which others may hand on.
        folder = _kept(private_folder("ort-engines"), self._graph.bundle.manifest.version)
        options = {
            "trt_max_workspace_size": str(WORKSPACE),
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(folder),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(folder),
            "trt_fp16_enable": str(int(self._graph.precision == "fp16")),
            "trt_layer_norm_fp32_fallback": "1",
            "trt_int8_enable": str(int(self._graph.precision == "int8")),
        }
        return [(tensorrt, options), cuda, cpu]

    def call(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One call; see `runtime.runner.Engine`."""
        session, names = self._session, list(self._graph.signature.outputs)  # another thread may close meanwhile
        if session is None:
            raise RuntimeError("the runner is closed")
        try:
            return dict(zip(names, session.run(names, feeds), strict=True))
        except _errors(self._ort) as error:
            raise InputError(
                f"{self._graph.path}: onnxruntime {self._ort.__version__} cannot compute the graph",
                got=_first_line(error),
                expected="a graph that computes what its manifest says",
                fix="do not use this bundle; export it again",
            ) from error

    def describe(self) -> dict[str, Any]:
        """{"backend", "providers" (as resolved by the session), "threads", "version", "precision"}."""
        providers = self._session.get_providers() if self._session is not None else []
        return {
            "backend": "onnxruntime",
            "providers": list(providers),
            "threads": self._threads,
            "version": str(self._ort.__version__),
            "precision": self._graph.precision,
        }

    def close(self) -> None:
        """Free the session; a second call does nothing."""
        self._session = None  # calls that run keep it, and with it the constants, until they end


def _kept(folder: Path, version: str) -> Path:
    """The folder of a version's engines; of others only those that were used last stay."""
    mine = folder / version
    mine.mkdir(mode=0o700, exist_ok=True)
    os.utime(mine)
    known = [path for path in folder.iterdir() if re.fullmatch("[0-9a-f]{16}", path.name) and path.is_dir()]
    for old in sorted(known, key=lambda path: path.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return mine


def is_old(version: str) -> bool:
    """Whether an ONNX Runtime lacks QuantizeLinear of opset 23. version: as 1.23.2."""
    return tuple(int(part) for part in version.split(".")[:2]) <= WITHOUT_QDQ_23


def _import() -> ModuleType:
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(
            "onnxruntime cannot be imported",
            got=_first_line(error),
            expected="onnxruntime 1.23 or newer",
            fix="pip install onnxruntime",
        ) from error
    return onnxruntime


def _errors(ort: ModuleType) -> tuple[type[BaseException], ...]:
    """The exceptions of onnxruntime's C++ side: they share no base class but Exception."""
    state = ort.capi.onnxruntime_pybind11_state
    found = [value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception)]
    return (*found, RuntimeError, ValueError)


def _listed(ort: ModuleType) -> str:
    return ", ".join(ort.get_available_providers())


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _no_provider(wanted: str, reason: str) -> InputError:
    fix = "use --backend cpu"
    if wanted != PROVIDERS["cpu"]:
        driver = cuda_driver()
        reason += f"; {driver.detail}"
        fix += (
            ", or: pip uninstall onnxruntime && pip install onnxruntime-gpu (and see: cdl-edge doctor)"
            if driver.devices
            else ", or install an NVIDIA driver"
        )
    return InputError(f"{wanted} cannot be used here", got=reason, expected=wanted, fix=fix)


def _value(argument: Any) -> Value:
    """ONNX Runtime gives the name of a free dimension, or None."""
    dtype = argument.type.removeprefix("tensor(").removesuffix(")")
    shape = tuple(size if isinstance(size, int) else None for size in argument.shape)
    return Value("float32" if dtype == "float" else dtype, shape)
