"""What is known about an engine, in a JSON file beside it: the engine itself stays a plain plan.

trtexec, DeepStream and Triton read a plain plan; metadata in front of it would break them. Everything here is compared
before a plan is deserialised: a plan is executable code, and it works on one TensorRT, one GPU and one JetPack only.
The sidecar says which plan was written, and its seal that this user wrote it on this device: whoever may write the
folder can write a plan and a sidecar, but not the seal (see `runtime.secret`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...files import atomic_file, sha256, write_json
from ..secret import seal

SCHEMA = 1
REBUILD = "rebuild with: cdl-edge build BUNDLE --rebuild"
_KEYS = {"sha256", "identity", "options", "graph", "files", "refittable", "achieved", "gate", "build_seconds", "refits"}
_BOUND = {
    "product": "product",
    "version": "TensorRT version",
    "gpu": "GPU",
    "capability": "compute capability",
    "board": "board",
    "l4t": "Jetson Linux (L4T) release",
}
"what an engine is bound to; a newer driver alone runs an older engine"


def sidecar_path(engine: Path) -> Path:
    """student.fp16.orin-sm87.engine -> student.fp16.orin-sm87.engine.json"""
    return engine.with_name(engine.name + ".json")


def write(engine: Path, plan: bytes, document: dict[str, Any]) -> dict[str, Any]:
    """Write a plan and its sealed sidecar; a crash in between leaves a plan without a sidecar, which nobody loads.

    Raises: InputError where no key for the seal can be kept.
    """
    sidecar_path(engine).unlink(missing_ok=True)
    with atomic_file(engine) as temporary:
        temporary.write_bytes(plan)
    document = {"schema": SCHEMA, "kind": "engine", "sha256": sha256(engine), "bytes": len(plan), **document}
    document["seal"] = seal(document)
    write_json(sidecar_path(engine), document)
    return document


def read(engine: Path) -> dict[str, Any] | None:
    """The sidecar; None when there is no engine or no sidecar. Raises: InputError when it cannot be understood."""
    path = sidecar_path(engine)
    if not engine.is_file() or not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        known = document["kind"] == "engine" and document["schema"] == SCHEMA and set(document) >= _KEYS
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not an engine's sidecar", got=f"{error}", expected="JSON", fix=REBUILD) from error
    if not known:
        raise InputError(
            f"{path}: another kind or version of sidecar",
            got=f"{document['kind']!r} {document['schema']!r}, keys {', '.join(document)}",
            expected=f"'engine' {SCHEMA}, keys {', '.join(sorted(_KEYS))}",
            fix=REBUILD,
        )
    return dict(document)


def differences(
    document: dict[str, Any],
    identity: dict[str, Any],
    graph: str,
    files: dict[str, str],
    options: dict[str, Any] | None,
) -> Iterator[tuple[str, Any, Any]]:
    """(what, the engine's, here) of all that makes the engine unfit, the files' names last.

    Args:
        identity: `product.identity`. graph: `external.graph_digest`. files: SHA-256 by name of the constants.
        options: asked for; None takes what the engine was built with.
    """
    kept = document.get("identity", {})
    for key, title in _BOUND.items():
        if kept.get(key) != identity[key]:
            yield title, kept.get(key), identity[key]
    if options is not None and document.get("options") != options:
        yield "build options", document.get("options"), options
    if document.get("graph") != graph:
        yield "graph", document.get("graph"), graph
    built = document.get("files", {})
    for name in sorted({*built, *files}):
        if built.get(name) != files.get(name):
            yield name, built.get(name), files.get(name)


def verify_plan(engine: Path, document: dict[str, Any]) -> bytes:
    """The plan's bytes, hashed. Raises: InputError when they are not those that were written."""
    plan = engine.read_bytes()
    digest = hashlib.sha256(plan).hexdigest()
    if digest != document.get("sha256"):
        raise InputError(
            f"{engine}: changed since it was written",
            got=f"sha256 {digest}, {len(plan)} bytes",
            expected=f"sha256 {document.get('sha256')}, {document.get('bytes')} bytes",
            fix=f"an engine is executable code: do not load it; {REBUILD}",
        )
    return plan


def unfit(engine: Path, found: list[tuple[str, Any, Any]]) -> InputError:
    """The error for an engine that does not belong here."""
    return InputError(
        f"{engine}: this engine cannot be used here: {', '.join(what for what, _, _ in found)} differ",
        got="; ".join(f"{what} {got}" for what, got, _ in found),
        expected="; ".join(f"{what} {expected}" for what, _, expected in found),
        fix=REBUILD,
    )
