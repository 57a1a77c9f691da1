"""Which form of graph suits which runtime."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import choose

PRECISIONS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Profile:
    """The dialect of ONNX that a runtime fuses best."""

    name: str
    runtimes: str
    "what reads it"
    opset: int
    """17 at least: LayerNormalization has to be one operator, decomposed it loses its precision in fp16. 19 for scales
    of Q/DQ in fp16"""
    ir: int
    "ONNX IR version: the oldest runtime named above still reads it"
    attention: tuple[str, ...]
    """precisions in which attention is the operator `Attention`; otherwise MatMul, Softmax in fp32, MatMul, which
    TensorRT and OpenVINO fuse themselves. TensorRT's `Attention` refuses `softmax_precision`: fp16 would be unsafe"""
    attention_rows: bool
    "`Attention` may have one query row (TensorRT-RTX 1.7 ends in an internal error)"
    gelu: bool
    "the operator `Gelu`; otherwise its definition with Erf"
    byte_layout: bool
    "bytes become patches before they are cast: TensorRT takes a byte input to a Cast only, OpenVINO is slower so"
    precisions: tuple[str, ...]
    "of the graphs that an export writes; fp32 always first"


PROFILES = {
    p.name: p
    for p in (
        Profile("ort", "ONNX Runtime 1.23 or newer", 23, 11, ("fp32", "fp16", "bf16"), True, True, True, ("fp32",)),
        Profile("trt10", "TensorRT 10.3 (JetPack 6) or newer", 19, 9, (), False, False, False, ("fp32", "fp16")),
        Profile(
            "trt11", "TensorRT 10.14 or newer, 11 (JetPack 7)", 23, 11, ("fp32",), False, True, False, ("fp32", "fp16")
        ),
        Profile("openvino", "OpenVINO 2025 or newer", 20, 9, (), False, True, False, ("fp32",)),
    )
}


def get_profile(name: str) -> Profile:
    """The profile of a name. Raises: InputError for an unknown one, with the closest match."""
    return PROFILES[choose("export profile", name, PROFILES)]
