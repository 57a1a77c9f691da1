"""Is everything there? One line for each thing, with the command that mends it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from .. import jetson
from ..cores import default_threads, free_cores, usable_cores
from ..errors import InputError
from ..extras import command
from ..machine import board, cpu_flags, cpu_model, cuda_driver, governor, version_of
from ..runtime.backends.openvino import DEVICE, core, precisions

Check = dict[str, Any]
_ORT_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
# Flags that decide how fast a ViT runs on a CPU: 8-bit dot products and matrix units first.
_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
)
_FREE_BYTES = 500_000_000
_ROOMY_BYTES = 12 * 2**30
"up to this memory (the boards of 4 and 8 GB) a swap file is advised; chosen, not measured"
_TRAINING = ("torch", "timm", "safetensors", "accelerate", "scipy", "tqdm")
_NEEDS = {
    "train": _TRAINING,
    "export": (*_TRAINING, "onnx"),
    "calibrate": ("onnx",),
    "serve": ("starlette", "uvicorn", "python-multipart"),
    "sign": ("cryptography",),
}
"purpose -> distributions"
_JETSON_ORT = "install the onnxruntime-gpu wheel for your JetPack: https://elinux.org/Jetson_Zoo#ONNX_Runtime"


def doctor(root: Path = jetson.ROOT) -> dict[str, Any]:
    """Look at this machine; torch, timm and onnx are looked up, never imported.

    Args:
        root: where a Jetson's own files are looked for.

    Returns: {"checks": [{"name", "status": "ok" | "warn" | "fail", "detail", "fix": command or None}], "ok": no check
        failed}. Something optional that is absent is "ok" and still names its command. The checks named "to ..." say
        of each purpose whether this machine serves it.
    """
    checks = [
        _python(),
        _package("numpy", "numpy", "1.26"),
        _package("pillow", "pillow", "10.3"),
        _onnxruntime(),
        *(_tool(name, purpose) for name, purpose in _TOOLS.items()),
        _cuda(),
        _openvino(),
        _tensorrt(root),
        _cpu(),
        _threads(),
        _temp(),
        check("board", "ok", board() or f"no board name; {platform.machine()}, {platform.platform()}"),
        *_jetson(root),
        *_purposes(root),
    ]
    return {"checks": checks, "ok": all(c["status"] != "fail" for c in checks)}


_TOOLS = {
    "torch": "training and export",
    "timm": "training and export",
    "safetensors": "training and export",
    "onnx": "export and calibration",
    "scikit-learn": "the data source `digits`",
}


def check(name: str, status: str, detail: str, fix: str | None = None) -> Check:
    """One line of the report."""
    return {"name": name, "status": status, "detail": detail, "fix": fix}


def _python() -> Check:
    good = sys.version_info >= (3, 10)
    fix = None if good else "install Python 3.10 or newer, then: python3 -m venv .venv && .venv/bin/pip install WHEEL"
    return check("python", "ok" if good else "fail", f"{platform.python_version()} at {sys.executable}", fix)


def _package(name: str, distribution: str, oldest: str) -> Check:
    version = version_of(distribution)
    if version is None:
        return check(name, "fail", "not installed", f"pip install '{distribution}>={oldest}'")
    if _numbers(version) < _numbers(oldest):
        return check(name, "warn", f"{version}, {oldest} or newer is tested", f"pip install '{distribution}>={oldest}'")
    return check(name, "ok", version)


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split(".")[:2]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)


def _onnxruntime() -> Check:
    installed = [name for name in _ORT_PACKAGES if version_of(name) is not None]
    try:
        import onnxruntime
    except ImportError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return check(
            "onnxruntime", "fail", f"cannot be imported: {reason}", "pip install --force-reinstall onnxruntime"
        )
    # What is compiled in; whether a provider loads shows only when a session is made.
    detail = f"{onnxruntime.__version__}, built with {', '.join(onnxruntime.get_available_providers())}"
    if len(installed) > 1:
        keep = "onnxruntime-gpu" if cuda_driver().devices and "onnxruntime-gpu" in installed else "onnxruntime"
        return check(
            "onnxruntime",
            "warn",
            f"{detail}; {' and '.join(installed)} overwrite each other's files",
            f"pip uninstall -y {' '.join(installed)} && pip install {keep}",
        )
    return check("onnxruntime", "ok", detail)


def _tool(name: str, purpose: str) -> Check:
    version = version_of(name)
    if version is not None:
        return check(name, "ok", version)
    return check(name, "ok", f"not installed (optional, for {purpose})", command("train"))


def _optional(name: str, module: str, purpose: str, fix: str) -> Check:
    version = version_of(name)
    if version is None and importlib.util.find_spec(module) is not None:
        version = "installed outside of pip"
    if version is not None:
        return check(name, "ok", version)
    return check(name, "ok", f"not installed (optional, for {purpose})", fix)


def _openvino() -> Check:
    fix = command("openvino")
    found = _optional("openvino", "openvino", "x86 CPUs", fix)
    if found["fix"] is not None:
        return found
    try:
        engine = core()
    except InputError as error:
        return check("openvino", "warn", f"cannot be imported: {error.__cause__}", f"{fix} --force-reinstall")
    name = engine.get_property(DEVICE, "FULL_DEVICE_NAME")
    return check("openvino", "ok", f"{found['detail']}, device {DEVICE} ({name}): {', '.join(precisions(engine))}")


def _tensorrt(root: Path) -> Check:
    hidden = importlib.util.find_spec("tensorrt") is None and jetson.apt_tensorrt(root)
    if hidden and sys.prefix != sys.base_prefix:
        fix = "make the environment again with: python3 -m venv --system-site-packages .venv"
        return check("tensorrt", "warn", "installed by apt, but this virtual environment does not see it", fix)
    fix = jetson.GET_TENSORRT if jetson.on_jetson() else "pip install 'cdl-edge[tensorrt]'"
    return _optional("tensorrt", "tensorrt", "NVIDIA engines", fix)


def _jetson(root: Path) -> list[Check]:
    """JetPack, power mode and swap; nothing on other machines."""
    release = jetson.release(root)
    if release is None:
        return []
    return [_jetpack(release), _power(root), _swap(root)]


def _jetpack(release: jetson.Release) -> Check:
    if release.jetpack is None:
        return check("jetpack", "ok", f"Jetson Linux {release.text}, a release that this version does not know")
    detail = f"JetPack {release.jetpack} (Jetson Linux {release.text})"
    python = jetson.PYTHONS.get(release.jetpack)
    if python is None:
        return check("jetpack", "fail", f"{detail}: its Python and TensorRT are too old", "flash JetPack 6 or 7")
    if sys.version_info[:2] != python:
        wanted = ".".join(map(str, python))
        detail += f"; its TensorRT is built for Python {wanted}, this is {platform.python_version()}"
        fix = f"/usr/bin/python{wanted} -m venv --system-site-packages .venv && .venv/bin/pip install WHEEL"
        return check("jetpack", "warn", detail, fix)
    return check("jetpack", "ok", detail)


def _power(root: Path) -> Check:
    mode = jetson.power_mode(root)
    if mode is None:
        return check("power mode", "ok", "not set: the default of the board", "sudo nvpmodel -q")
    detail = f"{mode.number} ({mode.name or 'not named'})"
    if mode.fastest is None or mode.number == mode.fastest:
        return check("power mode", "ok", detail)
    fix = f"to measure at full speed: sudo nvpmodel -m {mode.fastest} && sudo jetson_clocks"
    return check("power mode", "warn", f"{detail}; {mode.fastest} is the one without a power budget", fix)


def _swap(root: Path) -> Check:
    found = jetson.swap(root)
    if found is None:
        return check("swap", "ok", "the kernel does not say")
    memory, zram, disk = (n / 2**30 for n in (found.memory_bytes, found.zram_bytes, found.disk_bytes))
    detail = f"{memory:.1f} GiB memory, {zram:.1f} GiB zram, {disk:.1f} GiB on disk"
    if found.disk_bytes or found.memory_bytes > _ROOMY_BYTES:
        return check("swap", "ok", detail)
    fix = "sudo fallocate -l 8G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && sudo swapon /swapfile"
    only = "zram takes from the same memory" if found.zram_bytes else "no swap"
    return check("swap", "warn", f"{detail}; {only}: building an engine may run out of memory", fix)


def _purposes(root: Path) -> list[Check]:
    """Check each purpose: yes, or what is missing and the one command that mends it."""
    lacking = {purpose: [n for n in names if version_of(n) is None] for purpose, names in _NEEDS.items()}
    checks = [_purpose(p, lacking[p], "ok", command("train")) for p in ("train", "export", "calibrate")]
    engines = [name for name in _ORT_PACKAGES if version_of(name) is not None]
    checks.append(_purpose("run on the CPU", [] if engines else ["onnxruntime"], "fail", "pip install onnxruntime"))
    checks += _gpu_purposes(root)
    checks.append(_purpose("serve", lacking["serve"], "ok", command("serve")))
    # JetPack's OpenCV is no Python distribution: the module counts.
    opencv = [] if importlib.util.find_spec("cv2") is not None else ["opencv-python-headless"]
    mend = "sudo apt-get install python3-opencv" if jetson.on_jetson() else command("watch")
    checks.append(_purpose("watch a camera or a video", opencv, "ok", mend))
    return [*checks, _purpose("sign packs, or check who signed", lacking["sign"], "ok", command("sign"))]


def _gpu_purposes(root: Path) -> list[Check]:
    """TensorRT comes first on a Jetson, ONNX Runtime on a PC."""
    if not cuda_driver().devices:
        return [check("to run on an NVIDIA GPU", "ok", "no: the driver offers none, see `cuda driver`")]
    small = jetson.on_jetson()
    runtime = [] if version_of("onnxruntime-gpu") else ["onnxruntime-gpu"]
    mend = _JETSON_ORT if small else "pip uninstall -y onnxruntime && pip install 'cdl-edge[gpu]'"
    engine = [] if importlib.util.find_spec("tensorrt") is not None else ["tensorrt"]
    binding = [] if any(version_of(n) for n in ("pycuda", "cuda-python", "cuda-bindings")) else ["cuda-python"]
    steps = [str(_tensorrt(root)["fix"])] * bool(engine) + [jetson.get_cuda_python(root)] * bool(binding)
    return [
        _purpose("run on the GPU by ONNX Runtime", runtime, "ok" if small else "warn", mend),
        _purpose(
            "run on the GPU by TensorRT",
            engine + binding,
            "warn" if small else "ok",
            " && ".join(steps) if small else "pip install 'cdl-edge[tensorrt]'",
        ),
    ]


def _purpose(name: str, missing: list[str], status: str, fix: str) -> Check:
    if not missing:
        return check(f"to {name}", "ok", "yes")
    return check(f"to {name}", status, f"no: {', '.join(missing)} missing", fix)


def _cuda() -> Check:
    driver = cuda_driver()
    if not driver.devices:
        absent = driver.detail.startswith("no NVIDIA driver")
        fix = "install the NVIDIA driver if there is a GPU: https://www.nvidia.com/drivers"
        return check("cuda driver", "ok" if absent else "warn", f"{driver.detail}; the CPU is used", fix)
    if version_of("onnxruntime-gpu") is None and jetson.on_jetson():
        # PyPI has no aarch64 wheel for JetPack's Python.
        return check("cuda driver", "ok", f"{driver.detail}; no onnxruntime-gpu: TensorRT or the CPU", _JETSON_ORT)
    if version_of("onnxruntime-gpu") is None:
        return check(
            "cuda driver",
            "warn",
            f"{driver.detail}, but onnxruntime-gpu is not installed: --backend cuda cannot be used",
            "pip uninstall -y onnxruntime && pip install 'cdl-edge[gpu]'",
        )
    return check("cuda driver", "ok", driver.detail)


def _cpu() -> Check:
    flags = cpu_flags()
    present = [name for name in _FLAGS if name in flags]
    detail = f"{cpu_model()}; " + (", ".join(present) if present else "none of the instructions that speed up INT8")
    slow = platform.machine() in ("x86_64", "AMD64") and bool(flags) and "avx2" not in flags
    return check("cpu", "warn" if slow else "ok", detail + ("; without AVX2 inference is several times slower" * slow))


def _threads() -> Check:
    usable, total = usable_cores(), os.cpu_count() or 1
    detail = f"{usable} of {total} core(s) usable, {free_cores()} free now; commands take {default_threads()} thread(s)"
    detail += " unless --threads says otherwise"
    mode = governor()
    if mode is not None and mode != "performance":
        fix = "sudo cpupower frequency-set -g performance" if not jetson.on_jetson() else "sudo jetson_clocks"
        return check("threads", "warn", f"{detail}; frequency governor {mode!r}: latencies will vary", fix)
    return check("threads", "ok", detail + (f"; frequency governor {mode!r}" if mode else ""))


def _temp() -> Check:
    try:
        with tempfile.TemporaryFile() as stream:
            stream.write(b"x")
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return check("disk", "fail", f"no temporary file can be written: {error}", "set TMPDIR to a writable folder")
    detail = f"{folder} writable, {free / 1e9:.1f} GB free"
    if free < _FREE_BYTES:
        return check("disk", "warn", detail, f"free some space on the disk of {folder}, or set TMPDIR")
    return check("disk", "ok", detail)
