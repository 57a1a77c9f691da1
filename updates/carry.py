"""Classes that were learnt on the device, on top of a new version from the workshop.

What was enrolled are features. They mean the same to a new version whose features are the same, as they are where the
backbone is frozen and the prompts did not change: that is measured here. Where they are others, the kept pictures are
looked at again; without them the pack is refused, and nothing has changed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..artefacts.bundle import Bundle
from ..errors import InputError
from ..runtime.loader import load
from .enrolments import (
    Enrolled,
    answers,
    build,
    features_of,
    made,
    present_head,
    statistics_of,
)
from .judgement import losses

SAME = 1e-3
"""largest difference of two features, as a share of the largest of all, that is called none: engines differ by 1e-5,
the features of another training by 1e-1 and more"""


def carry(
    running: Bundle, base: Bundle, new: Bundle, folder: Path, backend: str, threads: int | None
) -> dict[str, Any]:
    """Write the version that `new` becomes with what was enrolled in `running` into an empty folder.

    Args:
        running: with enrolments on `base`. new: the workshop's next version, proven.

    Returns: {"names", "images", "recomputed": whether pictures were looked at again, "old_classes": what the classes
        of `new` lose, see judgement.losses}.

    Raises: InputError for a `new` that can take no enrolments, or whose features are others and whose pictures were
        not kept.
    """
    enrolled = Enrolled.of(running)
    try:
        workshop = statistics_of(new)
    except InputError as error:
        reason = str(error).splitlines()[0].removeprefix(f"{new.path}: ")
        raise _refused(enrolled, reason) from error
    x, tested = _features(running, base, new, enrolled, backend, threads)
    carried = replace(enrolled, features=x)
    total, head, *_ = made(new, workshop, carried)
    old = present_head(new)
    logits = [answers(h, total.map, tested) for h in (old, head)]
    build(new, carried, total.classes, head, logits[1], folder)
    return {
        "names": enrolled.names,
        "images": len(x),
        "recomputed": x is not enrolled.features,
        "old_classes": losses(workshop, old, total, head, logits),
    }


def _features(
    running: Bundle, base: Bundle, new: Bundle, enrolled: Enrolled, backend: str, threads: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """As `new` sees them: of the enrolled pictures, float32 (N, D), and of those of its self-test."""
    pictures = base.selftest()[0]
    seen = []
    for bundle in (base, new):
        if bundle.preprocessing != base.preprocessing:
            break
        with load(bundle, backend, threads, precision="fp32") as runner:
            seen.append(runner.compute({runner.signature.images: pictures})["features"])
    same = len(seen) == 2 and seen[0].shape == seen[1].shape
    if same and np.abs(seen[0] - seen[1]).max() <= SAME * np.abs(seen[0]).max():
        return enrolled.features, features_of(new, [], backend, threads)[1]
    kept = [enrolled.files[name] for entry in enrolled.entries for name in entry.pictures]
    if len(kept) < len(enrolled.features):
        raise _refused(enrolled, "its features are others than those of the enrolled pictures")
    return features_of(new, kept, backend, threads)


def _refused(enrolled: Enrolled, reason: str) -> InputError:
    names = ", ".join(enrolled.names[:8])
    return InputError(
        "the new version cannot take over what was enrolled here, and the pictures were not kept",
        got=f"{names}: {reason}",
        expected="a version with the same features, as of a frozen backbone without prompts that learn",
        fix="cdl-edge enrol remove each of them, install the pack, and enrol them again",
    )
