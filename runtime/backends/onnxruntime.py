"""ONNX Runtime: on the CPU everywhere, on an NVIDIA GPU where onnxruntime-gpu and the driver are there."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from ...errors import InputError, choose
from ..bundle import Bundle
from ..machine import cuda_driver
from ..runner import Runner, Value, check_threads

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OrtRunner(Runner):
    """One graph of a bundle in an ONNX Runtime session; see `runtime.runner.Runner`.

    Args:
        graph: "student", "query" or "prompted".
        provider: "cpu" or "cuda". CUDA that cannot be had is an InputError: there is no silent fallback.
        threads: of the CPU; None means every core this process may use.

    Raises: InputError when onnxruntime is missing, the provider cannot be had, the graph cannot be loaded, or its
        inputs and outputs are not those of the manifest.
    """

    _session: Any = None

    def __init__(
        self,
        bundle: Bundle,
        graph: str = "student",
        provider: str = "cpu",
        threads: int | None = None,
        precision: str | None = None,
    ) -> None:
        self._threads = check_threads(threads)
        self._ort = _import()
        self._wanted = PROVIDERS[choose("provider", provider, PROVIDERS)]
        if self._wanted not in self._ort.get_available_providers():
            raise _no_provider(self._wanted, "this onnxruntime was built without it: " + _listed(self._ort))
        super().__init__(bundle, graph, precision)
        # get_available_providers() names what was compiled in, not what loads: only the session knows.
        if self._session.get_providers()[0] != self._wanted:
            resolved = ", ".join(self._session.get_providers())
            self.close()
            raise _no_provider(self._wanted, f"onnxruntime fell back to {resolved}")
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self.check_signature({i.name: _value(i) for i in inputs}, {o.name: _value(o) for o in outputs})

    def _open(self) -> None:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        if self._threads == 1:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # The CPU stays behind CUDA for the few shape operators that have no CUDA kernel.
        cpu = PROVIDERS["cpu"]
        providers = [cpu] if self._wanted == cpu else [self._wanted, cpu]
        try:
            self._session = self._ort.InferenceSession(str(self.path), options, providers=providers)
        except _errors(self._ort) as error:
            raise InputError(
                f"{self.path}: onnxruntime {self._ort.__version__} cannot load the graph",
                got=_first_line(error),
                expected=f"a graph that {self._wanted} can run",
                fix="export it again, with a profile for this device, or upgrade onnxruntime",
            ) from error

    def _call(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._session is None:
            raise RuntimeError("the runner is closed")
        names = list(self.signature.outputs)
        return dict(zip(names, self._session.run(names, feeds), strict=True))

    def describe(self) -> dict[str, Any]:
        """{"backend", "providers" (as resolved by the session), "threads", "version", "precision"}."""
        providers = self._session.get_providers() if self._session is not None else []
        return {
            "backend": "onnxruntime",
            "providers": list(providers),
            "threads": self._threads,
            "version": str(self._ort.__version__),
            "precision": self.precision,
        }

    def close(self) -> None:
        """Free the session; a second call does nothing."""
        self._session = None


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
    if wanted == PROVIDERS["cuda"]:
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
