"""What the page is made from: metrics, manifest and profile, read and refused where they are malformed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..runtime.bundle import Bundle
from .words import PARITY

SCHEMA = 1
"version of metrics.json that this code reads"


def read_metrics(run: Path) -> dict[str, Any]:
    """RUN/metrics.json, checked. Raises: InputError."""
    run = Path(run)
    path = run / "metrics.json"
    if not path.is_file():
        raise InputError(
            f"{path}: missing",
            got="no such folder" if not run.is_dir() else "a folder without it",
            expected="the folder of a finished run",
            fix="check the path; an unfinished run is continued with: cdl-edge train ... --resume",
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read", got=error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged", got=str(error), expected="JSON written by train") from error
    return check_metrics(document, str(path))


def check_metrics(document: object, where: str) -> dict[str, Any]:
    """Refuse what the page could only show wrongly; returns the document. Raises: InputError."""
    fields = _object(document, where, "the document")
    schema = fields.get("schema", SCHEMA)
    if isinstance(schema, int) and schema > SCHEMA:
        raise InputError(
            f"{where}: written by a newer cdl-edge", got=schema, expected=SCHEMA, fix="upgrade cdl-edge, then repeat"
        )
    _object(fields.get("config"), where, "config")
    classes = _list(fields.get("classes"), where, "classes")
    if not classes or not all(isinstance(c, str) for c in classes):
        raise _malformed(where, "classes", classes, "names")
    tasks = _list(fields.get("tasks"), where, "tasks")
    flat = [c for task in tasks for c in _list(task, where, "tasks")]
    if not all(type(c) is int for c in flat) or sorted(flat) != list(range(len(classes))):
        raise _malformed(where, "tasks", tasks, f"each of 0 to {len(classes) - 1} in one task")
    _check_side(_object(fields.get("student"), where, "student"), where, "student", len(tasks))
    if fields.get("teacher") is not None:
        _check_side(_object(fields["teacher"], where, "teacher"), where, "teacher", len(tasks))
    _check_baseline(fields.get("baseline"), where)
    if fields["student"].get("confusion") is not None:
        _check_confusion(_object(fields["student"]["confusion"], where, "student.confusion"), where, len(classes))
    if fields.get("seconds") is not None:
        _number(fields["seconds"], where, "seconds")
    for key in ("versions", "definitions", "backbones"):
        _object(fields.get(key) or {}, where, key)
    for side, backbone in (fields.get("backbones") or {}).items():
        _object(backbone, where, f"backbones.{side}")
    _list(fields.get("skipped") or [], where, "skipped")
    images = fields.get("images")
    for key, count in (images if isinstance(images, dict) else {"": images}).items():
        if count is not None:
            _number(count, where, f"images.{key}".rstrip("."))
    return fields


def _check_baseline(found: object, where: str) -> None:
    """Null in runs of early versions."""
    if found is None:
        return
    fields = _object(found, where, "baseline")
    if not isinstance(fields.get("head"), str):
        raise _malformed(where, "baseline.head", fields.get("head"), "the name of a head")
    if not 0 <= _number(fields.get("average_accuracy"), where, "baseline.average_accuracy") <= 100:
        raise _malformed(where, "baseline.average_accuracy", fields["average_accuracy"], "an accuracy from 0 to 100 %")


def _check_confusion(found: Mapping[str, Any], where: str, classes: int) -> None:
    def counts(value: object, at: str, length: int) -> list[Any]:
        values = _list(value, where, at)
        if len(values) != length or not all(type(v) is int and v >= 0 for v in values):
            raise _malformed(where, at, values, f"{length} counts")
        return values

    images = counts(found.get("images"), "student.confusion.images", classes)
    right = counts(found.get("right"), "student.confusion.right", classes)
    if any(r > n for r, n in zip(right, images, strict=True)):
        raise _malformed(where, "student.confusion.right", right, "no more than the images of each class")
    for pair in _list(found.get("pairs"), where, "student.confusion.pairs"):
        true, answer, _ = counts(pair, "student.confusion.pairs", 3)
        if max(true, answer) >= classes:
            raise _malformed(where, "student.confusion.pairs", pair, f"classes below {classes}")
    if found.get("matrix") is not None:
        rows = _list(found["matrix"], where, "student.confusion.matrix")
        if len(rows) != classes:
            raise _malformed(where, "student.confusion.matrix", f"{len(rows)} rows", f"{classes} rows")
        for row, total in zip(rows, images, strict=True):
            if sum(counts(row, "student.confusion.matrix", classes)) != total:
                raise _malformed(where, "student.confusion.matrix", row, f"a row of {total} images")


def _check_side(side: Mapping[str, Any], where: str, name: str, tasks: int) -> None:
    optional = ("incremental_accuracy", "forgetting_of_joint")
    for key in ("average_accuracy", "forgetting", *optional):
        if key not in optional or side.get(key) is not None:
            _number(side.get(key), where, f"{name}.{key}")
    matrix = _list(side.get("matrix"), where, f"{name}.matrix")
    if len(matrix) != tasks:
        raise _malformed(where, f"{name}.matrix", f"{len(matrix)} rows", f"{tasks} rows, one a task")
    for i, row in enumerate(matrix):
        at = f"{name}.matrix[{i}]"
        if len(_list(row, where, at)) != tasks or any(value is not None for value in row[i + 1 :]):
            raise _malformed(where, at, row, f"{i + 1} accuracies, then null up to {tasks} columns")
        for value in row[: i + 1]:
            if not 0 <= _number(value, where, at) <= 100:
                raise _malformed(where, at, value, "an accuracy from 0 to 100 %")
    for key in ("accuracy_after_task", "forgetting_after_task", "seconds"):
        values = side.get(key)
        if values is None:
            continue
        if len(_list(values, where, f"{name}.{key}")) != tasks:
            raise _malformed(where, f"{name}.{key}", f"{len(values)} values", f"{tasks}, one a task")
        for value in values:
            if abs(_number(value, where, f"{name}.{key}")) > 100 and key != "seconds":
                raise _malformed(where, f"{name}.{key}", value, "at most 100")


def check_profile(document: object) -> dict[str, Any]:
    """Refuse what is no `profile --json` document; returns it. Raises: InputError."""
    where = "profile"
    fields = _object(document, where, "the document")
    end = _object(fields.get("end_to_end_ms"), where, "end_to_end_ms")
    for key in ("p50", "p99"):
        _number(end.get(key), where, f"end_to_end_ms.{key}")
    for key, value in fields.items():
        if key.endswith("_ms") and isinstance(value, dict):
            for name, number in value.items():
                _number(number, where, f"{key}.{name}")
    for flag in _list(fields.get("flags", []), where, "flags"):
        if not isinstance(flag, str):
            raise _malformed(where, "flags", flag, "strings")
    for key in ("context", "definitions"):
        _object(fields.get(key) or {}, where, key)
    if fields.get("trace_ms") is not None:
        trace = _list(fields["trace_ms"], where, "trace_ms")
        for value in trace:
            if _number(value, where, "trace_ms") < 0:
                raise _malformed(where, "trace_ms", value, "milliseconds, not negative")
        if not trace:
            raise _malformed(where, "trace_ms", trace, "at least one value, or no such key")
    return fields


def check_recorded(bundle: Bundle) -> None:
    """Of the manifest, the numbers that `open_bundle` has no use for and the page shows."""
    where = str(bundle.path / "manifest.json")
    parity = _object(bundle.manifest.get("parity") or {}, where, "parity")
    for key in parity.keys() & PARITY.keys():
        _number(parity[key], where, f"parity.{key}")
    accuracy = _object(bundle.manifest.get("accuracy") or {}, where, "accuracy")
    for key in ("average_accuracy", "forgetting", "images"):
        if accuracy.get(key) is not None:
            _number(accuracy[key], where, f"accuracy.{key}")
    for value in _list(accuracy.get("per_task") or [], where, "accuracy.per_task"):
        _number(value, where, "accuracy.per_task")


def check_quantisation(bundle: Bundle) -> None:
    """Of the manifest's "quantisation", what the page shows. Raises: InputError."""
    where, tasks = str(bundle.path / "manifest.json"), len(bundle.tasks)
    found = _object(bundle.manifest.get("quantisation") or {}, where, "quantisation")
    for key in ("smooth", "max_drop"):
        if found.get(key) is not None:
            _number(found[key], where, f"quantisation.{key}")
    ranges = _object(found.get("ranges") or {}, where, "quantisation.ranges")
    for key in ("kept_tasks", "images"):
        _number(ranges.get(key) or 0, where, f"quantisation.ranges.{key}")
    _list(ranges.get("tasks_with_images") or [], where, "quantisation.ranges.tasks_with_images")
    for key in ("definitions", "recommended"):
        _object(found.get(key) or {}, where, f"quantisation.{key}")
    for name, flavour in _object(found.get("flavours") or {}, where, "quantisation.flavours").items():
        _check_flavour(_object(flavour, where, name), where, f"quantisation.flavours.{name}", tasks)
    for i, entry in enumerate(_list(found.get("latency") or [], where, "quantisation.latency")):
        fields = _object(entry, where, f"quantisation.latency[{i}]")
        for key in ("compute_ms", "ratio"):
            if _number(fields.get(key), where, f"quantisation.latency[{i}].{key}") <= 0:
                raise _malformed(where, f"quantisation.latency[{i}].{key}", fields[key], "a number above 0")
        for key in ("backend", "precision"):
            if not isinstance(fields.get(key), str):
                raise _malformed(where, f"quantisation.latency[{i}].{key}", fields.get(key), "a name")


def _check_flavour(flavour: Mapping[str, Any], where: str, at: str, tasks: int) -> None:
    for key in ("agreement", "max_abs_error", "layers_int8", "images"):
        _number(flavour.get(key), where, f"{at}.{key}")
    _list(flavour.get("layers_float") or [], where, f"{at}.layers_float")
    for unit, value in _object(flavour.get("sensitivity") or {}, where, f"{at}.sensitivity").items():
        _number(value, where, f"{at}.sensitivity.{unit}")
    if flavour.get("before") is None or flavour.get("after") is None:
        return
    for side in ("before", "after", "drop"):
        fields = _object(flavour.get(side), where, f"{at}.{side}")
        names = ("average",) if side == "drop" else ("average_accuracy", "confidence", "calibration_error")
        for key in names:
            _number(fields.get(key), where, f"{at}.{side}.{key}")
        values = _list(fields.get("per_task"), where, f"{at}.{side}.per_task")
        known = [_number(v, where, f"{at}.{side}.per_task") for v in values if v is not None]
        if len(values) != tasks or not known:
            raise _malformed(where, f"{at}.{side}.per_task", values, f"{tasks} numbers or null, not all null")
    if flavour.get("quantisation_forgetting") is not None:
        _number(flavour["quantisation_forgetting"], where, f"{at}.quantisation_forgetting")


def check_pair(metrics: Mapping[str, Any], bundle: Bundle) -> None:
    """A page that mixes two runs would mislead: classes, tasks and the student's matrix must agree."""
    training = bundle.manifest.get("training") or {}
    student = training.get("student") if isinstance(training, dict) else None
    same = list(bundle.classes) == metrics["classes"] and [list(t) for t in bundle.tasks] == metrics["tasks"]
    if same and isinstance(student, dict) and "matrix" in student:
        same = student["matrix"] == metrics["student"]["matrix"]
    if not same:
        raise InputError(
            f"{bundle.path}: was not exported from this run",
            got="other classes, other tasks or another accuracy matrix",
            expected="the run that the bundle was exported from",
            fix="leave the run out: the bundle keeps its own training record",
        )


def check_measured(profile: Mapping[str, Any], bundle: Bundle | None) -> None:
    """Latency of another graph must not stand under this one's name. Raises: InputError."""
    context = profile.get("context") or {}
    digest, version = context.get("graph_sha256"), context.get("manifest_sha256")
    if bundle is None:
        if version is not None or digest is not None:  # a run alone does not say which bundles were made from it
            raise InputError(
                "a profile without the bundle that it was measured on",
                got=f"a run and a profile of bundle {profile.get('bundle') or version or digest!s:.64}",
                expected="the bundle too",
                fix="give it: cdl-edge report RUN BUNDLE --profile FILE --out PAGE",
            )
        return
    known = {entry["sha256"] for entry in bundle.manifest["files"].values()}
    # Two bundles of one architecture have the same graph: what they have learnt lies in other files.
    if version is not None and version != bundle.manifest["manifest_sha256"]:
        raise InputError(
            f"{bundle.path}: the profile was measured on another bundle",
            got=f"version {version!s:.16}",
            expected=f"version {bundle.manifest['manifest_sha256']:.16}",
            fix=f"measure this one: cdl-edge profile {bundle.path} --json",
        )
    if digest is not None and digest not in known:
        raise InputError(
            f"{bundle.path}: the profile was measured on another graph",
            got=f"sha256 {digest!s:.64}",
            expected="the hash of a graph of this bundle",
            fix=f"measure this one: cdl-edge profile {bundle.path} --json",
        )


def _malformed(where: str, field: str, got: object, expected: str) -> InputError:
    return InputError(f"{where}: malformed field {field}", got=f"{got!r:.160}", expected=expected, fix="write it again")


def _object(value: object, where: str, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _malformed(where, field, value, "an object")
    return value


def _list(value: object, where: str, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise _malformed(where, field, value, "a list")
    return value


def _number(value: object, where: str, field: str) -> float:
    # The bound also keeps out integers that no float can hold.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e15:
        raise _malformed(where, field, value, "a finite number")
    return float(value)
