"""layers.json: the linear layers of each float graph, as export knows them and calibrate puts them into 8 bits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from ..errors import InputError
from .layout import LAYERS_SCHEMA
from .typed import MalformedField, parse

TOKENS = ("all", "few")


@dataclass(frozen=True)
class Layer:
    """A linear layer of a graph: one Gemm on rows of tokens."""

    node: str
    "name of the Gemm: `prompted.blocks.3.q`"
    unit: str
    "what is quantised or not as one, in both passes: `blocks.3.qkv`, or `stem` for the patch embedding"
    activation: str
    "name of what it reads, which the layers of a unit share in one pass: `prompted.blocks.3.qkv`"
    range: str | None
    """key of its range in ranges.npz. Not `activation` where the pass reads what the other one has computed: the first
    Q, K and V of a two-pass student, made of the shared stem. None: pixels, whole numbers from 0 to 255"""
    input: str
    "the value that the Gemm reads"
    weight: str
    "the constant (in, out) that it multiplies with"
    tokens: str
    "`all` of the image, or the `few` rows that the last block answers for: there is little to gain in 8 bits"

    def check(self) -> None:
        """`tokens` is one of both words. Raises: MalformedField."""
        if self.tokens not in TOKENS:
            raise MalformedField("tokens", self.tokens, " or ".join(TOKENS))


@dataclass(frozen=True)
class LayerTable:
    """The layers of every graph that an export writes, in the order in which they are computed."""

    graphs: Mapping[str, tuple[Layer, ...]]
    "by the graph's name in the manifest"
    schema: int = LAYERS_SCHEMA

    def to_bytes(self) -> bytes:
        """The content of layers.json."""
        graphs = {name: [asdict(layer) for layer in layers] for name, layers in self.graphs.items()}
        return (json.dumps({"schema": self.schema, "graphs": graphs}, separators=(",", ":")) + "\n").encode()

    @classmethod
    def read(cls, content: bytes, where: str) -> LayerTable:
        """The inverse of `to_bytes`. where: the file, for messages. Raises: InputError."""
        try:
            document = json.loads(content.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: no table of layers", got=str(error), fix="export the bundle again") from error
        table = parse(cls, document, where)
        if table.schema > LAYERS_SCHEMA:
            raise InputError(
                f"{where}: written by a newer cdl-edge", got=table.schema, expected=LAYERS_SCHEMA, fix="upgrade"
            )
        return table

    def of(self, graph: str, where: str) -> Sequence[Layer]:
        """The layers of one graph. Raises: InputError for a graph that is not in the table."""
        if graph not in self.graphs:
            raise InputError(
                f"{where}: no layers of the graph {graph!r}",
                got=", ".join(self.graphs),
                expected=graph,
                fix="export the bundle again",
            )
        return self.graphs[graph]
