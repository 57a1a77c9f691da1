"""A folder of pictures: which of its files count and why the others do not, and which of its folders are classes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError
from .images import EXTENSIONS

PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
"part of a data set -> names of its folder, in any case"
HIDDEN = frozenset(
    {"@eadir", "#recycle", "$recycle.bin", "__macosx", "desktop.ini", "lost+found", "system volume information"}
    | {"thumbs", "thumbs.db"}
)
"what file managers, recycle bins and indexers leave behind, in small letters; with all that starts with a dot"
EXPECTED = "PATH/train/<class>/* and PATH/val/<class>/*, or PATH/<class>/* to have a fifth held out"

LeftOut = Counter[str]
"reason -> number of files"


def hidden(name: str) -> bool:
    """Whether a file or folder of that name is no part of anybody's pictures."""
    return name.startswith(".") or name.lower() in HIDDEN


def check_name(path: Path | str) -> None:
    """Raises: InputError for a path that is not UTF-8: manifests and tables could not name it."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            "a file or folder name is not UTF-8",
            got=os.fsencode(path),
            expected="names in UTF-8",
            fix="rename it (`convmv -f latin1 -t utf8 -r --notest PATH` renames a whole folder)",
        ) from error


def class_folders(root: Path) -> list[Path]:
    """The visible folders in `root`, sorted."""
    return sorted(p for p in root.iterdir() if p.is_dir() and not hidden(p.name))


def pictures_below(folder: Path, left_out: LeftOut, named: bool = True) -> list[Path]:
    """The pictures in a folder and its subfolders, sorted; every other file is counted in `left_out`.

    named: their names go into tables and hashes. Raises: InputError then for one that is not UTF-8.
    """

    def closed(_: OSError) -> None:
        left_out["in a folder that cannot be opened"] += 1

    found: list[Path] = []
    for place, folders, files in os.walk(folder, onerror=closed):
        for name in [f for f in folders if hidden(f)]:
            folders.remove(name)
            left_out["hidden"] += sum(len(inner) for _, _, inner in os.walk(os.path.join(place, name)))
        left_out["behind a link to a folder"] += sum(os.path.islink(os.path.join(place, f)) for f in folders)
        for name in files:
            path = Path(place, name)
            reason = _reason(path)
            if reason is None:
                if named:
                    check_name(path)
                found.append(path)
            else:
                left_out[reason] += 1
    return sorted(found)


def _reason(path: Path) -> str | None:
    """Why a file is no picture; None for one that may be."""
    if hidden(path.name):
        return "hidden"
    suffix = path.suffix.lower()
    if suffix not in EXTENSIONS:
        return f"of type {suffix}" if suffix else "without a type"
    try:
        return None if path.stat().st_size else "empty"
    except OSError:
        return "behind a broken link"


def leave_out_files(folder: Path, left_out: LeftOut) -> None:
    """Count the files that lie in `folder` itself, where only folders are expected."""
    for path in folder.iterdir():
        if path.is_file():
            left_out["hidden" if hidden(path.name) else "outside the class folders"] += 1
        elif path.is_dir() and hidden(path.name):
            left_out["hidden"] += sum(len(files) for _, _, files in os.walk(path))


def find_parts(root: Path, left_out: LeftOut) -> dict[str, Path]:
    """The folders of the parts "train", "val" and "test"; empty where the class folders lie in `root` itself.

    Without a part for validation, the one for testing takes its place. Pictures beside the parts are counted.

    Raises: InputError where it is not clear which folders are parts and which are classes.
    """
    folders = class_folders(root)
    parts: dict[str, Path] = {}
    for folder in folders:
        part = next((p for p, names in PARTS.items() if folder.name.lower() in names), None)
        if part is not None and part in parts:
            raise InputError(
                f"{root}: two folders of one part",
                got=f"{parts[part].name}/ and {folder.name}/",
                expected=EXPECTED,
                fix="rename or remove one of them",
            )
        if part is not None:
            parts[part] = folder
    divided = {p for p, f in parts.items() if not _has_pictures_itself(f) and any(map(_has_pictures, class_folders(f)))}
    if "train" in divided and "test" in parts and not class_folders(parts["test"]):
        # As competitions hand them out: test pictures whose classes nobody is told.
        unlabelled = parts.pop("test")
        left_out[f"in {unlabelled.name}/ without class folders"] += len(pictures_below(unlabelled, Counter()))
        folders.remove(unlabelled)
    others = [f for f in folders if f not in parts.values() and _has_pictures(f)]
    whole = "train" in divided and bool(divided & {"val", "test"})
    if others and not whole:
        if divided:  # class folders in it, and class folders beside it
            part = parts[min(divided)].name
            raise InputError(
                f"{root}: is {part}/ a part of the data, or a class?",
                got=f"folders of pictures in {part}/, and pictures in {others[0].name}/ beside it",
                expected=EXPECTED,
                fix=f"put the pictures of {part}/ directly into it if it is a class; otherwise name the other parts "
                "train/, val/ or test/",
            )
        return {}
    for folder in others:
        left_out[f"in {folder.name}/ beside the parts"] += len(pictures_below(folder, Counter()))
    if "val" not in parts and "test" in parts:
        parts["val"] = parts.pop("test")
    return parts


def no_class_folder(part: Path) -> InputError:
    """The error for a part of the data that holds pictures alone, or nothing."""
    pictures = len(pictures_below(part, Counter()))
    return InputError(
        f"{part}: no class folder",
        got=f"{pictures} picture(s) directly in it" if pictures else "nothing",
        expected="one folder for each class: by its name this folder is a part of the data",
        fix=f"rename {part.name}/ if it is a class" if pictures else None,
    )


def check_depth(root: Path, classes: list[Path]) -> None:
    """Raises: InputError where no class folder holds a picture itself, and folders in them do: one level too high."""
    if not classes or any(map(_has_pictures_itself, classes)):
        return
    first = next((p for folder in classes for p in _visible(folder)), None)
    if first is None:
        return
    below = root / first.relative_to(root).parts[0]
    other = "" if len(classes) == 1 else ", call the parts train/ and val/, or put all pictures into the class folders"
    raise InputError(
        f"{root}: one level too high: no picture lies directly in one of its {len(classes)} folder(s)",
        got=f"{first.relative_to(root)}",
        expected=EXPECTED,
        fix=f"name the folder that holds the class folders, perhaps folder:{below}{other}",
    )


def _visible(folder: Path) -> Iterator[Path]:
    """The pictures below, one after the other."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not hidden(f))
        yield from (Path(place, f) for f in sorted(files) if _reason(Path(place, f)) is None)


def _has_pictures(folder: Path) -> bool:
    return next(_visible(folder), None) is not None


def _has_pictures_itself(folder: Path) -> bool:
    return any(p.is_file() and _reason(p) is None for p in folder.iterdir())


def one_or_more(given: Any) -> list[Any]:
    """What is given, as a list: one path, the bytes of one file or one frame, (H, W, 3), stands for itself.

    Otherwise "/photos" would be its letters, and the first one names the whole disk.
    """
    if isinstance(given, (str, os.PathLike, bytes)) or (isinstance(given, np.ndarray) and given.ndim == 3):
        return [given]
    return list(given)


def named_pictures(
    sources: Sequence[Path | str | bytes | np.ndarray],
) -> tuple[list[Path | str | bytes | np.ndarray], LeftOut]:
    """The sources (or the one source) as they are, but in place of a folder the pictures below it; and what was left
    out of folders.

    A name that is not UTF-8 stops nothing here: only the terminal shows it. Raises: InputError for a folder without a
    picture.
    """
    left_out: LeftOut = Counter()
    found: list[Path | str | bytes | np.ndarray] = []
    for source in one_or_more(sources):
        if isinstance(source, (bytes, np.ndarray)) or not Path(source).is_dir():
            found.append(source)
            continue
        below = pictures_below(Path(source), left_out, named=False)
        if not below:
            raise InputError(
                f"{source}: no picture in this folder",
                got=reasons(left_out) or "nothing",
                expected=", ".join(sorted(EXTENSIONS)),
            )
        found += below
    return found, +left_out


def reasons(left_out: Mapping[str, int]) -> str:
    """Say for people why files were left out: "(3 hidden, 2 of type .txt)"; empty where none was."""
    parts = [f"{count} {reason}" for reason, count in sorted(left_out.items(), key=lambda e: -e[1]) if count]
    return f"({', '.join(parts)})" if parts else ""
