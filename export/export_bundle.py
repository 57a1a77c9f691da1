"""RUN -> BUNDLE: build the graph, write it aside, prove it equal, measure it, then give it its name."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from .. import __version__
from ..artefacts.bundle import Bundle, check_target, write_bundle
from ..artefacts.layout import LAYERS, RANGES, SELECTIONS, SELFTEST, STATISTICS
from ..class_statistics import ClassStatistics
from ..data import Dataset, Fingerprint, check_spelling, held_out_early, load_dataset
from ..errors import InputError
from ..files import workspace
from ..heads import best_ridge
from ..log import LOG
from ..machine import version_of
from ..measurement.evaluate import find_images, score
from ..runtime import load
from ..runtime.confidence import fit, pack_selections
from ..runtime.runner import Runner
from ..train.closed_form import load_statistics, statistics_file
from ..train.run import Run, load_run
from .assembly import assemble
from .nodes import Graph
from .parity import CHUNK, compare, logits_of, logits_of_passes, sample, student_logits
from .profiles import Profile, get_profile
from .student_graph import StudentGraph

SELFTEST_IMAGES = 4
SPARE = 8
"training images that are read at least, where validation images are too few: some of them may be unreadable"
KNOWN_IMAGES = 100
"""validation images of each task that confidence and selections are taken from. The task posterior was as good with
four times as many to 0.03 nats; a temperature needs fewer (ImageNet at 32 x 32, 100 classes, 2026-11-21)."""


def export(
    run: Path | str,
    out: Path | str,
    profile: str = "ort",
    dynamic_batch: bool = False,
    images: int = 500,
    data: str | None = None,
    replace: bool = False,
    statistics: bool = False,
) -> dict[str, Any]:
    """Fold a finished run's student into a bundle.

    Args:
        run: a RUN folder. out: a new or empty folder; with `replace` also a bundle, see artefacts.bundle.foreign.
        profile: key of PROFILES. dynamic_batch: any batch size instead of one image a call.
        images: real images for the parity gate, from the run's validation images, then its training images.
        data: where the run's images are now, if they have moved.
        statistics: put the class statistics that the head is made from into the bundle, and so into its packs; the
            graph gives its features then, and classes can be enrolled on the device (see updates.enrol).

    Returns: {"bundle", "parity", "accuracy", "bytes": {file: size}, "manifest_sha256", "data"}.

    Raises: InputError for a run or data source that is not there, or other images than the run's; GateError when the
        graph differs from the student.
    """
    dialect = get_profile(profile)
    out = Path(out)
    check_target(out, replace)
    opened = load_run(Path(run))
    kept = _statistics(opened) if statistics else None
    record = opened.metrics.data
    source = data or opened.config.data
    dataset = load_dataset(source, learning=False, early=held_out_early(opened.metrics.document))
    LOG.info(dataset.line)
    _check_images(opened, dataset)
    pixels = _real_images(opened, dataset, images)
    LOG.info(f"the trained student answers {len(pixels)} images")
    expected = student_logits(opened, pixels, len(opened.metrics.classes))
    graphs = _graphs(opened, dialect, None if dynamic_batch else 1, kept is not None)
    metadata = {"classes": list(opened.metrics.classes), "preprocessing": opened.preprocessing.to_json()}
    artefact = assemble(graphs, metadata)
    files: dict[str, Path | bytes] = {f"{name}.onnx": model for name, model in artefact.models.items()}
    files |= {**artefact.constants, SELFTEST: _selftest(pixels, expected)}
    files[LAYERS] = artefact.layers.to_bytes()
    if (opened.path / RANGES).is_file():
        files[RANGES] = opened.path / RANGES
    if kept is not None:
        files[STATISTICS] = kept
    manifest = _manifest(opened, out.name, dialect, dynamic_batch, graphs)
    manifest["statistics"] = STATISTICS if kept is not None else None
    if kept is not None and opened.config.head == "ranpac":
        # A device that learns a class does not choose it again: that takes longer than all the rest.
        manifest["ridge"] = best_ridge(ClassStatistics.load(kept))

    with workspace(out.parent) as folder:
        # Everything is measured on a bundle as the device will open it; only then it is written under its name.
        draft = write_bundle(folder / "draft", manifest, files)
        parities = _prove(draft, graphs, pixels, expected)
        with load(draft, "onnxruntime") as runner:
            measured = score(runner, find_images(runner, source, "val"), progress="accuracy of the graph")
            LOG.info("confidence, and the prompts that each task selects")
            confidence, selections = _confidence(draft, runner, dataset)
        keep = ("average_accuracy", "forgetting", "per_task", "images")
        accuracy = {
            **{k: measured[k] for k in keep},
            "source": _without_places((record or {}).get("given", source)),
        }
        parity = parities["student"]
        proven = {"parity": parity, "graph_parity": parities, "accuracy": accuracy, "confidence": confidence}
        if selections:
            proven["selections"] = SELECTIONS
            files[SELECTIONS] = pack_selections(selections)
        bundle = write_bundle(out, {**manifest, **proven}, files, replace)
    return {
        "bundle": str(bundle.path),
        "parity": parity,
        "accuracy": accuracy,
        "bytes": {name: entry.bytes for name, entry in bundle.manifest.files.items()},
        "manifest_sha256": bundle.manifest.manifest_sha256,
        "data": dataset.summary,
    }


def _graphs(run: Run, profile: Profile, batch: int | None, features: bool) -> dict[str, Graph]:
    """Name -> graph: the student, of a two-pass student also its passes apart, in every precision of the profile.

    features: see StudentGraph; of the whole student only.
    """
    graphs = {}
    parts = ("student", "query", "prompted") if run.student.two_pass else ("student",)
    for precision in profile.precisions:
        for part in parts:
            builder = StudentGraph(
                run.student,
                run.preprocessing,
                len(run.metrics.classes),
                batch,
                profile,
                precision,
                features=features and part == "student",
            )
            graphs[part if precision == "fp32" else f"{part}.{precision}"] = builder.build(part)
    return graphs


def _selftest(pixels: np.ndarray, logits: np.ndarray) -> bytes:
    """A few real images and what the student says about them: the device checks itself with them."""
    chosen = np.linspace(0, len(pixels) - 1, min(SELFTEST_IMAGES, len(pixels))).round().astype(int)
    stream = io.BytesIO()
    np.savez_compressed(stream, images=pixels[chosen], logits=logits[chosen])
    return stream.getvalue()


def _prove(draft: Bundle, graphs: dict[str, Graph], pixels: np.ndarray, expected: np.ndarray) -> dict[str, Any]:
    """Parity of every graph, by ONNX Runtime on the CPU: {name: as Parity.to_json}. Raises: GateError."""
    proven = {}
    for name in graphs:
        part, _, precision = name.partition(".")
        precision = precision or "fp32"
        onnx.checker.check_model(str(draft.graph(name)), full_check=True)
        if part == "query":
            continue  # proven together with the prompted graph
        LOG.info(f"{name}: compared with the trained student on {len(pixels)} images")
        with ExitStack() as stack:
            runner = stack.enter_context(load(draft, "onnxruntime", graph=part, precision=precision))
            if part == "prompted":
                query = stack.enter_context(load(draft, "onnxruntime", graph="query", precision=precision))
                got = logits_of_passes(query, runner, pixels)
            else:
                got = logits_of(runner, pixels)
        proven[name] = compare(expected, got, precision, f"the graph {name!r}").to_json()
    return proven


def _confidence(draft: Bundle, runner: Runner, dataset: Dataset) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The manifest's "confidence", and the mean selection of each task, see `runtime.confidence.fit`."""
    position = {name: index for index, name in enumerate(draft.classes)}
    index_here = np.array([position.get(name, -1) for name in dataset.classes])
    tasks = [[i for i, c in enumerate(index_here) if c in task] for task in draft.tasks]
    parts = [sample(dataset.val.of_classes(task), KNOWN_IMAGES) for task in tasks]
    decoded = [part.decode(draft.preprocessing, sampled=True) for part in parts]
    pixels = np.concatenate([part.pixels for part in decoded])
    labels = index_here[np.concatenate([part.labels for part in decoded])]

    def computed(graph: Runner) -> dict[str, np.ndarray]:
        images = graph.signature.images
        parts = [graph.compute({images: pixels[i : i + CHUNK]}) for i in range(0, len(pixels), CHUNK)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    outputs = computed(runner)
    names = [name for name in outputs if name.endswith("_weights")]
    if "prompted" in draft.manifest.graphs:
        signature = draft.signature("prompted")
        names = [name for name in signature.inputs if name != signature.images]
        if set(names) - set(outputs):  # the fused graph keeps the mapped weights of cdl-prompt to itself
            with load(draft, "onnxruntime", graph="query", verify=False) as query:
                outputs |= computed(query)
    return fit(outputs["logits"], labels, draft.tasks, {name: outputs[name] for name in names})


def _check_images(run: Run, dataset: Dataset) -> None:
    """Raises: InputError where these are not the run's validation images: accuracy and self-test are taken from them.

    The source may have got other classes since, and lost training images.
    """
    classes = run.metrics.classes
    check_spelling(dataset.source, dataset.classes, classes)
    missing = sorted(set(classes) - {dataset.classes[c] for c in set(dataset.val.labels.tolist())})
    changes = f"without {', '.join(missing[:5])}" if missing else ""
    if not missing and (record := run.metrics.data):
        learnt = Fingerprint.from_json(record["fingerprint"]).val
        val = dataset.val.of_classes([dataset.classes.index(c) for c in classes]).hashes(dataset.classes)
        changes = Fingerprint({}, {c: learnt[c] for c in sorted(learnt)}).changes(
            Fingerprint({}, {c: val[c] for c in sorted(val)})
        )
    if changes:
        raise InputError(
            f"{dataset.source}: not the images that the run was trained with",
            got=changes,
            expected="the run's validation images, all classes: accuracy, self-test and confidence are taken from them",
            fix="bring them back, name the folder that they have moved to with --data, or train again",
        )


def _statistics(run: Run) -> Path:
    """The file of class statistics that the student's head is made from.

    Raises: InputError for a learnt head, and where the file is missing, damaged, or of other classes.
    """
    if run.student.statistics_head is None:
        raise InputError(
            f"{run.path}: there are no class statistics to put into the bundle",
            got=f"--head {run.config.head}",
            expected="a run whose head is made from class statistics: ncm, slda, ranpac or aligned",
            fix="leave --statistics out, or train with --head ranpac",
        )
    tasks = len(run.metrics.tasks)
    load_statistics(run.path, "student", tasks).ordered(run.metrics.classes)
    return statistics_file(run.path, "student", tasks)


def _real_images(run: Run, dataset: Dataset, count: int) -> np.ndarray:
    """uint8 (count, S, S, 3)."""
    pixels = sample(dataset.val, count).decode(run.preprocessing, sampled=True).pixels
    if len(pixels) < count:
        missing = count - len(pixels)  # some more are read: the only one that is missing may be unreadable
        more = sample(dataset.train, max(missing, SPARE)).decode(run.preprocessing, sampled=True).pixels
        spread = np.linspace(0, len(more) - 1, min(missing, len(more))).round().astype(np.int64)
        pixels = np.concatenate([pixels, more[spread]])
    return pixels


def _without_places(value: Any) -> Any:
    """JSON in which a path from the root or from the home is its last name: file:/a/b is file:b."""
    if isinstance(value, dict):
        return {k: _without_places(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_places(v) for v in value]
    kind, colon, path = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    return f"{kind}{colon}{Path(path).name}" if path.startswith(("/", "~")) else value


def _portable(record: Mapping[str, Any]) -> dict[str, Any]:
    """What "data" of a run says without the source's place and the hashes of what was learnt from."""
    hashes = {k: v for k, v in record["fingerprint"].items() if k != "train"}
    before = {"before": [_portable(run) for run in record["before"]]} if "before" in record else {}
    return {**{k: v for k, v in record.items() if k != "source"}, "fingerprint": hashes, **before}


def _without_folder(line: str) -> str:
    """What a run says of an image that it could not read, the file without its folder."""
    file, colon, reason = line.partition(": ")
    return f"{Path(file).name}{colon}{reason}"


def _manifest(run: Run, name: str, profile: Profile, dynamic_batch: bool, graphs: dict[str, Graph]) -> dict[str, Any]:
    config, student, size = run.config, run.student, run.preprocessing.size
    outputs = graphs["student"].outputs
    entries = outputs["prompt_weights"][1] if "prompt_weights" in outputs else 0
    learner = student.learner
    query = "none" if not learner.needs_query else config.query
    training = {k: v for k, v in run.metrics.document.items() if k not in ("student", "teacher")}
    if record := training.get("data"):
        # A bundle goes out of the house: no path of this machine, and what tells the run's images from others.
        training["data"] = _portable(record)
        training["config"] = {**training["config"], "data": record["given"]}
    training["skipped"] = [_without_folder(line) for line in training.get("skipped") or ()]
    for side in ("student", "teacher"):
        kept = run.metrics.document.get(side)
        training[side] = {k: v for k, v in kept.items() if k not in ("loss", "pictures")} if kept else None
    return {
        "name": name,
        "created": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "classes": run.metrics.classes,
        "tasks": run.metrics.tasks,
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
            "source": _without_places(run.backbone.source),
            "identity": run.backbone.identity,
            "width": run.backbone.width,
            "depth": run.backbone.depth,
            "heads": int(run.backbone.model.blocks[0].attn.num_heads),
        },
        "profile": profile.name,
        "opset": profile.opset,
        "precision": "fp32",
        "quantisation": None,
        "graphs": {name: f"{name}.onnx" for name in graphs},
        "signatures": {name: graph.signature for name, graph in graphs.items()},
        "selftest": SELFTEST,
        "ranges": RANGES if (run.path / RANGES).is_file() else None,
        "layers": LAYERS,
        "accuracy": None,
        "parity": None,
        "graph_parity": None,
        "confidence": None,
        "selections": None,
        "training": _without_places(training),
        "versions": {
            "cdl-edge": __version__,
            **{package: version(package) for package in ("torch", "timm", "onnx")},
            "onnxruntime": version_of("onnxruntime") or version_of("onnxruntime-gpu"),
        },
    }
