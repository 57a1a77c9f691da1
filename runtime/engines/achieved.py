"""What an engine really computes in, read from its inspector: a request for fp16 can silently come to nothing."""

from __future__ import annotations

import json
import re
from collections import Counter
from types import ModuleType
from typing import Any

from ...errors import InputError

# TensorRT 10: {"Format/Datatype": "Half"} or "Row major linear FP16"; 11: {"DataType": "Half", "Format": ...}.
_TYPES = (
    ("int8", r"\bint8\b"),
    ("bf16", r"\b(bf16|bfloat16)\b"),
    ("fp16", r"\b(fp16|half)\b"),
    ("fp32", r"\b(fp32|float)\b"),
)
"narrowest first: a layer counts as the narrowest type that it reads or writes"
_ATTENTION = re.compile(r"mha|fmha|attention", re.IGNORECASE)
_LINEAR = re.compile(r"(?:\w+\.)?blocks\.\d+\.(?:qkv|q|k|v|proj|fc1|fc2)\b")


def inspect(engine: Any, trt: ModuleType) -> str:
    """The engine's layers as JSON text; detailed, since `build` asks for that."""
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def read(text: str) -> dict[str, Any]:
    """Count an inspector's layers.

    Returns: {"layers": {type: number}, "linears": {type: number of encoder linears named in the layers' metadata},
        "attention": sorted names of fused attention kernels}.

    Raises: InputError when the text is no inspector's JSON, or tells names only.
    """
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("the engine inspector's answer cannot be read", got=f"{text:.200}", expected="JSON") from error
    if not layers or not all(isinstance(layer, dict) for layer in layers):
        raise InputError(
            "the engine inspector tells names only",
            got=f"{layers!r:.200}",
            expected="layers with types",
            fix="build the engine with this program: it asks for detailed verbosity",
        )
    kinds: Counter[str] = Counter()
    linears: dict[str, str] = {}
    attention = set()
    for layer in layers:
        kind = _kind(layer)
        kinds[kind] += 1
        # With several linears in one kernel, and parts of one (its bias, its casts) in another, the narrowest counts.
        for name in _LINEAR.findall(str(layer.get("Metadata", "")) + " " + str(layer.get("Name", ""))):
            linears[name] = min(kind, linears.get(name, "other"), key=_rank)
        tactic = str(layer.get("TacticName") or layer.get("Name", ""))
        if _ATTENTION.search(tactic):
            attention.add(re.sub(r"_0x[0-9a-f]+$|_myl\d+_\d+$", "", tactic))
    return {"layers": dict(kinds), "linears": dict(Counter(linears.values())), "attention": sorted(attention)}


def check(precision: str, found: dict[str, Any]) -> None:
    """Raises: InputError unless the engine computes in the precision asked for."""
    if precision == "fp32":
        lower = {kind: n for kind, n in found["layers"].items() if kind in ("fp16", "bf16", "int8")}
        if not lower:
            return
        raise _absent(precision, found)
    if not found["layers"].get(precision) or (found["linears"] and not found["linears"].get(precision)):
        raise _absent(precision, found)


def _absent(precision: str, found: dict[str, Any]) -> InputError:
    layers = ", ".join(f"{n} {kind}" for kind, n in sorted(found["layers"].items()))
    linears = ", ".join(f"{n} {kind}" for kind, n in sorted(found["linears"].items()))
    return InputError(
        f"the engine does not compute in {precision}",
        got=f"layers: {layers}" + (f"; linear layers of the encoder: {linears}" if linears else ""),
        expected=f"{precision} layers" if precision != "fp32" else "fp32 layers only",
        fix="export the bundle again: the types stand in its graph",
    )


def _rank(kind: str) -> int:
    order = [name for name, _ in _TYPES]
    return order.index(kind) if kind in order else len(order)


def _kind(layer: dict[str, Any]) -> str:
    texts = []
    for side in ("Inputs", "Outputs", "Constants"):
        for tensor in layer.get(side) or []:
            if isinstance(tensor, dict):
                keys = ("DataType", "Datatype", "Format/Datatype", "Format/DataType")
                texts += [str(tensor[key]) for key in keys if key in tensor]
    text = " ".join(texts).lower()
    return next((name for name, pattern in _TYPES if re.search(pattern, text)), "other")
