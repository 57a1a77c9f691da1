"""The bundle: a folder with a manifest, ONNX graphs and their constants, every byte of it under a SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import numpy as np

from ..errors import InputError
from ..files import atomic_folder, sha256
from ..images import Preprocessing

SCHEMA = 1
"version of manifest.json that this code writes; older ones are read, newer ones refused"
MANIFEST = "manifest.json"
CURRENT, VERSIONS = "current", "versions"
"of a store of bundles (see store.py): the link to the version that runs, and the folder of all of them"
SELECTIONS = ("top-k", "weighted", "none")
_AGAIN = "copy the bundle again, or export it again"


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
    manifest: dict[str, Any]
    "the parsed manifest.json"

    @property
    def name(self) -> str:
        """The bundle's own name, its folder's name when it has none."""
        return str(self.manifest.get("name") or self.path.resolve().name)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        return tuple(self.manifest["classes"])

    @property
    def tasks(self) -> tuple[tuple[int, ...], ...]:
        """For each task, in learned order, the indices of its classes."""
        return tuple(tuple(task) for task in self.manifest["tasks"])

    @property
    def preprocessing(self) -> Preprocessing:
        """How a picture becomes the graph's uint8 input."""
        return Preprocessing.from_json(self.manifest["input"]["preprocessing"])

    @property
    def batch(self) -> int | None:
        """Images in one call of the graph; None when any number goes."""
        fields = self.manifest["input"]
        return None if fields.get("dynamic_batch") else int(fields["shape"][0])

    @property
    def two_pass(self) -> bool:
        """Whether a query pass selects the prompts of the second one."""
        return self.manifest.get("query") == "two-pass"

    @property
    def selection(self) -> dict[str, Any]:
        """How `runtime.select` reads prompt_weights: {"kind", "k", "blocks"}."""
        return dict(self.manifest.get("selection") or {"kind": "none"})

    @property
    def size_bytes(self) -> int:
        """Bytes of all listed files, the manifest left out."""
        return sum(int(entry["bytes"]) for entry in self.manifest["files"].values())

    def signature(self, name: str = "student") -> Signature:
        """Inputs and outputs of one of the graphs."""
        fields, signatures = self.manifest["input"], self.manifest.get("signatures") or {}
        images = str(fields.get("name", "images"))
        default = {"inputs": {images: fields["shape"]}, "outputs": self.manifest["outputs"]}
        free = bool(fields.get("dynamic_batch"))
        inputs, outputs = (
            {
                n: (None if free else fields["shape"][0], *shape[1:])
                for n, shape in signatures.get(name, default)[k].items()
            }
            for k in ("inputs", "outputs")
        )
        return Signature(images, inputs, outputs)

    def selftest(self) -> tuple[np.ndarray, np.ndarray]:
        """Real images uint8 (n, S, S, 3) and what the student says about them in fp32, (n, C).

        Raises: InputError for a bundle without them.
        """
        name = self.manifest.get("selftest")
        if not name:
            raise InputError(
                f"{self.path}: no self-test in this bundle",
                expected="selftest.npz: what nobody compared is not used",
                fix="export the bundle again: cdl-edge export RUN --out BUNDLE",
            )
        try:
            with np.load(self.path / str(name), allow_pickle=False) as stored:
                return stored["images"], stored["logits"]
        except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise InputError(f"{self.path}: no self-test", got=str(error), fix="export the bundle again") from error

    def graph(self, name: str = "student") -> Path:
        """Path of one of the graphs. Raises: InputError when the bundle has no such graph."""
        graphs = self.manifest["graphs"]
        if name not in graphs:
            raise InputError(
                f"{self.path}: the bundle has no graph {name!r}", got=", ".join(graphs), fix="name one of these"
            )
        return self.path / str(graphs[name])


def canonical(manifest: Mapping[str, Any]) -> str:
    """The one text that a manifest may have on disk. Raises: ValueError for NaN or infinity."""
    return json.dumps(manifest, indent=2, sort_keys=False, ensure_ascii=False, allow_nan=False) + "\n"


def self_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical text with `manifest_sha256` left empty, so that the manifest covers itself."""
    return hashlib.sha256(canonical({**manifest, "manifest_sha256": ""}).encode("utf-8")).hexdigest()


def write_bundle(path: Path, manifest: Mapping[str, Any], files: Mapping[str, Path | bytes]) -> Bundle:
    """Write a bundle folder, whole or not at all; an existing one at `path` is replaced.

    Args:
        manifest: everything but "schema", "kind", "files" and "manifest_sha256", which are set here.
        files: content of each file by its name inside the folder: bytes, or a file to copy.

    Raises: InputError for a manifest or a file name that `open_bundle` would refuse.
    """
    path = Path(path)
    if MANIFEST in files:
        raise InputError(f"{path}: {MANIFEST} is written by write_bundle", fix="pass it as `manifest`")
    if path.exists() and not (path / MANIFEST).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(
            f"{path}: is already there and is no bundle",
            expected="a new path, an empty folder, or a bundle to replace",
            fix="choose another path: what is there would be deleted",
        )
    derived = ("schema", "kind", "files", "manifest_sha256")
    document: dict[str, Any] = {"schema": SCHEMA, "kind": "bundle"}
    document |= {key: value for key, value in manifest.items() if key not in derived}
    with atomic_folder(path) as temporary:
        entries: dict[str, Any] = {}
        for name, content in files.items():
            check_name(path / MANIFEST, name)
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                target.write_bytes(content)
            else:
                shutil.copyfile(content, target)
            _sync(target)
            entries[name] = {"sha256": sha256(target), "bytes": target.stat().st_size}
        document["files"] = entries
        document["manifest_sha256"] = ""
        try:
            # Through JSON and back: tuples become lists now, so that what is checked is what will be read.
            document = json.loads(canonical(document))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{path / MANIFEST}: not plain JSON", got=str(error), expected="strings, finite numbers, lists, objects"
            ) from error
        document["manifest_sha256"] = self_hash(document)
        _check_manifest(path / MANIFEST, document)
        (temporary / MANIFEST).write_bytes(canonical(document).encode("utf-8"))
        _sync(temporary / MANIFEST)
    return Bundle(path, document)


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
    if not path.is_dir():
        raise InputError(
            f"{path}: no such bundle",
            got="a file" if path.exists() else "nothing there",
            expected="a folder made by `cdl-edge export`",
            fix="check the path, or run: cdl-edge export RUN --out BUNDLE",
        )
    try:
        path = current_version(path)
        document = _read_manifest(path)
        files = _field(path / MANIFEST, document, "files", dict)
        for name, entry in files.items():
            check_name(path / MANIFEST, name)
            if name != document.get("ranges") or (path / name).exists():
                _check_file(path, name, entry, verify)
    except OSError as error:  # permissions, a failing card
        raise InputError(
            f"{error.filename or path}: cannot be read", got=error.strerror or str(error), fix="check its permissions"
        ) from error
    _check_manifest(path / MANIFEST, document)
    return Bundle(path, document)


def current_version(path: Path) -> Path:
    """The folder that runs: of a store (a folder with `current` and `versions`) what the link names, else `path`.

    Raises: InputError for a link to anything but one of the versions.
    """
    link = path / CURRENT
    if not link.is_symlink() or not (path / VERSIONS).is_dir():
        return path
    target = os.readlink(link)
    if not re.fullmatch(VERSIONS + "/[0-9a-f]{16}", target) or not (path / target).is_dir():
        raise InputError(
            f"{link}: names no version of this store",
            got=target,
            expected=", ".join(sorted(f"{VERSIONS}/{p.name}" for p in (path / VERSIONS).iterdir())) or "a version",
            fix=f"ln -sfn {VERSIONS}/VERSION {link}",
        )
    return path / target


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "an empty folder"
        raise InputError(
            f"{manifest_path}: missing",
            got=found,
            expected="a bundle folder",
            fix="run: cdl-edge export RUN --out BUNDLE",
        )
    text = manifest_path.read_bytes()
    try:
        document = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{manifest_path}: not readable as JSON",
            got=f"{type(error).__name__}: {error}",
            expected="UTF-8 JSON",
            fix=_AGAIN,
        ) from error
    if not isinstance(document, dict):
        raise InputError(
            f"{manifest_path}: not a manifest", got=type(document).__name__, expected="an object", fix=_AGAIN
        )
    schema = document.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise InputError(f"{manifest_path}: no schema version", got=repr(schema), expected=f"1 to {SCHEMA}", fix=_AGAIN)
    if schema > SCHEMA:
        raise InputError(
            f"{manifest_path}: written by a newer cdl-edge",
            got=f"schema {schema}",
            expected=f"schema {SCHEMA} or older",
            fix="upgrade cdl-edge: install a newer wheel, or `pip install .` in newer sources",
        )
    try:
        same_text = canonical(document).encode("utf-8") == text
        digest = self_hash(document)
    except (ValueError, RecursionError):  # NaN, infinity, a lone surrogate: nothing that write_bundle writes
        same_text, digest = False, "no canonical text"
    if not same_text or document.get("manifest_sha256") != digest:
        raise InputError(
            f"{manifest_path}: changed since it was written",
            got=f"sha256 {digest}" if same_text else "text that is not in canonical form",
            expected=f"sha256 {document.get('manifest_sha256')!s:.64}",
            fix=_AGAIN,
        )
    if document.get("kind") != "bundle":
        raise InputError(
            f"{manifest_path}: another kind of artefact",
            got=repr(document.get("kind")),
            expected="'bundle'",
            fix=_AGAIN,
        )
    return document


def check_name(manifest_path: Path, name: str) -> None:
    """Refuse every file name that could lead out of the folder. Raises: InputError."""
    parts = PurePosixPath(name).parts
    bad = not parts or name.startswith("/") or "\\" in name or ":" in name or "\0" in name or ".." in parts
    if bad or str(PurePosixPath(name)) != name or name == MANIFEST:
        raise InputError(
            f"{manifest_path}: a file name that is not allowed",
            got=repr(name),
            expected="a plain relative path inside the bundle, without '..'",
            fix="do not use this bundle; export it again",
        )


def _check_file(path: Path, name: str, entry: object, verify: bool) -> None:
    file = path / name
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("bytes"), int)
        or not isinstance(entry.get("sha256"), str)
    ):
        raise InputError(
            f"{path / MANIFEST}: files[{name!r}] is incomplete",
            got=repr(entry),
            expected="sha256 and bytes",
            fix=_AGAIN,
        )
    if not file.is_file():
        raise InputError(f"{file}: missing", expected=f"{entry['bytes']} bytes", fix=_AGAIN)
    if path.resolve() not in file.resolve().parents:
        raise InputError(
            f"{file}: a link that leads out of the bundle",
            got=str(file.resolve()),
            expected="a file inside the folder",
            fix="replace the link by the file itself",
        )
    size = file.stat().st_size
    if size != entry["bytes"]:
        problem = "truncated" if size < entry["bytes"] else "longer than it was written"
        raise InputError(f"{file}: {problem}", got=f"{size} bytes", expected=f"{entry['bytes']} bytes", fix=_AGAIN)
    if verify and (digest := sha256(file)) != entry["sha256"]:
        raise InputError(
            f"{file}: changed since it was written",
            got=f"sha256 {digest}",
            expected=f"sha256 {entry['sha256']}",
            fix=_AGAIN,
        )


def _field(manifest_path: Path, fields: Mapping[str, Any], key: str, kind: type) -> Any:
    value = fields.get(key)
    if not isinstance(value, kind):
        raise _contradiction(manifest_path, f"field {key!r}", got=repr(value), expected=kind.__name__)
    return value


def _contradiction(manifest_path: Path, what: str, got: object, expected: object) -> InputError:
    return InputError(f"{manifest_path}: {what}", got=got, expected=expected, fix="export it again")


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_manifest(at: Path, manifest: Mapping[str, Any]) -> None:
    """Fields present, of the right kind, and in agreement with each other."""
    classes = _field(at, manifest, "classes", list)
    if not classes or not all(isinstance(c, str) and c for c in classes) or len(set(classes)) != len(classes):
        raise _contradiction(at, "field 'classes'", f"{classes!r:.200}", "different, non-empty names")

    outputs = _field(at, manifest, "outputs", dict)
    logits = outputs.get("logits")
    if not isinstance(logits, list) or len(logits) != 2 or logits[1] != len(classes):
        raise _contradiction(
            at,
            "class count mismatch",
            f"{len(classes)} classes, outputs.logits {logits}",
            f"logits [1, {len(classes)}]",
        )

    tasks = _field(at, manifest, "tasks", list)
    flat = [c for task in tasks if isinstance(task, list) for c in task]
    indices = [c for c in flat if _is_count(c)]
    if not all(tasks) or len(indices) != len(flat) or sorted(indices) != list(range(len(classes))):
        raise _contradiction(at, "field 'tasks'", f"{tasks!r:.200}", f"each of 0 to {len(classes) - 1} in one task")

    fields = _field(at, manifest, "input", dict)
    shape = fields.get("shape")
    described = _field(at, fields, "preprocessing", dict)
    try:
        side = Preprocessing.from_json(described).size
    except (InputError, ValueError) as error:
        expected = "size, resize, interpolation, mean, std, as Preprocessing.to_json() gives them"
        raise _contradiction(at, "field 'preprocessing'", f"{described!r:.200}", expected) from error
    if not isinstance(shape, list) or shape[1:] != [side, side, 3] or fields.get("dtype") != "uint8":
        raise _contradiction(at, "field 'input'", f"{shape} {fields.get('dtype')}", f"[1, {side}, {side}, 3] uint8")
    if not fields.get("dynamic_batch") and (not _is_count(shape[0]) or shape[0] < 1):
        raise _contradiction(at, "field 'input'", f"batch {shape[0]!r}", "a positive number, or dynamic_batch")

    graphs = _field(at, manifest, "graphs", dict)
    for name, file in {"student": graphs.get("student"), **graphs}.items():
        if not isinstance(file, str) or file not in manifest["files"]:
            raise _contradiction(at, f"graph {name!r}", repr(file), "one of the listed files")
    for key in ("training", "accuracy", "parity"):  # optional; None when nothing was measured
        if manifest.get(key) is not None:
            _field(at, manifest, key, dict)
    _check_selection(at, manifest, outputs.get("prompt_weights"))


def _check_selection(at: Path, manifest: Mapping[str, Any], weights: object) -> None:
    selection = manifest.get("selection") or {"kind": "none"}
    kind = selection.get("kind") if isinstance(selection, dict) else selection
    if kind not in SELECTIONS:
        raise _contradiction(at, "field 'selection'", repr(selection), "kind " + ", ".join(SELECTIONS))
    if kind == "none":
        return
    k, blocks = selection.get("k"), selection.get("blocks")
    if not isinstance(weights, list) or len(weights) != 3 or not all(_is_count(n) for n in weights[1:]):
        raise _contradiction(at, f"selection {kind!r}", f"outputs.prompt_weights {weights}", "shape [1, L, K]")
    if not _is_count(k) or not 1 <= k <= weights[2]:
        raise _contradiction(at, "field 'selection'", f"k {k!r}", f"1 to {weights[2]} (entries of prompt_weights)")
    if not isinstance(blocks, list) or len(blocks) != weights[1]:
        raise _contradiction(
            at, "field 'selection'", f"blocks {blocks!r}", f"{weights[1]} block(s), as in prompt_weights"
        )
