"""The bundle: a folder with a manifest, ONNX graphs and their constants, every byte of it under a SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from ..arrays import ArraySpec, read_npz
from ..errors import InputError
from ..files import atomic_folder, check_out, sha256
from ..images import Preprocessing
from .layout import BUNDLE_SCHEMA, MANIFEST
from .manifest import (
    AGAIN,
    FileRecord,
    Manifest,
    canonical,
    check_names,
    is_count,
    manifest_field,
    read_manifest,
    sealed,
)

CURRENT, VERSIONS, STATE = "current", "versions", "store.json"
"of a store of bundles (see store.py): the link to the version that runs, the folder of all of them, what it knows"
SELFTEST_IMAGES = 64
"at most; export takes a few"


Shape = tuple[Any, ...]
"sizes; the first axis is the batch, None when it is free"


@dataclass(frozen=True)
class Signature:
    """What a graph takes and gives."""

    images: str
    "the input that takes pictures, uint8 (B, S, S, 3); all other values are float32"
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle whose manifest has been checked; see `open_bundle`."""

    path: Path
    "the folder"
    manifest: Manifest
    "manifest.json"
    _contents: WeakValueDictionary[str, np.ndarray] = field(
        default_factory=WeakValueDictionary, repr=False, compare=False
    )
    "what `read` has given and somebody still holds: several graphs share one copy of their constants"

    @property
    def name(self) -> str:
        """The bundle's own name, its folder's name when it has none."""
        return str(self.manifest.name or self.path.resolve().name)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        return self.manifest.classes

    @property
    def tasks(self) -> tuple[tuple[int, ...], ...]:
        """The indices of each task's classes, tasks in learned order."""
        return self.manifest.tasks

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """How a picture becomes the graph's uint8 input."""
        return Preprocessing.from_json(dict(self.manifest.input.preprocessing))

    @property
    def batch(self) -> int | None:
        """Images in one call of the graph; None when any number goes."""
        return None if self.manifest.input.dynamic_batch else self.manifest.input.shape[0]

    @property
    def two_pass(self) -> bool:
        """Whether a query pass selects the prompts of the second one."""
        return self.manifest.query == "two-pass"

    @property
    def selection(self) -> dict[str, Any]:
        """How `runtime.select` reads prompt_weights: {"kind", "k", "blocks"}."""
        return dict(self.manifest.selection)

    @property
    def size_bytes(self) -> int:
        """Bytes of all listed files, the manifest left out."""
        return sum(entry.bytes for entry in self.manifest.files.values())

    def signature(self, name: str = "student") -> Signature:
        """Inputs and outputs of one of the graphs."""
        fields = self.manifest.input
        default = {"inputs": {fields.name: fields.shape}, "outputs": self.manifest.outputs}
        found = self.manifest.signatures.get(name, default)
        inputs, outputs = (
            {n: (self.batch, *shape[1:]) for n, shape in found[k].items()} for k in ("inputs", "outputs")
        )
        return Signature(fields.name, inputs, outputs)

    def read(self, name: str) -> np.ndarray:
        """Content of a listed file, uint8 (bytes,), read only, compared with its hash after it was read.

        What is computed from it is computed from what was hashed, whatever happens to the file meanwhile.

        Raises: InputError for a name that is not listed, a file that is not there, or that has changed.
        """
        entry = self.manifest.files.get(name)
        if entry is None:
            raise InputError(
                f"{self.path}: {name!r} is under no hash",
                expected="one of " + ", ".join(self.manifest.files),
                fix="do not use this bundle; export it again",
            )
        content = self._contents.get(name)
        if content is None:
            try:
                with open(self.path / name, "rb") as stream:
                    size = os.fstat(stream.fileno()).st_size
                    # No larger than listed: the file may be growing.
                    content = np.fromfile(stream, np.uint8, min(size, entry.bytes + 1))
            except OSError as error:
                raise InputError(f"{self.path / name}: cannot be read", got=error.strerror, fix=AGAIN) from error
            _check_content(self.path / name, entry, len(content), hashlib.sha256(content.data).hexdigest())
            content.flags.writeable = False
            self._contents[name] = content
        return content

    def selftest(self) -> tuple[np.ndarray, np.ndarray]:
        """Real images uint8 (n, S, S, 3) and what the student says about them in fp32, (n, C).

        Raises: InputError for a bundle without them, or with others than it says.
        """
        name = self.manifest.selftest
        if not name:
            raise InputError(
                f"{self.path}: no self-test in this bundle",
                expected="selftest.npz: what nobody compared is not used",
                fix="export the bundle again: cdl-edge export RUN --out BUNDLE",
            )
        size, classes = self.preprocessing.size, len(self.classes)
        wanted = {
            "images": ArraySpec("uint8", (SELFTEST_IMAGES, size, size, 3)),
            "logits": ArraySpec("float32", (SELFTEST_IMAGES, classes)),
        }
        try:
            stored = read_npz(self.read(name), wanted)
        except ValueError as error:
            raise InputError(f"{self.path}: no self-test", got=str(error), fix="export the bundle again") from error
        return stored["images"], stored["logits"]

    def graph(self, name: str = "student") -> Path:
        """Path of one of the graphs. Raises: InputError when the bundle has no such graph."""
        return self.path / self.graph_file(name)

    def graph_file(self, name: str = "student") -> str:
        """Name of the file of one of the graphs. Raises: InputError when the bundle has no such graph."""
        graphs = self.manifest.graphs
        if name not in graphs:
            fix = "name one of these"
            if ".int8" in name:
                fix = "8-bit graphs are added by: cdl-edge calibrate BUNDLE --out NEW"
            elif name.endswith(".fp16"):
                fix = "fp16 graphs are in bundles of: cdl-edge export RUN --profile trt10 --out NEW"
            raise InputError(f"{self.path}: the bundle has no graph {name!r}", got=", ".join(graphs), fix=fix)
        return graphs[name]


def foreign(path: Path) -> str | None:
    """What in a file or folder is not a bundle's own, by its content; None when it is a bundle and nothing else.

    Only such a folder is ever replaced, see `files.check_out`: a store, engines, a file that somebody changed or added
    are not there again after a new export.
    """
    if (path / CURRENT).is_symlink() or (path / VERSIONS).exists():
        return "a store of versions: make a pack, or export to another path"
    try:
        listed = {MANIFEST, *open_bundle(path).manifest.files}
    except InputError as error:
        return str(error).splitlines()[0]
    folders = {str(parent) for name in listed for parent in PurePosixPath(name).parents}
    found = {p.relative_to(path).as_posix(): p.is_dir() and not p.is_symlink() for p in path.rglob("*")}
    other = sorted(name for name, folder in found.items() if name not in (folders if folder else listed))
    return f"also there: {', '.join(other[:5])}" if other else None


def check_target(path: Path, replace: bool = False) -> None:
    """Whether `write_bundle` would write there, to be asked before hours of work. Raises: InputError."""
    check_out(path, "a bundle", foreign, replace)


def write_bundle(
    path: Path, manifest: Mapping[str, Any], files: Mapping[str, Path | bytes], replace: bool = False
) -> Bundle:
    """Write a bundle folder, whole or not at all.

    Args:
        manifest: everything but "schema", "kind", "files", "manifest_sha256" and "text_sha256", which are set here.
        files: content of each file by its name inside the folder: bytes, or a file to copy.
        replace: a bundle that is there, and nothing else; without, only an empty folder may be there.

    Raises: InputError for a manifest or a file name that `open_bundle` would refuse, a `path` that may not be replaced,
        or cannot be written.
    """
    path = Path(path)
    check_target(path, replace)
    if MANIFEST in files:
        raise InputError(f"{path}: {MANIFEST} is written by write_bundle", fix="pass it as `manifest`")
    derived = ("schema", "kind", "files", "manifest_sha256", "text_sha256")
    document: dict[str, Any] = {"schema": BUNDLE_SCHEMA, "kind": "bundle"}
    document |= {key: value for key, value in manifest.items() if key not in derived}
    with atomic_folder(path, foreign) as temporary:
        check_names(path / MANIFEST, files)
        entries: dict[str, Any] = {}
        for name, content in files.items():
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                target.write_bytes(content)
            else:
                shutil.copyfile(content, target)
            _sync(target)
            entries[name] = {"sha256": sha256(target), "bytes": target.stat().st_size}
        document["files"] = entries
        try:
            # Through JSON and back: tuples become lists now, so that what is checked is what will be read.
            document = sealed(json.loads(canonical(document)))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{path / MANIFEST}: not plain JSON", got=str(error), expected="strings, finite numbers, lists, objects"
            ) from error
        written = Manifest.of(document, path / MANIFEST)
        (temporary / MANIFEST).write_bytes(canonical(document).encode("utf-8"))
        _sync(temporary / MANIFEST)
    return Bundle(path, written)


def _sync(path: Path) -> None:
    """Push a file to the disk before the folder is renamed: a board may lose power at any moment."""
    with open(path, "rb+") as stream:
        os.fsync(stream.fileno())


def open_bundle(path: Path | str, verify: bool = True) -> Bundle:
    """Open a bundle folder and check it; of a store, the version that `current` names at this moment.

    The link is followed once: whoever keeps the Bundle reads one version, whatever is installed meanwhile. The file
    of ranges may be absent: packs leave it out, only `calibrate` reads it.

    Args:
        verify: hash every listed file (a few ms for each 10 MB). False still checks the manifest, presence and sizes.

    Raises: InputError naming the file, what was got, what was expected and what to do, in this order: no folder, no
        manifest, no JSON, newer schema, manifest changed, a file missing, truncated or changed, fields that contradict
        each other (class count among them).
    """
    path = Path(path)
    try:
        if not path.is_dir():
            raise InputError(
                f"{path}: no such bundle",
                got="a file" if path.exists() else "nothing there",
                expected="a folder made by `cdl-edge export`",
                fix="check the path, or run: cdl-edge export RUN --out BUNDLE",
            )
        path = current_version(path)
        document = read_manifest(path)
        files = manifest_field(path / MANIFEST, document, "files", dict)
        check_names(path / MANIFEST, files)
        for name, entry in files.items():
            if name != document.get("ranges") or (path / name).exists():
                _check_file(path, name, entry, verify)
    except OSError as error:  # permissions, a failing card
        raise InputError(
            f"{error.filename or path}: cannot be read", got=error.strerror or str(error), fix="check its permissions"
        ) from error
    return Bundle(path, Manifest.of(document, path / MANIFEST))


def current_version(path: Path) -> Path:
    """The folder that runs: of a store (a folder with `current` and `versions`) what the link names, else `path`.

    Raises: InputError for a link to anything but one of the versions, and for a store whose link was lost when it was
        copied: the files of the bundle that it was before may lie beside it, and would be taken for what runs.
    """
    link = path / CURRENT
    if not link.is_symlink():
        copied = link.is_dir() or (link.exists() and (path / VERSIONS).is_dir())
        if copied or _was_a_store(path):
            raise InputError(
                f"{link}: the link to the version that runs was lost",
                got="a folder" if link.is_dir() else "a file" if copied else "nothing there",
                expected=f"a link to one of {_versions(path)}",
                fix="copy the whole folder again with a program that keeps links: rsync -a, cp -a, tar; not scp -r",
            )
        return path
    target = os.readlink(link)
    if not re.fullmatch(VERSIONS + "/[0-9a-f]{16}", target) or not (path / target).is_dir():
        raise InputError(
            f"{link}: names no version of this store",
            got=target,
            expected=_versions(path),
            fix=f"ln -sfn {VERSIONS}/VERSION {link}",
        )
    return path / target


def _was_a_store(path: Path) -> bool:
    """Whether a change was finished here: before the first one is, there may be the file, too, but no link yet."""
    try:
        return bool(json.loads((path / STATE).read_bytes())["next"] is None)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _versions(path: Path) -> str:
    return ", ".join(sorted(f"{VERSIONS}/{p.name}" for p in (path / VERSIONS).glob("*"))) or "its versions"


def _check_file(path: Path, name: str, entry: object, verify: bool) -> None:
    file = path / name
    if not isinstance(entry, dict) or not is_count(entry.get("bytes")) or not isinstance(entry.get("sha256"), str):
        raise InputError(
            f"{path / MANIFEST}: files[{name!r}] is incomplete",
            got=repr(entry),
            expected="sha256 and bytes",
            fix=AGAIN,
        )
    known = FileRecord(entry["sha256"], entry["bytes"])
    if not file.is_file():
        raise InputError(f"{file}: missing", expected=f"{known.bytes} bytes", fix=AGAIN)
    if path.resolve() not in file.resolve().parents:
        raise InputError(
            f"{file}: a link that leads out of the bundle",
            got=str(file.resolve()),
            expected="a file inside the folder",
            fix="replace the link by the file itself",
        )
    _check_content(file, known, file.stat().st_size, sha256(file) if verify else None)


def _check_content(file: Path, entry: FileRecord, size: int, digest: str | None) -> None:
    if size != entry.bytes:
        problem = "truncated" if size < entry.bytes else "longer than it was written"
        raise InputError(f"{file}: {problem}", got=f"{size} bytes", expected=f"{entry.bytes} bytes", fix=AGAIN)
    if digest is not None and digest != entry.sha256:
        raise InputError(
            f"{file}: changed since it was written",
            got=f"sha256 {digest}",
            expected=f"sha256 {entry.sha256}",
            fix=AGAIN,
        )
