"""The encoder's Linears in 8 bits: QuantizeLinear and DequantizeLinear around them, and their weights as bytes.

Only what takes the time: Q, K, V, projection and both layers of the MLP, where a Linear sees all tokens. Residual
sums, LayerNorm, softmax, GELU and both products of the attention stay as they are. Query pass and
prompted pass have ranges of their own and share the weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from ..artefacts.layer_table import Layer
from ..ranges import TensorRange
from .constants import Packed, read
from .float_graph import FloatGraph
from .opset import EVERYWHERE, lower
from .scales import choose_range
from .schemes import Scheme
from .smooth import Smoothing

WEIGHTS = "backbone.int8.bin"
"bytes and scales of the weights, shared by all schemes and by all updates"


def scales_file(scheme: Scheme) -> str:
    """Name of the file with the scales of activations (and integer biases): they change with what is learnt."""
    return f"scales.{scheme.name}.bin"


@dataclass(frozen=True)
class Quantised:
    """Graphs and their files of constants, in memory."""

    models: dict[str, bytes]
    "name of the graph -> the graph"
    constants: dict[str, bytes]
    "file name -> content"
    units: tuple[str, ...]
    "what is in 8 bits"


def quantise(
    graphs: Mapping[str, FloatGraph],
    ranges: Mapping[str, TensorRange],
    scheme: Scheme,
    method: str = "mse",
    smoothing: Smoothing | None = None,
    skip: Collection[str] = (),
    chosen: dict[str, tuple[float, float]] | None = None,
    opset: int | None = None,
) -> Quantised:
    """Put the Linears of some graphs of one bundle into 8 bits.

    Args:
        graphs: by name, as `export` writes them. ranges: of all inputs of Linears.
        method: key of scales.METHODS. smoothing: of channels behind LayerNorms; None: none.
        skip: units that stay as they are.
        chosen: range -> ends, of earlier calls with the same ranges, scheme and method: a search makes many. Filled.
        opset: opset.EVERYWHERE: graphs that older runtimes load too; None: the opset that they have.

    Raises: KeyError when a range is missing, ValueError when graphs contradict each other.
    """
    weights, scales = Packed(WEIGHTS), Packed(scales_file(scheme))
    chosen = {} if chosen is None else chosen
    done: dict[str, onnx.ModelProto] = {}
    units: dict[str, None] = {}
    for name, graph in graphs.items():
        editor = _Editor(graph, scheme, ranges, method, smoothing, set(skip), weights, scales, chosen)
        done[name] = editor.run()
        units |= dict.fromkeys(editor.units)
    constants: dict[str, bytes] = {}
    tensors: dict[str, onnx.TensorProto] = {}
    for packed in (weights, scales):
        constants[packed.name], laid = packed.layout()
        tensors |= laid
    for model in done.values():
        used = {name for node in model.graph.node for name in node.input}
        kept = [t for t in model.graph.initializer if t.name in used]
        kept += [tensor for name, tensor in tensors.items() if name in used]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
        if opset == EVERYWHERE:
            lower(model)
    return Quantised({name: model.SerializeToString() for name, model in done.items()}, constants, tuple(units))


def positive(scale: float | np.ndarray, kind: type | np.dtype) -> np.ndarray:
    """A scale as it is kept: zero, what half precision makes of a very small one, is no scale."""
    return np.asarray(np.maximum(scale, np.finfo(kind).tiny), kind)


class _Editor:
    """One graph."""

    def __init__(
        self,
        source: FloatGraph,
        scheme: Scheme,
        ranges: Mapping[str, TensorRange],
        method: str,
        smoothing: Smoothing | None,
        skip: set[str],
        weights: Packed,
        scales: Packed,
        chosen: dict[str, tuple[float, float]],
    ) -> None:
        self.model = onnx.load(str(source.path), load_external_data=False)
        self.graph, self.folder = self.model.graph, source.path.parent
        self.scheme, self.ranges, self.method = scheme, ranges, method
        self.weights, self.scales, self.chosen = weights, scales, chosen
        self.initial = {t.name: t for t in self.graph.initializer}
        self.made = {name: node for node in self.graph.node for name in node.output}
        every = {layer.node: layer for layer in source.whole}
        patches = next((layer for layer in every.values() if layer.range is None), None)
        every = {name: layer for name, layer in every.items() if layer.range is not None}
        self.layers = {name: layer for name, layer in every.items() if layer.unit not in skip}
        self.units = list(dict.fromkeys(layer.unit for layer in self.layers.values()))
        self.factors = self._smooth(smoothing, every) if smoothing is not None else {}
        # Also of what is skipped: the file of weights is one for all schemes, which may skip different units.
        self.steps = {name: self._weight(layer) for name, layer in every.items()}
        self._activations: dict[str, tuple[str, float]] = {}
        self.stem: tuple[Layer, onnx.NodeProto] | None = None
        "a patch embedding that goes into 8 bits, and the Cast of its bytes"
        if patches is not None:
            self.steps[patches.node] = self._weight(patches)
            if not scheme.symmetric and patches.unit not in skip:
                self.stem = patches, self.made[patches.input]
                self.units.append(patches.unit)

    def run(self) -> onnx.ModelProto:
        """The graph in 8 bits."""
        nodes: list[onnx.NodeProto] = []
        for node in self.graph.node:
            if node.name in self.layers:
                nodes += self._linear(node, self.layers[node.name])
            elif self.stem is not None and node.name == self.stem[0].node:
                nodes += self._patches(node, *self.stem)
            elif self.stem is None or node.name != self.stem[1].name:
                nodes.append(node)
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        return self.model

    def _constant(self, name: str) -> np.ndarray:
        """Values of an initializer, also behind the Cast of a graph of lower precision."""
        while name in self.made and self.made[name].op_type == "Cast":
            name = self.made[name].input[0]
        return read(self.initial[name], self.folder)

    def _smooth(self, smoothing: Smoothing, every: Mapping[str, Layer]) -> dict[str, np.ndarray]:
        """Activation -> what its channels are divided by; changes the LayerNorms in front of what goes into 8 bits."""
        readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.graph.node:
            for name in node.input:
                readers[name].append(node)
        found: dict[str, np.ndarray] = {}
        for node in list(self.graph.node):
            if node.op_type != "LayerNormalization":
                continue
            outputs = [node.output[0]]
            for reader in readers[node.output[0]]:
                if reader.op_type == "Cast":
                    outputs.append(reader.output[0])
            behind = [r for name in outputs for r in readers[name] if r.op_type != "Cast"]
            layers = [every.get(r.name) for r in behind]
            if not layers or any(la is None for la in layers):
                continue  # somebody else reads it too
            unit = next(la.unit for la in layers if la is not None)
            if unit not in smoothing.factors:
                continue  # a norm inside an MLP or behind attention: its channels are not known
            factor = smoothing.factors[unit]
            for position, what in ((1, "weight"), (2, "bias")):
                values = self._constant(node.input[position]) / factor
                name = self.weights.add(f"{unit}.norm.{what}", values.astype(np.float32))
                if unit in self.units:
                    node.input[position] = name
            found |= {la.activation: factor for la in layers if la is not None}
        return found

    def _activation(self, x: str, layer: Layer, kind: np.dtype) -> tuple[list[onnx.NodeProto], str, float]:
        """Q and DQ of a tensor, once: nodes, name behind them, scale."""
        if x in self._activations:
            return [], *self._activations[x]
        assert layer.range is not None
        kept, scheme = self.ranges[layer.range], self.scheme
        if layer.range not in self.chosen:
            self.chosen[layer.range] = choose_range(kept.histogram, self.method, scheme.symmetric)
        low, high = self.chosen[layer.range]
        if layer.activation in self.factors:
            assert kept.channels is not None
            # How far the method clips is known of the tensor as it was; its channels' ends are known exactly.
            share = [
                chosen / end if end else 1.0 for chosen, end in ((low, kept.histogram.low), (high, kept.histogram.high))
            ]
            channels = kept.channels / self.factors[layer.activation]
            low, high = (min(float(channels[0].min()), 0.0), max(float(channels[1].max()), 0.0))
            low, high = low * min(share[0], 1.0), high * min(share[1], 1.0)
            if scheme.symmetric:
                high = max(-low, high)
                low = -high
        scale = max(high - low, 1e-12) / scheme.levels
        stored = positive(scale, kind)
        zero = np.int8(0) if scheme.symmetric else np.uint8(np.clip(np.rint(-low / scale), 0, 255))
        tag = f"{layer.activation}.{np.dtype(kind).name}" if kind != np.float32 else layer.activation
        names = [self.scales.add(f"{tag}.scale", stored), self.scales.add(f"{tag}.zero", np.array(zero))]
        nodes = [
            helper.make_node("QuantizeLinear", [x, *names], [f"{x}.q"], name=f"{x}.quantize"),
            helper.make_node("DequantizeLinear", [f"{x}.q", *names], [f"{x}.d"], name=f"{x}.dequantize"),
        ]
        self._activations[x] = f"{x}.d", float(stored)
        return nodes, *self._activations[x]

    def _weight(self, layer: Layer) -> np.ndarray:
        """Keep a Linear's weights as bytes; returns their steps (out,), in float32."""
        source, weight = layer.weight, self._constant(layer.weight)  # (in, out)
        if layer.activation in self.factors:
            weight = weight * self.factors[layer.activation][:, None]
        steps = np.maximum(np.abs(weight).max(axis=0), 1e-12) / 127
        self.weights.add(f"{source}.int8", np.clip(np.rint(weight / steps), -127, 127).astype(np.int8))
        self.weights.add(f"{source}.scale", positive(steps, np.float32))
        self.weights.add(f"{source}.scale.fp16", positive(steps, np.float16))
        self.weights.add(f"{source}.zero", np.zeros(len(steps), np.int8))
        return positive(steps, np.float32)

    def _linear(self, node: onnx.NodeProto, layer: Layer) -> list[onnx.NodeProto]:
        kind = np.dtype(np.float16 if self.made.get(node.input[1]) is not None else np.float32)
        nodes, x, scale = self._activation(node.input[0], layer, kind)
        return [*nodes, *self._gemm(node, layer, x, scale, kind)]

    def _patches(self, node: onnx.NodeProto, layer: Layer, cast: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Pixels are U8 with scale 1 already: only the weights are rounded, and the Cast goes."""
        names = [
            self.scales.add("stem.scale", np.array(1, np.float32)),
            self.scales.add("stem.zero", np.array(0, np.uint8)),
        ]
        x = f"{cast.input[0]}.d"
        pixels = helper.make_node("DequantizeLinear", [cast.input[0], *names], [x], name=f"{x}.dequantize")
        return [pixels, *self._gemm(node, layer, x, 1.0, np.dtype(np.float32))]

    def _gemm(self, node: onnx.NodeProto, layer: Layer, x: str, scale: float, kind: np.dtype) -> list[onnx.NodeProto]:
        """A Linear on a dequantised input of some scale, with its weights from bytes."""
        nodes: list[onnx.NodeProto] = []
        source, steps = layer.weight, self.steps[node.name]
        ending = "" if kind == np.float32 else ".fp16"
        stored = [f"{source}.int8", f"{source}.scale{ending}", f"{source}.zero"]
        # A DequantizeLinear for each reader: ONNX Runtime fuses those only that are read once.
        w = f"{node.name}.weight.d"
        nodes.append(helper.make_node("DequantizeLinear", stored, [w], name=w, axis=1))
        inputs = [x, w]
        if len(node.input) > 2 and self.scheme.integer_bias:
            step = (scale * steps).astype(np.float32)
            bias = np.rint(self._constant(node.input[2]).astype(np.float64) / step)
            names = [
                self.scales.add(f"{node.name}.bias", np.clip(bias, -(2**31), 2**31 - 1).astype(np.int32)),
                self.scales.add(f"{node.name}.bias.scale", step),
                self.scales.add(f"{node.name}.bias.zero", np.zeros(len(step), np.int32)),
            ]
            b = f"{node.name}.bias.d"
            nodes.append(helper.make_node("DequantizeLinear", names, [b], name=b, axis=0))
            inputs.append(b)
        elif len(node.input) > 2:
            inputs.append(node.input[2])
        nodes.append(helper.make_node("Gemm", inputs, list(node.output), name=node.name))
        return nodes
