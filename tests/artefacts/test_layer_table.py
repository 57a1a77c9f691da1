"""layers.json: written and read back, and refused by name where it is damaged."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from cdl_edge.artefacts.layer_table import Layer, LayerTable
from cdl_edge.errors import InputError

LAYERS = (
    Layer("query.stem.0", "stem", "query.stem", None, "cast_1", "stem.0.weight", "all"),
    Layer("prompted.blocks.0.q", "blocks.0.qkv", "prompted.blocks.0.qkv", "query.blocks.0.qkv", "x", "w", "few"),
)
TABLE = LayerTable({"student": LAYERS})


def test_written_and_read_back():
    assert LayerTable.read(TABLE.to_bytes(), "layers.json") == TABLE
    assert TABLE.of("student", "layers.json") == LAYERS
    with pytest.raises(InputError, match="no layers of the graph 'query'"):
        TABLE.of("query", "layers.json")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schema": 2}, "newer cdl-edge"),
        ({"graphs": None}, "graphs"),
        ({"graphs": {"student": [{**asdict(LAYERS[0]), "tokens": "some"}]}}, r"graphs\.student\[0\]\.tokens"),
        ({"graphs": {"student": [{**asdict(LAYERS[0]), "weight": None}]}}, r"graphs\.student\[0\]\.weight"),
    ],
)
def test_what_it_may_not_say(change, named):
    document = {**json.loads(TABLE.to_bytes()), **change}
    with pytest.raises(InputError, match=named):
        LayerTable.read(json.dumps(document).encode(), "layers.json")


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]"])
def test_what_is_no_table(content):
    with pytest.raises(InputError, match=r"layers\.json"):
        LayerTable.read(content, "layers.json")
