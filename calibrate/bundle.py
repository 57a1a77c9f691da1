"""BUNDLE -> BUNDLE with 8-bit graphs: ranges, scales, gate, latency."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, choose
from ..ranges import Ranges, TensorRange, merge_tensors
from ..runtime.bundle import Bundle, open_bundle, write_bundle
from .collect import collect
from .flavours import FLAVOURS, OF_PROFILE, Flavour, get_flavour
from .images import FEW, Images, images_of
from .latency import race
from .measure import DEFINITIONS, Measured, compare, measure
from .quantize import WEIGHTS, Quantised, quantise, scales_file
from .scales import METHODS, choose_range
from .search import Gate, refusal, search, sensitivities
from .session import Session
from .smooth import Smoothing, smoothing

SOURCES = {
    "auto": "kept ranges, and images where there are some; images only where all classes are there",
    "kept": "the ranges kept while learning",
    "images": "the images of --data alone",
}
UNLIKE = 3.0
"standard errors of the accuracy below the recorded one, from which on images look wrong"
CLIPPED = 0.01
"share of a tensor's values outside of its range above which a warning is given"
SENSITIVITY_IMAGES = 64


def calibrate(
    bundle: Path | str,
    out: Path | str,
    data: str | None = None,
    ranges: str = "auto",
    method: str = "max",
    smooth: float | None = None,
    flavours: Sequence[str] | None = None,
    images: int = 64,
    max_drop: float | None = None,
    searching: bool = True,
    limit_per_class: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Add 8-bit graphs to a copy of a bundle; nothing is written when the gate refuses.

    Args:
        bundle: as `export` wrote it. out: a new folder, or a bundle to replace.
        data: image source, see data.load_dataset: all classes, or those whose images are still there. Its training
            images give ranges, its validation images measure accuracy. None: the ranges kept while learning decide.
        ranges: key of SOURCES. method: key of scales.METHODS. smooth: see smooth.py; None: not at all.
        flavours: keys of FLAVOURS; None: those of the bundle's export profile.
        images: training images of each task to take ranges from.
        max_drop: points of accuracy that any task with images, and their average, may lose; None: no gate.
        searching: leave sensitive layers in float until the gate is passed; False: refuse then.
        limit_per_class: validation images. say: gets a line where there is something to be warned of.

    Returns: the manifest's "quantisation", with "bundle" and "bytes".

    Raises: InputError for bad input, or no ranges and no images; GateError.
    """
    choose("source of ranges", ranges, SOURCES)
    choose("calibration method", method, METHODS)
    if smooth is not None and not 0 <= smooth <= 1:
        raise InputError("the strength of smoothing is out of range", got=smooth, expected="0 to 1")
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    if opened.batch not in (1, None):
        raise InputError(f"{opened.path}: a graph for {opened.batch} images", expected="one image, or any number")
    found = images_of(opened, data, images, limit_per_class, say) if data is not None else None
    if max_drop is not None and (found is None or not len(found.labels)):
        raise InputError(
            "--max-drop needs images to measure accuracy on",
            got="no --data",
            fix="name the images of at least one task with --data, or leave --max-drop out",
        )
    pixels = found.validation if found is not None else opened.selftest()[0]
    expected = Session(opened.graph().read_bytes(), opened.path).logits(pixels)
    if not np.isfinite(expected).all():
        raise InputError(
            f"{opened.path}: the answers of fp32 are not finite", fix="export the run again, or look at the images"
        )
    if found is not None:
        _warn_unlike(opened, measure(expected, found.labels, opened.tasks), len(pixels), say)
    kept, situation = _ranges(opened, found, ranges, say)
    chosen = [get_flavour(f) for f in flavours or OF_PROFILE.get(str(opened.manifest["profile"]), ("int8-x86",))]
    smoothed = smoothing(opened.graph(), kept, smooth) if smooth is not None else None

    files, graphs, signatures = _float_parts(opened)
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="cdl-edge-") as folder:
        for flavour in chosen:
            _warn_clipped(kept, method, flavour, say)
            trial = Trial(opened, kept, flavour, method, smoothed, Path(folder))
            quantised, report[flavour.name] = _one(trial, found, pixels, expected, max_drop, searching, say)
            files |= quantised.constants
            for name, model in quantised.models.items():
                key = f"{name}.{flavour.name}"
                files[f"{key}.onnx"], graphs[key] = model, f"{key}.onnx"
                if name in signatures:
                    signatures[key] = signatures[name]
    document: dict[str, Any] = {
        "method": method,
        "smooth": smooth,
        "ranges": situation,
        "max_drop": max_drop,
        "flavours": report,
        "definitions": DEFINITIONS,
    }
    manifest = {**opened.manifest, "name": Path(out).name, "graphs": graphs, "signatures": signatures or None}
    with tempfile.TemporaryDirectory(prefix="cdl-edge-") as folder:
        draft = write_bundle(Path(folder) / "draft", {**manifest, "quantisation": document}, files)
        document["latency"] = race(draft)
        fastest = min(document["latency"], key=lambda entry: entry["compute_ms"])
        document["recommended"] = {"backend": fastest["backend"], "precision": fastest["precision"]}
    written = write_bundle(Path(out), {**manifest, "quantisation": document}, files)
    sizes = {name: entry["bytes"] for name, entry in written.manifest["files"].items()}
    return {**document, "bundle": str(written.path), "bytes": sizes, "data": found.summary if found else None}


def _float_parts(bundle: Bundle) -> tuple[dict[str, Path | bytes], dict[str, str], dict[str, Any]]:
    """Files, graphs and signatures without an earlier calibration's: its constants may not fit the new graphs."""
    manifest = bundle.manifest
    graphs = {name: file for name, file in manifest["graphs"].items() if name.partition(".")[2] not in FLAVOURS}
    old = {*manifest["graphs"].values()} - {*graphs.values()}
    old |= {WEIGHTS, *(scales_file(flavour) for flavour in FLAVOURS.values())}
    files: dict[str, Path | bytes] = {name: bundle.path / name for name in manifest["files"] if name not in old}
    return files, graphs, {k: v for k, v in (manifest.get("signatures") or {}).items() if k in graphs}


@dataclass
class Trial:
    """One flavour of one bundle, to be tried with other layers in float."""

    bundle: Bundle
    ranges: dict[str, TensorRange]
    flavour: Flavour
    method: str
    smoothing: Smoothing | None
    folder: Path
    "for the constants: an engine reads them from files of one folder"
    chosen: dict[str, tuple[float, float]] = field(default_factory=dict)
    "tensor -> ends of its range: chosen once for all trials"

    def quantised(self, skip: Collection[str] = ()) -> Quantised:
        """All graphs of the bundle's base precision."""
        base = ".fp16" if self.flavour.name == "int8-trt" and "student.fp16" in self.bundle.manifest["graphs"] else ""
        names = [n for n in ("student", "query", "prompted") if n + base in self.bundle.manifest["graphs"]]
        graphs = {name: self.bundle.graph(name + base) for name in names}
        return quantise(graphs, self.ranges, self.flavour, self.method, self.smoothing, skip, self.chosen)

    def session(self, skip: Collection[str] = ()) -> Session:
        """The student in 8 bits but for some units."""
        made = self.quantised(skip)
        for name in ("backbone.bin", "prompts.bin"):
            if not (self.folder / name).exists():
                (self.folder / name).write_bytes((self.bundle.path / name).read_bytes())
        for name, content in made.constants.items():
            (self.folder / name).write_bytes(content)
        return Session(made.models["student"], self.folder, as_written=self.flavour.symmetric)

    @cached_property
    def fp32(self) -> Session:
        """The bundle's own graph."""
        return Session(self.bundle.graph().read_bytes(), self.bundle.path)


def _one(
    trial: Trial,
    found: Images | None,
    pixels: np.ndarray,
    expected: np.ndarray,
    max_drop: float | None,
    searching: bool,
    say: Callable[[str], None],
) -> tuple[Quantised, dict[str, Any]]:
    """Quantise, measure, and search where the gate asks for it. expected: what fp32 says about the pixels."""
    skip: list[str] = []
    ranking: dict[str, float] | None = None
    tasks = trial.bundle.tasks
    labels = found.labels if found is not None else None
    answers = trial.session().logits(pixels)
    if max_drop is not None and labels is not None:
        before, gate = measure(expected, labels, tasks), Gate(max_drop)
        tried: dict[int, np.ndarray] = {0: answers}
        if failures := gate.failures(before, measure(answers, labels, tasks)):
            assert found is not None
            some = found.training if len(found.training) else pixels
            some = some[:: max(1, len(some) // SENSITIVITY_IMAGES)][:SENSITIVITY_IMAGES]
            units = trial.quantised().units
            ranking = sensitivities(lambda s: trial.session(s).logits(some), units, trial.fp32.logits(some))
            if not searching:
                raise refusal(trial.flavour.name, max_drop, failures, ranking)
            say(f"{trial.flavour.name}: {'; '.join(failures)}: looking for layers to leave in float")

            def failing(units: Collection[str]) -> list[str]:
                tried[len(units)] = trial.session(units).logits(pixels)
                return gate.failures(before, measure(tried[len(units)], labels, tasks))

            skip = search(failing, list(ranking))
            answers = tried[len(skip)]
    quantised = trial.quantised(skip)
    document: dict[str, Any] = {
        "runtimes": trial.flavour.runtimes,
        "layers_int8": len(quantised.units),
        "layers_float": skip,
        "sensitivity": ranking,
        "images": len(pixels),
        "agreement": 100.0 * float((answers.argmax(1) == expected.argmax(1)).mean()),
        "max_abs_error": float(np.abs(answers - expected).max()),
        "before": None,
        "after": None,
    }
    if labels is not None:
        before, after = measure(expected, labels, tasks), measure(answers, labels, tasks)
        document |= {"before": before.to_json(), "after": after.to_json(), **compare(before, after)}
    return quantised, document


def _ranges(
    bundle: Bundle, found: Images | None, source: str, say: Callable[[str], None]
) -> tuple[dict[str, TensorRange], dict[str, Any]]:
    """The range of every tensor, and what it comes from. Raises: InputError when there is nothing to take it from."""
    name = bundle.manifest.get("ranges")
    kept = Ranges.load(bundle.path / str(name)) if name else None
    if source == "images" or (source == "auto" and (kept is None or (found is not None and found.whole))):
        kept_used = None
    else:
        kept_used = kept
    if source == "kept" and kept is None:
        raise InputError(f"{bundle.path}: no ranges were kept", fix="train with --range-images, or give --data")
    use_images = found is not None and len(found.training) > 0 and source != "kept"
    if kept_used is None and not use_images:
        raise InputError(
            f"{bundle.path}: nothing to take ranges from",
            got="no ranges in the bundle, no --data with training images",
            expected="ranges kept while learning, or images",
            fix="train with --range-images above 0 and export again, or give --data",
        )
    fresh = collect(bundle.graph(), found.training) if use_images and found is not None else None
    if fresh is not None and kept_used is None and fresh.images < FEW:
        say(f"warning: ranges of {fresh.images} images only; 500 are the usual advice")
    parts = [m for m in (kept_used.merged() if kept_used else None, fresh.tensors if fresh else None) if m is not None]
    merged = {n: merge_tensors([p[n] for p in parts if n in p]) for n in (fresh.tensors if fresh else parts[0])}
    situation = {
        "kept_tasks": len(kept_used.tasks) if kept_used else 0,
        "images": fresh.images if fresh else 0,
        "tasks_with_images": list(found.tasks) if fresh and found is not None else [],
    }
    return merged, situation


def _warn_unlike(bundle: Bundle, found: Measured, images: int, say: Callable[[str], None]) -> None:
    """fp32 is right less often than chance explains: other pictures than those that were learnt.

    Answers see what ranges do not: inverted or BGR photographs move no tensor's histogram by more than other
    photographs do, and cost half of the accuracy (2026-11-21).
    """
    recorded = (bundle.manifest.get("accuracy") or {}).get("per_task") or []
    pairs = [(r, a) for r, a in zip(recorded, found.per_task, strict=False) if a is not None]
    if not pairs:
        return
    before, now = (float(np.mean(column)) for column in zip(*pairs, strict=True))
    share = min(max(before / 100, 1 / images), 1 - 1 / images)  # never quite sure
    if before - now > UNLIKE * 100 * np.sqrt(share * (1 - share) / images):
        say(
            f"warning: fp32 has {now:.1f} % on these images, the export had {before:.1f} % on the same tasks: "
            "another camera, colour order, or preprocessing?"
        )


def _warn_clipped(ranges: dict[str, TensorRange], method: str, flavour: Flavour, say: Callable[[str], None]) -> None:
    """More than a few values beyond the end of a range: the method does not suit this tensor."""
    for name, kept in ranges.items():
        histogram = kept.histogram
        low, high = choose_range(histogram, method, flavour.symmetric)
        centres = (histogram.edges[:-1] + histogram.edges[1:]) / 2
        outside = float(histogram.counts[(centres < low) | (centres > high)].sum() / histogram.values)
        if outside > CLIPPED:
            say(f"warning: {name}: {100 * outside:.1f} % of the values are clipped by {method!r}")
