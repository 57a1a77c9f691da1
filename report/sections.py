"""What each section of the page shows, from checked documents: only texts and geometry are left to lay out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..artefacts.bundle import Bundle
from ..artefacts.manifest import AccuracyRecord, ParityRecord
from ..artefacts.profile_record import ProfileRecord
from ..artefacts.run_record import Metrics
from .charts import heat_cell, heat_domain, histogram_chart, line_chart
from .mistakes import chance
from .words import (
    HEADS,
    PARITY,
    duration_text,
    flag_text,
    label_text,
    labelled,
    method_text,
    ms_text,
    size_text,
    source_text,
    value_text,
)

# Of the graph's path through one picture, in time order; unknown stages follow, end to end is always last.
STAGES = ("decode", "preprocess", "h2d", "enqueue", "gpu", "compute", "d2h", "post", "postprocess", "end_to_end")
STAGE_NAMES = {"h2d": "Host to device", "d2h": "Device to host", "gpu": "GPU", "end_to_end": "End to end"}
STATISTICS = ("n", "min", "mean", "std", "p50", "p90", "p95", "p99", "max")
OF_DISTILLATION = ("teacher", "alpha", "tau", "kd_blocks", "kd_length", "kd_head")
"options that mean nothing in a run without a distiller; one without a teacher, as two-heads, has the others"
GRAPH_FACTS = ("learner", "distiller", "query", "alpha", "selection", "backbone", "profile", "opset", "precision")


def _settings(metrics: Metrics | None, bundle: Bundle | None) -> dict[str, Any]:
    """learner, distill, query, data, teacher, student: of the run, else of the bundle; None where nobody knows."""
    manifest = bundle.manifest if bundle else None
    fallback = {
        "learner": manifest and manifest.learner,
        "distill": manifest and manifest.distiller,
        "query": manifest and manifest.query,
        "data": manifest and manifest.accuracy and manifest.accuracy.source,
        "student": manifest and manifest.backbone and manifest.backbone.source,
        "teacher": None,
    }
    config = metrics.config if metrics else {}
    found = {key: config.get(key) or value for key, value in fallback.items()}
    if metrics and metrics.teacher is None:
        found["teacher"] = None  # a run without distillation trains none, whatever the option's default says
    return found


def _classes(metrics: Metrics | None, bundle: Bundle | None) -> tuple[Sequence[str], Sequence[Sequence[int]]]:
    """Classes and tasks: of the bundle, which may have learnt some on the device, else of the run."""
    known = bundle or metrics
    return (known.classes, known.tasks) if known else ((), ())


def header(metrics: Metrics | None, bundle: Bundle | None) -> dict[str, Any]:
    """Title, method and names at the very top; None for what nobody recorded."""
    settings = _settings(metrics, bundle)
    name = bundle.name if bundle else None
    title = source_text(str(settings["data"])) if settings["data"] else name or "Report"
    return {
        "title": title,
        "method": method_text(settings["learner"], settings["distill"]) if settings["learner"] else None,
        "teacher": settings["teacher"],
        "student": settings["student"],
        "bundle": name if name != title else None,
        "created": (bundle.manifest.created or "") if bundle else "",
    }


def figures(metrics: Metrics | None, bundle: Bundle | None, profile: ProfileRecord | None) -> list[dict[str, str]]:
    """The tiles at the top: {"label", "value", "unit", "note"}."""
    tiles: list[dict[str, str]] = []

    def add(label: str, value: str, unit: str = "", note: str = "") -> None:
        tiles.append({"label": label, "value": value, "unit": unit, "note": note})

    accuracy = bundle.manifest.accuracy if bundle else None
    if metrics:
        student, teacher, baseline = metrics.student, metrics.teacher, metrics.baseline
        if baseline:
            head = HEADS.get(baseline.head, baseline.head)
            add("Frozen baseline", f"{baseline.average_accuracy:.2f}", "%", f"bare student, {head}, no training")
        gap = "no teacher"
        if teacher:
            behind = student.average_accuracy - teacher.average_accuracy
            sign = "+" if behind >= 0 else "−"
            gap = f"teacher {teacher.average_accuracy:.2f} %, student {sign}{abs(behind):.2f}"
        add("Final average accuracy", f"{student.average_accuracy:.2f}", "%", gap)
        note = f"teacher {teacher.forgetting:.2f}" if teacher else "lower is better"
        if student.forgetting_of_joint is not None:
            note = f"{student.forgetting_of_joint:.2f} with all images at once"
        add("Forgetting", f"{student.forgetting:.2f}", "points", note)
        if student.incremental_accuracy is not None:
            add("Incremental accuracy", f"{student.incremental_accuracy:.2f}", "%", "mean over all stages")
    elif accuracy and accuracy.average_accuracy is not None:
        add("Final average accuracy", f"{accuracy.average_accuracy:.2f}", "%", "of the exported student")
        if accuracy.forgetting is not None:
            add("Forgetting", f"{accuracy.forgetting:.2f}", "points", "lower is better")
    classes, tasks = _classes(metrics, bundle)
    add("Classes", f"{len(classes):,}", "", f"learnt in {len(tasks)} task{'s' * (len(tasks) != 1)}")
    images = _images(metrics, bundle)
    if images:
        add("Images", *images)
    if metrics and metrics.seconds is not None:
        add("Training time", duration_text(metrics.seconds), "", _on_device(metrics))
    if bundle:
        precision = bundle.manifest.precision
        number, unit = size_text(bundle.size_bytes).split(" ")
        add("Bundle size", number, unit, str(precision) if precision else "")
    if profile:
        end = profile.end_to_end_ms
        precision = profile.context.get("precision")  # may be another than that of the accuracy
        note = " in ".join(str(v) for v in (profile.backend, precision) if v) or "one picture, end to end"
        add("Latency p50 / p99", f"{ms_text(end['p50'])} / {ms_text(end['p99'])}", "ms", note)
    return tiles


def _images(metrics: Metrics | None, bundle: Bundle | None) -> tuple[str, str, str] | None:
    """(value, unit, note) of the images' tile: training and validation if the run counted them, else evaluated."""
    if metrics and metrics.counts.train is not None:
        held = metrics.counts.val
        return f"{metrics.counts.train:,}", "", "for training" + (f", {held:,} held out" if held is not None else "")
    if metrics and isinstance(metrics.images, int):
        return f"{metrics.images:,}", "", "in the data source"
    accuracy = bundle.manifest.accuracy if bundle else None
    if accuracy and accuracy.images is not None:
        return f"{accuracy.images:,}", "", "evaluated"
    return None


def _on_device(metrics: Metrics) -> str:
    return f"on {metrics.device.upper()}" if metrics.device else ""


def accuracy_section(metrics: Metrics) -> dict[str, Any]:
    """Heat maps on one scale, curves over tasks, and the same numbers as a table."""
    sides = list(metrics.sides.items())
    values = [v for _, side in sides for row in side.matrix for v in row if v is not None]
    low, high = heat_domain(values)
    heats = []
    for name, side in sides:
        rows = [[heat_cell(value, low, high) for value in row] for row in side.matrix]
        heats.append({"name": name.capitalize(), "rows": rows, "average": f"{side.average_accuracy:.2f}"})

    charts = []
    for key, title, unit, zero in (
        ("accuracy_after_task", "Average accuracy", "%", False),
        ("forgetting_after_task", "Forgetting", "points", True),
    ):
        series = [(name, getattr(side, key)) for name, side in sides if getattr(side, key)]
        if series and len(metrics.tasks) > 1:  # one point is no line
            charts.append(line_chart(title, unit, series, zero))
    columns = [
        (f"{name.capitalize()} {what}", [f"{v:.2f}" for v in getattr(side, key)])
        for name, side in sides
        for key, what in (("accuracy_after_task", "accuracy, %"), ("forgetting_after_task", "forgetting, points"))
        if getattr(side, key)
    ]
    columns += [
        (f"{name.capitalize()} training, s", [f"{v:,.1f}" for v in side.seconds])
        for name, side in sides
        if side.seconds
    ]
    baseline, joint = metrics.baseline, metrics.student.forgetting_of_joint
    summary = [(name.capitalize(), f"{side.average_accuracy:.2f}", f"{side.forgetting:.2f}") for name, side in sides]
    if joint is not None:
        summary.append(("The student's head from all images at once", "–", f"{joint:.2f}"))
    if baseline:
        head = HEADS.get(baseline.head, baseline.head)
        summary.insert(0, (f"Frozen baseline ({head})", f"{baseline.average_accuracy:.2f}", "–"))
    return {
        "summary": summary,
        "heats": heats,
        "wide": len(metrics.tasks) > 11,
        "low": f"{low:.0f}",
        "high": f"{high:.0f}",
        "reading": metrics.definitions.get("matrix"),
        "charts": charts,
        "columns": columns,
        "tasks": len(metrics.tasks),
    }


def latency_section(profile: ProfileRecord) -> dict[str, Any]:
    """Distribution, flags, stages in time order and the conditions of the measurement."""
    stages = profile.stages
    position = {name: i for i, name in enumerate(STAGES)}
    names = sorted(stages, key=lambda s: (s == "end_to_end", position.get(s, len(STAGES))))
    columns = [c for c in STATISTICS if any(c in stages[name] for name in names)]
    end = profile.end_to_end_ms
    table = []
    for name in names:
        stage = stages[name]
        mean, std = stage.get("mean"), stage.get("std")
        table.append(
            {
                "name": STAGE_NAMES.get(name, label_text(name)),
                "total": name == "end_to_end",
                "definition": profile.definitions.get(f"{name}_ms"),
                "cells": [
                    "" if c not in stage else f"{stage[c]:,.0f}" if c == "n" else ms_text(stage[c]) for c in columns
                ],
                "spread": f"{100 * std / mean:.1f} %" if mean and std is not None else "",
                "share": round(100 * mean / end["mean"]) if mean is not None and end.get("mean") else None,
            }
        )
    flags = [{"name": f, "text": flag_text(f)} for f in profile.flags]
    top = {k: v for k, v in profile.document.items() if k not in ("context", "definitions", "flags", "trace_ms")}
    top = {k: v for k, v in top.items() if not (k.endswith("_ms") and isinstance(v, dict))}
    return {
        "chart": histogram_chart(profile.trace_ms, end) if profile.trace_ms else None,
        "columns": columns,
        "has_spread": any(row["spread"] for row in table),
        "has_share": sum(row["share"] is not None for row in table) > 1,
        "table": table,
        "flags": flags,
        "rate": f"{1000 / end['mean']:,.3g}" if end.get("mean") else None,
        "p50": ms_text(end["p50"]),
        "p99": ms_text(end["p99"]),
        "context": labelled({**top, **profile.context}, ("bundle", "files_bytes")),
    }


def export_section(bundle: Bundle) -> dict[str, Any]:
    """Parity, recorded accuracy, files with their hashes, and what the graph is."""
    manifest = bundle.manifest
    known, accuracy = manifest.parity or ParityRecord(), manifest.accuracy or AccuracyRecord()
    numbers = {key: getattr(known, key) for key in PARITY}
    tiles = [
        {"label": label, "value": text(numbers[key])}
        for key, (label, text) in PARITY.items()
        if numbers[key] is not None
    ]
    passed = None
    if known.max_abs_error is not None and known.tolerance is not None:
        passed = known.max_abs_error <= known.tolerance
    facts = labelled({key: _without_identity(manifest.document.get(key)) for key in GRAPH_FACTS})
    inputs = manifest.input
    shape = value_text("shape", list(inputs.shape))
    facts.append(("Input", f"{shape} {inputs.dtype}, {inputs.layout}"))
    facts += labelled(
        {k: manifest.document["input"].get(k) for k in ("dynamic_batch", "normalisation", "preprocessing")}
    )
    facts += [
        (f"Output {name}", value_text("shape", list(shape)) or "") for name, shape in manifest.outputs.items() if shape
    ]
    facts += labelled({"graphs": dict(manifest.graphs)})
    return {
        "parity": tiles,
        "passed": passed,
        "per_task": ["–" if v is None else f"{v:.1f}" for v in accuracy.per_task],
        "accuracy": f"{accuracy.average_accuracy:.2f}" if accuracy.average_accuracy is not None else None,
        "accuracy_images": f"{accuracy.images:,}" if accuracy.images is not None else None,
        "accuracy_source": accuracy.source,
        "files": [
            {"name": name, "size": size_text(entry.bytes), "bytes": f"{entry.bytes:,}", "sha256": entry.sha256}
            for name, entry in manifest.files.items()
        ],
        "total": size_text(bundle.size_bytes),
        "manifest_sha256": manifest.manifest_sha256,
        "facts": facts,
    }


def _without_identity(value: object) -> object:
    """A backbone's hash has its place in the model card."""
    return {k: v for k, v in value.items() if k != "identity"} if isinstance(value, dict) else value


def card_section(metrics: Metrics | None, bundle: Bundle | None, profile: ProfileRecord | None) -> dict[str, Any]:
    """The model card: use, limits, data, backbones, settings, definitions and versions."""
    settings = _settings(metrics, bundle)
    classes, tasks = _classes(metrics, bundle)
    backbones = {side: b.document for side, b in metrics.backbones.items()} if metrics else {}
    if not backbones and bundle and bundle.manifest.backbone:
        backbones = {"student": bundle.manifest.backbone.document}
    keys = [k for k in ("source", "identity", "width", "depth", "heads") if any(b.get(k) for b in backbones.values())]
    versions = {
        "Training": metrics.versions if metrics else {},
        "Export": bundle.manifest.versions if bundle else {},
    }
    columns = {name: v for name, v in versions.items() if v}
    packages = sorted({p for v in columns.values() for p in v}, key=lambda p: (p != "cdl-edge", p))
    definitions = metrics.definitions if metrics else {}
    skipped = metrics.skipped if metrics else ()
    return {
        "data": settings["data"],
        "class_count": len(classes),
        "tasks": [{"count": len(task), "names": [classes[c] for c in task]} for task in tasks],
        "skipped": list(skipped[:20]),
        "skipped_count": len(skipped),
        "backbone_columns": [label_text(k) for k in keys],
        "backbones": [
            {"name": side.capitalize(), "cells": [value_text(k, b.get(k)) or "" for k in keys]}
            for side, b in backbones.items()
        ],
        "frozen": settings["learner"] != "finetune",
        "training": _training(metrics) if metrics else [],
        "definitions": [(label_text(k), v) for k, v in definitions.items()],
        "limitations": _limitations(metrics, bundle, profile, len(classes)),
        "version_columns": list(columns),
        "versions": [(p, [value_text("", v.get(p)) or "" for v in columns.values()]) for p in packages],
    }


def _training(metrics: Metrics) -> list[tuple[str, str]]:
    """The options, with what "auto" came to in place of the word."""
    known = {"device": metrics.device, "precision": metrics.precision, "threads": metrics.threads}
    resolved = {k: v for k, v in known.items() if v is not None}
    plain = metrics.config.get("distill", "none") == "none"
    left_out = () if metrics.teacher else OF_DISTILLATION if plain else ("teacher",)
    return labelled({**metrics.config, **resolved}, (*left_out, "devices") if "device" in resolved else left_out)


def _confidence_lines(bundle: Bundle | None, classes: int) -> list[str]:
    """What a probability is worth, by what the bundle knows about its own confidence."""
    found = (bundle.manifest.confidence if bundle else None) or {}
    if not found:
        return [
            f"Every picture gets one of the {classes:,} classes, also one that shows none of them. The probability of "
            "a prediction is not calibrated: choose a threshold on your own pictures before acting on it."
        ]
    lines = [
        f"A probability is the softmax over the classes that compete, not calibrated; a confidence is calibrated on "
        f"{found.get('images', 0):,} held-out images of the training's source: on other pictures it may be too sure."
    ]
    share = 100 * (found.get("unknown") or {}).get("share", 0.0)
    if share:
        lines.append(
            f"Every picture gets one of the {classes:,} classes; those that look like none of them are marked unknown, "
            f"and {share:g} % of the known ones with them. How many strange pictures are not marked was not measured."
        )
    return lines


def _precision_line(metrics: Metrics) -> list[str]:
    """How far chance moves an accuracy that was measured on so many images: a 95 % interval."""
    images = metrics.counts.val
    if not images:
        return []
    points = chance(metrics.student.average_accuracy, images)
    return [
        f"The accuracy was measured on {images:,} images: chance alone moves it by {points:.1f} points to either side "
        "(95 % interval)."
    ]


def _limitations(
    metrics: Metrics | None, bundle: Bundle | None, profile: ProfileRecord | None, classes: int
) -> list[str]:
    """What the numbers do not say, from what is known."""
    lines = _confidence_lines(bundle, classes)
    if metrics:
        config = metrics.config
        seed = f" ({config['seed']})" if "seed" in config else ""
        lines.append(f"One run with one seed{seed} and one class order: another seed gives other figures.")
        lines += _precision_line(metrics)
        lines.append(
            "Accuracy was measured on held-out images of the same source: other cameras, light or viewpoints lower it."
        )
        last = [value or 0.0 for value in metrics.student.matrix[-1]]
        if len(last) > 1:
            weakest = min(range(len(last)), key=last.__getitem__)
            lines.append(
                f"The average hides differences: the weakest task at the end is task {weakest + 1} with "
                f"{last[weakest]:.1f} %."
            )
        if config.get("limit_per_class"):
            lines.append(f"Training saw at most {config['limit_per_class']:,} images a class.")
        if metrics.skipped:
            lines.append(f"{len(metrics.skipped):,} image(s) could not be read and were left out.")
    if bundle and (names := list(dict.fromkeys(entry.name for entry in bundle.manifest.enrolments))):
        lines.append(
            f"Enrolled on the device: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}. Every accuracy here "
            "was measured before that: run `cdl-edge evaluate` with pictures of these classes too."
        )
    if bundle and bundle.manifest.quantisation:
        compared = min((s.images for s in bundle.manifest.quantisation.schemes.values()), default=0)
        lines.append(
            f"8 bits were compared with fp32 on {compared:,} image{'s' * (compared != 1)}: single classes may lose "
            "more than the averages show."
        )
    if bundle and not bundle.manifest.accuracy:
        lines.append("The bundle records no accuracy: run cdl-edge evaluate on it before it is used.")
    if profile:
        lines.append(
            "Latency holds for the machine, the number of threads and the load named above, and for nothing else."
        )
    return lines
