"""The Open Inference Protocol v2 in plain numpy: requests to arrays, arrays to answers.

https://github.com/kserve/open-inference-protocol (REST), with Triton's extensions for binary tensors,
classification, configuration and statistics: https://github.com/triton-inference-server/server/tree/main/docs/protocol
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..artefacts.bundle import Signature
from ..errors import InputError
from ..runtime.runner import Runner
from . import document as json_document

LENGTH_HEADER = "inference-header-content-length"
EXTENSIONS = ["classification", "binary_tensor_data", "model_configuration", "statistics"]
DATATYPES: dict[str, np.dtype[Any]] = {"UINT8": np.dtype("uint8"), "FP32": np.dtype("<f4")}
OF_OUTPUT = ("classification", "binary_data")
"parameters of an output; another one would ask in vain for another answer, and is refused"
MISPLACED = ("classification", "class_count", "binary_data")
"parameters that the whole request does not have: clients that mean well put them there"
PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
"backend -> what Triton calls it"
_EXAMPLE = '{"inputs": [{"name": "images", "shape": [1, S, S, 3], "datatype": "UINT8", "data": [...]}]}'

_ASKED = 'ask as {"outputs": [{"name": "logits", "parameters": {"classification": 3}}]}'


@dataclass(frozen=True)
class RequestedOutput:
    """How a request asks for an output."""

    binary: bool = False
    classes: int = 0
    "so many of the largest values with their labels, in place of all values; 0: all values"


@dataclass(frozen=True)
class Request:
    """A parsed request."""

    id: str | None
    inputs: dict[str, np.ndarray]
    outputs: dict[str, RequestedOutput] | None
    "None: all of them"
    binary: bool
    "outputs as bytes where `outputs` says nothing"


def parse(body: bytes, header_length: str | None, signature: Signature, pictures: int) -> Request:
    """A request for one graph.

    Args:
        header_length: value of LENGTH_HEADER: bytes of JSON in front of the tensors; None: all of `body` is JSON.
        pictures: most rows of a tensor.

    Raises: InputError for whatever is not as the protocol or the graph wants it.
    """
    length = len(body)
    if header_length is not None:
        if not header_length.isdecimal() or int(header_length) > len(body):
            raise InputError(f"header {LENGTH_HEADER}", got=header_length, expected=f"0 to {len(body)}, bytes of JSON")
        length = int(header_length)
    document = json_document.parse(body[:length])
    if not isinstance(document, dict):
        raise InputError("the request is no object", got=type(document).__name__, expected=_EXAMPLE)
    inputs: dict[str, np.ndarray] = {}
    offset = length
    for fields in _objects(document.get("inputs"), "inputs"):
        name, array, offset = _tensor(fields, body, offset, signature, pictures)
        inputs[name] = array
    if offset != len(body):
        raise InputError("bytes behind the tensors", got=len(body) - offset, expected="none")
    outputs = None
    if document.get("outputs"):
        outputs = {}
        for fields in _objects(document["outputs"], "outputs"):
            name = _named(fields, signature.outputs, "output")
            outputs[name] = _wanted(name, _parameters(fields))
    identity = document.get("id")
    if identity is not None and not isinstance(identity, str):
        raise InputError("field 'id'", got=repr(identity)[:100], expected="a string")
    parameters = _parameters(document)
    for parameter in MISPLACED:
        if parameter in parameters:
            raise InputError(
                f"parameter {parameter!r} of the whole request",
                expected=f"{' or '.join(OF_OUTPUT)} of an output, binary_data_output of the request",
                fix=_ASKED,
            )
    return Request(identity, inputs, outputs, bool(parameters.get("binary_data_output")))


def answer(
    request: Request, outputs: Mapping[str, np.ndarray], labels: Sequence[str], model: str, version: str
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of an answer. labels: of the logits."""
    described, tails = [], []
    for name, array in outputs.items():
        if request.outputs is not None and name not in request.outputs:
            continue
        wanted = RequestedOutput(request.binary) if request.outputs is None else request.outputs[name]
        fields: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": list(array.shape)}
        data = array.ravel().tolist()
        if wanted.classes:
            rows = [classified(row, labels, wanted.classes) for row in array]
            data = [text for row in rows for text in row]
            fields |= {"datatype": "BYTES", "shape": [len(rows), len(rows[0])]}
        if wanted.binary:
            tails.append(_packed(data) if wanted.classes else np.ascontiguousarray(array, DATATYPES["FP32"]).tobytes())
            fields["parameters"] = {"binary_data_size": len(tails[-1])}
        else:
            fields["data"] = data
        described.append(fields)
    document = {"model_name": model, "model_version": version, "outputs": described}
    if request.id is not None:
        document["id"] = request.id
    head = json.dumps(document).encode("utf-8")
    if not tails:
        return head, {"content-type": "application/json"}
    return b"".join([head, *tails]), {"content-type": "application/octet-stream", LENGTH_HEADER: str(len(head))}


def classified(row: np.ndarray, labels: Sequence[str], count: int) -> list[str]:
    """The largest values of (C,), as the classification extension writes them: "VALUE:INDEX:LABEL"."""
    return [f"{row[i]:f}:{i}:{labels[i]}" for i in np.argsort(-row, kind="stable")[:count]]


def _packed(texts: Sequence[str]) -> bytes:
    """BYTES as the binary tensor extension packs them: each behind its length."""
    encoded = [text.encode("utf-8") for text in texts]
    return b"".join(len(content).to_bytes(4, "little") + content for content in encoded)


def metadata(runner: Runner, name: str, version: str) -> dict[str, Any]:
    """What GET /v2/models/NAME answers: tensors of any number of rows."""
    signature, backend = runner.signature, runner.describe()["backend"]
    inputs = [
        {"name": n, "datatype": "UINT8" if n == signature.images else "FP32", "shape": [-1, *shape[1:]]}
        for n, shape in signature.inputs.items()
    ]
    outputs = [
        {"name": n, "datatype": "FP32", "shape": [-1, *shape[1:]]} | _labelled(n, runner)
        for n, shape in signature.outputs.items()
    ]
    return {
        "name": name,
        "versions": [version],
        "platform": PLATFORMS.get(backend, backend),
        "inputs": inputs,
        "outputs": outputs,
    }


def _labelled(output: str, runner: Runner) -> dict[str, Any]:
    return {"parameters": {"labels": list(runner.bundle.classes)}} if output == "logits" else {}


def configuration(runner: Runner, name: str, pictures: int) -> dict[str, Any]:
    """What GET /v2/models/NAME/config answers: Triton's ModelConfig. pictures: most rows of a tensor."""
    signature, described = runner.signature, runner.describe()
    inputs = [
        {"name": n, "data_type": "TYPE_UINT8" if n == signature.images else "TYPE_FP32", "dims": [*shape[1:]]}
        | ({"format": "FORMAT_NHWC"} if n == signature.images else {})
        for n, shape in signature.inputs.items()
    ]
    outputs = [{"name": n, "data_type": "TYPE_FP32", "dims": [*shape[1:]]} for n, shape in signature.outputs.items()]
    kind = "KIND_GPU" if described["backend"] in ("tensorrt", "cuda", "ort-tensorrt") else "KIND_CPU"
    return {
        "name": name,
        "platform": PLATFORMS.get(described["backend"], described["backend"]),
        "backend": described["backend"],
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": pictures,
        "input": inputs,
        "output": outputs,
        "instance_group": [{"name": name, "kind": kind, "count": described.get("runners", 1)}],
        "parameters": {"labels": {"string_value": json.dumps(list(runner.bundle.classes), ensure_ascii=False)}},
    }


def _objects(value: object, name: str) -> Sequence[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(v, dict) for v in value):
        raise InputError(f"field {name!r}", got=f"{value!r:.100}", expected="a list of tensors", fix=_EXAMPLE)
    return value


def _parameters(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = fields.get("parameters", {})
    if not isinstance(parameters, dict):
        raise InputError("field 'parameters'", got=f"{parameters!r:.100}", expected="an object")
    return parameters


def _named(fields: Mapping[str, Any], known: Mapping[str, object], what: str) -> str:
    """The name of a tensor that the graph has. Raises: InputError."""
    name = fields.get("name")
    if not isinstance(name, str) or name not in known:
        raise InputError(f"the model has no such {what}", got=f"{name!r:.100}", expected=", ".join(known))
    return name


def _wanted(name: str, parameters: Mapping[str, Any]) -> RequestedOutput:
    for parameter in parameters:
        if parameter not in OF_OUTPUT:
            raise InputError(
                f"output {name!r}: unknown parameter", got=f"{parameter!r:.50}", expected=" or ".join(OF_OUTPUT)
            )
    classes = parameters.get("classification", 0)
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 0:
        raise InputError("parameter 'classification'", got=f"{classes!r:.50}", expected="how many classes")
    if classes and name != "logits":
        raise InputError(f"output {name!r} has no classes", got=f"classification {classes}", expected="output 'logits'")
    return RequestedOutput(bool(parameters.get("binary_data")), classes)


def _tensor(
    fields: Mapping[str, Any], body: bytes, offset: int, signature: Signature, pictures: int
) -> tuple[str, np.ndarray, int]:
    """Name and array of one input, and where the next one's bytes begin."""
    name, shape, datatype = _named(fields, signature.inputs, "input"), fields.get("shape"), fields.get("datatype")
    wanted = [*signature.inputs[name][1:]]
    kind = "UINT8" if name == signature.images else "FP32"
    counts = isinstance(shape, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in shape)
    if datatype != kind or not isinstance(shape, list) or not counts or shape[1:] != wanted:
        got = f"{datatype!r:.50} {shape!r:.100}"
        raise InputError(f"input {name!r}", got=got, expected=f"{kind} {['N', *wanted]}")
    if not 1 <= shape[0] <= pictures:
        raise InputError(
            f"input {name!r}: rows", got=f"{shape[0]!r:.50}", expected=f"1 to {pictures}", fix="send several requests"
        )
    dtype = DATATYPES[kind]
    size = _parameters(fields).get("binary_data_size")
    if size is not None:
        expected = math.prod(shape) * dtype.itemsize
        if size != expected or isinstance(size, bool) or offset + expected > len(body):
            raise InputError(
                f"input {name!r}: bytes", got=f"{size!r:.50}, {len(body) - offset} in the body", expected=expected
            )
        return name, np.frombuffer(body, dtype, math.prod(shape), offset).reshape(shape), offset + expected
    data, wrong = fields.get("data"), f"input {name!r}: data"
    if not isinstance(data, json_document.Numbers):
        raise InputError(wrong, got=f"{data!r:.100}", expected=f"{math.prod(shape)} numbers")
    try:
        values = data.read(shape)
    except ValueError as error:
        raise InputError(
            wrong, got=str(error)[:200], expected=f"{math.prod(shape)} numbers, flat or {shape}"
        ) from error
    if kind == "UINT8" and (values.min() < 0 or values.max() > 255 or (values != np.floor(values)).any()):
        raise InputError(wrong, got="numbers outside", expected="whole numbers from 0 to 255")
    return name, values.astype(dtype), offset
