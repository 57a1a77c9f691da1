"""Which form of 8-bit graph suits which processor."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import choose


@dataclass(frozen=True)
class Flavour:
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
        """Steps between the ends of a range."""
        return 254 if self.symmetric else 255


FLAVOURS = {
    f.name: f
    for f in (
        Flavour("int8-x86", False, True, "ONNX Runtime and OpenVINO on x86: U8 activations, S8 weights"),
        Flavour("int8-arm", True, True, "ONNX Runtime on ARM: S8 activations and weights, zero points 0", 21),
        Flavour("int8-trt", True, False, "TensorRT: S8 activations and weights, zero points 0, bias in float"),
    )
}
OF_PROFILE = {
    "ort": ("int8-x86", "int8-arm"),
    "openvino": ("int8-x86",),
    "trt10": ("int8-trt",),
    "trt11": ("int8-trt",),
}
"export profile -> flavours made by default"


def get_flavour(name: str) -> Flavour:
    """The flavour of a name. Raises: InputError for an unknown one, with the closest match."""
    return FLAVOURS[choose("flavour", name, FLAVOURS)]
