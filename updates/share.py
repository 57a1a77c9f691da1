"""What a device has learnt, for others: pictures and statistics for the workshop, a pack for the rest of the fleet."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ..artefacts.bundle import Bundle
from ..class_statistics import ClassStatistics, FeatureMap, merged
from ..errors import InputError
from ..files import atomic_folder
from ..folders import hidden
from .enrolments import Enrolled, base_of, build, present_head, statistics_of
from .packs import create
from .store import Store

PACK, STATISTICS, PHOTOS = "enrolments.pack", "statistics.npz", "photos"
"what `export_enrolments` writes"
LONGEST_FOLDER = 255
"bytes of a name, of most filesystems"
HELD_OUT = 5
"every so many-th picture of a class is one for validation"


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


def check_folder(name: str) -> None:
    """Raises: InputError for the name of a class that no folder of pictures can have."""
    too_long = len(name.encode("utf-8")) > LONGEST_FOLDER
    if PurePosixPath(name).name != name or name in ("..",) or hidden(name) or "\\" in name or too_long:
        raise InputError(
            f"class {name!r}: no folder of pictures can have this name",
            expected=f"a name without / and \\ that does not begin with a dot, {LONGEST_FOLDER} bytes at most",
            fix="give the class another one first: cdl-edge enrol rename BUNDLE OLD NEW",
        )


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
