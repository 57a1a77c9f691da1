"""Classes that a device has learnt itself: their records, and the version of a bundle that they make.

Every version with enrolments is made from the one that the workshop made, and from the features of all pictures that
were enrolled. The workshop's statistics stay as they are; what is removed leaves no trace of rounding.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import ArraySpec, read_npz
from ..artefacts.bundle import Bundle, open_bundle
from ..artefacts.external import external_records
from ..artefacts.layout import ENROLMENTS, MANIFEST, PROMPTS, SELFTEST
from ..artefacts.manifest import Enrolment, canonical, sealed
from ..artefacts.relabel import relabelled
from ..class_statistics import ClassStatistics, FeatureMap
from ..errors import InputError
from ..heads import CLOSED_FORM, LinearMap
from ..packing import pack
from .store import Store, link, write_file

MOST = 20_000
"pictures that may be enrolled in one bundle: their features are kept, 4 KB each"
AGAIN = "in the workshop: cdl-edge export RUN --out BUNDLE --statistics"


@dataclass(frozen=True)
class Enrolled:
    """All that a version has learnt on the device."""

    entries: tuple[Enrolment, ...]
    features: np.ndarray
    "float32 (N, D), the pictures of all entries in their order"

    @classmethod
    def of(cls, bundle: Bundle) -> Enrolled:
        """Read it from a version. Raises: InputError for a file that is not what its manifest says."""
        entries, width = bundle.manifest.enrolments, bundle.signature().outputs["features"][1]
        if not entries:
            return cls((), np.zeros((0, width), np.float32))
        wanted = {"features": ArraySpec("float32", (sum(e.images for e in entries), width), exact=True)}
        try:
            return cls(entries, read_npz(bundle.read(ENROLMENTS), wanted, most=4 * MOST * width)["features"])
        except ValueError as error:
            raise InputError(
                f"{bundle.path}: what was enrolled is not whole", got=str(error), fix="cdl-edge pack rollback BUNDLE"
            ) from error

    @property
    def names(self) -> list[str]:
        """Names of the enrolled classes, in the order in which they came."""
        return list(dict.fromkeys(entry.name for entry in self.entries))

    def of_class(self, name: str) -> np.ndarray:
        """float32 (n, D): the features of the pictures that a class was given here."""
        owners = np.repeat([entry.name for entry in self.entries], [entry.images for entry in self.entries])
        return self.features[owners == name] if len(owners) else self.features

    def plus(self, entry: Enrolment, features: np.ndarray) -> Enrolled:
        """These enrolments and one more."""
        return Enrolled((*self.entries, entry), np.concatenate([self.features, features]))

    def without(self, name: str) -> Enrolled:
        """Without all pictures of a class."""
        kept = [entry.name != name for entry in self.entries]
        rows = np.repeat(kept, [entry.images for entry in self.entries])
        return Enrolled(tuple(e for e in self.entries if e.name != name), self.features[rows])

    def added_to(self, workshop: ClassStatistics) -> ClassStatistics:
        """The statistics of the workshop's images and of these; new classes behind the others."""
        total = workshop
        for name in self.names:
            x = self.of_class(name)
            total = total + ClassStatistics.of(workshop.map, x, np.zeros(len(x), np.int64), (name,))
        return total


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
    _check(base)
    return base


def head_of(base: Bundle) -> str:
    """Kind of the head, a key of CLOSED_FORM."""
    return str(((base.manifest.training or {}).get("config") or {}).get("head"))


def _check(base: Bundle) -> None:
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
            fix="train with --head ranpac; or add the class in the workshop with --extend",
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
            fix="train with --learner frozen; or add the class in the workshop with --extend",
        )


def statistics_of(base: Bundle) -> ClassStatistics:
    """The workshop's class statistics, in the order of the logits. Raises: InputError for others than the graph's."""
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
    """The head that a version answers with."""
    held = _constants(bundle)
    return LinearMap(held["head.weight"].T.astype(np.float64), held["head.bias"].astype(np.float64), 0.0)


def answers(head: LinearMap, map: FeatureMap, x: np.ndarray) -> np.ndarray:
    """Logits float64 (N, C) of features (N, D), as the graph computes them."""
    return np.asarray(map.apply(x) @ head.weight.T + head.bias)


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
    for file in set(manifest.graphs.values()):
        made[file] = relabelled(base.read(file).tobytes(), PROMPTS, constants, where, classes)
    document = json.loads(json.dumps(dict(manifest.document)))
    for name, entry in made.items():
        write_file(folder / name, [entry])
        document["files"][name] = {"sha256": hashlib.sha256(entry).hexdigest(), "bytes": len(entry)}
    for name in manifest.files:
        if name not in made and (base.path / name).is_file():
            link(base.path / name, folder / name)
    _widen(document, count)
    document |= {
        "classes": list(classes),
        "enrolments": [asdict(entry) for entry in enrolled.entries],
        "enrolled_on": manifest.version,
    }
    write_file(folder / MANIFEST, [canonical(sealed(document)).encode("utf-8")])


def _widen(document: dict[str, Any], count: int) -> None:
    """Shapes of logits; the new classes are one more task, of which the workshop has measured nothing."""
    for outputs in (document["outputs"], *(s["outputs"] for s in (document.get("signatures") or {}).values())):
        if "logits" in outputs:
            outputs["logits"][-1] = count
    if count == len(document["classes"]):
        return
    document["tasks"].append(list(range(len(document["classes"]), count)))
    measured = [document.get("accuracy")]
    for scheme in ((document.get("quantisation") or {}).get("flavours") or {}).values():
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
