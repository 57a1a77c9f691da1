"""Which files an ONNX graph reads its constants from, and where in them, without the `onnx` package."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError

# Field numbers of onnx.proto3 (onnx 1.23): the path from a model to the strings of a tensor's external_data.
_MODEL_GRAPH, _GRAPH_NODE, _GRAPH_INITIALIZER, _TENSOR_EXTERNAL = 7, 1, 5, 13
_NODE_ATTRIBUTE, _ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 5, 6, 10, 11
_MODEL_FUNCTIONS, _FUNCTION_NODE = 25, 7
_MODEL_OPSET, _TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME = 8, 1, 2, 8
_TYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 10: "float16", 11: "float64"}
"TensorProto.DataType -> numpy"


@dataclass(frozen=True)
class Record:
    """A constant that is kept outside of its graph."""

    name: str
    location: str
    offset: int
    length: int
    "bytes"
    dims: tuple[int, ...]
    dtype: str
    "of numpy"

    def read(self, folder: Path) -> np.ndarray:
        """The constant, read from its file. Raises: InputError when the file is too short for it."""
        file = folder / self.location
        with open(file, "rb") as stream:
            stream.seek(self.offset)
            data = stream.read(self.length)
        expected = int(np.prod(self.dims, dtype=np.int64)) * np.dtype(self.dtype).itemsize
        if len(data) != self.length or self.length != expected:
            raise InputError(
                f"{file}: the constant {self.name!r} is not whole", got=f"{len(data)} bytes", expected=expected
            )
        return np.frombuffer(data, self.dtype).reshape(self.dims)


def external_records(path: Path) -> list[Record]:
    """The graph's own constants that are kept outside of it, in the file's order (those of subgraphs are left out).

    Raises: InputError when the file is no ONNX graph, or a constant is of a type that numpy does not have.
    """
    try:
        view = memoryview(path.read_bytes())
        tensors = [t for graph in _messages(view, _MODEL_GRAPH) for t in _messages(graph, _GRAPH_INITIALIZER)]
        return [_record(t) for t in tensors if any(_messages(t, _TENSOR_EXTERNAL))]
    except (IndexError, ValueError, KeyError) as error:
        raise InputError(f"{path}: not an ONNX graph", got=str(error), fix="export the bundle again") from error


def graph_digest(path: Path) -> str:
    """SHA-256 of what a graph computes: nodes, shapes, operator versions; class names and the like are left out.

    Raises: InputError when the file is no ONNX graph.
    """
    digest = hashlib.sha256()
    try:
        view = memoryview(path.read_bytes())
        for field in (_MODEL_GRAPH, _MODEL_OPSET, _MODEL_FUNCTIONS):
            for message in _messages(view, field):
                digest.update(b"%d:%d:" % (field, len(message)))
                digest.update(message)
    except (IndexError, ValueError) as error:
        raise InputError(f"{path}: not an ONNX graph", got=str(error), fix="export the bundle again") from error
    return digest.hexdigest()


def _record(tensor: memoryview) -> Record:
    entries = {}
    for entry in _messages(tensor, _TENSOR_EXTERNAL):
        keys, values = list(_messages(entry, 1)), list(_messages(entry, 2))
        entries[bytes(keys[-1]).decode("utf-8")] = bytes(values[-1]).decode("utf-8")
    dims = list(_numbers(tensor, _TENSOR_DIMS))
    for packed in _messages(tensor, _TENSOR_DIMS):
        position = 0
        while position < len(packed):
            size, position = _varint(packed, position)
            dims.append(size)
    kind = _TYPES[next(_numbers(tensor, _TENSOR_TYPE), 0)]
    name = bytes(next(_messages(tensor, _TENSOR_NAME), b"")).decode("utf-8")
    offset, length = int(entries.get("offset", 0)), int(entries["length"])
    return Record(name, entries["location"], offset, length, tuple(dims), kind)


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
    return (value for number, value in _fields(data) if number == field and isinstance(value, memoryview))


def _numbers(data: memoryview, field: int) -> Iterator[int]:
    """The integers numbered `field` of a protobuf message."""
    return (value for number, value in _fields(data) if number == field and isinstance(value, int))


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | int | None]]:
    """Every field of a protobuf message: its number, and its bytes or its integer (None: a fixed-width number)."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
            yield key >> 3, None
        elif kind == 2:
            length, position = _varint(data, position)
            if position + length > len(data):
                raise ValueError("a field runs past the end")
            yield key >> 3, data[position : position + length]
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
