"""ONNX Runtime: on the CPU everywhere, on an NVIDIA GPU where onnxruntime-gpu and the driver are there."""

from __future__ import annotations

import time
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from ...errors import InputError, choose
from ..bundle import Bundle
from ..external import external_files
from ..machine import cuda_driver, usable_cores
from ..runner import Outputs, check_images, in_batches

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OrtRunner:
    """One graph of a bundle in an ONNX Runtime session; see `runtime.runner.Runner`.

    Args:
        graph: name in the manifest's "graphs".
        provider: "cpu" or "cuda". CUDA that cannot be had is an InputError: there is no silent fallback.
        threads: of the CPU; None means every core this process may use.

    Raises: InputError when onnxruntime is missing, the provider cannot be had, the graph cannot be loaded, or its
        inputs and outputs are not those of the manifest.
    """

    def __init__(
        self, bundle: Bundle, graph: str = "student", provider: str = "cpu", threads: int | None = None
    ) -> None:
        if threads is not None and threads < 1:
            raise InputError("the number of threads is wrong", got=threads, expected="1 or more")
        self._ort = _import()
        self.bundle = bundle
        self._path = bundle.graph(graph)
        self._threads = threads or usable_cores()
        wanted = PROVIDERS[choose("provider", provider, PROVIDERS)]
        if wanted not in self._ort.get_available_providers():
            raise _no_provider(wanted, "this onnxruntime was built without it: " + _listed(self._ort))
        _check_external(bundle, self._path)

        begin = time.perf_counter()
        self._session: Any = self._load(wanted)
        self.load_ms = (time.perf_counter() - begin) * 1e3
        # get_available_providers() names what was compiled in, not what loads: only the session knows.
        if self._session.get_providers()[0] != wanted:
            resolved = ", ".join(self._session.get_providers())
            self.close()
            raise _no_provider(wanted, f"onnxruntime fell back to {resolved}")
        self._names = self._check_signature()

    def _load(self, wanted: str) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        if self._threads == 1:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # The CPU stays behind CUDA for the few shape operators that have no CUDA kernel.
        providers = [wanted] if wanted == PROVIDERS["cpu"] else [wanted, PROVIDERS["cpu"]]
        try:
            return self._ort.InferenceSession(str(self._path), options, providers=providers)
        except _errors(self._ort) as error:
            raise InputError(
                f"{self._path}: onnxruntime {self._ort.__version__} cannot load the graph",
                got=_first_line(error),
                expected=f"a graph that {wanted} can run",
                fix="export it again, with a profile for this device, or upgrade onnxruntime",
            ) from error

    def _check_signature(self) -> list[str]:
        """Compare inputs and outputs with the manifest; returns the outputs to ask for."""
        manifest = self.bundle.manifest
        declared = manifest["input"]
        inputs = self._session.get_inputs()
        name = str(declared.get("name", "images"))
        if [i.name for i in inputs] != [name]:
            raise self._mismatch("inputs", [i.name for i in inputs], [name])
        shape = [None if declared.get("dynamic_batch") else declared["shape"][0], *declared["shape"][1:]]
        if inputs[0].type != "tensor(uint8)":
            raise self._mismatch(f"input {name!r}", inputs[0].type, "tensor(uint8)")
        if not _agrees(inputs[0].shape, shape):
            raise self._mismatch(f"input {name!r}", inputs[0].shape, shape)
        self._input = name

        outputs = {o.name: o for o in self._session.get_outputs()}
        wanted = {n: s for n, s in manifest["outputs"].items() if n in ("logits", "prompt_weights") and s}
        for name, declared_shape in wanted.items():
            if name not in outputs:
                raise self._mismatch("outputs", list(outputs), list(wanted))
            if outputs[name].type != "tensor(float)":
                raise self._mismatch(f"output {name!r}", outputs[name].type, "tensor(float)")
            if name == "logits" and outputs[name].shape[-1] != len(self.bundle.classes):
                raise self._mismatch(
                    "class count mismatch", f"logits {outputs[name].shape}", f"{len(self.bundle.classes)} classes"
                )
            if not _agrees(outputs[name].shape, [None, *declared_shape[1:]]):
                raise self._mismatch(f"output {name!r}", outputs[name].shape, declared_shape)
        return list(wanted)

    def _mismatch(self, what: str, got: object, expected: object) -> InputError:
        return InputError(
            f"{self._path}: the graph does not fit its manifest: {what}",
            got=got,
            expected=expected,
            fix="export the bundle again",
        )

    def run(self, images: np.ndarray) -> Outputs:
        """Compute uint8 (B, S, S, 3). Raises: InputError for another shape or dtype, RuntimeError once closed."""
        if self._session is None:
            raise RuntimeError("the runner is closed")
        declared = self.bundle.manifest["input"]["shape"]
        check_images(images, declared[1])
        if len(images) == 0:
            shapes = self.bundle.manifest["outputs"]
            results = [np.zeros((0, *shapes[name][1:]), np.float32) for name in self._names]
        elif self.bundle.batch is None:
            results = self._compute(images)
        else:
            results = in_batches(self._compute, images, self.bundle.batch)
        named = dict(zip(self._names, results, strict=True))
        return Outputs(named["logits"], named.get("prompt_weights"))

    def _compute(self, images: np.ndarray) -> list[np.ndarray]:
        return list(self._session.run(self._names, {self._input: np.ascontiguousarray(images)}))

    def infer(self, images: np.ndarray) -> np.ndarray:
        """`run`, the logits only: float32 (B, C)."""
        return self.run(images).logits

    def describe(self) -> dict[str, Any]:
        """{"backend", "providers" (as resolved by the session), "threads", "version"}."""
        providers = self._session.get_providers() if self._session is not None else []
        return {
            "backend": "onnxruntime",
            "providers": list(providers),
            "threads": self._threads,
            "version": str(self._ort.__version__),
        }

    def close(self) -> None:
        """Free the session; a second call does nothing."""
        self._session = None

    def __enter__(self) -> OrtRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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


def _agrees(got: list[Any], declared: list[Any]) -> bool:
    """Shapes are equal; None in the manifest and a name in the graph stand for a free dimension."""
    return len(got) == len(declared) and all(
        (isinstance(g, int) and g == d) if isinstance(d, int) else (not isinstance(g, int) or d is None)
        for g, d in zip(got, declared, strict=True)
    )


def _check_external(bundle: Bundle, path: Path) -> None:
    """Every file that the graph takes its constants from has to be under the manifest's hashes."""
    folder = path.parent.relative_to(bundle.path)
    listed = bundle.manifest["files"]
    for location in external_files(path):
        if (folder / location).as_posix() not in listed:
            raise InputError(
                f"{path}: the graph reads a file that the manifest does not list",
                got=repr(location),
                expected="one of " + ", ".join(listed),
                fix="do not use this bundle; export it again",
            )
