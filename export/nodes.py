"""The graph under construction: ONNX nodes, and constants with the file that each belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from torch import Tensor, nn

from ..artefacts.layer_table import Layer
from ..artefacts.layout import BACKBONE, PROMPTS
from .profiles import PROFILES, Profile

FROZEN, LEARNT = BACKBONE, PROMPTS
TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@dataclass(frozen=True)
class Reads:
    """What a linear layer reads, for the table of layers; see artefacts.layer_table.Layer."""

    unit: str
    few: bool = False
    "the rows that the last block answers for, not all tokens"
    computed_in: str | None = None
    "the pass whose range the values have; None: the one that is built"
    pixels: bool = False
    "whole numbers from 0 to 255"


@dataclass
class Graph:
    """Nodes and constants as they are added.

    Constants are always kept in fp32 and cast in the graph, so that graphs of all precisions share their files: every
    engine folds a cast of a constant when it loads. What selects prompts, normalises or answers stays in fp32.
    """

    batch: int | None
    "images a call; None: any number"
    profile: Profile = PROFILES["ort"]
    precision: str = "fp32"
    "of tokens and weights: a key of TYPES"
    inputs: dict[str, tuple[int, list[Any]]] = field(default_factory=dict)
    "name -> type, shape behind the batch"
    outputs: dict[str, list[int]] = field(default_factory=dict)
    "name -> shape behind the batch, fp32"
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    "constant -> FROZEN, LEARNT, or empty for what is structure and stays in the graph"
    layers: list[Layer] = field(default_factory=list)
    "the linear layers that calibrate may put into 8 bits"
    scope: str = ""
    "the pass that is built, in front of the names of its linear layers: `prompted.blocks.3.fc1`"
    count: int = 0
    _cast: dict[str, str] = field(default_factory=dict)
    "constant -> the same in the graph's precision"

    @property
    def signature(self) -> dict[str, dict[str, list[Any]]]:
        """For the manifest: name -> shape of one image, of inputs and outputs."""
        return {
            "inputs": {name: [1, *shape] for name, (_, shape) in self.inputs.items()},
            "outputs": {name: [1, *shape] for name, shape in self.outputs.items()},
        }

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output; returns the output's name."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, outputs: int, *inputs: str, name: str = "", **attributes: Any) -> list[str]:
        """Add a node with several outputs; returns their names."""
        self.count += 1
        names = [f"{kind.lower()}_{self.count}" + (f"_{i}" if outputs > 1 else "") for i in range(outputs)]
        name = name or f"{kind}_{self.count}"
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=name, **attributes))
        return names

    def input(self, name: str, kind: int, *shape: int) -> str:
        """Declare an input of shape (B, *shape); returns its name."""
        self.inputs[name] = (kind, list(shape))
        return name

    def output(self, name: str, x: str, *shape: int) -> None:
        """Declare the value `x` as an output of the graph, (B, *shape)."""
        self.outputs[name] = list(shape)
        self.nodes.append(helper.make_node("Identity", [x], [name], name=name))

    def constant(self, name: str, value: Tensor | np.ndarray, place: str) -> str:
        """Add a float32 constant once; a second call with the name returns it."""
        if name not in self.constants:
            array = value.detach().cpu().float().numpy() if isinstance(value, Tensor) else value
            self.constants[name] = np.ascontiguousarray(array, dtype=np.float32)
            self.places[name] = place
        return name

    def weight(self, name: str, value: Tensor | np.ndarray, place: str) -> str:
        """Add a constant in the graph's precision; returns its name."""
        name = self.constant(name, value, place)
        if self.precision != "fp32" and name not in self._cast:
            self._cast[name] = self.compute(name)
        return self._cast.get(name, name)

    def compute(self, x: str) -> str:
        """Cast a value from fp32 to the graph's precision."""
        return x if self.precision == "fp32" else self.op("Cast", x, to=TYPES[self.precision])

    def single(self, x: str) -> str:
        """Cast a value from the graph's precision to fp32."""
        return x if self.precision == "fp32" else self.op("Cast", x, to=TensorProto.FLOAT)

    def shape(self, *sizes: int) -> str:
        """Add an int64 vector for Reshape and Split; returns its name."""
        name = "sizes_" + "_".join(str(s).replace("-", "m") for s in sizes)
        self.constants[name] = np.asarray(sizes, dtype=np.int64)
        self.places[name] = ""
        return name

    def indices(self, *values: int) -> str:
        """Add an int64 vector for Gather; returns its name."""
        return self.shape(*values)

    def reshape(self, x: str, *sizes: int) -> str:
        """Reshape to sizes, at most one -1; 0 keeps the size that is there."""
        return self.op("Reshape", x, self.shape(*sizes))

    def split(self, x: str, sizes: list[int], axis: int) -> list[str]:
        """Cut a value along an axis into parts of these sizes; returns their names."""
        if len(sizes) == 1:
            return [x]
        return self.ops("Split", len(sizes), x, self.shape(*sizes), axis=axis)

    def slice(self, x: str, start: int, end: int, axis: int) -> str:
        """Take x[start:end] along an axis."""
        return self.op("Slice", x, self.shape(start), self.shape(end), self.shape(axis))

    def concat(self, parts: list[str], axis: int) -> str:
        """Join values along an axis; one part alone is returned as it is."""
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=axis)

    def rows(self, name: str, value: Tensor, like: str, place: str = LEARNT) -> str:
        """A constant (1, n, D) for every image of the batch; `like`: any value whose first axis is the batch."""
        if self.batch is not None:
            return self.weight(name, value.expand(self.batch, -1, -1), place)
        size = self.slice(self.op("Shape", like), 0, 1, 0)
        return self.op(
            "Expand", self.weight(name, value, place), self.op("Concat", size, self.shape(*value.shape[1:]), axis=0)
        )

    def linear(self, name: str, x: str, weight: Tensor, bias: Tensor | None, layer: Reads | None = None) -> str:
        """(M, in) -> (M, out); weight as torch has it, (out, in). layer: for the table of layers; None: not in it."""
        inputs = [x, self.weight(f"{name}.weight", weight.detach().t(), FROZEN)]
        if bias is not None:
            inputs.append(self.weight(f"{name}.bias", bias, FROZEN))
        node = f"{self.scope}.{name}"
        if layer is not None:
            activation = f"{self.scope}.{layer.unit}"
            ranged = None if layer.pixels else f"{layer.computed_in or self.scope}.{layer.unit}"
            tokens = "few" if layer.few else "all"
            self.layers.append(Layer(node, layer.unit, activation, ranged, x, f"{name}.weight", tokens))
        return self.op("Gemm", *inputs, name=node)

    def norm(self, name: str, x: str, layer: nn.LayerNorm, place: str = FROZEN) -> str:
        """LayerNorm over the last axis, computed and given in fp32: `compute` what goes into a linear layer."""
        scale, shift = (self.constant(f"{name}.{k}", getattr(layer, k), place) for k in ("weight", "bias"))
        return self.op("LayerNormalization", self.single(x), scale, shift, axis=-1, epsilon=layer.eps)

    def gelu(self, x: str) -> str:
        """Apply the exact GELU, x / 2 (1 + erf(x / sqrt 2))."""
        if self.profile.gelu:
            return self.op("Gelu", x)
        half, one, root = (
            self.weight(f"gelu.{n}", np.array(v), "") for n, v in (("half", 0.5), ("one", 1.0), ("root", 0.5**0.5))
        )
        return self.op("Mul", self.op("Mul", x, half), self.op("Add", self.op("Erf", self.op("Mul", x, root)), one))

    def heads(self, x: str, count: int, width: int, keys: bool = False) -> str:
        """Cut (B, n, D) into attention heads (B, H, n, D / H); for keys (B, H, D / H, n)."""
        x = self.op("Transpose", self.reshape(x, 0, 0, count, width // count), perm=[0, 2, 1, 3])
        # A transpose of its own: engines read it as the product's flag. In one with the other it would be a copy
        # (measured: OpenVINO 2026.4, 20 us a layer of a ViT-T).
        return self.op("Transpose", x, perm=[0, 1, 3, 2]) if keys else x

    def softmax(self, x: str) -> str:
        """Apply softmax over the last axis, in fp32."""
        return self.compute(self.op("Softmax", self.single(x), axis=-1))

    def attention(self, q: str, k: str, v: str, heads: int, width: int, scale: float, few: bool = False) -> str:
        """softmax(q k^T scale) v of (B, n, D) each -> (B, n, D). few: q has one or two rows."""
        if self.precision in self.profile.attention and (self.profile.attention_rows or not few):
            safe = {} if self.precision == "fp32" else {"softmax_precision": int(TensorProto.FLOAT)}
            return self.op("Attention", q, k, v, q_num_heads=heads, kv_num_heads=heads, scale=scale, **safe)
        scores = self.op("MatMul", self.heads(q, heads, width), self.heads(k, heads, width, keys=True))
        if scale != 1:
            scores = self.op("Mul", scores, self.weight("scale", np.array(scale), ""))
        mixed = self.op("MatMul", self.softmax(scores), self.heads(v, heads, width))
        return self.reshape(self.op("Transpose", mixed, perm=[0, 2, 1, 3]), 0, 0, width)
