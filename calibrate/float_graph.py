"""The float graphs of a bundle with their linear layers: what calibrate reads, and what it puts into 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from ..artefacts.bundle import Bundle
from ..artefacts.layer_table import Layer, LayerTable


@dataclass(frozen=True)
class FloatGraph:
    """A graph of a bundle in fp32, as `export` wrote it."""

    path: Path
    layers: Sequence[Layer]

    @property
    def whole(self) -> list[Layer]:
        """The layers that see all tokens of an image; the others would gain nothing in 8 bits."""
        return [layer for layer in self.layers if layer.tokens == "all"]


def float_graph(bundle: Bundle, name: str) -> FloatGraph:
    """A graph of a bundle with its layers. name: key of the manifest's graphs. Raises: InputError."""
    path, table = bundle.graph(name), bundle.manifest.layers
    if table is None:
        return FloatGraph(path, named_layers(path, "query" in bundle.manifest.graphs))
    where = str(bundle.path / table)
    return FloatGraph(path, LayerTable.read(bundle.read(table).tobytes(), where).of(name, where))


def named_layers(path: Path, two_pass: bool) -> tuple[Layer, ...]:
    """The layers of a graph from the names of its nodes: for bundles from before export wrote a table.

    Nobody can export those again without their run. All of them were exported alike: the last block answers for a few
    rows, so that its Q, projection and MLP see no other; and the pass "prompted" alone gets the first Q, K and V of a
    two-pass student from the tokens that the query pass reads.
    """
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    made = {output: node for node in nodes for output in node.output}
    gemms = [(n, *n.name.partition(".")[::2]) for n in nodes if n.op_type == "Gemm" and "." in n.name]
    blocks = [(scope, int(name.split(".")[1])) for _, scope, name in gemms if name.startswith("blocks.")]
    last = {scope: max(i for s, i in blocks if s == scope) for scope, _ in blocks}
    found = []
    for node, scope, name in gemms:
        weight = node.input[1]
        while weight in made:  # behind the cast of a graph of lower precision
            weight = made[weight].input[0]
        before = made.get(node.input[0])
        if name == "stem.0" and before is not None and before.op_type == "Cast":
            found.append(Layer(node.name, "stem", f"{scope}.stem", None, node.input[0], weight, "all"))
        elif name.startswith("blocks."):
            _, block, part = name.split(".")
            unit = f"blocks.{block}.{'qkv' if part in 'qkv' else part}"
            reads = "query" if two_pass and unit == "blocks.0.qkv" else scope
            few = int(block) == last[scope] and part not in "kv"
            tokens = "few" if few else "all"
            found.append(Layer(node.name, unit, f"{scope}.{unit}", f"{reads}.{unit}", node.input[0], weight, tokens))
    return tuple(found)
