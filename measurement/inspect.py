"""What a bundle is, and whether it works here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..artefacts.bundle import Bundle, open_bundle
from ..errors import InputError
from ..runtime import load
from ..runtime.predict import predict
from .profile import synthetic_jpeg

_COPIED = (
    "created",
    "schema",
    "learner",
    "distiller",
    "query",
    "alpha",
    "selection",
    "backbone",
    "profile",
    "opset",
    "precision",
    "quantisation",
    "input",
    "outputs",
    "graphs",
    "accuracy",
    "parity",
    "graph_parity",
    "versions",
    "files",
    "manifest_sha256",
)


def inspect(bundle: Bundle | Path | str) -> dict[str, Any]:
    """A summary of the manifest as plain JSON values; the run's own metrics ("training") are left out.

    Returns: {"path", "name", "class_count", "task_count", "classes": [names], "tasks": [[names]], "size_bytes", and the
        manifest's own fields, None where the manifest has none}.

    Raises: InputError as `open_bundle` does.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    return {
        "path": str(opened.path),
        "name": opened.name,
        "class_count": len(opened.classes),
        "task_count": len(opened.tasks),
        "classes": list(opened.classes),
        "tasks": [[opened.classes[c] for c in task] for task in opened.tasks],
        "size_bytes": opened.size_bytes,
        **{key: opened.manifest.document.get(key) for key in _COPIED},
    }


def validate(
    path: Path | str, backend: str = "auto", threads: int | None = None, precision: str | None = None
) -> dict[str, Any]:
    """Check every hash, load the graph, classify a picture; black and white inputs show an overflow if there is one.

    Returns: {"valid": True, "path", "files": how many were hashed, "size_bytes", "load_ms", "checks": [what was done],
        and the backend's description}.

    Raises: InputError for whatever does not hold.
    """
    bundle = open_bundle(path, verify=True)
    size = bundle.preprocessing.size
    with load(bundle, backend, threads, precision=precision) as runner:
        extremes = np.stack([np.zeros((size, size, 3), np.uint8), np.full((size, size, 3), 255, np.uint8)])
        pixels = np.concatenate([bundle.preprocessing.read(synthetic_jpeg())[None], extremes])
        outputs = runner.run(pixels)
        for name, values in (("logits", outputs.logits), ("prompt_weights", outputs.prompt_weights)):
            if values is not None and not np.isfinite(values).all():
                raise InputError(
                    f"{bundle.graph()}: output {name!r} is not finite",
                    got=f"{int((~np.isfinite(values)).sum())} of {values.size} values NaN or infinite",
                    expected="finite numbers",
                    fix="export in another precision, or on another backend",
                )
        predict(runner, [synthetic_jpeg()])
        return {
            "valid": True,
            "path": str(bundle.path),
            "files": len(bundle.manifest.files),
            "size_bytes": bundle.size_bytes,
            "load_ms": runner.load_ms,
            "checks": ["manifest", "sha256 of every file", "graph loads and fits the manifest", "outputs are finite"],
            **runner.describe(),
        }
