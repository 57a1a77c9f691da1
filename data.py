"""Image sources: `digits`, `folder:PATH`, `cifar100[:PATH]`, `imagenet-r:PATH`."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError, choose
from .extras import command
from .folders import (
    EXPECTED,
    LeftOut,
    check_depth,
    check_name,
    class_folders,
    find_parts,
    leave_out_files,
    no_class_folder,
    pictures_below,
    reasons,
)
from .images import EXTENSIONS
from .splits import DIGITS, Decoded, Split, deeper, joined

__all__ = (
    "Dataset",
    "Decoded",
    "Fingerprint",
    "Split",
    "absolute",
    "check_spelling",
    "held_out_early",
    "load_dataset",
    "measured_before",
)

VAL_SHARE = 0.2
"share of each class's images that is held out, by a hash of the file name, when a folder has no part of its own for it"
SCORED = ("auto", "val", "test", "train", "all")
"what `evaluate --split` takes"


@dataclass(frozen=True)
class Fingerprint:
    """What a student has learnt from and was measured on: class name -> hash of its images, see Split.hashes."""

    train: Mapping[str, str]
    val: Mapping[str, str]
    pictures: tuple[str, ...] = ()
    "of some images of both, see Split.samples: they tell a folder that has grown since from one that is another"

    @cached_property
    def whole(self) -> str:
        """SHA-256 over everything, the order of the classes included."""
        return hashlib.sha256(json.dumps([list(self.train.items()), list(self.val.items())]).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The fingerprint as plain JSON values."""
        some = {"pictures": list(self.pictures)} if self.pictures else {}
        return {"sha256": self.whole, "train": dict(self.train), "val": dict(self.val), **some}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Fingerprint:
        """The inverse of `to_json`; a part that was left away is empty."""
        return cls(document.get("train") or {}, document.get("val") or {}, tuple(document.get("pictures") or ()))

    def changes(self, now: Fingerprint) -> str:
        """How the images of `now` differ from these, in one line; empty where they do not."""
        if now.whole == self.whole:
            return ""
        found = []
        for part, old, new in (("training", self.train, now.train), ("validation", self.val, now.val)):
            for what, names in (
                ("without", [c for c in old if c not in new]),
                ("new", [c for c in new if c not in old]),
                ("other pictures of", [c for c in new if c in old and new[c] != old[c]]),
            ):
                if names:
                    found.append(f"{what} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''} in {part}")
        return "; ".join(found) or "the classes in another order"

    def shares(self, other: Fingerprint) -> bool:
        """Whether a class has the same training or validation images in both."""
        pairs = ((self.train, other.train), (self.val, other.val))
        return any(mine.get(c) == theirs[c] for mine, theirs in pairs for c in theirs)


@dataclass(frozen=True)
class Dataset:
    """A named source with a training and a validation split over the same classes."""

    source: str
    "as it was given"
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split | None = None
    "a part of its own beside the validation images, which only `scored` gives"
    held_out: bool = False
    "the source has no part for validation: images of each class were taken"
    early: bool = False
    "they were taken as early versions did, see load_dataset"
    parts: Mapping[str, str] = field(default_factory=dict)
    '"train", "val", "test" -> what their folders are called; empty where there are none'
    left_out: Mapping[str, int] = field(default_factory=dict)
    "files that are not read: reason -> how many"

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """A fingerprint of class names, file names and file bytes; where the folder lies is of no account."""
        samples = (*self.val.samples, *self.train.samples)
        return Fingerprint(self.train.hashes(self.classes), self.val.hashes(self.classes), samples)

    @property
    def summary(self) -> dict[str, Any]:
        """{"classes", "train", "validation", "left_out": {reason: files}}, and "test" where there is one."""
        counts = {"classes": len(self.classes), "train": len(self.train), "validation": len(self.val)}
        more = {} if self.test is None else {"test": len(self.test)}
        return {**counts, **more, "left_out": dict(self.left_out)}

    @property
    def line(self) -> str:
        """One line for people with what `summary` has."""
        how = ""
        if self.held_out:
            how = " (a fifth of each class, held out)"
        elif (called := self.parts.get("val", "val")) != "val":
            how = f" ({called}/)"
        test = "" if self.test is None else f", {len(self.test)} in {self.parts['test']}/ kept apart"
        counts = f"{len(self.classes)} classes, {len(self.train)} train, {len(self.val)} validation{how}{test}"
        left_out = f"{sum(self.left_out.values())} left out {reasons(self.left_out)}".strip()
        return f"{self.source}: {counts}, {left_out}{deeper((self.train, self.val, self.test), self.classes)}"

    @property
    def record(self) -> dict[str, Any]:
        """What a run's metrics.json keeps: the source as given and as an absolute path, `summary`, fingerprint."""
        where = {"given": self.source, "source": absolute(self.source)}
        early = {"early": True} if self.early else {}
        return {**where, **self.summary, **early, "fingerprint": self.fingerprint.to_json()}

    def scored(self, split: str = "auto", trained: Mapping[str, Any] | None = None) -> tuple[Split, str]:
        """The images that an evaluation scores, and a few words that say which.

        Args:
            split: one of SCORED. auto: the validation images; of class folders without parts all images, unless the
                student was trained on some of them. Of PATH/val alone all images count, too: none was learnt from.
            trained: the "data" record of the student's run; None where nobody knows.

        Raises: InputError for a part that is not there.
        """
        choose("split", split, SCORED)
        if split == "auto":
            own = not self.held_out or trained is None or self.is_of(trained)
            split = "val" if own and not self._held_out_of(trained or {}) else "all"
        if split == "all":
            return joined([s for s in (self.train, self.val, self.test) if s is not None]), "all images"
        if split == "test" and self.test is None and self.parts.get("val", "").lower() not in ("test", "testing"):
            raise InputError(
                f"{self.source}: no part for testing",
                got=", ".join(f"{name}/" for name in self.parts.values()) or "no parts",
                expected="PATH/test/<class>/*",
                fix="give --split val or --split all",
            )
        if split == "test" and self.test is not None:
            return self.test, "test images"
        if split == "train":
            return self.train, "training images"
        return self.val, "validation images" + (", a fifth of each class" if self.held_out else "")

    def is_of(self, trained: Mapping[str, Any]) -> bool:
        """Whether a student of that record, or of a run that its run extends, has learnt from some of these images."""
        if any(self.is_of(run) for run in trained.get("before") or ()):
            return True
        # A bundle keeps no place: two machines may have a folder:photos each, and then only the images tell.
        if "source" in trained and {self.source, absolute(self.source)} & {trained["given"], trained["source"]}:
            return True
        learnt = Fingerprint.from_json(trained["fingerprint"])
        # A class's hash changes with every picture that is added to it. A test set may hold a copy of one picture; of a
        # folder that was learnt from, each class brings those that were named.
        classes = sum(name in learnt.val for name in self.classes)
        return learnt.shares(self.fingerprint) or len(self._known.intersection(learnt.pictures)) >= max(1, classes)

    def _held_out_of(self, trained: Mapping[str, Any]) -> bool:
        """Whether all of these images were held out of a training, and of those that it went on from."""
        if not self.held_out or len(self.train) + len(self.val) > trained.get("validation", 0):
            return False  # most are told by their number: no file of them is read
        mine = joined([self.train, self.val]).hashes(self.classes)
        known = measured_before(trained)
        learnt = {name: digest for name, digest in mine.items() if name in known}
        return bool(learnt) and all(known[name] == {digest} for name, digest in learnt.items())

    @cached_property
    def _known(self) -> set[str]:
        """What Fingerprint.pictures would say of each training and validation image."""
        return {digest[:DIGITS] for part in (self.train, self.val) for digest in part.digests}


def absolute(source: str) -> str:
    """The source with its path from the root of the file system, so that it means the same from everywhere."""
    kind, colon, path = source.partition(":")
    return f"{kind}:{os.path.abspath(os.path.expanduser(path))}" if path else kind + colon


def check_spelling(source: str, classes: Sequence[str], known: Sequence[str]) -> None:
    """Raises: InputError for a class that reads like one of `known` and is written with other characters.

    An accent may be a character of its own, or not: a folder that went through a Mac may have the other spelling.
    """
    spelt = {unicodedata.normalize("NFC", name): name for name in known}
    for name in classes:
        other = spelt.get(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise InputError(
                f"{source}: the class folder {name!r} reads like the class {other!r}, but has other characters",
                got=ascii(name),
                expected=ascii(other),
                fix="rename the folder: an accent is a character of its own in one of the two",
            )


def measured_before(record: Mapping[str, Any]) -> dict[str, set[str]]:
    """Class -> the hashes of what was held out of it, in the run of a "data" record and in those that it extends."""
    found: dict[str, set[str]] = {}
    for run in (record, *(record.get("before") or ())):
        for name, digest in Fingerprint.from_json(run.get("fingerprint") or {}).val.items():
            found.setdefault(name, set()).add(digest)
    return found


def held_out_early(training: Mapping[str, Any] | None) -> bool:
    """Whether a run is of a version that held images out differently. training: its metrics.json, or a manifest's."""
    return bool(training) and bool(((training or {}).get("data") or {"early": True}).get("early"))


def load_dataset(source: str, learning: bool = True, early: bool = False) -> Dataset:
    """Open a source by its name. Raises: InputError for anything that is not there or not complete.

    Args:
        learning: every class has training and validation images; otherwise a class may have either.
        early: hold images out as versions did that kept no "data" in metrics.json, for their runs: held_out_early.
    """
    kind, _, path = source.partition(":")
    loaders = {"digits": _digits, "folder": _folder, "cifar100": _cifar100, "imagenet-r": _imagenet_r}
    check_name(source)
    if source and kind not in loaders and Path(source).expanduser().is_dir():
        raise InputError(
            "unknown data source",
            got=repr(source),
            expected="one of " + ", ".join(sorted(loaders)),
            fix=f"for the folder of that name give folder:{source}",
        )
    loader = loaders[choose("data source", kind, loaders)]
    if not path and kind in ("folder", "imagenet-r"):
        raise InputError(f"{source}: the path is missing", expected=f"{kind}:PATH")
    try:
        dataset = loader(source, Path(path).expanduser() if path else None, early)
    except OSError as error:
        raise InputError(
            f"{error.filename or path}: cannot be read", got=error.strerror or str(error), fix="mend its permissions"
        ) from error
    check_spelling(source, dataset.classes, dataset.classes)
    if learning:
        _check_complete(dataset, path)
    return dataset


def _check_complete(dataset: Dataset, path: str) -> None:
    """Raises: InputError where a class has no training or no validation images."""
    if dataset.held_out:
        lonely = [c for c in range(len(dataset.classes)) if c not in set(dataset.val.labels.tolist())]
        if lonely:
            raise InputError(
                f"{path}/{dataset.classes[lonely[0]]}: one image only",
                got=f"{len(lonely)} class(es) of one image",
                expected="at least two: one to learn, one to hold out",
                fix="add images",
            )
    train, val = (dataset.parts.get(part, part) for part in ("train", "val"))
    both = set(dataset.train.labels.tolist()) | set(dataset.val.labels.tolist())
    for split, here, there in ((dataset.val, val, train), (dataset.train, train, val)):
        absent = sorted(set(range(len(dataset.classes))) - set(split.labels.tolist()))
        if len(absent) == len(dataset.classes):
            raise InputError(
                f"{path}: no folder {here}/",
                got=", ".join(f"{name}/" for name in dataset.parts.values()),
                expected=EXPECTED,
            )
        if absent and absent[0] not in both:
            there = dataset.parts.get("test", "test")
        if absent:
            first = dataset.classes[absent[0]]
            raise InputError(
                f"{path}: {len(absent)} class(es) of {there}/ are missing in {here}/",
                got=", ".join(dataset.classes[c] for c in absent[:5]) + (" ..." if len(absent) > 5 else ""),
                expected="the same class folders in both",
                fix=f"add {here}/{first} with at least one image, or remove {there}/{first}",
            )


def _ranks(names: Sequence[str]) -> np.ndarray:
    """float64 (N,): a number from 0 to 1 for each name, by hash: the same everywhere and for ever."""
    rank = np.array([int.from_bytes(hashlib.sha256(n.encode()).digest()[:6], "big") for n in names], dtype=np.float64)
    return rank / float(1 << 48)


def _a_fifth(names: Sequence[str]) -> np.ndarray:
    """bool (N,): VAL_SHARE of the names, one at least and never all: those that rank first.

    An image that is added moves at most one other.
    """
    held = np.zeros(len(names), dtype=bool)
    held[np.argsort(_ranks(names), kind="stable")[: min(len(names) - 1, max(1, round(VAL_SHARE * len(names))))]] = True
    return held


def _about_a_fifth(names: Sequence[str]) -> np.ndarray:
    """bool (N,): the names that rank below VAL_SHARE; never none, never all. Adding an image moves no other."""
    rank = _ranks(names)
    held = rank < VAL_SHARE
    if len(names) > 1:
        held[np.argmin(rank)] = True
        held[np.argmax(rank)] = False
    return held


def _digits(source: str, path: Path | None, early: bool) -> Dataset:
    try:
        from sklearn.datasets import load_digits  # the bundled UCI test set: 1,797 scans of 8 x 8, 17 grey levels
    except ImportError as error:
        raise InputError("digits come with scikit-learn", got=str(error), fix=command("train")) from error

    bunch = load_digits()
    grey = (np.asarray(bunch.images) * (255.0 / 16.0)).round().astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=3)
    labels = np.asarray(bunch.target, dtype=np.int64)
    held = _about_a_fifth([str(i) for i in range(len(labels))])
    return Dataset(
        source, tuple(str(d) for d in range(10)), Split(images[~held], labels[~held]), Split(images[held], labels[held])
    )


def _read_split(root: Path, classes: Sequence[str], there: Collection[str], left_out: LeftOut) -> Split:
    """The pictures in root/<class>. there: those of the classes that have a folder."""
    items: list[Path] = []
    labels: list[int] = []
    empty: list[str] = []
    for index, name in enumerate(classes):
        if name not in there:
            continue
        files = pictures_below(root / name, left_out)
        if not files:
            empty.append(name)
        items += files
        labels += [index] * len(files)
    if empty:
        raise InputError(
            f"{root}: {len(empty)} class folder(s) without an image",
            got=", ".join(empty[:5]) + (" ..." if len(empty) > 5 else ""),
            expected=f"at least one of {', '.join(sorted(EXTENSIONS))} in each",
            fix="add images or remove the folder",
        )
    return Split(items, np.asarray(labels, dtype=np.int64))


def _folder(source: str, path: Path | None, early: bool) -> Dataset:
    assert path is not None
    if not path.is_dir():
        raise InputError(f"{path}: no such folder", expected=EXPECTED)
    left_out: LeftOut = Counter()
    parts = find_parts(path, left_out)
    leave_out_files(path, left_out)
    if not parts or list(parts) == ["train"]:
        return _unsplit(source, parts.get("train", path), left_out, early)
    names: dict[str, set[str]] = {}
    for part, folder in parts.items():
        folders = class_folders(folder)
        if not folders:
            raise no_class_folder(folder)
        check_depth(folder, folders)
        leave_out_files(folder, left_out)
        names[part] = {f.name for f in folders}
    classes = sorted(set().union(*names.values()))
    for name in classes:
        check_name(name)
    read = {part: _read_split(folder, classes, names[part], left_out) for part, folder in parts.items()}
    empty = Split([], np.zeros(0, dtype=np.int64))
    return Dataset(
        source,
        tuple(classes),
        read.get("train", empty),
        read["val"],
        read.get("test"),
        parts={part: folder.name for part, folder in parts.items()},
        left_out=dict(+left_out),
    )


def _unsplit(source: str, path: Path, left_out: LeftOut, early: bool) -> Dataset:
    """PATH/<class>/*: a fifth of each class is held out for validation."""
    folders = class_folders(path)
    if not folders:
        entries = list(path.iterdir())
        itself = any(p.suffix.lower() in EXTENSIONS for p in entries)
        raise InputError(
            f"{path}: no class folder",
            got=f"{len(entries)} entries, none a folder",
            expected=EXPECTED,
            fix=f"name the folder that holds the class folders, perhaps folder:{path.parent}" if itself else None,
        )
    check_depth(path, folders)
    classes = [f.name for f in folders]
    for name in classes:
        check_name(name)
    everything = _read_split(path, classes, classes, left_out)
    assert not isinstance(everything.items, np.ndarray)
    held = np.zeros(len(everything), dtype=bool)
    hold_out = _about_a_fifth if early else _a_fifth
    for c in range(len(classes)):
        index = np.flatnonzero(everything.labels == c)
        if len(index) > 1:
            held[index] = hold_out([str(everything.items[int(i)].relative_to(path)) for i in index])
    train, val = (everything.take(np.flatnonzero(chosen)) for chosen in (~held, held))
    return Dataset(source, tuple(classes), train, val, held_out=True, early=early, left_out=dict(+left_out))


def _imagenet_r(source: str, path: Path | None, early: bool) -> Dataset:
    assert path is not None
    if not path.is_dir():
        raise InputError(
            f"{path}: ImageNet-R is not there",
            expected="the unpacked imagenet-r.tar (200 folders n0...)",
            fix="download it from its authors' page (github.com/hendrycks/imagenet-r) and name its folder",
        )
    return _folder(source, path, early)


def _cifar100(source: str, path: Path | None, early: bool) -> Dataset:
    path = path or Path.home() / ".cache" / "cdl-edge" / "cifar-100-binary"
    for folder in (path, path / "cifar-100-binary"):
        if (folder / "train.bin").is_file() and (folder / "test.bin").is_file():
            return _cifar100_binary(source, folder)
    if (path / "train").is_dir():
        return _folder(source, path, early)
    raise InputError(
        f"{path}: CIFAR-100 is not there",
        expected="train.bin, test.bin, fine_label_names.txt (the binary version), or train/<class>/, val/<class>/",
        fix="download cifar-100-binary.tar.gz from cs.toronto.edu/~kriz/cifar.html and unpack it there "
        "(the Python version is pickled, and pickles are not read)",
    )


def _cifar100_binary(source: str, folder: Path) -> Dataset:
    """Records of <coarse byte><fine byte><3072 pixel bytes, planes R G B of 32 x 32>."""

    def read(name: str) -> Split:
        raw = np.fromfile(folder / name, dtype=np.uint8)
        if raw.size == 0 or raw.size % 3074:
            raise InputError(
                f"{folder / name}: truncated",
                got=f"{raw.size} bytes",
                expected="a multiple of 3074",
                fix="download it again",
            )
        records = raw.reshape(-1, 3074)
        images = records[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return Split(np.ascontiguousarray(images), records[:, 1].astype(np.int64))

    names_file = folder / "fine_label_names.txt"
    names = names_file.read_text().split() if names_file.is_file() else [f"class{i:02d}" for i in range(100)]
    train, val = read("train.bin"), read("test.bin")
    for name, split in (("train.bin", train), ("test.bin", val)):
        if int(split.labels.max()) >= len(names):
            raise InputError(
                f"{folder / name}: a label without a class name",
                got=f"label {int(split.labels.max())}",
                expected=f"0 to {len(names) - 1}",
                fix="download it again",
            )
        absent = len(names) - len(np.unique(split.labels))
        if absent:
            raise InputError(
                f"{folder / name}: {absent} of {len(names)} classes have no image", fix="download it again"
            )
    return Dataset(source, tuple(names), train, val)
