"""A class from a few pictures, on the device: no torch, no image of the other classes, and a way back.

The features of the pictures come from the bundle's own graph, the head is made new from class statistics (heads.py),
and the version with it is proven and swapped in as a pack is: all or nothing, the one before is kept.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..artefacts.bundle import open_bundle
from ..artefacts.manifest import Enrolment
from ..class_statistics import ClassStatistics
from ..errors import InputError
from ..files import writable
from ..folders import named_pictures, reasons
from ..heads import CLOSED_FORM, LinearMap
from ..runtime.loader import load
from ..runtime.selftest import self_test
from .enrolments import MOST, Enrolled, answers, base_of, build, head_of, present_head, statistics_of
from .judgement import (
    check_alike,
    check_count,
    check_duplicates,
    check_losses,
    enough,
    left_out,
    losses,
)
from .packs import REFUSED
from .store import Store, locked, read_store

MAX_DROP = 0.5
"points that the classes that were there may lose"
LONGEST = 200
"characters of a class's name"
CHUNK = 32
"pictures in memory at a time"


def enrol(
    bundle: Path | str,
    name: str,
    images: Sequence[Path | str | bytes | np.ndarray],
    max_drop: float = MAX_DROP,
    backend: str = "auto",
    threads: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Teach a bundle a new class, or give a class that it knows more pictures.

    Args:
        bundle: a folder exported with `statistics`; a plain one becomes a store, see store.py.
        name: of the class. images: files, folders, their bytes, or frames, uint8 RGB (H, W, 3).
        max_drop: points that the classes that were there may lose: of the pictures of the self-test, and of the
            classes that are recognised by the mean of their own statistics.
        backend, threads: of the features and of the self-test. say: gets a line for each step.

    Returns: {"bundle", "name", "new_class", "images", "pictures" (of the class, all together), "classes", "version",
        "previous", "leave_one_out": {"accuracy", "low", "high", "enough", "sentence", "taken_for": {class: pictures}},
        "old_classes": see judgement.losses, "self_test", "seconds": {"features", "head"}}.

    Raises: InputError for a bundle that nothing can be enrolled in, an unreadable picture, too few of them, the same
        one twice, pictures of another class; GateError for a loss above `max_drop` or a self-test that is not passed.
        Nothing has changed then.
    """
    _check_name(name)
    if not max_drop >= 0:
        raise InputError("--max-drop is out of range", got=max_drop, expected="0 or more points")
    sources, skipped = named_pictures(images)
    say(f"{len(sources)} picture(s) of {name!r}, {sum(skipped.values())} left out {reasons(skipped)}".strip())
    with writable(Path(bundle), REFUSED), locked(Path(bundle)) as store:
        base = base_of(store)
        enrolled, kind = Enrolled.of(store.bundle), head_of(base)
        before = enrolled.added_to(statistics_of(base))
        counts = dict(zip(before.classes, before.counts.tolist(), strict=True))
        check_count(name, len(sources), counts.get(name, 0))
        if len(sources) + len(enrolled.features) > MOST:
            raise InputError(
                "too many pictures were enrolled in this bundle",
                got=len(sources) + len(enrolled.features),
                expected=f"{MOST} or fewer",
                fix="add the class in the workshop: cdl-edge train --extend RUN",
            )
        begin = time.perf_counter()
        x, tested_x = _features(store, sources, backend, threads)
        seconds = {"features": time.perf_counter() - begin}
        pictures = [s if isinstance(s, str | Path) else f"picture {i + 1}" for i, s in enumerate(sources)]
        check_duplicates(x, [str(p) for p in pictures], enrolled.of_class(name))
        begin = time.perf_counter()
        total = before + ClassStatistics.of(before.map, x, np.zeros(len(x), np.int64), (name,))
        head = CLOSED_FORM[kind][1](total)
        taken_for = left_out(kind, total, head, before.map.apply(x), name)
        seconds["head"] = time.perf_counter() - begin
        check_alike(name, taken_for)
        old = present_head(store.bundle)
        logits = [answers(h, before.map, tested_x) for h in (old, head)]
        lost = losses(before, old, total, head, logits)
        check_losses(name, lost, max_drop)
        entry = Enrolment(name, len(x), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        say("self-test of the new version")
        swapped = _swap(store, enrolled.plus(entry, x), total, head, logits[1], backend, threads)
    return {
        "bundle": str(bundle),
        "name": name,
        "new_class": name not in counts,
        "images": len(x),
        "pictures": len(x) + counts.get(name, 0),
        "classes": len(total.classes),
        **swapped,
        "leave_one_out": {**enough(taken_for.count(name), len(x)), "taken_for": dict(Counter(taken_for))},
        "old_classes": lost,
        "seconds": seconds,
    }


def remove(bundle: Path | str, name: str, backend: str = "auto", threads: int | None = None) -> dict[str, Any]:
    """Take the pictures of a class that were enrolled here out again; a class that has no others goes with them.

    Without enrolments the workshop's own version runs again.

    Returns: {"bundle", "name", "images", "classes", "version", "previous", "self_test"}.

    Raises: InputError for a class that was not enrolled here, GateError for a self-test that is not passed.
    """
    with writable(Path(bundle), REFUSED), locked(Path(bundle)) as store:
        known = list(dict.fromkeys(entry.name for entry in store.bundle.manifest.enrolments))
        if name not in known:
            raise InputError(
                f"{bundle}: no class {name!r} was enrolled here",
                got=", ".join(known) or "nothing was enrolled",
                expected="one of the names of `cdl-edge enrol list`",
            )
        base = base_of(store)
        enrolled = Enrolled.of(store.bundle)
        images = len(enrolled.of_class(name))
        left = enrolled.without(name)
        if left.entries:
            total = left.added_to(statistics_of(base))
            head = CLOSED_FORM[head_of(base)][1](total)
            _, tested_x = _features(store, [], backend, threads)
            logits = answers(head, total.map, tested_x)
            swapped = _swap(store, left, total, head, logits, backend, threads)
        else:
            store.clean()
            previous, tested = store.state.current, self_test(base, backend, threads)
            store.rollback(base)
            swapped = {"version": base.manifest.version, "previous": previous, "self_test": tested}
        classes = len(base.classes) + len(set(left.names) - set(base.classes))
    return {"bundle": str(bundle), "name": name, "images": images, "classes": classes, **swapped}


def enrolments(bundle: Path | str) -> list[dict[str, Any]]:
    """What was enrolled, in its order: [{"name", "images", "at" (UTC)}]. Raises: InputError for no bundle."""
    opened, _ = read_store(Path(bundle))
    return [vars(entry) for entry in opened.manifest.enrolments]


def _features(
    store: Store, sources: Sequence[Path | str | bytes | np.ndarray], backend: str, threads: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """float32 (n, D) of pictures, and (m, D) of those of the self-test; in fp32, as the statistics are.

    Raises: InputError for a picture that cannot be read.
    """
    opened = store.bundle
    with load(opened, backend, threads, precision="fp32") as runner:
        images, parts = runner.signature.images, []
        for start in range(0, len(sources), CHUNK):
            pixels = np.stack([opened.preprocessing.read(source) for source in sources[start : start + CHUNK]])
            parts.append(runner.compute({images: pixels})["features"])
        tested = runner.compute({images: opened.selftest()[0]})["features"]
    return np.concatenate([np.zeros((0, tested.shape[1]), np.float32), *parts]), tested


def _swap(
    store: Store,
    enrolled: Enrolled,
    total: ClassStatistics,
    head: LinearMap,
    logits: np.ndarray,
    backend: str,
    threads: int | None,
) -> dict[str, Any]:
    """Make, prove and install the version with these enrolments: {"version", "previous", "self_test"}."""
    base, previous = base_of(store), store.state.current
    store.clean()
    with store.stage() as folder:
        build(base, enrolled, total.classes, head, logits, folder)
        proven = open_bundle(folder)
        tested = self_test(proven, backend, threads)
        state = store.install(proven, store.state.sequence, store.state.public_key)
    return {"version": state.current, "previous": previous, "self_test": tested}


def _check_name(name: str) -> None:
    if not name or name != name.strip() or not name.isprintable() or len(name) > LONGEST:
        raise InputError(
            "this cannot be the name of a class",
            got=repr(name)[:LONGEST],
            expected=f"1 to {LONGEST} printable characters, no blank at either end",
        )
