"""A class from a few pictures, on the device: no torch, no image of the other classes, and a way back.

The features of the pictures come from the bundle's own graph, the head is made new from class statistics (heads.py),
and the version with it is proven and swapped in as a pack is: all or nothing, the one before is kept.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..artefacts.bundle import Bundle, open_bundle
from ..artefacts.manifest import Enrolment
from ..class_statistics import ClassStatistics, FeatureMap, merged
from ..errors import InputError, command_line
from ..files import atomic_folder, writable
from ..folders import named_pictures, reasons
from ..heads import LinearMap
from ..log import LOG
from ..runtime.selftest import self_test
from .enrolment_checks import (
    FEWEST,
    check_alike,
    check_count,
    check_duplicates,
    check_losses,
    enough,
    left_out,
    losses,
)
from .enrolment_record import MOST, Enrolled, Source, check_folder, check_name, digest, kept_pictures, known_as
from .enrolment_version import (
    answers,
    base_of,
    build,
    check_base,
    features_of,
    head_of,
    made,
    present_head,
    statistics_of,
)
from .packs import REFUSED, create
from .store import Store, locked, read_store

MAX_DROP = 0.5
"points that the classes that were there may lose"
PACK, STATISTICS, PHOTOS = "enrolments.pack", "statistics.npz", "photos"
"what `export_enrolments` writes"
HELD_OUT = 5
"every so many-th picture of a class is one for validation"


def enrol(
    bundle: Path | str,
    name: str,
    images: Sequence[Source],
    max_drop: float = MAX_DROP,
    backend: str = "auto",
    threads: int | None = None,
    keep_pictures: bool = False,
    anyway: bool = False,
) -> dict[str, Any]:
    """Teach a bundle a new class, or give a class that it knows more pictures.

    Args:
        bundle: a folder exported with `statistics`; a plain one becomes a store, see store.py.
        name: of the class. images: files, folders, their bytes, or frames, uint8 RGB (H, W, 3).
        max_drop: points that the classes that were there may lose: of the pictures of the self-test, and of the
            classes that are recognised by the mean of their own statistics.
        backend, threads: of the features and of the self-test.
        keep_pictures: keep the pictures themselves in the bundle, for `export_enrolments`.
        anyway: learn it even from fewer than FEWEST pictures, or from such as look like another class.

    Returns: what `judge` returns, and {"version", "previous", "self_test"}.

    Raises: InputError for a bundle that nothing can be enrolled in, an unreadable picture, too few of them, the same
        one twice, pictures of another class; GateError for a loss above `max_drop` or a self-test that is not passed.
        Nothing has changed then.
    """
    if not max_drop >= 0:
        raise InputError("--max-drop is out of range", got=max_drop, expected="0 or more points")
    begin = time.perf_counter()
    with writable(Path(bundle), REFUSED), locked(Path(bundle)) as store:
        learnt = _learn(store, name, images, backend, threads, anyway)
        check_losses(name, learnt.found["old_classes"], max_drop)
        after = learnt.enrolled
        files = kept_pictures(learnt.sources, after.files.values()) if keep_pictures else {}
        entry = replace(after.entries[-1], pictures=tuple(files), digests=tuple(map(digest, learnt.sources)))
        after = replace(after, entries=(*after.entries[:-1], entry), files={**after.files, **files})
        LOG.info("self-test of the new version")
        swapped = swap(store, after, learnt.total.classes, learnt.head, learnt.selftest, backend, threads)
    passes = learnt.found["seconds"]["features"] + swapped.pop("seconds")
    seconds = {**learnt.found["seconds"], "other": time.perf_counter() - begin - passes}
    return {**learnt.found, **swapped, "kept": len(files), "seconds": seconds}


def judge(
    bundle: Path | str,
    name: str,
    images: Sequence[Source],
    backend: str = "auto",
    threads: int | None = None,
) -> dict[str, Any]:
    """What `enrol` would answer; nothing changes. Raises: InputError as `enrol` does, but for losses.

    Returns: {"bundle", "name", "new_class", "images", "pictures" (of the class, all together), "classes",
        "leave_one_out": {"accuracy", "low", "high", "enough", "sentence", "taken_for": {class: pictures}},
        "old_classes": see enrolment_checks.losses, "seconds": {"features": with the start of the engine, "head"}};
        and by themselves "class" (as "name"), "leave_one_out_accuracy", "enough", "old_classes_drop" (the larger of
        both drops, in points), "data": {"images", "left_out": {reason: files}}.
    """
    return _learn(Store(Path(bundle)), name, images, backend, threads, False).found


@dataclass(frozen=True)
class _Learnt:
    """A version that could be made."""

    found: dict[str, Any]
    "the answers"
    sources: Sequence[Source]
    enrolled: Enrolled
    "these pictures are the last entry"
    total: ClassStatistics
    head: LinearMap
    selftest: np.ndarray
    "logits on the pictures of the self-test"


def _learn(
    store: Store,
    name: str,
    images: Sequence[Source],
    backend: str,
    threads: int | None,
    anyway: bool,
) -> _Learnt:
    """Compute the head with a class, and judge it. Raises: see `enrol`."""
    check_name(name)
    name = known_as(name, store.bundle.classes)
    sources, skipped = named_pictures(images)
    for source in sources:  # before they are counted: one wrong path is not "too few pictures"
        if isinstance(source, (str, Path)) and not Path(source).exists():
            raise InputError(f"{source}: no such file", fix="check the path")
    LOG.info(f"{len(sources)} picture(s) of {name!r}, {sum(skipped.values())} left out {reasons(skipped)}".strip())
    base = base_of(store)
    enrolled, kind = Enrolled.of(store.bundle), head_of(base)
    workshop = statistics_of(base)
    before = enrolled.added_to(workshop)
    counts = dict(zip(before.classes, before.counts.tolist(), strict=True))
    held = counts.get(name, 0)
    check_count(name, len(sources), held, 1 if anyway else FEWEST)
    if len(sources) + len(enrolled.features) > MOST:
        raise InputError(
            "too many pictures were enrolled in this bundle",
            got=len(sources) + len(enrolled.features),
            expected=f"{MOST} or fewer",
            fix="add the class where the run is: cdl-edge train --extend RUN",
        )
    begin = time.perf_counter()
    x, tested = features_of(store.bundle, sources, backend, threads)
    seconds = {"features": time.perf_counter() - begin}
    begin = time.perf_counter()
    pictures = [s if isinstance(s, str | Path) else f"picture {i + 1}" for i, s in enumerate(sources)]
    check_duplicates(x, [str(p) for p in pictures], enrolled.of_class(name))
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    after = enrolled.plus(Enrolment(name, len(x), at), x)
    total, head, leverages, target = made(base, workshop, after, name)
    h = before.map.apply(x)
    taken_for = left_out(kind, total, head, h, name, leverages[-len(x) :], target)
    if not anyway:
        check_alike(name, taken_for)
    old = present_head(store.bundle)
    logits = [answers(h, before.map, tested) for h in (old, head)]
    lost = losses(before, old, total, head, logits)
    seconds["head"] = time.perf_counter() - begin
    alone = enough(taken_for.count(name), len(x))
    found = {
        "bundle": str(store.path),
        "name": name,
        "new_class": name not in counts,
        "images": len(x),
        "pictures": len(x) + held,
        "classes": len(total.classes),
        "leave_one_out": {**alone, "taken_for": dict(Counter(taken_for))},
        "old_classes": lost,
        "class": name,
        "leave_one_out_accuracy": alone["accuracy"],
        "old_classes_drop": max(part["drop"] for part in lost.values()),
        "enough": alone["enough"],
        "data": {"images": len(sources), "left_out": dict(skipped)},
        "seconds": seconds,
    }
    return _Learnt(found, sources, after, total, head, logits[1])


def remove(bundle: Path | str, name: str, backend: str = "auto", threads: int | None = None) -> dict[str, Any]:
    """Take the pictures of a class that were enrolled here out again; a class that has no others goes with them.

    Without enrolments the workshop's own version runs again.

    Returns: {"bundle", "name", "images", "classes", "version", "previous", "self_test"}.

    Raises: InputError for a class that was not enrolled here, GateError for a self-test that is not passed.
    """
    with writable(Path(bundle), REFUSED), locked(Path(bundle)) as store:
        name = known_as(name, store.bundle.classes)
        enrolled = _known(store, name)
        base, images = base_of(store), len(enrolled.of_class(name))
        left = enrolled.without(name)
        if left.entries:
            total, head, *_ = made(base, statistics_of(base), left)
            _, tested = features_of(store.bundle, [], backend, threads)
            logits = answers(head, total.map, tested)
            swapped = swap(store, left, total.classes, head, logits, backend, threads)
            del swapped["seconds"]
        else:
            store.clean()
            previous, tested_now = store.state.current, self_test(base, backend, threads)
            store.rollback(base, newest=True)
            swapped = {"version": base.manifest.version, "previous": previous, "self_test": tested_now}
        classes = len(base.classes) + len(set(left.names) - set(base.classes))
    return {"bundle": str(bundle), "name": name, "images": images, "classes": classes, **swapped}


def rename(bundle: Path | str, old: str, new: str, backend: str = "auto", threads: int | None = None) -> dict[str, Any]:
    """Give a class that was enrolled here another name; what it has learnt stays.

    Returns: {"bundle", "name", "before", "images", "version", "previous", "self_test"}.

    Raises: InputError for a class that was not enrolled here or that the workshop named, and for a name that another
        class has; GateError for a self-test that is not passed.
    """
    check_name(new)
    with writable(Path(bundle), REFUSED), locked(Path(bundle)) as store:
        old, new = (known_as(name, store.bundle.classes) for name in (old, new))
        enrolled, base = _known(store, old), base_of(store)
        remove = command_line("enrol", "remove", bundle, old)
        if old in base.classes:
            raise InputError(
                f"{bundle}: the class {old!r} was named in training; only its pictures from here could go",
                got=f"{len(enrolled.of_class(old))} picture(s) that were enrolled as {old!r}",
                expected="a class that was enrolled here",
                fix=f"{remove}, then enrol them under the other name",
            )
        if new in store.bundle.classes:
            raise InputError(
                f"{bundle}: there is a class {new!r} already",
                expected="a new name",
                fix=f"to give it these pictures too: {remove}, then enrol them as {new!r}",
            )
        classes = tuple(new if c == old else c for c in store.bundle.classes)
        logits = store.bundle.selftest()[1]
        head, images = present_head(store.bundle), len(enrolled.of_class(old))
        swapped = swap(store, enrolled.renamed(old, new), classes, head, logits, backend, threads)
        del swapped["seconds"]
    return {"bundle": str(bundle), "name": new, "before": old, "images": images, **swapped}


def enrolments(bundle: Path | str) -> list[dict[str, Any]]:
    """What was enrolled, in its order. Raises: InputError for no bundle.

    Returns: [{"name", "images", "at" (UTC), "kept": how many of the pictures are kept in the bundle}].
    """
    opened, _ = read_store(Path(bundle))
    entries = opened.manifest.enrolments
    return [{"name": e.name, "images": e.images, "at": e.at, "kept": len(e.pictures)} for e in entries]


def obstacle(bundle: Bundle) -> str | None:
    """Why nothing can be enrolled in a bundle, in one line; None: a class can."""
    if bundle.manifest.enrolled_on is not None:
        return None
    try:
        check_base(bundle)
    except InputError as error:
        return str(error).splitlines()[0].removeprefix(f"{bundle.path}: ")
    return None


def swap(
    store: Store,
    enrolled: Enrolled,
    classes: tuple[str, ...],
    head: LinearMap,
    logits: np.ndarray,
    backend: str,
    threads: int | None,
) -> dict[str, Any]:
    """Make, prove and install the version with these enrolments.

    Returns: {"version", "previous", "self_test", "seconds": of the self-test}.
    """
    base, previous = base_of(store), store.state.current
    store.clean()
    with store.stage() as folder:
        build(base, enrolled, classes, head, logits, folder)
        proven = open_bundle(folder)
        begin = time.perf_counter()
        tested = self_test(proven, backend, threads)
        seconds = time.perf_counter() - begin
        state = store.install(proven, store.state.sequence, store.state.keys)
    return {"version": state.current, "previous": previous, "self_test": tested, "seconds": seconds}


def _known(store: Store, name: str) -> Enrolled:
    """What was enrolled. Raises: InputError where `name` is not among it."""
    enrolled = Enrolled.of(store.bundle)
    if name not in enrolled.names:
        raise InputError(
            f"{store.path}: no class {name!r} was enrolled here",
            got=", ".join(enrolled.names) or "nothing was enrolled",
            expected="one of the names of `cdl-edge enrol list`",
        )
    return enrolled


def export_enrolments(
    bundle: Path | str, out: Path | str, key: Path | str | None = None, sequence: int | None = None
) -> dict[str, Any]:
    """Write what was enrolled in a bundle into a new folder.

    It holds `enrolments.pack`, which teaches the same to every device that runs the version on which the classes were
    enrolled; `statistics.npz`, class statistics of the enrolled pictures alone; and, of the pictures that were kept,
    `photos/train/<class>/*` and `photos/val/<class>/*`, as `train` reads them. The pack holds the features of the
    pictures, never the pictures.

    Args:
        out: a new or empty folder. key, sequence: of the pack, see packs.create.

    Returns: {"bundle", "out", "classes": {name: {"images", "kept"}}, "photos": number of files, "pack": see
        packs.create}.

    Raises: InputError for a bundle in which nothing was enrolled, a class whose name no folder can have, an `out` that
        is there already, and what packs.create refuses.
    """
    store = Store(Path(bundle))
    enrolled = Enrolled.of(store.bundle)
    if not enrolled.entries:
        raise InputError(
            f"{bundle}: nothing was enrolled here",
            expected="a bundle that has learnt a class on the device",
            fix="cdl-edge enrol BUNDLE NAME IMAGE...",
        )
    pictures = {name: _pictures(enrolled, name) for name in enrolled.names}
    for name in pictures:
        check_folder(name)
    base, out = base_of(store), Path(out)
    photos = 0
    with atomic_folder(out) as folder:
        _statistics(enrolled, statistics_of(base).map).save(folder / STATISTICS)
        for name, files in pictures.items():
            photos += _copy(files, folder / PHOTOS, name)
        pack = _pack(store.bundle, base, enrolled, folder / PACK, key, sequence)
    counts = {name: {"images": len(enrolled.of_class(name)), "kept": len(files)} for name, files in pictures.items()}
    shown = {**pack, "pack": str(out / PACK)}
    return {"bundle": str(bundle), "out": str(out), "classes": counts, "photos": photos, "pack": shown}


def _pictures(enrolled: Enrolled, name: str) -> list[Path]:
    """Those that were kept of a class, in their order."""
    names = [picture for entry in enrolled.entries if entry.name == name for picture in entry.pictures]
    return [Path(file) for picture in names if isinstance(file := enrolled.files[picture], Path)]


def _statistics(enrolled: Enrolled, map: FeatureMap) -> ClassStatistics:
    """Of the enrolled pictures alone."""
    found = {name: enrolled.of_class(name) for name in enrolled.names}
    return merged(ClassStatistics.of(map, x, np.zeros(len(x), np.int64), (name,)) for name, x in found.items())


def _copy(files: Sequence[Path], folder: Path, name: str) -> int:
    """Into folder/train/name and folder/val/name; returns how many."""
    for i, file in enumerate(files):
        held_out = i % HELD_OUT == HELD_OUT - 1 or (len(files) < HELD_OUT and i == len(files) - 1 and i > 0)
        target = folder / ("val" if held_out else "train") / name / f"{i:04d}{file.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return len(files)


def _pack(
    running: Bundle, base: Bundle, enrolled: Enrolled, out: Path, key: Path | str | None, sequence: int | None
) -> dict[str, Any]:
    """From the workshop's version to the one that runs here, without the pictures."""
    with tempfile.TemporaryDirectory(prefix="cdl-edge-pack-") as folder:
        made = Path(folder) / "bundle"
        made.mkdir()
        build(base, enrolled.bare(), running.classes, present_head(running), running.selftest()[1], made)
        return create(base.path, made, out, key, sequence)
