"""Image sources: `digits`, `folder:PATH`, `cifar100[:PATH]`, `imagenet-r:PATH`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import InputError, choose
from .extras import command
from .images import EXTENSIONS, Preprocessing, UnreadableImage

VAL_SHARE = 0.2
"share of images held out, by a hash of the file name, when a folder has no train/ and val/ of its own"
_GLANCE = Preprocessing(32, 32)
"decodes as little of a file as shows that it is readable"


@dataclass(frozen=True)
class Decoded:
    """Pixels in memory, ready for a backbone."""

    pixels: np.ndarray
    "uint8 (N, S, S, 3)"
    labels: np.ndarray
    "int64 (N,)"
    skipped: tuple[str, ...]
    "one line for each image that could not be read"


@dataclass(frozen=True)
class Split:
    """Images (paths, or uint8 arrays of one shape) with their labels."""

    items: Sequence[Path] | np.ndarray
    "paths, or uint8 (N, H, W, 3)"
    labels: np.ndarray
    "int64 (N,), indices into Dataset.classes"

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray) -> Split:
        """The images at `index` (int64 (K,)), in that order."""
        items = self.items[index] if isinstance(self.items, np.ndarray) else [self.items[int(i)] for i in index]
        return Split(items, self.labels[index])

    def joined(self, *others: Split) -> Split:
        """These images, then those of the others; all are paths, or all are arrays."""
        labels = np.concatenate([s.labels for s in (self, *others)])
        if isinstance(self.items, np.ndarray):
            return Split(np.concatenate([np.asarray(s.items) for s in (self, *others)]), labels)
        return Split([item for s in (self, *others) for item in s.items], labels)

    def of_classes(self, classes: Sequence[int]) -> Split:
        """The images of some classes, in their order here."""
        return self.take(np.flatnonzero(np.isin(self.labels, np.asarray(classes))))

    def limited(self, per_class: int, seed: int) -> Split:
        """At most `per_class` images of each class, drawn by `seed`, in their order here."""
        rng = np.random.default_rng([seed, 0x11317])
        keep = [rng.permutation(np.flatnonzero(self.labels == c))[:per_class] for c in np.unique(self.labels)]
        return self.take(np.sort(np.concatenate(keep)))

    def check_readable(self, classes: Sequence[str]) -> None:
        """Look for one readable image of each class, before hours of work are spent on the classes in front of it.

        classes: names, for the message. Raises: InputError for a class with nothing but unreadable files.
        """
        if isinstance(self.items, np.ndarray):
            return
        for label in np.unique(self.labels).tolist():
            first = None
            for index in np.flatnonzero(self.labels == label):
                try:
                    _GLANCE.read(self.items[int(index)])
                    break
                except UnreadableImage as error:
                    first = first or " ".join(str(error).split())
            else:
                raise InputError(
                    f"class {classes[label]!r} has no readable image",
                    got=first,
                    expected="at least one readable image a class",
                    fix="replace the files or remove the class folder",
                )

    def decode(self, preprocessing: Preprocessing) -> Decoded:
        """Read every image; an unreadable one is named and left out.

        Raises: InputError when a class loses all of its images.
        """

        def one(item: Path | np.ndarray) -> np.ndarray | str:
            try:
                return preprocessing.read(item)
            except UnreadableImage as error:
                return " ".join(str(error).split())

        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            results = list(pool.map(one, self.items, chunksize=64))
        good = [i for i, r in enumerate(results) if not isinstance(r, str)]
        skipped = tuple(r for r in results if isinstance(r, str))
        lost = sorted(set(self.labels.tolist()) - set(self.labels[good].tolist()))
        if lost:
            raise InputError(
                f"no readable image is left of {len(lost)} class(es)",
                # The first file of a lost class: its path says which class it is.
                got=next(str(r) for r, label in zip(results, self.labels, strict=True) if label == lost[0]),
                expected="at least one readable image a class",
                fix="replace the files or remove the class folder",
            )
        size = preprocessing.size
        pixels = np.stack([r for r in results if not isinstance(r, str)]) if good else np.zeros((0, size, size, 3))
        return Decoded(pixels.astype(np.uint8, copy=False), self.labels[good], skipped)


@dataclass(frozen=True)
class Dataset:
    """A named source with a training and a validation split over the same classes."""

    source: str
    classes: tuple[str, ...]
    train: Split
    val: Split

    def fingerprint(self) -> str:
        """sha256 over class names, labels, and the images: their bytes, or names and sizes of their files."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for split in (self.train, self.val):
            digest.update(np.ascontiguousarray(split.labels).tobytes())
            if isinstance(split.items, np.ndarray):
                digest.update(np.ascontiguousarray(split.items).tobytes())
                continue
            for path in split.items:
                digest.update(f"{path.parent.name}/{path.name} {path.stat().st_size}\n".encode())
        return digest.hexdigest()


def load_dataset(source: str, learning: bool = True) -> Dataset:
    """Open a source by its name. Raises: InputError for anything that is not there or not complete.

    learning: every class has training images; otherwise a class may be in val/ alone, to be measured and not learnt.
    """
    kind, _, path = source.partition(":")
    loaders = {"digits": _digits, "folder": _folder, "cifar100": _cifar100, "imagenet-r": _imagenet_r}
    loader = loaders[choose("data source", kind, loaders)]
    if not path and kind in ("folder", "imagenet-r"):
        raise InputError(f"{source}: the path is missing", expected=f"{kind}:PATH")
    dataset = loader(source, Path(path).expanduser() if path else None)
    absent = sorted(set(range(len(dataset.classes))) - set(dataset.train.labels.tolist()))
    if learning and absent:
        first = dataset.classes[absent[0]]
        raise InputError(
            f"{path}: {len(absent)} class(es) of val/ are missing in train/",
            got=", ".join(dataset.classes[c] for c in absent[:5]) + (" ..." if len(absent) > 5 else ""),
            expected="the same class folders in both",
            fix=f"add train/{first} with at least one image, or remove val/{first}",
        )
    return dataset


def _held_out(names: Sequence[str]) -> np.ndarray:
    """bool (N,): about VAL_SHARE of the names, by hash; never none, never all.

    Adding images moves no other one, except where the hash alone would have held out none or all of so few.
    """
    rank = np.array([int.from_bytes(hashlib.sha256(n.encode()).digest()[:6], "big") for n in names], dtype=np.float64)
    rank /= float(1 << 48)
    held = rank < VAL_SHARE
    if len(names) > 1:
        held[np.argmin(rank)] = True
        held[np.argmax(rank)] = False
    return held


def _digits(source: str, path: Path | None) -> Dataset:
    try:
        from sklearn.datasets import load_digits  # the bundled UCI test set: 1,797 scans of 8 x 8, 17 grey levels
    except ImportError as error:
        raise InputError("digits come with scikit-learn", got=str(error), fix=command("train")) from error

    bunch = load_digits()
    grey = (np.asarray(bunch.images) * (255.0 / 16.0)).round().astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=3)
    labels = np.asarray(bunch.target, dtype=np.int64)
    held = _held_out([str(i) for i in range(len(labels))])
    return Dataset(
        source, tuple(str(d) for d in range(10)), Split(images[~held], labels[~held]), Split(images[held], labels[held])
    )


def _class_folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _image_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and not p.name.startswith("."))


def _read_split(root: Path, classes: Sequence[str], there: Collection[str] | None = None) -> Split:
    """there: those of the classes that have a folder; None: all."""
    items: list[Path] = []
    labels: list[int] = []
    empty: list[str] = []
    for index, name in enumerate(classes):
        if there is not None and name not in there:
            continue
        files = _image_files(root / name)
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


def _folder(source: str, path: Path | None) -> Dataset:
    assert path is not None
    if not path.is_dir():
        raise InputError(f"{path}: no such folder", expected="PATH/train/<class>/* and PATH/val/<class>/*")
    if not (path / "train").is_dir() and not (path / "val").is_dir():
        return _unsplit(source, path)
    for part in ("train", "val"):
        if not (path / part).is_dir():
            raise InputError(
                f"{path}: no folder {part}/",
                got=", ".join(sorted(p.name for p in path.iterdir())[:8]),
                expected="PATH/train/<class>/* and PATH/val/<class>/*, or PATH/<class>/* to have a fifth held out",
            )
    names = {part: [p.name for p in _class_folders(path / part)] for part in ("train", "val")}
    missing = sorted(set(names["train"]) - set(names["val"]))
    if missing:
        raise InputError(
            f"{path}: {len(missing)} class(es) of train/ are missing in val/",
            got=", ".join(missing[:5]) + (" ..." if len(missing) > 5 else ""),
            expected="the same class folders in both",
            fix=f"add val/{missing[0]} with at least one image, or remove train/{missing[0]}",
        )
    if not names["train"]:
        raise InputError(f"{path}/train: no class folder", expected="one folder for each class")
    classes = names["val"]
    train = _read_split(path / "train", classes, set(names["train"]))
    return Dataset(source, tuple(classes), train, _read_split(path / "val", classes))


def _unsplit(source: str, path: Path) -> Dataset:
    """PATH/<class>/*: a fifth of each class is held out for validation."""
    classes = [p.name for p in _class_folders(path)]
    if not classes:
        raise InputError(
            f"{path}: no class folder",
            got=f"{len(list(path.iterdir()))} entries, none a folder",
            expected="PATH/train/<class>/* and PATH/val/<class>/*, or PATH/<class>/*",
        )
    everything = _read_split(path, classes)
    assert not isinstance(everything.items, np.ndarray)
    held = np.zeros(len(everything), dtype=bool)
    for c, name in enumerate(classes):
        index = np.flatnonzero(everything.labels == c)
        if len(index) < 2:
            raise InputError(
                f"{path}/{name}: one image only",
                expected="at least two: one to learn, one to hold out",
                fix="add images",
            )
        held[index] = _held_out([str(everything.items[int(i)].relative_to(path)) for i in index])
    return Dataset(
        source, tuple(classes), everything.take(np.flatnonzero(~held)), everything.take(np.flatnonzero(held))
    )


def _imagenet_r(source: str, path: Path | None) -> Dataset:
    assert path is not None
    if not path.is_dir():
        raise InputError(
            f"{path}: ImageNet-R is not there",
            expected="the unpacked imagenet-r.tar (200 folders n0...)",
            fix="download it from its authors' page (github.com/hendrycks/imagenet-r) and name its folder",
        )
    return _folder(source, path)


def _cifar100(source: str, path: Path | None) -> Dataset:
    path = path or Path.home() / ".cache" / "cdl-edge" / "cifar-100-binary"
    for folder in (path, path / "cifar-100-binary"):
        if (folder / "train.bin").is_file() and (folder / "test.bin").is_file():
            return _cifar100_binary(source, folder)
    if (path / "train").is_dir():
        return _folder(source, path)
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
