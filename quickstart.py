"""The whole way once, on data that every installation has: what `cdl-edge quickstart` runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .display import (
    accuracy_table,
    baseline_line,
    baseline_warning,
    latency_table,
    parity_line,
    quantisation_table,
)
from .errors import InputError, command_line
from .log import LOG

TASKS = 5
"that the classes are cut into, where there are as many"


def _profile(bundle: Path) -> dict[str, Any]:
    """`cdl-edge profile` in a process of its own: this one has trained, and its peak memory is the training's."""
    command = [sys.executable, "-m", f"{__package__}.cli", "profile", str(bundle)]
    options = ["--runs", "500", "--precision", "fp32", "--json"]
    done = subprocess.run([*command, *options], stdout=subprocess.PIPE, text=True, check=True)
    document: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return document


def quickstart(data: str, out: Path) -> tuple[dict[str, Any], str]:
    """Train teacher and student, export, put it into 8 bits, evaluate and profile the bundle, write the report.

    Returns: a JSON document and the same as text. Raises: InputError when `out` holds something already.
    """
    from .artefacts.layout import SCHEMES_KEY
    from .artefacts.run_record import Metrics
    from .calibrate.calibrate_bundle import calibrate
    from .data import load_dataset
    from .export.export_bundle import export
    from .measurement.evaluate import find_images, score
    from .report.model_page import write_report
    from .runtime import load
    from .train.config import TrainConfig
    from .train.loop import train

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: is not empty", expected="a new folder", fix="remove it, or give another --out")
    started = time.perf_counter()
    tasks = min(TASKS, len(load_dataset(data).classes))
    LOG.info(f"1/5 train: CODA-Prompt teacher and student, KDP distillation, {tasks} tasks")
    # Scans of digits are few (1,420) and look like nothing the backbones have seen: slda is ahead of ranpac on them.
    options = {"learner": "coda", "distill": "kdp", "tasks": tasks, "epochs": 20, "head": "slda"}
    config = TrainConfig.from_json({"data": data, "out": str(out / "run"), **options})
    metrics = Metrics.of(train(config), "what train returned")
    average, baseline = metrics.student.average_accuracy, metrics.document["baseline"]
    if warning := baseline_warning(average, baseline, metrics.config):
        LOG.info(warning)
    LOG.info("2/5 export: static ONNX graphs, compared with the trained student")
    exported = export(out / "run", out / "bundle")
    LOG.info("3/5 calibrate: 8 bits from the ranges kept while learning; images only measure what it costs")
    quantised = calibrate(out / "bundle", out / "bundle8", data, ranges="kept")
    LOG.info("4/5 evaluate and profile the bundle, without torch's help")
    with load(out / "bundle8", precision="fp32") as runner:
        accuracy = score(runner, find_images(runner, data))
    latency = _profile(out / "bundle8")
    LOG.info("5/5 report")
    report = write_report(out / "report.html", run=out / "run", bundle=out / "bundle8", profile=latency)
    document = {
        **{
            name: {k: getattr(side, k) for k in ("average_accuracy", "forgetting", "matrix")}
            for name, side in metrics.sides.items()
        },
        "baseline": baseline,
        "data": {k: v for k, v in (metrics.data or {}).items() if k not in ("source", "fingerprint")},
        "parity": exported["parity"],
        "evaluate": accuracy,
        "calibrate": {k: quantised[k] for k in (SCHEMES_KEY, "latency", "recommended")},
        "profile": {k: latency[k] for k in ("end_to_end_ms", "preprocess_ms", "compute_ms", "backend", "flags")},
        "bundle": str(out / "bundle8"),
        "report": str(report),
        "seconds": time.perf_counter() - started,
    }
    text = "\n\n".join(
        [
            accuracy_table(metrics),
            baseline_line(average, baseline),
            f"bundle on {accuracy['backend']}: average accuracy {accuracy['average_accuracy']:.2f} % "
            f"over {accuracy['images']} images",
            parity_line(exported["parity"]),
            quantisation_table(quantised),
            latency_table(latency),
            f"bundle: {out / 'bundle8'}   report: {report.resolve()}   ({document['seconds']:.0f} s)",
            f"next: {command_line('predict', out / 'bundle8')} IMAGE  |  "
            "cdl-edge train --data folder:PHOTOS --out runs/mine",
        ]
    )
    return document, text
