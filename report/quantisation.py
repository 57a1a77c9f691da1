"""What the page says about 8 bits: the manifest's "quantisation", checked, as texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..artefacts.bundle import Bundle
from ..artefacts.external import external_records
from ..artefacts.quantisation_record import GateRecord, Quantisation, SchemeRecord
from .words import label_text, ms_text, power_text, size_text

MOST_SENSITIVE = 10
"layers listed with their sensitivity"
NAMES = {"per_task": "Accuracy", "drop": "Drop: a change below 0", "agreement": "Same answer as fp32"}
"of definitions, as the tables say it"
BACKENDS = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "tensorrt": "TensorRT"}


def quantisation_section(bundle: Bundle) -> dict[str, Any] | None:
    """Accuracy before and after, per task and scheme; where ranges came from; latency; sizes. None: nothing to say."""
    found = bundle.manifest.quantisation
    if found is None or not found.schemes:
        return None
    schemes = found.schemes
    return {
        "reading": _reading(found, len(bundle.tasks)),
        "gate": _gate(found, schemes),
        "refused": [(f"{BACKENDS.get(r.backend, r.backend)} in {r.precision}", r.reason) for r in found.refused],
        "runtimes": [(name, scheme.runtimes) for name, scheme in schemes.items() if scheme.runtimes],
        "costs": _costs(schemes),
        "layers": [entry for name, scheme in schemes.items() if (entry := _layers(name, scheme))],
        "tasks": _tasks(schemes, len(bundle.tasks)),
        "latency": _latency(found),
        "sizes": _sizes(bundle, list(schemes)),
        "definitions": [(NAMES.get(k, label_text(k)), v) for k, v in found.definitions.items()],
    }


def _reading(found: Quantisation, tasks: int) -> list[str]:
    """How the 8-bit graphs were made, in sentences."""
    kept, images, with_images = found.ranges.kept_tasks, found.ranges.images, len(found.ranges.tasks_with_images)
    parts = []
    if kept:
        parts.append(f"what was kept while {kept} task{'s were' if kept != 1 else ' was'} learnt")
    if images:
        whose = "every task" if with_images == tasks else f"{with_images} of {tasks} tasks"
        parts.append(f"{images:,} images of {whose}")
    lines = [f"The ranges of the tensors come from {' and '.join(parts) or 'nowhere'}."]
    if kept and not images:
        lines.append("No image of any task was needed.")
    smooth = found.smooth
    even = f", channels after a LayerNorm evened out with strength {smooth:g}" if smooth is not None else ""
    lines.append(f"Scales are chosen by the method {found.method}{even}.")
    if found.max_drop is not None:
        most = found.max_drop
        lines.append(f"Neither a task nor the average may lose more than {most:g} point{'s' * (most != 1)}.")
    return lines


def _gate(found: Quantisation, schemes: Mapping[str, SchemeRecord]) -> dict[str, Any] | None:
    """The gate's verdict over all schemes, and what it could not decide; None: there was no gate."""
    if found.max_drop is None:
        return None
    # Before 2026-11-27 the gate did not know its own error: what it passed may have been chance.
    judged = [f.gate or GateRecord("not decided") for f in schemes.values()]
    passed = all(g.verdict == "passed" for g in judged)
    unsure = [f"{name}: {line}" for (name, _), g in zip(schemes.items(), judged, strict=True) for line in g.unsure]
    return {"passed": passed, "text": "within the gate" if passed else "the gate cannot tell", "unsure": unsure}


def _costs(schemes: Mapping[str, SchemeRecord]) -> dict[str, Any]:
    """A row for each measure: of fp32, then of each scheme. Rows that nobody measured are left out."""
    measured = [f for f in schemes.values() if f.measured]
    before = next((f.before for f in measured), None)

    def row(label: str, original: str, text: Callable[[Any], str]) -> tuple[str, list[str]]:
        return label, [original, *(text(f) if f.measured else "–" for f in schemes.values())]

    rows = []
    if before:
        rows = [
            row(
                "Average accuracy, %",
                f"{before.average_accuracy:.2f}",
                lambda f: f"{f.after.average_accuracy:.2f}",
            ),
            row("Average change, points", "", lambda f: change_text(-f.drop.average)),
            row("Worst task, points", "", lambda f: change_text(-_worst(f)[0])),
            row("Worst task", "", lambda f: f"{_worst(f)[1]}" if _worst(f)[0] > 0 else "none loses"),
            row(
                "Confidence, %",
                f"{100 * before.confidence:.1f}",
                lambda f: f"{100 * f.after.confidence:.1f}",
            ),
            row(
                "Calibration error, points",
                f"{before.calibration_error:.2f}",
                lambda f: f"{f.after.calibration_error:.2f}",
            ),
        ]
        if any(f.quantisation_forgetting is not None for f in measured):
            rows.insert(4, row("Quantisation forgetting, points", "", _forgetting))
    names: dict[str, Callable[[Any], str]] = {
        "Same answer as fp32, %": lambda f: f"{f.agreement:.2f}",
        "Largest error of a logit": lambda f: power_text(f.max_abs_error),
        "Images compared": lambda f: f"{f.images:,}",
        "Layers in 8 bits": lambda f: f"{f.layers_int8:,}",
        "Layers left in float": lambda f: f"{len(f.layers_float):,}",
    }
    rows += [(label, ["", *(text(f) for f in schemes.values())]) for label, text in names.items()]
    return {"columns": ["fp32", *schemes], "rows": rows, "measured": bool(measured)}


def _worst(scheme: Any) -> tuple[float, int]:
    """Points that the task loses which loses most, and the task."""
    return max((d, t + 1) for t, d in enumerate(scheme.drop.per_task) if d is not None)


def _forgetting(scheme: SchemeRecord) -> str:
    value = scheme.quantisation_forgetting
    return "–" if value is None else change_text(value)


def _layers(name: str, scheme: SchemeRecord) -> dict[str, Any] | None:
    """What stayed in float and what was most sensitive; None when nothing was searched."""
    left = list(scheme.layers_float)
    ranking = sorted((scheme.sensitivity or {}).items(), key=lambda item: -item[1])[:MOST_SENSITIVE]
    if not left and not ranking:
        return None
    return {"name": name, "left": left, "sensitivity": [(u, power_text(v), u in left) for u, v in ranking]}


def change_text(value: float) -> str:
    """A change in points as text: "+0.50", "−1.20", "0.00"."""
    text = f"{abs(value):.2f}"
    return text if float(text) == 0 else f"{'+' if value > 0 else '−'}{text}"


def _tasks(schemes: Mapping[str, SchemeRecord], tasks: int) -> dict[str, Any] | None:
    """Rows of the table over tasks: fp32, and for each scheme its accuracy and the change; the average is last."""
    first = next((f.before for f in schemes.values() if f.measured), None)
    if first is None:
        return None
    rows = [("fp32", _cells([*first.per_task, first.average_accuracy]))]
    for name, scheme in schemes.items():
        after, drop = scheme.after, scheme.drop
        if not scheme.measured or after is None or drop is None:
            continue
        rows.append((name, _cells([*after.per_task, after.average_accuracy])))
        changes = [None if d is None else -d for d in (*drop.per_task, drop.average)]
        cells = [
            {"text": "–", "tone": ""} if c is None else {"text": change_text(c), "tone": "lost" if c < -0.005 else ""}
            for c in changes
        ]
        rows.append(("change", cells))
    return {"count": tasks, "rows": rows, "missing": any(a is None for a in first.per_task)}


def _cells(values: Sequence[float | None]) -> list[dict[str, str]]:
    return [{"text": "–" if v is None else f"{v:.1f}", "tone": ""} for v in values]


def _latency(found: Quantisation) -> list[dict[str, Any]]:
    """A row for each backend and precision, against the first."""
    entries, advice = found.latency, found.recommended
    fastest = min((e.compute_ms for e in entries), default=0.0)
    return [
        {
            "backend": BACKENDS.get(entry.backend, entry.backend),
            "precision": entry.precision,
            "ms": ms_text(entry.compute_ms),
            "speed": f"{1 / entry.ratio:.2f} ×",
            "share": round(100 * fastest / entry.compute_ms),
            "best": all(getattr(entry, k) == advice.get(k) for k in ("backend", "precision")),
        }
        for entry in entries
    ]


def _sizes(bundle: Bundle, schemes: Sequence[str]) -> list[dict[str, str]]:
    """Sizes for each precision of the student: its graph, and the constants that it reads."""
    graphs = bundle.manifest.graphs
    rows = []
    for key in ("student", "student.fp16", *(f"student.{name}" for name in schemes)):
        if key not in graphs:
            continue
        graph = bundle.graph(key)
        read = sum({(r.location, r.offset): r.length for r in external_records(graph)}.values())
        size = bundle.manifest.files[graphs[key]].bytes
        rows.append(
            {
                "name": key.partition(".")[2] or "fp32",
                "graph": size_text(size),
                "constants": size_text(read),
                "total": size_text(size + read),
            }
        )
    return rows
