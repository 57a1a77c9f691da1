"""Open a bundle as a runner: the one way in."""

from __future__ import annotations

from pathlib import Path

from ..artefacts.bundle import Bundle, open_bundle
from .backends import open_runner
from .runner import Runner


def load(
    bundle: Bundle | Path | str,
    backend: str = "auto",
    threads: int | None = None,
    graph: str = "student",
    verify: bool = True,
    precision: str | None = None,
) -> Runner:
    """Open a bundle and load one of its graphs.

        with load("bundle") as student:
            logits = student.infer(images)  # uint8 (B, S, S, 3) -> float32 (B, C)

    Args:
        bundle: a folder, or what `open_bundle` returned.
        backend: "onnxruntime" (also "ort", "cpu", "auto"), "cuda", "ort-tensorrt", "openvino", "tensorrt".
        threads: CPU threads; None: OMP_NUM_THREADS, or the cores that are free.
        graph: name in the manifest's "graphs".
        precision: key of runtime.runner.PRECISIONS; None: what the bundle recommends for this backend, else fp32.
        verify: check every file's hash first; False trusts the disk.

    Raises: InputError for a bundle that is not whole, an unknown backend, or a backend that cannot run here.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle, verify)
    return open_runner(opened, backend, graph, threads, precision)
