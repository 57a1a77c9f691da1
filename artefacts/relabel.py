"""A graph for other classes: wider logits, other names, its learnt constants at other places; without `onnx`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .external import (
    BROKEN,
    GRAPH_INITIALIZER,
    GRAPH_OUTPUT,
    MODEL_GRAPH,
    TENSOR_DIMS,
    TENSOR_EXTERNAL,
    VALUE_NAME,
    fields_of,
    head_of,
    message_of,
    messages_of,
    no_graph,
    record_of,
    varint_of,
)

# Field numbers of onnx.proto3 (onnx 1.23), beside those of external.py.
_MODEL_METADATA, _GRAPH_VALUES = 14, 13
_VALUE_TYPE, _TYPE_TENSOR, _TENSOR_SHAPE, _SHAPE_DIM, _DIM_VALUE = 2, 1, 2, 1, 1
_KEY, _VALUE = 1, 2

Where = Mapping[str, tuple[int, int]]


def relabelled(
    model: bytes, file: str, constants: Mapping[str, np.ndarray], where: Where, classes: Sequence[str]
) -> bytes:
    """The same graph for other classes.

    Args:
        model: a graph as `export` or `calibrate` writes it. file: the file of constants that was made anew.
        constants, where: what that file holds, and (offset, length) of each, see packing.pack. classes: their names.

    Raises: InputError for a model that is no graph, or reads a constant from the file that is not there any more.
    """
    try:
        return _rebuilt(
            memoryview(model),
            {
                MODEL_GRAPH: lambda graph: _graph(graph, file, constants, where, len(classes)),
                _MODEL_METADATA: lambda entry: _metadata(entry, classes),
            },
        )
    except BROKEN as error:
        raise no_graph(model, error) from error


def _graph(graph: memoryview, file: str, constants: Mapping[str, np.ndarray], where: Where, classes: int) -> bytes:
    def initializer(tensor: memoryview) -> bytes:
        if not any(messages_of(tensor, TENSOR_EXTERNAL)):
            return bytes(tensor)
        record = record_of(tensor)
        if record.location != file:
            return bytes(tensor)
        kept = [bytes(raw) for n, _, raw in fields_of(tensor) if n not in (TENSOR_DIMS, TENSOR_EXTERNAL)]
        dims = [varint_of(TENSOR_DIMS << 3) + varint_of(size) for size in constants[record.name].shape]
        places = zip(("location", "offset", "length"), (file, *where[record.name]), strict=True)
        return b"".join([*dims, *kept, *(_field(TENSOR_EXTERNAL, _pair(key, str(value))) for key, value in places)])

    def output(value: memoryview) -> bytes:
        if bytes(next(messages_of(value, VALUE_NAME), b"")) != b"logits":
            return bytes(value)
        shaped = {_TENSOR_SHAPE: lambda shape: _last_size(shape, classes)}
        return _rebuilt(
            value, {_VALUE_TYPE: lambda kind: _rebuilt(kind, {_TYPE_TENSOR: lambda t: _rebuilt(t, shaped)})}
        )

    # Sizes noted for values inside of the graph are hints: those of the old classes would be wrong ones.
    hints = {_GRAPH_VALUES: lambda value: None}
    return _rebuilt(graph, {GRAPH_INITIALIZER: initializer, GRAPH_OUTPUT: output, **hints})


def _metadata(entry: memoryview, classes: Sequence[str]) -> bytes:
    if bytes(next(messages_of(entry, _KEY), b"")) != b"classes":
        return bytes(entry)
    return _pair("classes", json.dumps(list(classes)))


def _last_size(shape: memoryview, size: int) -> bytes:
    sizes = [bytes(raw) for _, _, raw in fields_of(shape)]
    return b"".join([*sizes[:-1], _field(_SHAPE_DIM, varint_of(_DIM_VALUE << 3) + varint_of(size))])


def _pair(key: str, value: str) -> bytes:
    return _field(_KEY, key.encode("utf-8")) + _field(_VALUE, value.encode("utf-8"))


def _rebuilt(data: memoryview, change: Mapping[int, Callable[[memoryview], bytes | None]]) -> bytes:
    """A message with some of its fields changed, or left out for None; all others as they are, in their order."""
    parts: list[bytes] = []
    for number, value, raw in fields_of(data):
        if number not in change:
            parts.append(bytes(raw))
        elif (content := change[number](message_of(value))) is not None:
            parts.append(_field(number, content))
    return b"".join(parts)


def _field(number: int, content: bytes) -> bytes:
    return head_of(number, len(content)) + content
