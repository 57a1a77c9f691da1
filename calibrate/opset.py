"""8-bit graphs in a dialect that older runtimes load too.

ONNX Runtime 1.23, the newest one for Python 3.10 (JetPack 6), runs float graphs of opset 23 but has no QuantizeLinear
of it: a graph for it stays at opset 21, and `Attention`, which came with 23, becomes what it is defined as. That takes
1.06 of the time (8 bits, ViT-T/16, one thread, ONNX Runtime 1.32, 2026-11-27): newer runtimes get opset 23.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..runtime.backends.onnxruntime import is_old
from .cpu_session import VERSION

EVERYWHERE = 21
"opset; of QuantizeLinear and DequantizeLinear the last one that ONNX Runtime 1.23 has"


def here() -> int | None:
    """The newest opset of an 8-bit graph that this machine's ONNX Runtime loads; None: any that we write."""
    return EVERYWHERE if is_old(VERSION) else None


def opset_of(model: onnx.ModelProto) -> int:
    """Version of ONNX's own operators that a model uses."""
    return next(int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx"))


def lower(model: onnx.ModelProto) -> None:
    """Bring a graph down to opset EVERYWHERE, in place; one that is there already stays as it is.

    Of all operators that an export writes only `Attention` is younger; onnx's checker refuses a graph in which another
    one is.
    """
    if opset_of(model) <= EVERYWHERE:
        return
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = EVERYWHERE
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, np.ndarray] = {}
    for node in model.graph.node:
        nodes += _attention(node, constants) if node.op_type == "Attention" else [node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())


def _attention(node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> list[onnx.NodeProto]:
    """softmax(q k^T scale) v of (B, n, D) each in plain operators. constants: what they need, by name; filled."""
    settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    heads, scale = int(settings["q_num_heads"]), float(settings["scale"])
    if int(settings["kv_num_heads"]) != heads or len(node.input) != 3 or "softmax_precision" in settings:
        raise ValueError(f"{node.name}: not an attention that an export writes")
    made: list[onnx.NodeProto] = []

    def op(kind: str, name: str, *inputs: str, **attributes: object) -> str:
        output = f"{node.name}.{name}"
        made.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output

    def constant(name: str, value: list[int] | float) -> str:
        constants[name] = np.array(value, np.float32 if isinstance(value, float) else np.int64)
        return name

    def by_heads(name: str, x: str) -> str:
        x = op("Reshape", f"{name}.split", x, constant(f"attention.split.{heads}", [0, 0, heads, -1]))
        return op("Transpose", f"{name}.heads", x, perm=[0, 2, 1, 3])

    q, k, v = (by_heads(name, x) for name, x in zip("qkv", node.input, strict=True))
    scores = op("MatMul", "scores", q, op("Transpose", "k.columns", k, perm=[0, 1, 3, 2]))
    if scale != 1:
        scores = op("Mul", "scaled", scores, constant(f"attention.scale.{scale}", scale))
    mixed = op("MatMul", "mixed", op("Softmax", "shares", scores, axis=-1), v)
    rows = op("Transpose", "rows", mixed, perm=[0, 2, 1, 3])
    join = constant("attention.join", [0, 0, -1])
    made.append(helper.make_node("Reshape", [rows, join], list(node.output), name=f"{node.name}.join"))
    return made
