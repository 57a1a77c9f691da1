"""One self-contained HTML page about a run, its bundle and its latency: numbers, charts and a model card.

The page loads nothing: styles are inline, charts are inline SVG, there is no script, and its own content security
policy forbids all three. The same input gives the same bytes. numpy, the standard library and jinja2 only.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from . import __version__
from .errors import InputError
from .files import write_text
from .runtime.bundle import Bundle, open_bundle

SCHEMA = 1
"version of metrics.json that this code reads"
TEMPLATE = "report.html.j2"

# Sequential, one hue, darker (on a light page) or lighter (on a dark page) is more: readable with every kind of colour
# vision and in grey print. The text on each step is chosen by contrast in `ink`.
HEAT_LIGHT = ("#f1f6fb", "#deeaf6", "#c8dcf0", "#abcbe6", "#86b4da", "#5e9acb", "#2f75b0", "#1f5f99", "#134678")
HEAT_DARK = ("#17212c", "#1a2d3f", "#1d3a55", "#21496d", "#285a88", "#3670a5", "#568fc2", "#86b2da", "#bdd8ef")
INKS = ("#ffffff", "#0b1620")

LEARNERS = {"l2p": "L2P", "dualprompt": "DualPrompt", "coda": "CODA-Prompt", "apt": "APT", "finetune": "Fine-tuning"}
DISTILLERS = {
    "none": "no distillation",
    "kd": "KD",
    "dkd": "DKD",
    "fitnets": "FitNets",
    "reviewkd": "ReviewKD",
    "kd-token": "KD token",
    "kdp": "KDP",
    "cdl-prompt": "CDL-Prompt",
    "blockwise": "block-wise logits",
    "m2kd": "M2KD",
}
# Of the graph's path through one picture, in time order; unknown stages follow, end to end is always last.
STAGES = ("decode", "preprocess", "h2d", "enqueue", "gpu", "compute", "d2h", "post", "postprocess", "end_to_end")
STAGE_NAMES = {"h2d": "Host to device", "d2h": "Device to host", "gpu": "GPU", "end_to_end": "End to end"}
STATISTICS = ("n", "min", "mean", "std", "p50", "p90", "p95", "p99", "max")
FLAGS = {
    "unstable": "The standard deviation is more than 2.5 % of the mean: the machine was busy or its clock moved. Close "
    "other programs, fix the clock and measure again before comparing.",
    "jitter": "p99 is more than 1.5 times p50: most pictures are quick, some wait. Plan for p99, not for p50.",
    "enqueue-bound": "Handing work to the GPU takes more than 80 % of the GPU's own time: the processor is the limit, "
    "a CUDA graph would help.",
    "throttled": "The device lowered its clock while it was measured: heat or power. Cool it, or lower its power mode.",
}
ACRONYMS = {"cpu", "gpu", "os", "sha256", "onnx", "rss", "kd", "id", "url"}
OF_DISTILLATION = ("teacher", "alpha", "tau", "kd_blocks", "kd_length")
"options that mean nothing in a run without a teacher"
WORDS = {
    "cpu_count": "Processor cores",
    "peak_rss_bytes": "Peak memory of the process",
    "first_inference_ms": "First inference",
    "load_ms": "Load the session",
    "check_ms": "Check the bundle",
    "load_average": "Load average (1 min)",
    "limit_per_class": "Training images a class",
    "kd_blocks": "Blocks with KD prompts",
    "kd_length": "KD rows a block",
    "out": "Run folder",
    "distill": "Distiller",
    "batch": "Images in one call",
    "compat": "Authors' behaviour (compat)",
    "augment": "Augmentation",
    "tau": "Temperature (tau)",
    "alpha": "Distillation share (alpha)",
}


def write_report(
    out: Path, run: Path | None = None, bundle: Path | None = None, profile: Mapping[str, Any] | None = None
) -> Path:
    """Write the page and return its path.

    Args:
        out: HTML file to write, whole or not at all.
        run: folder written by train (metrics.json). None: what the bundle keeps of it, if any.
        bundle: folder written by export or calibrate; every file of it is hashed.
        profile: what `profile --json` prints, with an optional "trace_ms": end-to-end milliseconds of each call.

    Raises: InputError when there is neither run nor bundle, when something is missing, damaged, malformed or newer than
        this code, and when run, bundle and profile do not belong together.
    """
    out = Path(out)
    if out.is_dir():
        raise InputError(f"{out}: is a folder", expected="an HTML file", fix=f"name {out / 'report.html'}")
    if run is None and bundle is None:
        raise InputError("nothing to report on", expected="a run folder, a bundle folder or both")
    metrics = read_metrics(run) if run is not None else None
    opened = open_bundle(bundle) if bundle is not None else None
    if opened is not None:
        _check_recorded(opened)
        training = opened.manifest.get("training")
        if metrics is None and training:
            metrics = check_metrics(training, f"{opened.path}: manifest.json, training")
        elif metrics is not None:
            _check_pair(metrics, opened)
    checked = check_profile(profile) if profile is not None else None
    if opened is not None and checked is not None:
        _check_measured(checked, opened)
    html = render(metrics, opened, checked)
    # A file name that is no UTF-8 reaches JSON as a lone surrogate, which no UTF-8 file can hold.
    write_text(out, html.encode("utf-8", "replace").decode("utf-8"))
    return out


def render(metrics: Mapping[str, Any] | None, bundle: Bundle | None, profile: Mapping[str, Any] | None) -> str:
    """The page as text, from documents that have been checked."""
    # Autoescape: class names and paths are the user's, and end up in a page that is opened with a double click.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = {
        "accuracy": _accuracy(metrics) if metrics else None,
        "latency": _latency(profile) if profile else None,
        "export": _export(bundle) if bundle else None,
        "card": _card(metrics, bundle, profile),
    }
    return environment.get_template(TEMPLATE).render(
        header=_header(metrics, bundle),
        figures=_figures(metrics, bundle, profile),
        heat_light=[(c, ink(c)) for c in HEAT_LIGHT],
        heat_dark=[(c, ink(c)) for c in HEAT_DARK],
        version=__version__,
        **sections,
    )


# -- reading -----------------------------------------------------------------------------------------------------------


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


def _check_side(side: Mapping[str, Any], where: str, name: str, tasks: int) -> None:
    for key in ("average_accuracy", "forgetting", "incremental_accuracy"):
        if key != "incremental_accuracy" or side.get(key) is not None:
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


def _check_recorded(bundle: Bundle) -> None:
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


def _check_pair(metrics: Mapping[str, Any], bundle: Bundle) -> None:
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


def _check_measured(profile: Mapping[str, Any], bundle: Bundle) -> None:
    """Latency of another graph must not stand under this one's name."""
    digest = (profile.get("context") or {}).get("graph_sha256")
    known = {entry["sha256"] for entry in bundle.manifest["files"].values()}
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


# -- words and numbers -------------------------------------------------------------------------------------------------


def ink(colour: str) -> str:
    """Of INKS, the one with more contrast on `colour` (WCAG 2 contrast ratio)."""
    return max(INKS, key=lambda text: contrast(text, colour))


def contrast(a: str, b: str) -> float:
    """WCAG 2 contrast ratio of two #rrggbb colours, 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * blue

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def size_text(count: float) -> str:
    """Bytes in decimal units: "22.4 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return (
        f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
    )


def duration_text(seconds: float) -> str:
    """ "38.2 s", "12 min 5 s", "3 h 20 min"."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def ms_text(value: float) -> str:
    """Milliseconds with three or more significant digits and no unit: "0.123", "4.56", "1,234"."""
    if value and abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"


def _power_text(value: float) -> str:
    """A very small number: "3.1 × 10⁻⁶"."""
    if not value or 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}"
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits} × 10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def _source_name(source: str) -> str:
    """A data source as a title: the folder's name, or the data set's."""
    kind, _, path = source.partition(":")
    names = {"digits": "Digits", "cifar100": "CIFAR-100", "imagenet-r": "ImageNet-R"}
    return (Path(path).name or path) if kind == "folder" and path else names.get(kind, source)


def _label(key: str) -> str:
    if key in WORDS:
        return WORDS[key]
    stem = key
    for unit in ("_ms", "_bytes", "_c", "_w", "_mj", "_mhz"):
        stem = stem.removesuffix(unit)
    words = [w.upper() if w in ACRONYMS and w != "sha256" else w for w in stem.replace("-", " ").split("_")]
    text = " ".join(words)
    return text[:1].upper() + text[1:]


def _value(key: str, value: object) -> str | None:
    """A JSON value in words; None for what is not known."""
    if value is None or value == {} or value == []:
        return None
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        inner = {k: _value(key if key.endswith("_bytes") else k, v) for k, v in value.items()}
        return ", ".join(f"{k} {v}" for k, v in inner.items() if v is not None) or None
    if isinstance(value, list):
        texts = [_value("", v) or "none" for v in value]
        return " × ".join(texts) if key in ("shape", "logits", "prompt_weights") else ", ".join(texts)
    if isinstance(value, (int, float)):
        if key.endswith("_bytes"):
            return size_text(value)
        units = {"_ms": "ms", "_c": "°C", "_w": "W", "_mj": "mJ", "_mhz": "MHz"}
        unit = next((u for suffix, u in units.items() if key.endswith(suffix)), None)
        number = ms_text(value) if key.endswith("_ms") else f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
        if key in ("seed", "opset", "schema"):
            number = str(value)
        return f"{number} {unit}" if unit else number
    return str(value)


def _rows(fields: Mapping[str, Any], leave_out: Iterable[str] = ()) -> list[tuple[str, str]]:
    """(label, value) of every known field."""
    pairs = [(_label(key), _value(key, value)) for key, value in fields.items() if key not in leave_out]
    return [(label, value) for label, value in pairs if value is not None]


def _method(learner: object, distiller: object) -> str:
    """ "CODA-Prompt + KDP"."""
    first = LEARNERS.get(str(learner), str(learner))
    return f"{first} + {DISTILLERS.get(str(distiller), str(distiller))}" if distiller else first


# -- sections ----------------------------------------------------------------------------------------------------------


def _settings(metrics: Mapping[str, Any] | None, bundle: Bundle | None) -> dict[str, Any]:
    """learner, distill, query, data, teacher, student: of the run, else of the bundle; None where nobody knows."""
    manifest: Mapping[str, Any] = bundle.manifest if bundle else {}
    backbone = manifest.get("backbone")
    fallback = {
        "learner": manifest.get("learner"),
        "distill": manifest.get("distiller"),
        "query": manifest.get("query"),
        "data": (manifest.get("accuracy") or {}).get("source"),
        "student": backbone.get("source") if isinstance(backbone, dict) else backbone,
        "teacher": None,
    }
    config = metrics["config"] if metrics else {}
    found = {key: config.get(key) or value for key, value in fallback.items()}
    if metrics and metrics.get("teacher") is None:
        found["teacher"] = None  # a run without distillation trains none, whatever the option's default says
    return found


def _header(metrics: Mapping[str, Any] | None, bundle: Bundle | None) -> dict[str, Any]:
    settings = _settings(metrics, bundle)
    name = bundle.name if bundle else None
    title = _source_name(str(settings["data"])) if settings["data"] else name or "Report"
    return {
        "title": title,
        "method": _method(settings["learner"], settings["distill"]) if settings["learner"] else None,
        "teacher": settings["teacher"],
        "student": settings["student"],
        "bundle": name if name != title else None,
        "created": str(bundle.manifest.get("created") or "") if bundle else "",
    }


def _figures(
    metrics: Mapping[str, Any] | None, bundle: Bundle | None, profile: Mapping[str, Any] | None
) -> list[dict[str, str]]:
    """The tiles at the top: {"label", "value", "unit", "note"}."""
    tiles: list[dict[str, str]] = []

    def add(label: str, value: str, unit: str = "", note: str = "") -> None:
        tiles.append({"label": label, "value": value, "unit": unit, "note": note})

    accuracy = (bundle.manifest.get("accuracy") or {}) if bundle else {}
    if metrics:
        student, teacher = metrics["student"], metrics.get("teacher")
        gap = "no teacher"
        if teacher:
            behind = student["average_accuracy"] - teacher["average_accuracy"]
            sign = "+" if behind >= 0 else "−"
            gap = f"teacher {teacher['average_accuracy']:.2f} %, student {sign}{abs(behind):.2f}"
        add("Final average accuracy", f"{student['average_accuracy']:.2f}", "%", gap)
        note = f"teacher {teacher['forgetting']:.2f}" if teacher else "lower is better"
        add("Forgetting", f"{student['forgetting']:.2f}", "points", note)
        if student.get("incremental_accuracy") is not None:
            add("Incremental accuracy", f"{student['incremental_accuracy']:.2f}", "%", "mean over all stages")
    elif accuracy.get("average_accuracy") is not None:
        add("Final average accuracy", f"{accuracy['average_accuracy']:.2f}", "%", "of the exported student")
        if accuracy.get("forgetting") is not None:
            add("Forgetting", f"{accuracy['forgetting']:.2f}", "points", "lower is better")
    classes = metrics["classes"] if metrics else bundle.classes if bundle else []
    tasks = metrics["tasks"] if metrics else bundle.tasks if bundle else []
    add("Classes", f"{len(classes):,}", "", f"learnt in {len(tasks)} task{'s' * (len(tasks) != 1)}")
    images = _images(metrics, bundle)
    if images:
        add("Images", *images)
    if metrics and metrics.get("seconds") is not None:
        add("Training time", duration_text(metrics["seconds"]), "", _on_device(metrics))
    if bundle:
        precision = bundle.manifest.get("precision")
        number, unit = size_text(bundle.size_bytes).split(" ")
        add("Bundle size", number, unit, str(precision) if precision else "")
    if profile:
        end = profile["end_to_end_ms"]
        note = str(profile.get("backend") or "") or "one picture, end to end"
        add("Latency p50 / p99", f"{ms_text(end['p50'])} / {ms_text(end['p99'])}", "ms", note)
    return tiles


def _images(metrics: Mapping[str, Any] | None, bundle: Bundle | None) -> tuple[str, str, str] | None:
    """(value, unit, note) of the images' tile: training and validation if the run counted them, else evaluated."""
    counts = (metrics or {}).get("images")
    if isinstance(counts, dict) and counts.get("train") is not None:
        held = counts.get("val")
        return f"{counts['train']:,}", "", "for training" + (f", {held:,} held out" if held is not None else "")
    if isinstance(counts, int):
        return f"{counts:,}", "", "in the data source"
    accuracy = (bundle.manifest.get("accuracy") or {}) if bundle else {}
    if isinstance(accuracy.get("images"), int):
        return f"{accuracy['images']:,}", "", "evaluated"
    return None


def _on_device(metrics: Mapping[str, Any]) -> str:
    device = metrics.get("device")
    return f"on {str(device).upper()}" if device else ""


def _accuracy(metrics: Mapping[str, Any]) -> dict[str, Any]:
    sides = [(name, metrics[name]) for name in ("student", "teacher") if metrics.get(name) is not None]
    values = [v for _, side in sides for row in side["matrix"] for v in row if v is not None]
    low, high = heat_domain(values)
    heats = []
    for name, side in sides:
        rows = [[_heat_cell(value, low, high) for value in row] for row in side["matrix"]]
        heats.append({"name": name.capitalize(), "rows": rows, "average": f"{side['average_accuracy']:.2f}"})

    charts = []
    for key, title, unit, zero in (
        ("accuracy_after_task", "Average accuracy", "%", False),
        ("forgetting_after_task", "Forgetting", "points", True),
    ):
        series = [(name, side[key]) for name, side in sides if side.get(key)]
        if series and len(metrics["tasks"]) > 1:  # one point is no line
            charts.append(line_chart(title, unit, series, zero))
    columns = [
        (f"{name.capitalize()} {what}", [f"{v:.2f}" for v in side[key]])
        for name, side in sides
        for key, what in (("accuracy_after_task", "accuracy, %"), ("forgetting_after_task", "forgetting, points"))
        if side.get(key)
    ]
    columns += [
        (f"{name.capitalize()} training, s", [f"{v:,.1f}" for v in side["seconds"]])
        for name, side in sides
        if side.get("seconds")
    ]
    definitions = metrics.get("definitions") or {}
    return {
        "heats": heats,
        "wide": len(metrics["tasks"]) > 11,
        "low": f"{low:.0f}",
        "high": f"{high:.0f}",
        "reading": definitions.get("matrix"),
        "charts": charts,
        "columns": columns,
        "tasks": len(metrics["tasks"]),
    }


def heat_domain(values: Sequence[float]) -> tuple[float, float]:
    """Ends of the colour scale in %: the multiples of 10 around the values, at least 10 apart."""
    low, high = 10 * math.floor(min(values) / 10), 10 * math.ceil(max(values) / 10)
    return (float(low), float(high)) if high > low else (float(max(0, low - 10)), float(max(10, high)))


def _heat_cell(value: float | None, low: float, high: float) -> dict[str, Any] | None:
    if value is None:
        return None
    step = min(len(HEAT_LIGHT) - 1, int((value - low) / (high - low) * len(HEAT_LIGHT)))
    return {"text": f"{value:.1f}" if value < 99.95 else "100", "step": step}


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at or below `low` to at or above `high`."""
    span = max(high - low, 1e-9)
    step = next(
        m * 10.0**e
        for e in itertools.count(math.floor(math.log10(span / most)))
        for m in (1, 2, 5)
        if span / (m * 10.0**e) <= most - 1
    )
    return [round(step * i, 10) for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def line_chart(title: str, unit: str, series: Sequence[tuple[str, Sequence[float]]], zero: bool) -> dict[str, Any]:
    """Geometry of one value per task, in pixels of a fixed view box.

    Args:
        series: (name, values (T,)); all of one length.
        zero: the axis must include 0.
    """
    width, height, left, right, top, bottom = 480, 268, 44, 88, 24, 44
    flat = [v for _, values in series for v in values]
    low, high = min([*flat, 0.0]) if zero else min(flat), max(flat)
    # Nearly constant values must not look like a landslide.
    padding = max(0.0, 4.0 - (high - low)) / 2
    if not zero:
        low, high = max(0.0, low - padding), min(100.0, high + padding)
    marks = ticks(low, max(high, low + 2.0))
    tasks = len(series[0][1])

    def x(i: int) -> float:
        return round(left + (width - left - right) * i / (tasks - 1), 2)

    def y(value: float) -> float:
        return round(height - bottom - (height - top - bottom) * (value - marks[0]) / (marks[-1] - marks[0]), 2)

    lines: list[dict[str, Any]] = []
    for name, values in series:
        points = [
            {"x": x(i), "y": y(v), "title": f"{name.capitalize()}, after task {i + 1}: {v:.2f} {unit}"}
            for i, v in enumerate(values)
        ]
        path = "M" + " L".join(f"{p['x']} {p['y']}" for p in points)
        lines.append({"name": name, "points": points, "path": path, "last": f"{values[-1]:.1f}"})
    for line, label_y in zip(lines, spread([line["points"][-1]["y"] for line in lines], 30), strict=True):
        line["label_y"] = min(label_y, height - bottom - 4)
    every = math.ceil(tasks / 12)
    decimals = 0 if all(m == round(m) for m in marks) else 1
    return {
        "title": title,
        "unit": unit,
        "width": width,
        "height": height,
        "left": left,
        "right": width - right,
        "top": top,
        "floor": height - bottom,
        "y_ticks": [{"y": y(m), "text": f"{m:.{decimals}f}", "zero": m == 0 and marks[0] < 0} for m in marks],
        "x_ticks": [{"x": x(i), "text": str(i + 1)} for i in range(tasks) if i % every == 0],
        "lines": lines,
        "alt": f"{title} after each of {tasks} tasks, in {unit}. "
        + " ".join(f"{name.capitalize()}: from {v[0]:.1f} to {v[-1]:.1f}." for name, v in series),
    }


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Move labels apart until neighbours are `gap` pixels from each other, in their order here."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    moved = list(positions)
    for above, below in itertools.pairwise(order):
        missing = gap - (moved[below] - moved[above])
        if missing > 0:
            moved[above] -= missing / 2
            moved[below] += missing / 2
    return moved


def histogram(trace_ms: Sequence[float], most: int = 40) -> tuple[list[float], list[int], int]:
    """Counts over bins of a round width.

    Returns: (edges (B + 1,), counts (B,), overflow): counts plus overflow make len(trace_ms). Values far above p99 are
        the overflow: one hiccup of the operating system must not flatten everything else.
    """
    values = np.asarray(trace_ms, dtype=np.float64)
    low, p99, largest = float(values.min()), float(np.percentile(values, 99)), float(values.max())
    high = min(largest, p99 + 0.3 * (p99 - low))
    edges = ticks(low, max(high, low * 1.001 + 1e-6), most)
    # A value on the last edge belongs to the last bin, as in numpy.
    inside = values <= edges[-1]
    counts, _ = np.histogram(values[inside], bins=np.asarray(edges))
    return edges, [int(c) for c in counts], int((~inside).sum())


def _histogram_chart(trace_ms: Sequence[float], end: Mapping[str, float]) -> dict[str, Any]:
    width, height, left, right, top, bottom = 480, 288, 44, 20, 66, 44
    edges, counts, overflow = histogram(trace_ms)
    marks = [m for m in ticks(0, max(counts), 5) if m == round(m)]

    def x(value: float) -> float:
        return left + (width - left - right) * (value - edges[0]) / (edges[-1] - edges[0])

    def y(count: float) -> float:
        return height - bottom - (height - top - bottom) * count / marks[-1]

    bars = [
        {
            "x": round(x(a) + 0.5, 2),
            "y": round(y(count), 2),
            "width": round(max(0.5, x(b) - x(a) - 1), 2),
            "height": round(height - bottom - y(count), 2),
            "title": f"{a:g} to {b:g} ms: {count:,} call{'s' * (count != 1)}",
        }
        for a, b, count in zip(edges, edges[1:], counts, strict=False)
        if count
    ]
    lines = []
    for row, name in enumerate(("p50", "p90", "p99")):
        value = float(end.get(name, np.percentile(trace_ms, int(name[1:]))))
        at = round(min(max(x(value), left), width - right), 2)
        flip = at > width - right - 100
        lines.append({"name": name, "text": f"{ms_text(value)} ms", "x": at, "y": 16 + 17 * row, "flip": flip})
    most = 7
    while len(numbers := [m for m in ticks(edges[0], edges[-1], most) if edges[0] - 1e-9 <= m <= edges[-1] + 1e-9]) > 8:
        most -= 1
    return {
        "width": width,
        "height": height,
        "left": left,
        "right": width - right,
        "top": top,
        "floor": height - bottom,
        "bars": bars,
        "lines": lines,
        "x_ticks": [{"x": round(x(m), 2), "text": f"{m:g}"} for m in numbers],
        "y_ticks": [{"y": round(y(m), 2), "text": f"{m:,.0f}"} for m in marks],
        "overflow": f"{overflow:,} of {len(trace_ms):,} calls took longer than {edges[-1]:g} ms (at most "
        f"{ms_text(max(trace_ms))} ms) and are not drawn."
        if overflow
        else None,
        "n": f"{len(trace_ms):,}",
        "alt": f"Distribution of {len(trace_ms):,} end-to-end times in ms. "
        + ", ".join(f"{line['name']} {line['text']}" for line in lines),
    }


def _latency(profile: Mapping[str, Any]) -> dict[str, Any]:
    stages = {key.removesuffix("_ms"): v for key, v in profile.items() if key.endswith("_ms") and isinstance(v, dict)}
    position = {name: i for i, name in enumerate(STAGES)}
    names = sorted(stages, key=lambda s: (s == "end_to_end", position.get(s, len(STAGES))))
    columns = [c for c in STATISTICS if any(c in stages[name] for name in names)]
    end = profile["end_to_end_ms"]
    definitions = profile.get("definitions") or {}
    table = []
    for name in names:
        stage = stages[name]
        mean, std = stage.get("mean"), stage.get("std")
        table.append(
            {
                "name": STAGE_NAMES.get(name, _label(name)),
                "total": name == "end_to_end",
                "definition": definitions.get(f"{name}_ms"),
                "cells": [
                    "" if c not in stage else f"{stage[c]:,.0f}" if c == "n" else ms_text(stage[c]) for c in columns
                ],
                "spread": f"{100 * std / mean:.1f} %" if mean and std is not None else "",
                "share": round(100 * mean / end["mean"]) if mean is not None and end.get("mean") else None,
            }
        )
    flags = [
        {"name": f, "text": next((t for k, t in FLAGS.items() if f.startswith(k)), None)}
        for f in profile.get("flags", [])
    ]
    top = {k: v for k, v in profile.items() if k not in ("context", "definitions", "flags", "trace_ms")}
    top = {k: v for k, v in top.items() if not (k.endswith("_ms") and isinstance(v, dict))}
    return {
        "chart": _histogram_chart(profile["trace_ms"], end) if profile.get("trace_ms") else None,
        "columns": columns,
        "has_spread": any(row["spread"] for row in table),
        "has_share": sum(row["share"] is not None for row in table) > 1,
        "table": table,
        "flags": flags,
        "rate": f"{1000 / end['mean']:,.3g}" if end.get("mean") else None,
        "p50": ms_text(end["p50"]),
        "p99": ms_text(end["p99"]),
        "context": _rows({**top, **(profile.get("context") or {})}, ("bundle", "files_bytes")),
    }


def _export(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    known: Mapping[str, float] = manifest.get("parity") or {}
    tiles = [{"label": label, "value": text(known[key])} for key, (label, text) in PARITY.items() if key in known]
    passed = None
    if "max_abs_error" in known and "tolerance" in known:
        passed = known["max_abs_error"] <= known["tolerance"]
    accuracy = manifest.get("accuracy") or {}
    per_task = accuracy.get("per_task") or []
    facts = _rows({key: _without_identity(manifest.get(key)) for key in (*GRAPH_FACTS, "quantisation")})
    inputs = manifest["input"]
    facts.append(("Input", f"{_value('shape', inputs['shape'])} {inputs['dtype']}, {inputs.get('layout', 'NHWC')}"))
    facts += _rows({k: inputs.get(k) for k in ("dynamic_batch", "normalisation", "preprocessing")})
    facts += [(f"Output {name}", _value("shape", shape) or "") for name, shape in manifest["outputs"].items() if shape]
    facts += _rows({"graphs": manifest["graphs"]})
    return {
        "parity": tiles,
        "passed": passed,
        "per_task": [f"{v:.1f}" for v in per_task],
        "accuracy": f"{accuracy['average_accuracy']:.2f}" if accuracy.get("average_accuracy") is not None else None,
        "accuracy_images": f"{accuracy['images']:,}" if isinstance(accuracy.get("images"), int) else None,
        "accuracy_source": accuracy.get("source"),
        "files": [
            {"name": name, "size": size_text(entry["bytes"]), "bytes": f"{entry['bytes']:,}", "sha256": entry["sha256"]}
            for name, entry in manifest["files"].items()
        ],
        "total": size_text(bundle.size_bytes),
        "manifest_sha256": manifest["manifest_sha256"],
        "facts": facts,
    }


def _without_identity(value: object) -> object:
    """A backbone's hash has its place in the model card."""
    return {k: v for k, v in value.items() if k != "identity"} if isinstance(value, dict) else value


GRAPH_FACTS = ("learner", "distiller", "query", "alpha", "selection", "backbone", "profile", "opset", "precision")
PARITY = {
    "max_abs_error": ("Largest error of a logit", _power_text),
    "tolerance": ("Tolerance", _power_text),
    "mean_abs_error": ("Mean error", _power_text),
    "top1_agreement": ("Same first class", lambda v: f"{v:.2f} %"),
    "images": ("Images compared", lambda v: f"{v:,.0f}"),
}


def _card(
    metrics: Mapping[str, Any] | None, bundle: Bundle | None, profile: Mapping[str, Any] | None
) -> dict[str, Any]:
    settings = _settings(metrics, bundle)
    classes: Sequence[str] = metrics["classes"] if metrics else bundle.classes if bundle else ()
    tasks: Sequence[Sequence[int]] = metrics["tasks"] if metrics else bundle.tasks if bundle else ()
    backbones = dict((metrics or {}).get("backbones") or {})
    if not backbones and bundle and isinstance(bundle.manifest.get("backbone"), dict):
        backbones = {"student": bundle.manifest["backbone"]}
    keys = [k for k in ("source", "identity", "width", "depth", "heads") if any(b.get(k) for b in backbones.values())]
    versions = {
        "Training": (metrics or {}).get("versions"),
        "Export": (bundle.manifest if bundle else {}).get("versions"),
    }
    columns = {name: v for name, v in versions.items() if isinstance(v, dict) and v}
    packages = sorted({p for v in columns.values() for p in v}, key=lambda p: (p != "cdl-edge", p))
    definitions = (metrics or {}).get("definitions") or {}
    skipped = [str(line) for line in (metrics or {}).get("skipped") or []]
    return {
        "data": settings["data"],
        "class_count": len(classes),
        "tasks": [{"count": len(task), "names": [classes[c] for c in task]} for task in tasks],
        "skipped": skipped[:20],
        "skipped_count": len(skipped),
        "backbone_columns": [_label(k) for k in keys],
        "backbones": [
            {"name": side.capitalize(), "cells": [_value(k, b.get(k)) or "" for k in keys]}
            for side, b in backbones.items()
        ],
        "frozen": settings["learner"] != "finetune",
        "training": _training(metrics) if metrics else [],
        "definitions": [(_label(k), str(v)) for k, v in definitions.items()],
        "limitations": _limitations(metrics, bundle, profile, len(classes)),
        "version_columns": list(columns),
        "versions": [(p, [_value("", v.get(p)) or "" for v in columns.values()]) for p in packages],
    }


def _training(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The options, with what "auto" came to in place of the word."""
    resolved = {k: metrics[k] for k in ("device", "precision", "threads") if metrics.get(k) is not None}
    left_out = () if metrics.get("teacher") else OF_DISTILLATION
    return _rows({**metrics["config"], **resolved}, (*left_out, "devices") if "device" in resolved else left_out)


def _limitations(
    metrics: Mapping[str, Any] | None, bundle: Bundle | None, profile: Mapping[str, Any] | None, classes: int
) -> list[str]:
    """What the numbers do not say, from what is known."""
    lines = [
        f"Every picture gets one of the {classes:,} classes, also one that shows none of them. The probability of a "
        "prediction is not calibrated: choose a threshold on your own pictures before acting on it.",
    ]
    if metrics:
        config = metrics["config"]
        seed = f" ({config['seed']})" if "seed" in config else ""
        lines.append(f"One run with one seed{seed} and one class order: differences below about a point are noise.")
        lines.append(
            "Accuracy was measured on held-out images of the same source: other cameras, light or viewpoints lower it."
        )
        last = metrics["student"]["matrix"][-1]
        if len(last) > 1:
            weakest = min(range(len(last)), key=last.__getitem__)
            lines.append(
                f"The average hides differences: the weakest task at the end is task {weakest + 1} with "
                f"{last[weakest]:.1f} %."
            )
        if config.get("limit_per_class"):
            lines.append(f"Training saw at most {config['limit_per_class']:,} images a class.")
        if metrics.get("skipped"):
            lines.append(f"{len(metrics['skipped']):,} image(s) could not be read and were left out.")
    if bundle and bundle.manifest.get("quantisation"):
        lines.append("The graph is quantised: its accuracy may differ from the float model's, class by class.")
    if bundle and not bundle.manifest.get("accuracy"):
        lines.append("The bundle records no accuracy: run `cdl-edge evaluate` on it before it is used.")
    if profile:
        lines.append(
            "Latency holds for the machine, the number of threads and the load named above, and for nothing else."
        )
    return lines
