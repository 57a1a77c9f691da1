"""Which TensorRT is there, on which GPU: the driver is asked first, a full TensorRT can crash without one."""

from __future__ import annotations

import ctypes
import importlib
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ... import jetson
from ...errors import InputError
from ...machine import board, cuda_driver

OLDEST = (10, 3)
"JetPack 6; strong typing, refit of single weights and named timing caches are all there"
_LOGGERS: dict[str, Any] = {}


@dataclass(frozen=True)
class Gpu:
    """The GPU that an engine is bound to."""

    name: str
    capability: str
    "compute capability, as 8.7"
    driver: str
    "the newest CUDA that the driver serves, as 12.6"
    memory_bytes: int

    @property
    def slug(self) -> str:
        """The GPU in a file name, as orin-sm87."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") + "-sm" + self.capability.replace(".", "")


def find_gpu(device: int = 0) -> Gpu:
    """Ask the driver for a GPU, through libcuda alone. Raises: InputError with the driver's answer when there is none.

    CUDA_VISIBLE_DEVICES decides which GPU number 0 is.
    """
    driver = cuda_driver()
    if driver.devices <= device:
        raise InputError(
            "TensorRT cannot be used here",
            got=driver.detail,
            expected="an NVIDIA GPU and its driver",
            fix="use --backend cpu, or install an NVIDIA driver (and see: cdl-edge doctor)",
        )
    library = ctypes.CDLL("libcuda.so.1")
    name, total, version = ctypes.create_string_buffer(256), ctypes.c_size_t(), ctypes.c_int()
    parts = [ctypes.c_int(), ctypes.c_int()]
    answers = [
        library.cuDeviceGetName(name, 256, device),
        library.cuDeviceTotalMem_v2(ctypes.byref(total), device),
        library.cuDriverGetVersion(ctypes.byref(version)),
        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h
        *(library.cuDeviceGetAttribute(ctypes.byref(p), n, device) for p, n in zip(parts, (75, 76), strict=True)),
    ]
    if any(answers):
        raise InputError("the NVIDIA driver does not describe its GPU", got=f"CUDA errors {answers}", fix="restart it")
    capability = f"{parts[0].value}.{parts[1].value}"
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Gpu(name.value.decode("utf-8", "replace"), capability, cuda, total.value)


def find_tensorrt() -> ModuleType:
    """Import `tensorrt`, checked. Call `find_gpu` before: nothing of TensorRT is touched without a driver.

    Raises: InputError when it is absent or older than OLDEST.
    """
    try:
        trt = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:  # OSError: a library that the bindings load is missing
        raise InputError(
            "TensorRT cannot be imported",
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            expected=f"TensorRT {_text(OLDEST)} or newer",
            fix=_hint(),
        ) from error
    version = str(trt.__version__)
    if _numbers(version) < OLDEST:
        raise InputError("this TensorRT is too old", got=version, expected=f"{_text(OLDEST)} or newer", fix=_hint())
    return trt


def _hint() -> str:
    if jetson.on_jetson():
        return f"{jetson.GET_TENSORRT}, and make the environment with: python3 -m venv --system-site-packages"
    return "pip install 'cdl-edge[tensorrt]' (its libraries come from pypi.nvidia.com)"


def identity(trt: ModuleType, gpu: Gpu) -> dict[str, Any]:
    """All that an engine is bound to, as the sidecar keeps it."""
    return {
        "product": trt.__name__,
        "version": str(trt.__version__),
        "gpu": gpu.name,
        "capability": gpu.capability,
        "driver": gpu.driver,
        "board": board(),
        "l4t": l4t(),
    }


def l4t() -> str | None:
    """Release of Jetson's Linux, as 36.4.3 (JetPack 6.2); None elsewhere."""
    found = jetson.release()
    return found.text.removeprefix("R") if found is not None else None


def logger(trt: ModuleType) -> Any:
    """The one logger of this process: TensorRT keeps the first it is given and ignores any other."""
    if trt.__name__ not in _LOGGERS:

        class Messages(trt.ILogger):  # type: ignore[name-defined]
            """Keeps warnings and errors for whoever asks; prints nothing."""

            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.lines: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.Severity.WARNING:
                    self.lines.append(str(message).strip())

            def take(self) -> list[str]:
                """What was said since the last call."""
                lines, self.lines = self.lines, []
                return lines

        _LOGGERS[trt.__name__] = Messages()
    return _LOGGERS[trt.__name__]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _text(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)
