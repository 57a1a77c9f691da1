"""The graph under construction: ONNX nodes, and constants with the file that each belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper
from torch import Tensor, nn

FROZEN, LEARNT = "backbone.bin", "prompts.bin"


@dataclass
class Graph:
    """Nodes and constants as they are added."""

    batch: int | None
    "images a call; None: any number"
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    "constant -> FROZEN, LEARNT, or empty for what is structure and stays in the graph"
    count: int = 0

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output; returns the output's name."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, outputs: int, *inputs: str, **attributes: Any) -> list[str]:
        """Add a node with several outputs."""
        self.count += 1
        names = [f"{kind.lower()}_{self.count}" + (f"_{i}" if outputs > 1 else "") for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=f"{kind}_{self.count}", **attributes))
        return names

    def constant(self, name: str, value: Tensor | np.ndarray, place: str) -> str:
        """Add a float32 constant once; a second call with the name returns it."""
        if name not in self.constants:
            array = value.detach().cpu().float().numpy() if isinstance(value, Tensor) else value
            self.constants[name] = np.ascontiguousarray(array, dtype=np.float32)
            self.places[name] = place
        return name

    def shape(self, *sizes: int) -> str:
        """An int64 vector for Reshape and Split."""
        name = "shape_" + "_".join(str(s).replace("-", "m") for s in sizes)
        self.constants[name] = np.asarray(sizes, dtype=np.int64)
        self.places[name] = ""
        return name

    def reshape(self, x: str, *sizes: int) -> str:
        """Reshape to sizes, at most one -1."""
        return self.op("Reshape", x, self.shape(*sizes))

    def rows(self, name: str, value: Tensor, like: str) -> str:
        """A learnt constant (1, n, D) for every image of the batch; `like`: any value whose first axis is the batch."""
        if self.batch is not None:
            return self.constant(name, value.expand(self.batch, -1, -1), LEARNT)
        size = self.op("Shape", like, start=0, end=1)
        full = self.op("Concat", size, self.shape(*value.shape[1:]), axis=0)
        return self.op("Expand", self.constant(name, value, LEARNT), full)

    def linear(self, name: str, x: str, weight: Tensor, bias: Tensor | None, place: str = FROZEN) -> str:
        """(M, in) -> (M, out); weight as torch has it, (out, in)."""
        inputs = [x, self.constant(f"{name}.weight", weight.detach().t(), place)]
        if bias is not None:
            inputs.append(self.constant(f"{name}.bias", bias, place))
        return self.op("Gemm", *inputs)

    def norm(self, name: str, x: str, layer: nn.LayerNorm, place: str = FROZEN) -> str:
        """LayerNorm over the last axis."""
        scale, shift = (self.constant(f"{name}.{k}", getattr(layer, k), place) for k in ("weight", "bias"))
        return self.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=layer.eps)
