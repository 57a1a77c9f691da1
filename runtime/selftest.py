"""Does what runs here compute what the trained student did? Asked on the real images that each bundle carries.

Asked of an engine after every build and every refit, of a version before it answers anybody, of a pack when it is made
and when it is installed. Fused fp16 attention has been silently wrong in several versions of TensorRT,
and a refittable engine has lost a bias in 11.3 (its release notes): nothing is taken on trust.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from ..artefacts.bundle import Bundle
from ..errors import GateError, InputError
from .loader import load
from .runner import Runner

TOLERANCE = 1e-3
"fp32: largest |difference| of an output; TF32 is off, so only the order of sums differs"
LIMITS = {"fp16": 0.02, "bf16": 0.08, "int8": 0.2}
"""Largest relative error: RMS of the difference over RMS of the reference around its mean.

fp16 and bf16: about 4 times what 12 to 24 blocks of rounding give. int8: cosine 0.98; the 0.926 of ill-chosen INT8
is 0.38. Chosen, not measured on a GPU.
"""

Feeds = dict[str, np.ndarray]


def self_test(bundle: Bundle, backend: str = "auto", threads: int | None = None) -> dict[str, dict[str, Any]]:
    """Compute the stored images in the precision that the bundle recommends for this backend, and in fp32.

    Returns: precision -> what `check` found.

    Raises: InputError when the bundle has no self-test or cannot be loaded, GateError when it answers otherwise.
    """
    feeds, expected = reference(bundle)
    results = {}
    with load(bundle, backend, threads) as runner:
        results[runner.precision] = prove(runner, feeds, expected)
        prove_answers(runner, next(iter(feeds.values())))
    if "fp32" not in results:
        with load(bundle, backend, threads, precision="fp32") as runner:
            results["fp32"] = prove(runner, feeds, expected)
    return results


def prove(runner: Runner, feeds: Feeds, expected: Feeds) -> dict[str, Any]:
    """Check the answers of a loaded graph against what `expected` holds; see `check`."""
    return check(runner.compute, feeds, expected, runner.precision, f"{runner.bundle.path}: the self-test fails")


def prove_answers(runner: Runner, images: np.ndarray) -> None:
    """Classify pictures through the function that answers requests: the graph alone is not all that is served.

    images: uint8 (B, S, S, 3). Raises: GateError when the answer is none, or holds NaN.
    """
    from .predict import predict

    pictures = []
    for image in images:
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "PNG")
        pictures.append(stream.getvalue())
    try:
        json.dumps(predict(runner, pictures, top=len(runner.bundle.classes)), allow_nan=False)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise GateError(
            f"{runner.bundle.path}: pictures get no answer",
            got=f"{type(error).__name__}: {error}".splitlines()[0],
            expected="a label, its probability and its confidence",
            fix="export the bundle again",
        ) from error


def extremes(runner: Runner) -> np.ndarray:
    """A black and a white picture: uint8 (2, S, S, 3)."""
    size = runner.bundle.preprocessing.size
    return np.stack([np.zeros((size, size, 3), np.uint8), np.full((size, size, 3), 255, np.uint8)])


def prove_finite(runner: Runner) -> dict[str, Any]:
    """Black and white pictures give finite logits: all that can be asked of a bundle without a self-test.

    Returns: as `check`, of no image. Raises: GateError.
    """
    if not np.isfinite(runner.infer(extremes(runner))).all():
        raise GateError(f"{runner.path}: logits hold NaN or infinity", fix="export the bundle again")
    return {"images": 0}


def reference(bundle: Bundle, graph: str = "student") -> tuple[Feeds, Feeds]:
    """(inputs, outputs in fp32) on the real images of the bundle's self-test.

    The student's logits come from the self-test, where torch computed them; the outputs of "query" and "prompted" come
    from ONNX Runtime and the fp32 graphs.

    Raises: InputError when the bundle has no self-test, or one that does not fit it.
    """
    images, logits = bundle.selftest()
    if len(images) == 0 or logits.shape != (len(images), len(bundle.classes)):
        raise InputError(
            f"{bundle.path}: the self-test does not fit the graph",
            got=f"{len(images)} images, logits {logits.shape}",
            expected=f"images, and logits of {len(bundle.classes)} classes for each",
            fix="export the bundle again",
        )
    if graph == "student":
        return {bundle.signature().images: images}, {"logits": logits}
    from .backends.onnxruntime import open_onnxruntime

    feeds: Feeds = {bundle.signature(graph).images: images}
    if graph != "query":
        with open_onnxruntime(bundle, "query", threads=1) as query:
            feeds |= query.compute(dict(feeds))
    with open_onnxruntime(bundle, graph, threads=1) as runner:
        return feeds, runner.compute(feeds)


def check(
    compute: Callable[[Feeds], Feeds], feeds: Feeds, expected: Feeds, precision: str, where: object
) -> dict[str, Any]:
    """Compare, and return what was found as plain JSON values. Raises: GateError."""
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
                f"{where}: its {name} are not the student's",
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
        return "export the bundle again; if it stays, report the backend, its version and the device"
    return "precision fp32; for a TensorRT engine also: cdl-edge build BUNDLE --unfuse-attention, or another TensorRT"
