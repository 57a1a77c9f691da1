"""What an evaluation scores: which images of a source, and whether a training run was measured on the same ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .data import SCORED, Dataset, Fingerprint, check_spelling, held_out_early, load_dataset, measured_before
from .errors import InputError, choose
from .splits import DIGITS, Split


@dataclass(frozen=True)
class Scored:
    """What an evaluation scores."""

    dataset: Dataset
    images: Split
    which: str
    "what they are, in a few words"
    missing: tuple[str, ...]
    "classes of the student without an image"
    classes: int
    "that the student has"
    comparable: bool
    "they are the validation images that its training was measured on: accuracy lost since then is forgetting"
    grown: bool = False
    "held out of the folder that it was trained on, which has other pictures by now"
    enrolled: tuple[str, ...] = ()
    "files of the images that were enrolled on the device: they are no measure of it"

    def limited(self, limit: int, seed: int) -> Scored:
        """The same with at most `limit` images of each class: a sample of them says nothing about forgetting."""
        images = self.images.limited(limit, seed)
        comparable = self.comparable and len(images) == len(self.images)
        there = {str(item) for item in images.items} if self.enrolled else set()
        enrolled = tuple(file for file in self.enrolled if file in there)
        return replace(self, images=images, comparable=comparable, enrolled=enrolled)

    @property
    def lines(self) -> list[str]:
        """For people: what is read, what of it is scored, and which classes are missing."""
        found = [self.dataset.line, f"scored: {self.which}"]
        if self.grown:
            found.append("warning: the pictures have changed since the training: it may have learnt some of these")
        if self.enrolled:
            first = "/".join(Path(self.enrolled[0]).parts[-2:]) + (" ..." if len(self.enrolled) > 1 else "")
            count = f"{len(self.enrolled)} of the {len(self.images)} pictures"
            found.append(f"warning: {count} were enrolled here ({first}): they make the accuracy too good")
        if self.missing:
            names = ", ".join(self.missing[:8]) + (" ..." if len(self.missing) > 8 else "")
            count = f"{len(self.missing)} of the {self.classes}"
            found.append(f"{count} classes have no image here and are not measured: {names}")
        return found


def find_scored(
    source: str,
    split: str,
    training: Mapping[str, Any] | None,
    classes: Sequence[str],
    enrolled: Collection[str] = (),
) -> Scored:
    """The images of a source that a student is scored on.

    Args:
        split: one of SCORED, see Dataset.scored.
        training: metrics.json of the student's run, or "training" of a manifest; None where nobody knows.
        classes: of the student, by name.
        enrolled: digests of the pictures that it has learnt from on the device: DIGITS digits of their SHA-256.

    Raises: InputError where there is nothing to score.
    """
    choose("split", split, SCORED)
    record = (training or {}).get("data")
    dataset = load_dataset(source, learning=False, early=held_out_early(training))
    check_spelling(source, dataset.classes, classes)
    images, which = dataset.scored(split, record)
    there = {dataset.classes[c] for c in set(images.labels.tolist())}
    missing = tuple(c for c in classes if c not in there)
    if len(missing) == len(classes):
        raise InputError(
            f"{source}: none of the {len(classes)} classes that the student has learnt",
            got=", ".join(sorted(there)[:8]) or "no images",
            expected="images of at least one of " + ", ".join(list(classes)[:8]) + (" ..." if len(classes) > 8 else ""),
            fix="evaluate on the data the student was trained on, or rename the class folders",
        )
    measured = Fingerprint.from_json(record["fingerprint"]).val if record and "fingerprint" in record else None
    # PATH/val alone comes as all images. Only so many are looked at: each file is read.
    alone = split == "auto" and dataset.held_out and len(images) <= (record or {}).get("validation", 0)
    comparable, grown = images is dataset.val and not missing, False
    if (images is dataset.val or alone) and measured is not None:
        names = [c for c in classes if c in there]
        own = images.of_classes([dataset.classes.index(c) for c in names]).hashes(dataset.classes)
        comparable = own == measured
        # An added picture moves another one into the fifth that is held out.
        known = measured_before(record or {})
        others = any(h not in known.get(c, {h}) for c, h in own.items())
        grown = others and dataset.held_out and record is not None and dataset.is_of(record)
    learnt = [p for d, paths in images.digests.items() if d[:DIGITS] in enrolled for p in paths] if enrolled else []
    return Scored(
        dataset, images, which, missing, len(classes), comparable and not missing, grown, tuple(sorted(learnt))
    )
