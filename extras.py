"""What the package installs for itself, and which extra brings what a command needs besides."""

from __future__ import annotations

EXTRAS = {
    "train": ("torch", "timm", "onnx", "safetensors", "sklearn", "scipy", "accelerate", "tqdm"),
    "serve": ("starlette", "uvicorn", "python_multipart"),
    "sign": ("cryptography",),
    "watch": ("cv2",),
    "openvino": ("openvino",),
}
"extra -> modules; pyproject.toml lists the packages that they come from"


def command(extra: str) -> str:
    """What installs an extra beside the package, wherever the package came from."""
    return f"pip install 'cdl-edge[{extra}]'"


def extra_of(error: ModuleNotFoundError) -> str | None:
    """The extra that brings the module that was not found; None for one that is in no extra: a bug."""
    name = (error.name or "").partition(".")[0]
    return next((extra for extra, modules in EXTRAS.items() if name in modules), None)
