"""RUN -> BUNDLE: build the graph, write it aside, prove it equal, measure it, then give it its name."""

from __future__ import annotations

import tempfile
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ..data import Dataset, load_dataset
from ..errors import InputError
from ..runtime import load
from ..runtime.bundle import open_bundle, write_bundle
from ..runtime.evaluate import evaluate
from ..train.run import Run, load_run
from .graph import OPSET, StudentGraph
from .model import assemble
from .parity import check, sample
from .profiles import check_profile


def export(
    run: Path | str, out: Path | str, profile: str = "ort", dynamic_batch: bool = False, images: int = 500
) -> dict[str, Any]:
    """Fold a finished run's student into a bundle.

    Args:
        run: a RUN folder. out: a new folder, or a bundle to replace.
        profile: key of PROFILES. dynamic_batch: any batch size instead of one image a call.
        images: real images for the parity gate, from the run's validation images, then its training images.

    Returns: {"bundle", "parity", "accuracy", "bytes": {file: size}, "manifest_sha256"}.

    Raises: InputError for a run or data source that is not there; ParityError when the graph differs from the student.
    """
    check_profile(profile)
    out = Path(out)
    _check_target(out)
    opened = load_run(Path(run))
    dataset = load_dataset(opened.config.data)
    pixels = _real_images(opened, dataset, images)
    classes = opened.metrics["classes"]
    builder = StudentGraph(opened.student, opened.preprocessing, len(classes), None if dynamic_batch else 1)
    graph = builder.build()
    outputs: dict[str, list[int]] = {"logits": [len(classes)]}
    if builder.weights:
        outputs["prompt_weights"] = [len(builder.weights), builder.entries]
    metadata = {"classes": classes, "preprocessing": opened.preprocessing.to_json()}
    artefact = assemble(graph, opened.preprocessing.size, outputs, metadata)
    manifest = _manifest(opened, out.name, profile, dynamic_batch, outputs, builder.entries)

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        # Everything is measured on a bundle as the device will open it; only then it is written under its name.
        files: dict[str, Path | bytes] = {"student.onnx": artefact.model, **artefact.constants}
        draft = write_bundle(Path(folder) / out.name, manifest, files)
        onnx.checker.check_model(str(draft.graph()), full_check=True)
        with load(draft, "onnxruntime") as runner:
            parity = check(opened, runner, pixels).to_json()
            measured = evaluate(runner, opened.config.data)
        keep = ("average_accuracy", "forgetting", "per_task", "images")
        accuracy = {**{k: measured[k] for k in keep}, "source": opened.config.data}
        bundle = write_bundle(out, {**manifest, "parity": parity, "accuracy": accuracy}, files)
    return {
        "bundle": str(bundle.path),
        "parity": parity,
        "accuracy": accuracy,
        "bytes": {name: entry["bytes"] for name, entry in bundle.manifest["files"].items()},
        "manifest_sha256": bundle.manifest["manifest_sha256"],
    }


def _check_target(out: Path) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "manifest.json").is_file():
        raise InputError(f"{out}: exists and is not a bundle", expected="a new folder, or a bundle to replace")
    open_bundle(out, verify=False)


def _real_images(run: Run, dataset: Dataset, count: int) -> np.ndarray:
    """uint8 (count, S, S, 3)."""
    missing = sorted(set(run.metrics["classes"]) - set(dataset.classes))
    if missing:
        raise InputError(
            f"{run.config.data}: changed since the run: {len(missing)} classes are gone",
            got="without " + ", ".join(missing[:5]),
            expected="the classes the run has learnt",
        )
    pixels = sample(dataset.val, count).decode(run.preprocessing).pixels
    if len(pixels) < count:
        more = sample(dataset.train, count - len(pixels)).decode(run.preprocessing).pixels
        pixels = np.concatenate([pixels, more])
    return pixels


def _manifest(
    run: Run, name: str, profile: str, dynamic_batch: bool, outputs: dict[str, list[int]], entries: int
) -> dict[str, Any]:
    config, student, size = run.config, run.student, run.preprocessing.size
    learner = student.learner
    query = "none" if not learner.needs_query else config.query
    training = {k: v for k, v in run.metrics.items() if k not in ("student", "teacher")}
    for side in ("student", "teacher"):
        kept = run.metrics[side]
        training[side] = {k: v for k, v in kept.items() if k != "loss"} if kept else None
    return {
        "name": name,
        "created": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "classes": run.metrics["classes"],
        "tasks": run.metrics["tasks"],
        "input": {
            "name": "images",
            "shape": [1, size, size, 3],
            "layout": "NHWC",
            "dtype": "uint8",
            "dynamic_batch": dynamic_batch,
            "preprocessing": run.preprocessing.to_json(),
            "normalisation": "in graph",
        },
        "outputs": {key: [1, *shape] for key, shape in outputs.items()},
        "learner": config.learner,
        "distiller": config.distill,
        "query": query,
        "alpha": config.alpha,
        "selection": {
            **learner.selection,
            "k": min(int(str(learner.selection["k"])), entries),
            "blocks": list(learner.blocks()),
        },
        "backbone": {
            "source": run.backbone.source,
            "identity": run.backbone.identity,
            "width": run.backbone.width,
            "depth": run.backbone.depth,
            "heads": int(run.backbone.model.blocks[0].attn.num_heads),
        },
        "profile": profile,
        "opset": OPSET,
        "precision": "fp32",
        "quantisation": None,
        "graphs": {"student": "student.onnx"},
        "accuracy": None,
        "parity": None,
        "training": training,
        "versions": {package: version(package) for package in ("cdl-edge", "torch", "timm", "onnx", "onnxruntime")},
    }
