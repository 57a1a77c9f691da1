"""manifest.json: what it may say, and the hashes that cover it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from ..errors import InputError
from ..images import Preprocessing
from .layout import BUNDLE_SCHEMA, MANIFEST, PICTURES, SCHEMES_KEY
from .quantisation_record import Quantisation
from .run_record import BackboneRecord
from .typed import MalformedField, parse

MAX_MANIFEST = 8 << 20
"bytes; 10,000 classes over 1,000 tasks take 2 MB"
MAX_AXIS = 1 << 24
"of a shape"
MAX_BATCH = 4096
MAX_SIDE = 4096
"pixels of a graph's input, and of the picture it is cut from"
LONGEST_NAME = 200
"bytes of a file's name: filesystems take 255, temporary names are longer than the final ones"
SELECTION_KINDS = ("top-k", "weighted", "none")
AGAIN = "copy the bundle again, or export it again"


@dataclass(frozen=True)
class FileRecord:
    """A file of the bundle, by its content."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class InputRecord:
    """The pictures that a graph takes."""

    shape: tuple[int, ...]
    "(B, S, S, 3)"
    dtype: str
    preprocessing: Mapping[str, Any]
    "see images.Preprocessing"
    name: str = "images"
    layout: str = "NHWC"
    dynamic_batch: bool = False
    "any number of images in one call"
    normalisation: str | None = None


@dataclass(frozen=True)
class AccuracyRecord:
    """Accuracy of the fp32 graph, measured when it was exported."""

    average_accuracy: float | None = None
    "%"
    forgetting: float | None = None
    "points"
    per_task: tuple[float | None, ...] = ()
    images: int | None = None
    source: str | None = None


@dataclass(frozen=True)
class ParityRecord:
    """How far a graph's logits are from the trained student's."""

    max_abs_error: float | None = None
    mean_abs_error: float | None = None
    top1_agreement: float | None = None
    "%"
    images: int | None = None
    tolerance: float | None = None
    judged: str | None = None
    "which of the errors is held against the tolerance"


@dataclass(frozen=True)
class Enrolment:
    """Pictures that were added to a class on the device at one time."""

    name: str
    "of the class"
    images: int
    at: str
    "UTC"
    pictures: tuple[str, ...] = ()
    "the files of the bundle that they are in, in the order of their features; empty: they were not kept"
    digests: tuple[str, ...] = ()
    "of each picture, see splits.Split.digest: by them an evaluation knows what was learnt; empty in earlier bundles"

    def check(self) -> None:
        """There is a picture, and each is kept or none. Raises: MalformedField."""
        if not self.name or self.images < 1:
            raise MalformedField("images", self.images, "1 or more, of a class with a name")
        if len(self.pictures) not in (0, self.images):
            raise MalformedField("pictures", list(self.pictures), f"no file, or {self.images}")
        if len(self.digests) not in (0, self.images):
            raise MalformedField("digests", list(self.digests), f"none, or {self.images}")


@dataclass(frozen=True)
class Manifest:
    """manifest.json, checked: see docs/bundle.md for what each field says."""

    classes: tuple[str, ...]
    tasks: tuple[tuple[int, ...], ...]
    input: InputRecord
    outputs: Mapping[str, tuple[int, ...]]
    graphs: Mapping[str, str]
    "file of each graph by name"
    files: Mapping[str, FileRecord]
    manifest_sha256: str
    "the version"
    schema: int = BUNDLE_SCHEMA
    name: str | None = None
    created: str | None = None
    learner: str | None = None
    distiller: str | None = None
    query: str | None = None
    alpha: float | None = None
    selection: Mapping[str, Any] = field(default_factory=lambda: {"kind": "none"})
    backbone: BackboneRecord | None = None
    profile: str | None = None
    opset: int | None = None
    precision: str | None = None
    quantisation: Quantisation | None = None
    signatures: Mapping[str, Mapping[str, Mapping[str, tuple[int, ...]]]] = field(default_factory=dict)
    "inputs and outputs of each graph, shapes by name"
    selftest: str | None = None
    "a file, or None"
    ranges: str | None = None
    layers: str | None = None
    selections: str | None = None
    statistics: str | None = None
    ridge: float | None = None
    "of a ranpac head, as the workshop chose it from these statistics; see heads.ranpac"
    enrolments: tuple[Enrolment, ...] = ()
    "in their order; see updates.enrol"
    enrolled_on: str | None = None
    "the version that they were added to, as the workshop made it: first digits of its manifest_sha256"
    accuracy: AccuracyRecord | None = None
    parity: ParityRecord | None = None
    graph_parity: Mapping[str, ParityRecord] = field(default_factory=dict)
    confidence: Mapping[str, Any] | None = None
    "see runtime.confidence.Confidence"
    training: Mapping[str, Any] | None = None
    "what the run's metrics.json said, without its paths and losses; see run_record.Metrics"
    versions: Mapping[str, Any] = field(default_factory=dict)
    document: Mapping[str, Any] = field(default_factory=dict, repr=False)
    "all of it, as it was read: what the hashes are over"

    @classmethod
    def of(cls, document: Mapping[str, Any], at: Path) -> Manifest:
        """Check a document and read it. at: its file, for messages. Raises: InputError."""
        check_manifest(at, document)
        return parse(cls, document, str(at))

    @property
    def version(self) -> str:
        """The first digits of the hash, by which versions are told apart."""
        return self.manifest_sha256[:16]

    @property
    def config(self) -> Mapping[str, Any]:
        """The options of the training run, see train.config.Config; empty where the bundle does not say them."""
        return (self.training or {}).get("config") or {}

    @property
    def shipped(self) -> dict[str, FileRecord]:
        """The files that a device gets: ranges stay where calibration is done."""
        return {name: entry for name, entry in self.files.items() if name != self.ranges}

    def check(self) -> None:
        """Measured numbers are about these tasks, kept pictures are pictures. Raises: MalformedField."""
        for i, entry in enumerate(self.enrolments):
            odd = [n for n in entry.pictures if n not in self.files or not n.startswith(f"{PICTURES}/")]
            if odd:
                raise MalformedField(f"enrolments[{i}].pictures", odd, f"files of this bundle below {PICTURES}/")
        for name, scheme in (self.quantisation.schemes if self.quantisation else {}).items():
            for side in ("before", "after", "drop"):
                found = getattr(scheme, side) if scheme.measured else None
                if found is not None and len(found.per_task) != len(self.tasks):
                    at = f"quantisation.{SCHEMES_KEY}.{name}.{side}.per_task"
                    raise MalformedField(at, list(found.per_task), f"{len(self.tasks)} numbers or null")


def canonical(manifest: Mapping[str, Any]) -> str:
    """The one text that a manifest may have on disk. Raises: ValueError for NaN or infinity."""
    return json.dumps(manifest, indent=2, sort_keys=False, ensure_ascii=False, allow_nan=False) + "\n"


def self_hash(manifest: Mapping[str, Any]) -> str:
    """The version: SHA-256 of the canonical text with `manifest_sha256` left empty, so that the manifest covers itself.

    From schema 2 on, what differs from one making of the same bundle to the next is left empty as well: its name, the
    date, the times that were measured. `text_sha256` covers those too.
    """
    blank: dict[str, Any] = {"manifest_sha256": ""}
    if manifest.get("schema") != 1:
        blank |= {"name": "", "created": "", "text_sha256": ""}
        quantisation = manifest.get("quantisation")
        if isinstance(quantisation, dict):
            blank["quantisation"] = {**quantisation, "latency": None}
    return hashlib.sha256(canonical({**manifest, **blank}).encode("utf-8")).hexdigest()


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with its hashes, which come last. Raises: ValueError for NaN or infinity."""
    document = {k: v for k, v in manifest.items() if k not in ("manifest_sha256", "text_sha256")}
    document["manifest_sha256"] = ""
    if document.get("schema") != 1:
        document["text_sha256"] = ""
    document["manifest_sha256"] = self_hash(document)
    if document.get("schema") != 1:
        document["text_sha256"] = text_hash(document)
    return document


def text_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the whole canonical text with `text_sha256` left empty."""
    return hashlib.sha256(canonical({**manifest, "text_sha256": ""}).encode("utf-8")).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "an empty folder"
        raise InputError(
            f"{manifest_path}: missing",
            got=found,
            expected="a bundle folder",
            fix="run: cdl-edge export RUN --out BUNDLE",
        )
    with open(manifest_path, "rb") as stream:
        text = stream.read(MAX_MANIFEST + 1)
    if len(text) > MAX_MANIFEST:
        raise InputError(f"{manifest_path}: too long", got="more", expected=f"{MAX_MANIFEST} bytes or fewer", fix=AGAIN)
    try:
        document = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{manifest_path}: not readable as JSON",
            got=f"{type(error).__name__}: {error}",
            expected="UTF-8 JSON",
            fix=AGAIN,
        ) from error
    if not isinstance(document, dict):
        raise InputError(
            f"{manifest_path}: not a manifest", got=type(document).__name__, expected="an object", fix=AGAIN
        )
    schema = document.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise InputError(
            f"{manifest_path}: no schema version", got=repr(schema), expected=f"1 to {BUNDLE_SCHEMA}", fix=AGAIN
        )
    if schema > BUNDLE_SCHEMA:
        raise InputError(
            f"{manifest_path}: written by a newer cdl-edge",
            got=f"schema {schema}",
            expected=f"schema {BUNDLE_SCHEMA} or older",
            fix="upgrade cdl-edge: install a newer wheel, or `pip install .` in newer sources",
        )
    try:
        same_text = canonical(document).encode("utf-8") == text
        digest, whole = self_hash(document), text_hash(document)
        unchanged = document.get("manifest_sha256") == digest and (schema == 1 or document.get("text_sha256") == whole)
    except (ValueError, RecursionError):  # NaN, infinity, a lone surrogate: nothing that write_bundle writes
        same_text, digest, unchanged = False, "no canonical text", False
    if not same_text or not unchanged:
        raise InputError(
            f"{manifest_path}: changed since it was written",
            got=f"sha256 {digest}" if same_text else "text that is not in canonical form",
            expected=f"sha256 {document.get('manifest_sha256')!s:.64}",
            fix=AGAIN,
        )
    if document.get("kind") != "bundle":
        raise InputError(
            f"{manifest_path}: another kind of artefact",
            got=repr(document.get("kind")),
            expected="'bundle'",
            fix=AGAIN,
        )
    return document


def check_names(at: Path, names: Iterable[str]) -> None:
    """Refuse file names that lead out of the folder, that no filesystem takes, or of which one is another's folder.

    Raises: InputError.
    """
    known = set(names)
    for name in known:
        pure = PurePosixPath(name)
        parts = pure.parts
        bad = not parts or name.startswith("/") or ".." in parts or not name.isprintable() or str(pure) != name
        long = max((len(part.encode("utf-8", "surrogatepass")) for part in parts), default=0) > LONGEST_NAME
        above = [str(parent) for parent in pure.parents if str(parent) in known]
        if bad or long or above or len(parts) > 4 or name == MANIFEST or any(c in name for c in "\\:"):
            raise InputError(
                f"{at}: a file name that is not allowed",
                got=f"{name!r:.300}" + (f" beside {above[0]!r}" if above else ""),
                expected=f"a plain relative path inside the bundle, without '..', at most {LONGEST_NAME} bytes a part",
                fix="do not use this bundle; export it again",
            )


def manifest_field(manifest_path: Path, fields: Mapping[str, Any], key: str, kind: type) -> Any:
    value = fields.get(key)
    if not isinstance(value, kind):
        raise _contradiction(manifest_path, f"field {key!r}", got=repr(value), expected=kind.__name__)
    return value


def _contradiction(manifest_path: Path, what: str, got: object, expected: object) -> InputError:
    return InputError(f"{manifest_path}: {what}", got=got, expected=expected, fix="export it again")


def is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_shape(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and 1 <= len(value) <= 8 and all(is_count(n) and n <= MAX_AXIS for n in value)


def check_manifest(at: Path, manifest: Mapping[str, Any]) -> None:
    """Fields present, of the right kind, and in agreement with each other."""
    classes = manifest_field(at, manifest, "classes", list)
    if not classes or not all(isinstance(c, str) and c for c in classes) or len(set(classes)) != len(classes):
        raise _contradiction(at, "field 'classes'", f"{classes!r:.200}", "different, non-empty names")

    outputs = manifest_field(at, manifest, "outputs", dict)
    logits = outputs.get("logits")
    if not isinstance(logits, list) or len(logits) != 2 or logits[1] != len(classes):
        raise _contradiction(
            at,
            "class count mismatch",
            f"{len(classes)} classes, outputs.logits {logits}",
            f"logits [1, {len(classes)}]",
        )

    tasks = manifest_field(at, manifest, "tasks", list)
    flat = [c for task in tasks if isinstance(task, list) for c in task]
    indices = [c for c in flat if is_count(c)]
    if (
        not all(isinstance(task, list) and task for task in tasks)
        or len(indices) != len(flat)
        or sorted(indices) != list(range(len(classes)))
    ):
        raise _contradiction(at, "field 'tasks'", f"{tasks!r:.200}", f"each of 0 to {len(classes) - 1} in one task")

    fields = manifest_field(at, manifest, "input", dict)
    shape = fields.get("shape")
    described = manifest_field(at, fields, "preprocessing", dict)
    try:
        side = Preprocessing.from_json(described).size
    except (InputError, ValueError) as error:
        expected = "size, resize, interpolation, mean, std, resize_rule, decoder, as Preprocessing.to_json() gives them"
        raise _contradiction(at, "field 'preprocessing'", f"{described!r:.200}", expected) from error
    if not all(is_count(described.get(key)) and described[key] <= MAX_SIDE for key in ("size", "resize")):
        sides = f"size {described.get('size')!r}, resize {described.get('resize')!r}"
        raise _contradiction(at, "field 'preprocessing'", sides, f"whole numbers up to {MAX_SIDE}")
    if not _is_shape(shape) or shape[1:] != [side, side, 3] or fields.get("dtype") != "uint8":
        raise _contradiction(at, "field 'input'", f"{shape} {fields.get('dtype')}", f"[1, {side}, {side}, 3] uint8")
    if not isinstance(fields.get("dynamic_batch", False), bool) or not 1 <= shape[0] <= MAX_BATCH:
        raise _contradiction(at, "field 'input'", f"batch {shape[0]!r}", f"1 to {MAX_BATCH}, or dynamic_batch")
    if not isinstance(fields.get("name", "images"), str):
        raise _contradiction(at, "field 'input'", f"name {fields['name']!r}", "a name")

    graphs = manifest_field(at, manifest, "graphs", dict)
    for name, file in {"student": graphs.get("student"), **graphs}.items():
        if not isinstance(file, str) or file not in manifest["files"]:
            raise _contradiction(at, f"graph {name!r}", repr(file), "one of the listed files")
    for key in ("training", "accuracy", "parity", "quantisation", "backbone", "confidence", "graph_parity"):
        if manifest.get(key) is not None:  # None when nothing was measured
            manifest_field(at, manifest, key, dict)
    _check_quantisation(at, manifest.get("quantisation") or {})
    width = (manifest.get("backbone") or {}).get("width", 0)
    if not is_count(width):
        raise _contradiction(at, "field 'backbone'", f"width {width!r}", "a whole number")
    for key in ("selftest", "ranges", "layers", "selections", "statistics"):
        if manifest.get(key) is not None and manifest[key] not in (*manifest["files"],):
            raise _contradiction(at, f"field {key!r}", repr(manifest[key]), "one of the listed files, or null")
    _check_signatures(at, manifest)
    _check_selection(at, manifest, outputs.get("prompt_weights"))


def _check_quantisation(at: Path, quantisation: Mapping[str, Any]) -> None:
    recommended = quantisation.get("recommended")
    words = recommended.values() if isinstance(recommended, dict) else ()
    if recommended is not None and (not isinstance(recommended, dict) or not all(isinstance(w, str) for w in words)):
        raise _contradiction(at, "field 'quantisation'", f"recommended {recommended!r:.200}", "backend and precision")


def _check_signatures(at: Path, manifest: Mapping[str, Any]) -> None:
    """The shapes that runners go by: of `outputs` and of every graph's `signatures`."""
    signatures = manifest.get("signatures")
    if signatures is not None and not isinstance(signatures, dict):
        raise _contradiction(at, "field 'signatures'", type(signatures).__name__, "an object, or null")
    images, side = manifest["input"].get("name", "images"), manifest["input"]["shape"][1:]
    own = {"inputs": {images: manifest["input"]["shape"]}, "outputs": manifest["outputs"]}
    for name, signature in {"student": own, **(signatures or {})}.items():
        parts: list[Any] = [signature.get(k) for k in ("inputs", "outputs")] if isinstance(signature, dict) else []
        if not parts or not all(isinstance(p, dict) and p and all(map(_is_shape, p.values())) for p in parts):
            raise _contradiction(at, f"signature of {name!r}", f"{signature!r:.200}", "shapes of inputs and outputs")
        if parts[0].get(images, [0])[1:] != side:
            raise _contradiction(at, f"signature of {name!r}", f"{parts[0]!r:.200}", f"the input {images!r}")
    answered: Mapping[str, Any] = (signatures or {}).get("student") or own
    logits = answered["outputs"].get("logits", [0])
    if logits[1:] != [len(manifest["classes"])]:
        raise _contradiction(at, "signature of 'student'", f"logits {logits}", f"[1, {len(manifest['classes'])}]")


def _check_selection(at: Path, manifest: Mapping[str, Any], weights: object) -> None:
    selection = manifest.get("selection") or {"kind": "none"}
    kind = selection.get("kind") if isinstance(selection, dict) else selection
    if kind not in SELECTION_KINDS:
        raise _contradiction(at, "field 'selection'", repr(selection), "kind " + ", ".join(SELECTION_KINDS))
    if kind == "none":
        return
    k, blocks = selection.get("k"), selection.get("blocks")
    if not isinstance(weights, list) or len(weights) != 3 or not all(is_count(n) for n in weights[1:]):
        raise _contradiction(at, f"selection {kind!r}", f"outputs.prompt_weights {weights}", "shape [1, L, K]")
    if not is_count(k) or not 1 <= k <= weights[2]:
        raise _contradiction(at, "field 'selection'", f"k {k!r}", f"1 to {weights[2]} (entries of prompt_weights)")
    if not isinstance(blocks, list) or len(blocks) != weights[1] or not all(map(is_count, blocks)):
        raise _contradiction(
            at, "field 'selection'", f"blocks {blocks!r}", f"{weights[1]} block(s), as in prompt_weights"
        )
