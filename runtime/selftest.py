"""Whether a bundle answers here as the trained student did, on the real images that it carries."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import InputError
from . import load
from .bundle import Bundle
from .engines.gate import check
from .runner import Runner


def self_test(bundle: Bundle, backend: str = "auto", threads: int | None = None) -> dict[str, dict[str, Any]]:
    """Compute the stored images in the precision that the bundle recommends for this backend, and in fp32.

    Returns: precision -> what `engines.gate.check` found.

    Raises: InputError when the bundle has no self-test or cannot be loaded, GateError when it answers otherwise.
    """
    images, logits = bundle.selftest()
    if len(images) == 0 or logits.shape != (len(images), len(bundle.classes)):
        raise InputError(
            f"{bundle.path}: the self-test does not fit the graph",
            got=f"{len(images)} images, logits {logits.shape}",
            expected=f"images, and logits of {len(bundle.classes)} classes for each",
            fix="export the bundle again",
        )
    results = {}
    with load(bundle, backend, threads) as runner:
        results[runner.precision] = _checked(runner, images, logits)
    if "fp32" not in results:
        with load(bundle, backend, threads, precision="fp32") as runner:
            results["fp32"] = _checked(runner, images, logits)
    return results


def _checked(runner: Runner, images: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    feeds, where = {runner.signature.images: images}, f"{runner.bundle.path}: the self-test fails"
    return check(runner.compute, feeds, {"logits": logits}, runner.precision, where)
