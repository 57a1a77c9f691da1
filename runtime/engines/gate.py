"""Are an engine's answers those of the trained student in fp32? Asked after every build and every refit.

Fused fp16 attention has been silently wrong in several versions of TensorRT (design/EDGE.md, 3), and a refittable
engine has lost a bias in 11.3 (its release notes): nothing is taken on trust.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...errors import InputError
from ..bundle import Bundle

TOLERANCE = 1e-3
"fp32: largest |difference| of an output; TF32 is off, so only the order of sums differs"
LIMITS = {"fp16": 0.02, "bf16": 0.08, "int8": 0.2}
"""Largest relative error: RMS of the difference over RMS of the reference around its mean.

fp16 and bf16: about 4 times what 12 to 24 blocks of rounding give. int8: cosine 0.98; the 0.926 of ill-chosen INT8
(design/EDGE.md, 4) is 0.38. Chosen, not measured on a GPU.
"""

Feeds = dict[str, np.ndarray]


class GateError(InputError):
    """The engine computes something else."""


def reference(bundle: Bundle, graph: str) -> tuple[Feeds, Feeds]:
    """(inputs, outputs in fp32) on the real images of the bundle's self-test.

    The student's logits come from the self-test, where torch computed them; the outputs of "query" and "prompted" come
    from ONNX Runtime and the fp32 graphs.

    Raises: InputError when the bundle has no self-test.
    """
    name = bundle.manifest.get("selftest")
    if not name:
        raise InputError(
            f"{bundle.path}: no self-test in this bundle",
            expected="selftest.npz: an engine whose answers nobody compared is not used",
            fix="export the bundle again: cdl-edge export RUN --out BUNDLE",
        )
    with np.load(bundle.path / str(name), allow_pickle=False) as file:
        images, logits = file["images"], file["logits"]
    if graph == "student":
        return {bundle.signature().images: images}, {"logits": logits}
    from ..backends.onnxruntime import OrtRunner

    feeds: Feeds = {bundle.signature(graph).images: images}
    if graph != "query":
        with OrtRunner(bundle, "query", threads=1) as query:
            feeds |= query.compute(dict(feeds))
    with OrtRunner(bundle, graph, threads=1) as runner:
        return feeds, runner.compute(feeds)


def check(
    compute: Callable[[Feeds], Feeds], feeds: Feeds, expected: Feeds, precision: str, where: object
) -> dict[str, Any]:
    """Compare and return what was found, for the sidecar. Raises: GateError."""
    got = compute(feeds)
    for name, value in got.items():
        if not np.isfinite(value).all():
            raise GateError(
                f"{where}: output {name!r} holds NaN or infinity",
                got=f"{int((~np.isfinite(value)).sum())} of {value.size} values",
                expected="finite numbers",
                fix=_fix(precision),
            )
    result: dict[str, Any] = {"images": len(next(iter(feeds.values()))), "precision": precision, "outputs": {}}
    for name, want in expected.items():
        found = _compare(got[name].astype(np.float64), want.astype(np.float64), precision, name)
        result["outputs"][name] = found
        if not found["passed"]:
            raise GateError(
                f"{where}: the engine's {name} are not the student's",
                got=", ".join(f"{k} {v:.3g}" for k, v in found.items() if k != "passed"),
                expected=f"max_abs_error <= {TOLERANCE:g}"
                if precision == "fp32"
                else f"relative_error <= {LIMITS[precision]:g}, and the same class wherever fp32 is clear",
                fix=_fix(precision),
            )
    return result


def _compare(got: np.ndarray, want: np.ndarray, precision: str, name: str) -> dict[str, Any]:
    difference = got - want
    spread = float(np.sqrt(np.mean((want - want.mean()) ** 2))) or 1.0
    found: dict[str, Any] = {
        "max_abs_error": float(np.abs(difference).max()),
        "relative_error": float(np.sqrt(np.mean(difference**2))) / spread,
    }
    if precision == "fp32":
        return {**found, "passed": found["max_abs_error"] <= TOLERANCE}
    limit = LIMITS[precision]
    passed = found["relative_error"] <= limit
    if name == "logits":
        same = got.argmax(1) == want.argmax(1)
        two = np.sort(want, axis=1)[:, -2:] if want.shape[1] > 1 else np.tile([0.0, np.inf], (len(want), 1))
        clear = two[:, 1] - two[:, 0] > 4 * limit * spread  # closer than that may fall either way
        found["top1_agreement"] = float(same.mean())
        passed = passed and bool(same[clear].all())
    return {**found, "passed": passed}


def _fix(precision: str) -> str:
    if precision == "fp32":
        return "export the bundle again; if it stays, report the TensorRT version and the GPU"
    return "cdl-edge build BUNDLE --unfuse-attention, another TensorRT version, or precision fp32"
