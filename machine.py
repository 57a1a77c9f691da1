"""Facts about this machine, read from the operating system; a fact that cannot be read is None."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import sys
from dataclasses import dataclass
from pathlib import Path


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, read without importing it; None when it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_line(path: str) -> str | None:
    """First line of a small system file, without the trailing NUL of the device tree; None when it cannot be read."""
    try:
        text = Path(path).read_bytes().decode("utf-8", "replace").strip("\0 \n")
    except OSError:
        return None
    return text.splitlines()[0] if text else None


def _cpuinfo() -> dict[str, str]:
    """/proc/cpuinfo of the first core; empty outside of Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_model() -> str:
    """The processor's name, its architecture when it tells none (as on most Arm boards)."""
    info = _cpuinfo()
    return info.get("model name") or info.get("Model") or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """Instruction set flags as the kernel names them; empty where it names none."""
    info = _cpuinfo()
    return frozenset((info.get("flags") or info.get("Features") or "").split())


def board() -> str | None:
    """The board's name from the device tree: Jetson, Raspberry Pi; None on a PC."""
    return read_line("/proc/device-tree/model")


def governor() -> str | None:
    """Frequency governor of the first core: anything but "performance" makes latencies vary."""
    return read_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def temperature_c() -> float | None:
    """The hottest thermal zone in degrees Celsius."""
    readings = [read_line(str(p / "temp")) for p in Path("/sys/class/thermal").glob("thermal_zone*")]
    values = [int(r) / 1000 for r in readings if r is not None and r.lstrip("-").isdigit()]
    return max(values, default=None)


def peak_rss_bytes() -> int | None:
    """The most memory this process has held so far; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class Driver:
    """What the CUDA driver says."""

    devices: int
    "GPUs it offers; 0 without a driver"
    detail: str
    "one line"


def cuda_driver() -> Driver:
    """Ask the CUDA driver for its devices, through libcuda alone: a full TensorRT segfaults without one."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Driver(0, "no NVIDIA driver (libcuda.so.1 is not there)")
    if code := library.cuInit(0):
        return Driver(0, f"the NVIDIA driver does not start (cuInit: error {code})")
    count = ctypes.c_int(0)
    if code := library.cuDeviceGetCount(ctypes.byref(count)):
        return Driver(0, f"the NVIDIA driver does not answer (cuDeviceGetCount: error {code})")
    return Driver(count.value, f"NVIDIA driver with {count.value} GPU(s)")
