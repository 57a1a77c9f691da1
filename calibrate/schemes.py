"""Quantisation schemes: which form of 8-bit graph suits which processor."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import choose


@dataclass(frozen=True)
class Scheme:
    """Encoder Linears in 8 bits; everything else stays as it was."""

    name: str
    "behind `student.` in the names of its graphs"
    symmetric: bool
    "activations S8 with zero point 0; otherwise U8 with any"
    integer_bias: bool
    "bias as int32 behind a DequantizeLinear: what ONNX Runtime fuses and TensorRT refuses"
    runtimes: str
    opset: int | None = None
    "the newest one that its graphs may have by default; None: what the bundle has"

    @property
    def levels(self) -> int:
        """Number of steps between the ends of a range."""
        return 254 if self.symmetric else 255


SCHEMES = {
    f.name: f
    for f in (
        Scheme("int8-x86", False, True, "ONNX Runtime and OpenVINO on x86: U8 activations, S8 weights"),
        Scheme("int8-arm", True, True, "ONNX Runtime on ARM: S8 activations and weights, zero points 0", 21),
        Scheme("int8-trt", True, False, "TensorRT: S8 activations and weights, zero points 0, bias in float"),
    )
}
OF_PROFILE = {
    "ort": ("int8-x86", "int8-arm"),
    "openvino": ("int8-x86",),
    "trt10": ("int8-trt",),
    "trt11": ("int8-trt",),
}
"export profile -> schemes made by default"


def get_scheme(name: str) -> Scheme:
    """The quantisation scheme of a name. Raises: InputError for an unknown one, with the closest match."""
    return SCHEMES[choose("quantisation scheme", name, SCHEMES)]
