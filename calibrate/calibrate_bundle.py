"""BUNDLE -> BUNDLE with 8-bit graphs: ranges, scales, gate, latency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..artefacts.bundle import VERSIONS, Bundle, check_target, open_bundle, write_bundle
from ..artefacts.layout import SCHEMES_KEY
from ..errors import InputError, choose, command_line
from ..files import workspace
from ..log import LOG
from ..ranges import Ranges, TensorRange, merge_tensors
from .calibration_images import FEW, PER_TASK, CalibrationImages, images_of
from .collect import collect
from .cpu_session import CpuSession
from .float_graph import float_graph
from .floor import recommend, some_of
from .latency import time_candidates
from .measure import DEFINITIONS, Measured, measure
from .opset import here
from .quantize import WEIGHTS, scales_file
from .scales import METHODS, choose_range
from .schemes import OF_PROFILE, SCHEMES, Scheme, get_scheme
from .smooth import STRENGTHS, smoothing
from .trial import Known, Trial, choose_smoothing, settle

SOURCES = {
    "auto": "kept ranges, and images where there are some; images only where all classes are there",
    "kept": "the ranges kept while learning",
    "images": "the images of --data alone",
}
UNLIKE = 3.0
"standard errors of the accuracy below the recorded one, from which on images look wrong"
CLIPPED = 0.01
"share of a tensor's values outside of its range above which a warning is given"


def calibrate(
    bundle: Path | str,
    out: Path | str,
    data: str | None = None,
    ranges: str = "auto",
    method: str = "max",
    smooth: float | str | None = "auto",
    schemes: Sequence[str] | None = None,
    images: int | None = None,
    max_drop: float | None = None,
    searching: bool = True,
    opset: int | None = None,
    limit_per_class: int | None = None,
    replace: bool = False,
) -> dict[str, Any]:
    """Add 8-bit graphs to a copy of a bundle; nothing is written when the gate refuses.

    Args:
        bundle: as `export` wrote it. out: a new or empty folder; with `replace` also a bundle, see
            artefacts.bundle.foreign.
        data: image source, see data.load_dataset: all classes, or those whose images are still there. Its training
            images give ranges, its validation images measure accuracy. None: the ranges kept while learning decide.
        ranges: key of SOURCES. method: key of scales.METHODS. smooth: see smooth.py; None: not at all.
        schemes: keys of SCHEMES; None: those of the bundle's export profile.
        images: training images of each task to take ranges from; None: PER_TASK.
        max_drop: points of accuracy that any task with images, and their average, may lose; None: no gate. A loss that
            chance explains fails nothing, see search.Gate.
        searching: leave sensitive layers in float until the gate is passed; False: refuse then.
        opset: 21: 8-bit graphs that ONNX Runtime 1.23 (Python 3.10, JetPack 6) loads too, a little slower; 23: those
            that newer ones run faster; None: 21 for int8-arm and where this machine's ONNX Runtime is so old.
        limit_per_class: validation images.

    Returns: the manifest's "quantisation", with "bundle" and "bytes".

    Raises: InputError for bad input, or no ranges and no images; GateError.
    """
    choose("source of ranges", ranges, SOURCES)
    choose("calibration method", method, METHODS)
    strengths = _strengths(smooth)
    loads = here()
    if opset not in (None, 21, 23) or (opset is not None and loads is not None and opset > loads):
        allowed = "21 or 23" if loads is None else f"{loads}: this machine's ONNX Runtime loads no newer one"
        raise InputError("the opset of 8-bit graphs is out of range", got=opset, expected=allowed)
    if max_drop is not None and not max_drop >= 0:
        raise InputError("--max-drop is out of range", got=max_drop, expected="0 or more points")
    if limit_per_class is not None and data is None:
        raise InputError(
            "--limit-per-class chooses among validation images", got="no --data", fix="leave it out, or name images"
        )
    if images is not None and data is None:
        raise InputError("--images counts training images of --data", got="no --data", fix="leave it out, or give both")
    check_target(Path(out), replace)
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    if opened.batch not in (1, None):
        raise InputError(f"{opened.path}: a graph for {opened.batch} images", expected="one image, or any number")
    if (workshop := opened.manifest.enrolled_on) is not None:
        # The copy would hold one version alone, without the one that classes are enrolled in and taken out of.
        again = command_line("calibrate", _beside(opened.path, workshop))
        raise InputError(
            f"{opened.path}: classes were enrolled in this version",
            got=f"version {opened.manifest.version}, made on {workshop}",
            expected="a version as `export` made it",
            fix=f"on the device: {again} --out NEW, then pack create and pack install: what was enrolled stays",
        )
    found = images_of(opened, data, images or PER_TASK, limit_per_class) if data is not None else None
    labels = found.labels if found is not None and len(found.labels) else None
    if max_drop is not None and labels is None:
        raise InputError(
            "--max-drop needs images to measure accuracy on",
            got="no --data" if data is None else f"no validation image of the bundle's classes in {data}",
            fix="name the images of at least one task with --data, or leave --max-drop out",
        )
    pixels = found.validation if found is not None and labels is not None else opened.selftest()[0]
    if found is not None and labels is None:
        LOG.warning(f"{data}: no validation image of the bundle's classes: no accuracy is measured")
    LOG.info(f"fp32: answers to {len(pixels)} images" + ("" if labels is not None else " of the bundle's own"))
    expected = CpuSession(opened.graph().read_bytes(), opened.path).logits(pixels)
    if not np.isfinite(expected).all():
        raise InputError(
            f"{opened.path}: the answers of fp32 are not finite", fix="export the run again, or look at the images"
        )
    if labels is not None:
        _warn_unlike(opened, measure(expected, labels, opened.tasks), len(pixels))
    kept, situation = _ranges(opened, found, ranges)
    chosen = [get_scheme(f) for f in schemes or OF_PROFILE.get(str(opened.manifest.profile), ("int8-x86",))]
    for scheme in chosen:
        _warn_clipped(kept, method, scheme)
    known = Known(pixels, expected, labels, found.training if found is not None else None, opened.tasks, max_drop)

    files, graphs, signatures = _float_parts(opened)
    report: dict[str, Any] = {}
    with workspace(Path(out).parent) as folder:

        def trials(strength: float | None) -> list[Trial]:
            smoothed = smoothing(float_graph(opened, "student"), kept, strength) if strength is not None else None
            return [Trial(opened, kept, f, method, smoothed, folder, opset or f.opset or loads) for f in chosen]

        strength, tried = choose_smoothing(trials, strengths, known)
        for trial, answers in tried:
            name = trial.scheme.name
            quantised, report[name] = settle(trial, answers, known, searching)
            files |= quantised.constants
            for graph, model in quantised.models.items():
                key = f"{graph}.{name}"
                files[f"{key}.onnx"], graphs[key] = model, f"{key}.onnx"
                if graph in signatures:
                    signatures[key] = signatures[graph]
    document: dict[str, Any] = {
        "method": method,
        "smooth": strength,
        "ranges": situation,
        "max_drop": max_drop,
        SCHEMES_KEY: report,
        "definitions": DEFINITIONS,
    }
    manifest = {**opened.manifest.document, "name": Path(out).name, "graphs": graphs, "signatures": signatures or None}
    manifest["ranges"] = _ranges_file(opened)
    with workspace(Path(out).parent) as folder:
        draft = write_bundle(folder / "draft", {**manifest, "quantisation": document}, files)
        LOG.info("latency: every precision that runs here, in turns")
        some = some_of(len(pixels))
        timed = time_candidates(draft, pixels[some])
    document["latency"] = [one.to_json() for one in timed]
    document["recommended"], document["refused"] = recommend(
        timed, expected[some], None if labels is None else labels[some], opened.tasks
    )
    for entry in document["refused"]:
        LOG.warning(f"{entry['backend']} {entry['precision']} is faster and not recommended: {entry['reason']}")
    written = write_bundle(Path(out), {**manifest, "quantisation": document}, files, replace)
    sizes = {name: entry.bytes for name, entry in written.manifest.files.items()}
    return {**document, "bundle": str(written.path), "bytes": sizes, "data": found.summary if found else None}


def _beside(path: Path, version: str) -> Path:
    """The folder of another version of a bundle, which is given as a whole or as one version."""
    versions = path.parent if path.parent.name == VERSIONS else path / VERSIONS
    return versions / version


def _strengths(smooth: float | str | None) -> list[float | None]:
    """What is tried, in this order. Raises: InputError for what is neither a strength nor a word."""
    if smooth is None or smooth == "none":
        return [None]
    if smooth == "auto":
        return [None, *STRENGTHS]
    try:
        strength = float(smooth)
    except ValueError:
        strength = -1.0
    if not 0 <= strength <= 1:
        raise InputError("the strength of smoothing is out of range", got=smooth, expected="auto, none, or 0 to 1")
    return [strength]


def _float_parts(bundle: Bundle) -> tuple[dict[str, Path | bytes], dict[str, str], dict[str, Any]]:
    """Files, graphs and signatures without an earlier calibration's: its constants may not fit the new graphs."""
    manifest = bundle.manifest
    graphs = {name: file for name, file in manifest.graphs.items() if name.partition(".")[2] not in SCHEMES}
    old = {*manifest.graphs.values()} - {*graphs.values()}
    old |= {WEIGHTS, *(scales_file(scheme) for scheme in SCHEMES.values())}
    if manifest.ranges and _ranges_file(bundle) is None:
        old.add(manifest.ranges)
    files: dict[str, Path | bytes] = {name: bundle.path / name for name in manifest.files if name not in old}
    return files, graphs, {k: v for k, v in manifest.signatures.items() if k in graphs}


def _ranges_file(bundle: Bundle) -> str | None:
    """Name of the file of kept ranges, where it is there: a pack leaves it in the workshop."""
    name = bundle.manifest.ranges
    return name if name and (bundle.path / name).is_file() else None


def _ranges(
    bundle: Bundle, found: CalibrationImages | None, source: str
) -> tuple[dict[str, TensorRange], dict[str, Any]]:
    """The range of every tensor, and what it comes from. Raises: InputError when there is nothing to take it from."""
    name = _ranges_file(bundle)
    kept = Ranges.load(bundle.path / name) if name else None
    if source == "images" or (source == "auto" and (kept is None or (found is not None and found.whole))):
        kept_used = None
    else:
        kept_used = kept
    if source == "kept" and kept is None:
        raise InputError(f"{bundle.path}: no ranges were kept", fix=_without_ranges(bundle))
    use_images = found is not None and len(found.training) > 0 and source != "kept"
    if kept_used is None and not use_images:
        raise InputError(
            f"{bundle.path}: nothing to take ranges from",
            got="no ranges in the bundle, no --data with training images",
            expected="ranges kept while learning, or images",
            fix=_without_ranges(bundle),
        )
    fresh = collect(float_graph(bundle, "student"), found.training) if use_images and found is not None else None
    if fresh is not None and kept_used is None and fresh.images < FEW:
        LOG.warning(f"ranges of {fresh.images} images only; 500 are the usual advice")
    parts = [m for m in (kept_used.merged() if kept_used else None, fresh.tensors if fresh else None) if m is not None]
    merged = {n: merge_tensors([p[n] for p in parts if n in p]) for n in (fresh.tensors if fresh else parts[0])}
    situation = {
        "kept_tasks": len(kept_used.tasks) if kept_used else 0,
        "images": fresh.images if fresh else 0,
        "tasks_with_images": list(found.tasks) if fresh and found is not None else [],
    }
    return merged, situation


def _without_ranges(bundle: Bundle) -> str:
    """What to do about a bundle without the file of kept ranges."""
    if bundle.manifest.ranges:
        return "packs leave the ranges out: calibrate in the workshop and send a pack of that, or give --data"
    return "train with --range-images above 0 and export again, or give --data"


def _warn_unlike(bundle: Bundle, found: Measured, images: int) -> None:
    """fp32 is right less often than chance explains: other pictures than those that were learnt.

    Answers see what ranges do not: inverted or BGR photographs move no tensor's histogram by more than other
    photographs do, and cost half of the accuracy (2026-11-21).
    """
    recorded = bundle.manifest.accuracy.per_task if bundle.manifest.accuracy else ()
    pairs = [(r, a) for r, a in zip(recorded, found.per_task, strict=False) if r is not None and a is not None]
    if not pairs:
        return
    before, now = (float(np.mean(column)) for column in zip(*pairs, strict=True))
    share = min(max(before / 100, 1 / images), 1 - 1 / images)  # never quite sure
    if before - now > UNLIKE * 100 * np.sqrt(share * (1 - share) / images):
        LOG.warning(
            f"fp32 has {now:.1f} % on these images, the export had {before:.1f} % on the same tasks: "
            "another camera, colour order, or preprocessing?"
        )


def _warn_clipped(ranges: dict[str, TensorRange], method: str, scheme: Scheme) -> None:
    """More than a few values beyond the end of a range: the method does not suit this tensor."""
    for name, kept in ranges.items():
        histogram = kept.histogram
        low, high = choose_range(histogram, method, scheme.symmetric)
        centres = (histogram.edges[:-1] + histogram.edges[1:]) / 2
        outside = float(histogram.counts[(centres < low) | (centres > high)].sum() / histogram.values)
        if outside > CLIPPED:
            LOG.warning(f"{name}: {100 * outside:.1f} % of the values are clipped by {method!r}")
