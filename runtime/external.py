"""Which files an ONNX graph reads its constants from, without the `onnx` package (a device has none)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError

# Field numbers of onnx.proto3 (onnx 1.23): the path from a model to the strings of a tensor's external_data.
_MODEL_GRAPH, _GRAPH_NODE, _GRAPH_INITIALIZER, _TENSOR_EXTERNAL = 7, 1, 5, 13
_NODE_ATTRIBUTE, _ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 5, 6, 10, 11
_MODEL_FUNCTIONS, _FUNCTION_NODE = 25, 7


def external_files(path: Path) -> set[str]:
    """The `location` of every tensor kept outside of the model, subgraphs and functions included.

    Raises: InputError when the file is no protobuf message.
    """
    found: set[str] = set()
    try:
        view = memoryview(path.read_bytes())
        for graph in _messages(view, _MODEL_GRAPH):
            found |= _graph(graph)
        for function in _messages(view, _MODEL_FUNCTIONS):
            for node in _messages(function, _FUNCTION_NODE):
                found |= _node(node)
    except (IndexError, ValueError) as error:
        raise InputError(f"{path}: not an ONNX graph", got=str(error), fix="export the bundle again") from error
    return found


def _graph(graph: memoryview) -> set[str]:
    found: set[str] = set()
    for tensor in _messages(graph, _GRAPH_INITIALIZER):
        found |= _tensor(tensor)
    for node in _messages(graph, _GRAPH_NODE):
        found |= _node(node)
    return found


def _node(node: memoryview) -> set[str]:
    found: set[str] = set()
    for attribute in _messages(node, _NODE_ATTRIBUTE):
        for field in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
            for tensor in _messages(attribute, field):
                found |= _tensor(tensor)
        for field in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
            for graph in _messages(attribute, field):
                found |= _graph(graph)
    return found


def _tensor(tensor: memoryview) -> set[str]:
    found: set[str] = set()
    for entry in _messages(tensor, _TENSOR_EXTERNAL):
        keys, values = list(_messages(entry, 1)), list(_messages(entry, 2))
        if keys and bytes(keys[-1]) == b"location":
            found.add(bytes(values[-1]).decode("utf-8") if values else "")
    return found


def _messages(data: memoryview, field: int) -> Iterator[memoryview]:
    """The length-delimited fields numbered `field` of a protobuf message."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == 0:
            _, position = _varint(data, position)
        elif kind == 1:
            position += 8
        elif kind == 5:
            position += 4
        elif kind == 2:
            length, position = _varint(data, position)
            if position + length > len(data):
                raise ValueError("a field runs past the end")
            if key >> 3 == field:
                yield data[position : position + length]
            position += length
        else:
            raise ValueError(f"wire type {kind}")


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")
