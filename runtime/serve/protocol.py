"""The Open Inference Protocol v2 in plain numpy: requests to arrays, arrays to answers.

https://github.com/kserve/open-inference-protocol (REST), with Triton's binary tensor extension:
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import InputError
from ..bundle import Signature
from ..runner import Runner

LENGTH_HEADER = "inference-header-content-length"
EXTENSIONS = ["binary_tensor_data"]
DATATYPES: dict[str, np.dtype[Any]] = {"UINT8": np.dtype("uint8"), "FP32": np.dtype("<f4")}
_EXAMPLE = '{"inputs": [{"name": "images", "shape": [1, S, S, 3], "datatype": "UINT8", "data": [...]}]}'


@dataclass(frozen=True)
class Request:
    """A parsed request."""

    id: str | None
    inputs: dict[str, np.ndarray]
    outputs: dict[str, bool] | None
    "wanted outputs, and whether as bytes; None: all of them"
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
    try:
        document = json.loads(body[:length].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError("the request is not JSON", got=str(error)[:200], expected=_EXAMPLE) from error
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
            if fields.get("name") not in signature.outputs:
                raise InputError(
                    "the model has no such output", got=fields.get("name"), expected=", ".join(signature.outputs)
                )
            outputs[fields["name"]] = bool(_parameters(fields).get("binary_data"))
    identity = document.get("id")
    if identity is not None and not isinstance(identity, str):
        raise InputError("field 'id'", got=repr(identity)[:100], expected="a string")
    return Request(identity, inputs, outputs, bool(_parameters(document).get("binary_data_output")))


def answer(
    request: Request, outputs: Mapping[str, np.ndarray], model: str, version: str
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of an answer."""
    described, tails = [], []
    for name, array in outputs.items():
        if request.outputs is not None and name not in request.outputs:
            continue
        fields: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": list(array.shape)}
        if request.binary if request.outputs is None else request.outputs[name]:
            tails.append(np.ascontiguousarray(array, DATATYPES["FP32"]).tobytes())
            fields["parameters"] = {"binary_data_size": len(tails[-1])}
        else:
            fields["data"] = array.ravel().tolist()
        described.append(fields)
    document = {"model_name": model, "model_version": version, "outputs": described}
    if request.id is not None:
        document["id"] = request.id
    head = json.dumps(document).encode("utf-8")
    if not tails:
        return head, {"content-type": "application/json"}
    return b"".join([head, *tails]), {"content-type": "application/octet-stream", LENGTH_HEADER: str(len(head))}


def metadata(runner: Runner, name: str, version: str) -> dict[str, Any]:
    """What GET /v2/models/NAME answers: tensors of any number of rows."""
    signature, backend = runner.signature, runner.describe()["backend"]
    inputs = [
        {"name": n, "datatype": "UINT8" if n == signature.images else "FP32", "shape": [-1, *shape[1:]]}
        for n, shape in signature.inputs.items()
    ]
    outputs = [{"name": n, "datatype": "FP32", "shape": [-1, *shape[1:]]} for n, shape in signature.outputs.items()]
    platform = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}.get(backend, backend)
    return {
        "name": name,
        "versions": [version],
        "platform": platform,
        "inputs": inputs,
        "outputs": outputs,
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


def _tensor(
    fields: Mapping[str, Any], body: bytes, offset: int, signature: Signature, pictures: int
) -> tuple[str, np.ndarray, int]:
    """Name and array of one input, and where the next one's bytes begin."""
    name, shape, datatype = fields.get("name"), fields.get("shape"), fields.get("datatype")
    if name not in signature.inputs:
        raise InputError("the model has no such input", got=repr(name), expected=", ".join(signature.inputs))
    wanted = [*signature.inputs[name][1:]]
    kind = "UINT8" if name == signature.images else "FP32"
    counts = isinstance(shape, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in shape)
    if datatype != kind or not isinstance(shape, list) or not counts or shape[1:] != wanted:
        raise InputError(f"input {name!r}", got=f"{datatype} {shape!r:.100}", expected=f"{kind} {['N', *wanted]}")
    if not 1 <= shape[0] <= pictures:
        raise InputError(
            f"input {name!r}: rows", got=shape[0], expected=f"1 to {pictures}", fix="send several requests"
        )
    dtype = DATATYPES[kind]
    size = _parameters(fields).get("binary_data_size")
    if size is not None:
        expected = math.prod(shape) * dtype.itemsize
        if size != expected or offset + expected > len(body):
            raise InputError(
                f"input {name!r}: bytes", got=f"{size!r:.50}, {len(body) - offset} in the body", expected=expected
            )
        return name, np.frombuffer(body, dtype, math.prod(shape), offset).reshape(shape), offset + expected
    try:
        values = np.asarray(fields.get("data"))
    except ValueError as error:  # rows of different lengths
        raise InputError(
            f"input {name!r}: data", got=str(error)[:100], expected=f"{math.prod(shape)} numbers"
        ) from error
    if values.size != math.prod(shape) or values.dtype.kind not in "iuf":
        raise InputError(
            f"input {name!r}: data", got=f"{values.size} values, {values.dtype}", expected=f"{math.prod(shape)} numbers"
        )
    if kind == "UINT8" and (values.dtype.kind == "f" or values.min() < 0 or values.max() > 255):
        raise InputError(f"input {name!r}: data", got="numbers outside", expected="whole numbers from 0 to 255")
    return name, values.astype(dtype).reshape(shape), offset
