"""Which files an ONNX graph reads its constants from, and where in them, without the `onnx` package."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError

# Field numbers of onnx.proto3 (onnx 1.23).
MODEL_GRAPH, GRAPH_INITIALIZER, _TENSOR_RAW, TENSOR_EXTERNAL, _TENSOR_LOCATION = 7, 5, 9, 13, 14
GRAPH_OUTPUT, VALUE_NAME, _NODE_INPUT = 12, 1, 1
_MODEL_FUNCTIONS, _MODEL_OPSET, TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME = 25, 8, 1, 2, 8
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
"every way from a model to a tensor: message -> field -> message"
_TYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 10: "float16", 11: "float64"}
"TensorProto.DataType -> numpy"
_LARGEST = (1 << 31) - 1
"bytes of a protobuf message"
BROKEN = (IndexError, ValueError, KeyError)
"what reading bytes that are no graph raises"


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
        with open(folder / self.location, "rb") as stream:
            stream.seek(self.offset)
            data = np.frombuffer(stream.read(self.length), np.uint8)
        return self.view(data, self.offset)

    def view(self, content: np.ndarray, start: int = 0) -> np.ndarray:
        """The constant in the content of its file, uint8 (bytes,), of which the first byte is number `start`.

        Raises: InputError when it does not lie within.
        """
        size = math.prod(self.dims) * np.dtype(self.dtype).itemsize
        low = self.offset - start
        whole = size == self.length and 0 <= low <= len(content) - self.length and len(self.dims) <= 32
        if not whole or min(self.dims, default=0) < 0:
            raise InputError(
                f"{self.location}: the constant {self.name!r} is not whole",
                got=f"{self.dtype} {self.dims}, {self.length} bytes at {self.offset}",
                expected=f"{size} bytes within {start} to {start + len(content)}",
                fix="export the bundle again",
            )
        return content[low : low + self.length].view(self.dtype).reshape(self.dims)


def external_records(model: Path | bytes) -> list[Record]:
    """The graph's own constants that are kept outside of it, in the file's order (those of subgraphs are left out).

    Raises: InputError when the model is no ONNX graph, or a constant is of a type that numpy does not have.
    """
    try:
        view = _content(model)
        tensors = [t for graph in messages_of(view, MODEL_GRAPH) for t in messages_of(graph, GRAPH_INITIALIZER)]
        return [record_of(t) for t in tensors if any(messages_of(t, TENSOR_EXTERNAL))]
    except BROKEN as error:
        raise no_graph(model, error) from error


def graph_digest(model: Path | bytes) -> str:
    """SHA-256 of what a graph computes: nodes, shapes, operator versions; class names and the like are left out.

    Raises: InputError when the file is no ONNX graph.
    """
    digest = hashlib.sha256()
    try:
        view = _content(model)
        for field in (MODEL_GRAPH, _MODEL_OPSET, _MODEL_FUNCTIONS):
            for message in messages_of(view, field):
                digest.update(b"%d:%d:" % (field, len(message)))
                digest.update(message)
    except BROKEN as error:
        raise no_graph(model, error) from error
    return digest.hexdigest()


def inlined(model: bytes, contents: Mapping[str, np.ndarray]) -> bytes:
    """The same model with its constants inside, for engines that take a model from memory in one piece.

    contents: of each file that the graph's constants are in, uint8 (bytes,), by its name.

    Raises: InputError for a model that is broken, is too large for one piece, or whose constants are not in the files.
    """
    try:
        graphs = list(messages_of(_content(model), MODEL_GRAPH))
        parts: list[bytes | memoryview] = [raw for n, _, raw in fields_of(memoryview(model)) if n != MODEL_GRAPH]
        for graph in graphs:
            inside: list[bytes | memoryview] = []
            for number, value, raw in fields_of(graph):
                outside = number == GRAPH_INITIALIZER and any(messages_of(message_of(value), TENSOR_EXTERNAL))
                inside += _whole(message_of(value), contents) if outside else [raw]
            parts += [head_of(MODEL_GRAPH, sum(map(len, inside))), *inside]
    except BROKEN as error:
        raise no_graph(model, error) from error
    if (size := sum(map(len, parts))) > _LARGEST:
        fix = "use --backend onnxruntime, which takes constants apart from the graph"
        raise InputError("the graph with its constants is too large", got=size, expected=f"{_LARGEST} bytes", fix=fix)
    return b"".join(parts)


def _whole(tensor: memoryview, contents: Mapping[str, np.ndarray]) -> list[bytes | memoryview]:
    """An initializer's message with its values inside."""
    record = record_of(tensor)
    values = record.view(contents[record.location]).tobytes()
    kept = [raw for number, _, raw in fields_of(tensor) if number not in (TENSOR_EXTERNAL, _TENSOR_LOCATION)]
    parts: list[bytes | memoryview] = [*kept, head_of(_TENSOR_RAW, len(values)), values]
    return [head_of(GRAPH_INITIALIZER, sum(map(len, parts))), *parts]


def head_of(field: int, length: int) -> bytes:
    """What stands before the content of a length-delimited field."""
    return varint_of(field << 3 | 2) + varint_of(length)


def varint_of(number: int) -> bytes:
    """A whole number from 0 as protobuf writes it."""
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    written.append(number)
    return bytes(written)


def _content(model: Path | bytes) -> memoryview:
    return memoryview(model if isinstance(model, bytes) else model.read_bytes())


def no_graph(model: Path | bytes, error: Exception) -> InputError:
    """The error for a file that is none of ours."""
    name = "the model" if isinstance(model, bytes) else str(model)
    return InputError(f"{name}: not an ONNX graph", got=str(error), fix="export the bundle again")


def record_of(tensor: memoryview) -> Record:
    """Read where an initializer's values are kept outside of the graph. Raises: what BROKEN names."""
    entries = {}
    for entry in messages_of(tensor, TENSOR_EXTERNAL):
        fields = {number: value for number, value, _ in fields_of(entry)}
        entries[bytes(message_of(fields[1])).decode("utf-8")] = bytes(message_of(fields[2])).decode("utf-8")
    dims = list(_numbers(tensor, TENSOR_DIMS))
    for packed in messages_of(tensor, TENSOR_DIMS):
        position = 0
        while position < len(packed):
            size, position = _varint(packed, position)
            dims.append(size)
    kind = _TYPES[next(_numbers(tensor, _TENSOR_TYPE), 0)]
    name = bytes(next(messages_of(tensor, _TENSOR_NAME), b"")).decode("utf-8")
    offset, length = int(entries.get("offset", 0)), int(entries["length"])
    return Record(name, entries["location"], offset, length, tuple(dims), kind)


def external_files(model: Path | bytes) -> set[str]:
    """The `location` of every tensor kept outside of the model: of subgraphs, functions and sparse tensors too.

    Raises: InputError when the model is no protobuf message.
    """
    try:
        return {name for kind, message in _walk(model) if kind == "tensor" for name in _locations(message)}
    except BROKEN as error:
        raise no_graph(model, error) from error


def used_names(model: Path | bytes) -> set[str]:
    """Every name that a node takes or a graph gives. Raises: InputError when the model is no protobuf message."""
    found: set[bytes] = set()
    try:
        for kind, message in _walk(model):
            if kind == "node":
                found |= {bytes(name) for name in messages_of(message, _NODE_INPUT)}
            elif kind == "graph":
                outputs = messages_of(message, GRAPH_OUTPUT)
                found |= {bytes(name) for output in outputs for name in messages_of(output, VALUE_NAME)}
        return {name.decode("utf-8") for name in found}
    except BROKEN as error:
        raise no_graph(model, error) from error


def _walk(model: Path | bytes) -> Iterator[tuple[str, memoryview]]:
    """The messages of _CHILDREN and the tensors, however deep; no recursion, which a file could drive too deep."""
    waiting = [("model", _content(model))]
    while waiting:
        kind, message = waiting.pop()
        yield kind, message
        below = _CHILDREN.get(kind, {})
        if below:
            waiting += [(below[n], v) for n, v, _ in fields_of(message) if n in below and isinstance(v, memoryview)]


def _locations(tensor: memoryview) -> set[str]:
    found: set[str] = set()
    for entry in messages_of(tensor, TENSOR_EXTERNAL):
        keys, values = list(messages_of(entry, 1)), list(messages_of(entry, 2))
        if keys and bytes(keys[-1]) == b"location":
            found.add(bytes(values[-1]).decode("utf-8") if values else "")
    return found


def message_of(value: object) -> memoryview:
    """The value of a length-delimited field. Raises: ValueError for another one."""
    if not isinstance(value, memoryview):
        raise ValueError("a number where a message belongs")
    return value


def messages_of(data: memoryview, field: int) -> Iterator[memoryview]:
    """The length-delimited fields numbered `field` of a protobuf message."""
    return (value for number, value, _ in fields_of(data) if number == field and isinstance(value, memoryview))


def _numbers(data: memoryview, field: int) -> Iterator[int]:
    """The integers numbered `field` of a protobuf message."""
    return (value for number, value, _ in fields_of(data) if number == field and isinstance(value, int))


def fields_of(data: memoryview) -> Iterator[tuple[int, memoryview | int | None, memoryview]]:
    """Every field of a message: number, its bytes or its integer (None: a fixed-width number), and all of it as is."""
    position = 0
    while position < len(data):
        begin = position
        key = data[position]
        if key < 0x80:  # nearly always: a graph has ten thousands of fields
            position += 1
        else:
            key, position = _varint(data, position)
        kind = key & 7
        value: memoryview | int | None = None
        if kind == 0:
            value, position = _varint(data, position)
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        elif kind == 2:
            length, position = _varint(data, position)
            value = data[position : position + length]
            position += length
        else:
            raise ValueError(f"wire type {kind}")
        if position > len(data):
            raise ValueError("a field runs past the end")
        yield key >> 3, value, data[begin:position]


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
