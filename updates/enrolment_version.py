"""The version of a bundle that classes learnt on the device make: its head, its files, and what it is made from.

Every such version is made from the one that the workshop made, and from the features of all pictures that were
enrolled. The workshop's statistics stay as they are; what is removed leaves no trace of rounding. A new version that
comes from the workshop takes over what was enrolled, see `carry`.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..artefacts.bundle import Bundle, open_bundle
from ..artefacts.external import external_records
from ..artefacts.layout import ENROLMENTS, MANIFEST, PROMPTS, SCHEMES_KEY, SELFTEST
from ..artefacts.manifest import canonical, sealed
from ..artefacts.relabel import relabelled
from ..class_statistics import ClassStatistics, FeatureMap
from ..errors import InputError
from ..files import sha256
from ..heads import CLOSED_FORM, LinearMap, best_ridge, ridge_regression
from ..packing import pack
from ..runtime.loader import load
from .enrolment_checks import losses
from .enrolment_record import Enrolled, Source
from .store import Store, link, write_file

LIFT = 0.2
"""exponent of the weight by which the target of a class of few pictures is above 1: an unseen picture of it is answered
lower than the few that it was learnt from"""
CHUNK = 32
"pictures in memory at a time"
AGAIN = "where the run is: cdl-edge export RUN --out BUNDLE --statistics"
SAME = 1e-3
"""largest difference of two features, as a share of the largest of all, that is called none: engines differ by 1e-5,
the features of another training by 1e-1 and more"""


def base_of(store: Store) -> Bundle:
    """The version that the workshop made and that all enrolments are added to.

    Raises: InputError for a bundle that nothing can be enrolled in, or whose workshop version is not there any more.
    """
    wanted = store.bundle.manifest.enrolled_on
    base = store.bundle
    if wanted is not None:
        if wanted not in {v.version for v in store.state.versions}:
            raise InputError(
                f"{store.path}: the version that classes were enrolled on is not kept here",
                got=f"{store.bundle.manifest.version} alone",
                expected=f"version {wanted} beside it",
                fix="copy the whole folder of the bundle, `versions` included",
            )
        base = open_bundle(store.folder(wanted))
    check_base(base)
    return base


def head_of(base: Bundle) -> str:
    """Kind of the head of a bundle, a key of heads.CLOSED_FORM."""
    return str(base.manifest.config.get("head"))


def check_base(base: Bundle) -> None:
    """Raises: InputError for a bundle that nothing can be enrolled in."""
    manifest = base.manifest
    if manifest.statistics is None:
        raise InputError(
            f"{base.path}: no class statistics in this bundle: nothing can be enrolled",
            expected="a bundle of a run whose head is made from them (--head ranpac, slda or ncm)",
            fix=AGAIN,
        )
    if head_of(base) not in CLOSED_FORM:
        raise InputError(
            f"{base.path}: a head that cannot be made on a device: nothing can be enrolled",
            got=head_of(base),
            expected=f"one of {', '.join(CLOSED_FORM)}",
            fix="train with --head ranpac; or add the class by cdl-edge train --extend RUN",
        )
    if "features" not in base.signature().outputs:
        raise InputError(
            f"{base.path}: its graph does not give features: nothing can be enrolled",
            got=f"outputs {', '.join(base.signature().outputs)}",
            expected="a bundle of this version of cdl-edge",
            fix=AGAIN,
        )
    if manifest.selections is not None:
        raise InputError(
            f"{base.path}: its prompts are selected for each task: nothing can be enrolled",
            got=f"learner {manifest.learner}",
            expected="a learner without selection, as frozen or apt",
            fix="train with --learner frozen; or add the class by cdl-edge train --extend RUN",
        )


def statistics_of(base: Bundle) -> ClassStatistics:
    """Of the workshop, its classes in the order of the logits.

    Raises: InputError for a bundle that nothing can be enrolled in, and for statistics of others than the graph's
        features.
    """
    check_base(base)
    held = ClassStatistics.load(base.path / str(base.manifest.statistics)).ordered(base.classes)
    width, kind = base.signature().outputs["features"][1], CLOSED_FORM[head_of(base)][0]
    if (held.map.width, held.map.kind) != (width, kind):
        raise InputError(
            f"{base.path}: class statistics of other features than the graph's",
            got=f"{held.map.kind}, {held.map.width} wide",
            expected=f"{kind}, {width} wide",
            fix=AGAIN,
        )
    return held


def present_head(bundle: Bundle) -> LinearMap:
    """The head that a version answers with, as a linear map of what it reads."""
    held = _constants(bundle)
    return LinearMap(held["head.weight"].T.astype(np.float64), held["head.bias"].astype(np.float64), 0.0)


class Made(NamedTuple):
    """A head with what it was made from."""

    total: ClassStatistics
    "of all pictures"
    head: LinearMap
    leverages: np.ndarray
    "of the pictures of one class, see enrolment_checks.left_out: float64 (n,); none for another head than ranpac"
    target: float
    "what that class is to be answered with, where the others are with 1"


def made(base: Bundle, workshop: ClassStatistics, enrolled: Enrolled, name: str | None = None) -> Made:
    """The statistics of all pictures, and the head that they make.

    A ranpac head takes its ridge from the workshop. It is chosen again, which takes seconds, where `base` does not say
    it, or where pictures from here are more than a quarter of those from the workshop: then it was chosen for others
    than these. Pictures of a class that has fewer than the others count more, see `weights`.

    name: a class of `enrolled`, of which leverages and target are.
    """
    kind, total = head_of(base), enrolled.added_to(workshop)
    if kind != "ranpac":
        return Made(total, CLOSED_FORM[kind][1](total), np.zeros(0), 1.0)
    sums, moment, rare = total.sums.copy(), total.moment.copy(), weights(workshop, total, enrolled)
    for other, weight in rare.items():
        h, row = workshop.map.apply(enrolled.of_class(other)), total.classes.index(other)
        sums[row] = weight**LIFT * (sums[row] + (weight - 1) * h.sum(axis=0))
        moment += (weight - 1) * h.T @ h
    known = base.manifest.ridge if total.images <= 1.25 * workshop.images else None
    ridge = best_ridge(total) if known is None else known
    h = total.sums[:0] if name is None else workshop.map.apply(enrolled.of_class(name))
    head, leverages = ridge_regression(replace(total, sums=sums, moment=moment), ridge, h)
    weight = rare.get(name or "", 1.0)
    return Made(total, head, weight * leverages, weight**LIFT)


def weights(workshop: ClassStatistics, total: ClassStatistics, enrolled: Enrolled) -> dict[str, float]:
    """Class -> how often each of its enrolled pictures counts in a regression; classes whose pictures count once not.

    Least squares hardly ever answer a class of 10 pictures beside classes of 100: it is rare. Here its pictures count
    as if it had as many as the median class of the workshop. LIFT was chosen on training pictures that nothing had
    learnt from; docs/enrol.md has what comes of it.
    """
    typical, found = float(np.median(workshop.counts)), {}
    for name in enrolled.names:
        count = int(total.counts[total.classes.index(name)])
        if count < typical:
            found[name] = typical / count
    return found


def answers(head: LinearMap, map: FeatureMap, x: np.ndarray) -> np.ndarray:
    """Logits float64 (N, C) of features (N, D), as the graph computes them."""
    return np.asarray(map.apply(x) @ head.weight.T + head.bias)


def features_of(
    opened: Bundle, sources: Sequence[Source], backend: str, threads: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """float32 (n, D) of pictures, and (m, D) of those of the self-test; in fp32, as the statistics are.

    Raises: InputError for a picture that cannot be read.
    """
    with load(opened, backend, threads, precision="fp32") as runner:
        images, parts = runner.signature.images, []
        for start in range(0, len(sources), CHUNK):
            pixels = np.stack([opened.preprocessing.read(source) for source in sources[start : start + CHUNK]])
            parts.append(runner.compute({images: pixels})["features"])
        tested = runner.compute({images: opened.selftest()[0]})["features"]
    return np.concatenate([np.zeros((0, tested.shape[1]), np.float32), *parts]), tested


def build(
    base: Bundle, enrolled: Enrolled, classes: tuple[str, ...], head: LinearMap, selftest: np.ndarray, folder: Path
) -> None:
    """Write the version that `base` becomes with these enrolments into an empty folder.

    Args:
        classes: of the head, those of `base` first. selftest: logits (n, C) on the pictures of the self-test.
    """
    manifest, count = base.manifest, len(classes)
    constants = _constants(base) | {
        "head.weight": np.ascontiguousarray(head.weight.T, np.float32),
        "head.bias": head.bias.astype(np.float32),
    }
    content, where = pack(constants)
    made = {PROMPTS: content, ENROLMENTS: _npz(features=enrolled.features)}
    made[manifest.selftest or SELFTEST] = _npz(images=base.selftest()[0], logits=selftest.astype(np.float32))
    made |= {name: kept for name, kept in enrolled.files.items() if isinstance(kept, bytes)}
    for file in set(manifest.graphs.values()):
        made[file] = relabelled(base.read(file).tobytes(), PROMPTS, constants, where, classes)
    document = json.loads(json.dumps(dict(manifest.document)))
    for name, entry in made.items():
        write_file(folder / name, [entry])
        document["files"][name] = {"sha256": hashlib.sha256(entry).hexdigest(), "bytes": len(entry)}
    for name in manifest.files:
        if name not in made and (base.path / name).is_file():
            link(base.path / name, folder / name)
    for name, kept in enrolled.files.items():
        if isinstance(kept, Path):
            link(kept, folder / name)
            document["files"][name] = {"sha256": sha256(kept), "bytes": kept.stat().st_size}
    _widen(document, count)
    document |= {
        "classes": list(classes),
        "enrolments": [asdict(entry) for entry in enrolled.entries],
        "enrolled_on": manifest.version,
    }
    write_file(folder / MANIFEST, [canonical(sealed(document)).encode("utf-8")])


def carry(
    running: Bundle, base: Bundle, new: Bundle, folder: Path, backend: str, threads: int | None
) -> dict[str, Any] | None:
    """Write the version that `new` becomes with what was enrolled in `running` into an empty folder.

    Args:
        running: with enrolments on `base`. new: the workshop's next version, proven; or one that another device has
            made of `base`, whose enrolments then come first.

    Returns: {"names", "images", "recomputed": whether pictures were looked at again, "old_classes": what the classes
        of `new` lose, see enrolment_checks.losses}; None where `new` holds all that was enrolled, and nothing was
        written.

    Raises: InputError for a `new` that can take no enrolments, or whose features are others and whose pictures were
        not kept.
    """
    enrolled, theirs = Enrolled.of(running), Enrolled.of(new)
    ground = base if new.manifest.enrolled_on == base.manifest.version else new
    try:
        workshop = statistics_of(ground)
    except InputError as error:
        reason = str(error).splitlines()[0].removeprefix(f"{ground.path}: ")
        raise _refused(enrolled, reason) from error
    x, tested = _features_on(running, base, ground, enrolled, backend, threads)
    carried = theirs.joined(replace(enrolled, features=x).spelt_as(new.classes))
    more = [entry for entry in carried.entries if entry not in theirs.entries]
    if not more:
        return None
    total, head, *_ = made(ground, workshop, carried)
    old = present_head(new)
    logits = [answers(h, total.map, tested) for h in (old, head)]
    build(ground, carried, total.classes, head, logits[1], folder)
    return {
        "names": list(dict.fromkeys(entry.name for entry in more)),
        "images": sum(entry.images for entry in more),
        "recomputed": x is not enrolled.features,
        "old_classes": losses(theirs.added_to(workshop), old, total, head, logits),
    }


def _features_on(
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


def _widen(document: dict[str, Any], count: int) -> None:
    """Shapes of logits; the new classes are one more task, of which the workshop has measured nothing."""
    for outputs in (document["outputs"], *(s["outputs"] for s in (document.get("signatures") or {}).values())):
        if "logits" in outputs:
            outputs["logits"][-1] = count
    if count == len(document["classes"]):
        return
    document["tasks"].append(list(range(len(document["classes"]), count)))
    measured = [document.get("accuracy")]
    for scheme in ((document.get("quantisation") or {}).get(SCHEMES_KEY) or {}).values():
        measured += [scheme.get(side) for side in ("before", "after", "drop")]
    for record in measured:
        if record and record.get("per_task"):
            record["per_task"].append(None)


def _constants(bundle: Bundle) -> dict[str, np.ndarray]:
    """What the graphs keep in the file of learnt constants, by name."""
    content = bundle.read(PROMPTS)
    graphs = sorted(set(bundle.manifest.graphs.values()))
    records = [r for name in graphs for r in external_records(bundle.read(name).tobytes()) if r.location == PROMPTS]
    return {record.name: record.view(content) for record in records}


def _npz(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()
