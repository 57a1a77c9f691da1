"""What 8 bits cost and give: ranges kept while learning beside images, ONNX Runtime's and NVIDIA's own quantisers.

    python benchmarks/int8.py RUN... --data folder:PHOTOS [--images 64] [--no-speed] [--rounds 60]

Accuracy, for every RUN (trained with --range-images): the student's fp32 graph, and 8-bit graphs of it
- kept:       ours, from the ranges kept while learning; no image at all;
- last task:  ours, from images of the last task alone: what one does whose earlier images are gone;
- kept+last:  ours, both;
- oracle:     ours, from images of all tasks;
- ort:        onnxruntime.quantization.quantize_static with its defaults, the oracle's images, the same graph;
- modelopt:   modelopt.onnx.quantization.quantize (int8, fp32 for the rest), likewise.
Symmetric graphs, slow on x86, are asked for their numbers as written, without the runtime's changes.
RUNs of one learner are averaged: mean and sample standard deviation over them (seeds).

Speed: a ViT-T/16 at 224 with CODA + KDP in two passes and with APT + KDP in one (random weights: they do not change the
cost), batch 1, one thread, rounds in random order (rounds.py), CPU time of the process: the two passes in fp32 as
torch.onnx exports them (= 1.00, timed as often as all others together; a ratio has its 95 % interval), our fp32, our
8 bits, both peers' 8 bits, and the same in OpenVINO where it is installed. The peers get our graph without
`last_products` (ONNX Runtime cannot run what modelopt makes of its constants), at opset 23 and at opset 20 (ONNX
Runtime cannot load symmetric activations at opset 23): what cannot be loaded or run is said, and null.

Prints tables; the last line of stdout is JSON. `pip install nvidia-modelopt[onnx]` for that row, null without it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from rounds import ceiling, clock_of, machine, race, ratio, show, version_of

from cdl_edge.calibrate.calibration_images import images_of
from cdl_edge.calibrate.collect import collect
from cdl_edge.calibrate.cpu_session import CpuSession
from cdl_edge.calibrate.float_graph import FloatGraph, float_graph, named_layers
from cdl_edge.calibrate.measure import Measured, compare, measure
from cdl_edge.calibrate.quantize import quantise
from cdl_edge.calibrate.schemes import SCHEMES
from cdl_edge.export.export_bundle import export
from cdl_edge.export.profiles import PROFILES
from cdl_edge.export.rewrites import ALL
from cdl_edge.ranges import Ranges, TensorRange, merge_tensors
from cdl_edge.runtime import open_bundle
from cdl_edge.train.augment import Normalise
from export import VARIANTS, Bare, Straight, backbone_of, by_torch, openvino, ort, ours, trained

METHOD = "max"
REFERENCE = "coda fp32 torch.onnx, ort"
"what every ratio of the speeds is to"
PEERS_GRAPH = replace(ALL, last_products=False)


class Reader(CalibrationDataReader):
    """uint8 (N, S, S, 3), one image at a time."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.left: Iterator[np.ndarray] = iter(pixels)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """As ONNX Runtime asks for it."""
        image = next(self.left, None)
        return None if image is None else {"images": image[None]}


def whole(path: Path, to: Path) -> Path:
    """A graph with its constants inside: what both peers take."""
    onnx.save(onnx.load(str(path)), str(to))
    return to


def by_ort(path: Path, pixels: np.ndarray, folder: Path) -> Path:
    """ONNX Runtime's defaults."""
    quantize_static(str(whole(path, folder / "whole.onnx")), str(folder / "ort.onnx"), Reader(pixels))
    return folder / "ort.onnx"


def by_modelopt(path: Path, pixels: np.ndarray, folder: Path) -> Path:
    """NVIDIA's. Raises: ImportError without it."""
    from modelopt.onnx.quantization import quantize

    quantize(
        str(whole(path, folder / "whole.onnx")),
        calibration_data={"images": pixels},
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=str(folder / "modelopt.onnx"),
        log_level="ERROR",
    )
    return folder / "modelopt.onnx"


PEERS: dict[str, Callable[[Path, np.ndarray, Path], Path]] = {"ort": by_ort, "modelopt": by_modelopt}


def peer(name: str, path: Path, pixels: np.ndarray, folder: Path) -> Path | None:
    """The file of a peer, or None with a line that says why not."""
    try:
        return PEERS[name](path, pixels, folder)
    except Exception as error:  # a foreign program on a foreign graph: whatever it raises is its answer
        print(f"{name}: {type(error).__name__}: {str(error).splitlines()[:1]}", file=sys.stderr)
        return None


def add_peer(calls: dict[str, Callable[[], Any]], label: str, path: Path | None, feed: dict[str, np.ndarray]) -> None:
    """A peer's graph among the calls, if ONNX Runtime loads and runs it."""
    if path is None:
        return
    try:
        call = ort(path, feed, 1)
        call()
    except Exception as error:  # onnxruntime's share no base class
        print(f"{label}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        return
    calls[label] = call


def accuracy(run: Path, data: str, images: int, scheme: str, peers: list[str]) -> dict[str, Any]:
    """Of one run: variant -> {"accuracy", "drop", "worst_task", "quantisation_forgetting", "agreement"}."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export(run, folder / "bundle", dynamic_batch=True)  # many images a call: the numbers are the same, and sooner
        bundle = open_bundle(folder / "bundle")
        found = images_of(bundle, data, images, None)
        per_task = len(found.training) // len(bundle.tasks)
        last = found.training[-per_task:]
        kept = Ranges.load(bundle.path / "ranges.npz").merged()
        graph = float_graph(bundle, "student")
        every, ending = collect(graph, found.training).tensors, collect(graph, last).tensors
        both = {n: merge_tensors([kept[n], ending[n]]) for n in ending}
        expected = CpuSession(bundle.graph().read_bytes(), bundle.path).logits(found.validation)
        before = measure(expected, found.labels, bundle.tasks)
        rows = {"fp32": row(before, before, expected, expected)}
        sources: dict[str, Mapping[str, TensorRange]] = {
            "kept": kept,
            "last task": ending,
            "kept+last": both,
            "oracle": every,
        }
        for label, ranges in sources.items():
            made = quantise({"student": graph}, ranges, SCHEMES[scheme], METHOD)
            for file, content in made.constants.items():
                (bundle.path / file).write_bytes(content)
            session = CpuSession(made.models["student"], bundle.path, as_written=SCHEMES[scheme].symmetric)
            logits = session.logits(found.validation)
            rows[label] = row(before, measure(logits, found.labels, bundle.tasks), logits, expected)
        if peers:
            export(run, folder / "peers")
        for label in peers:
            path = peer(label, folder / "peers" / "student.onnx", found.training, folder)
            if path is not None:
                logits = CpuSession(path.read_bytes(), folder, as_written=True).logits(found.validation)
                rows[label] = row(before, measure(logits, found.labels, bundle.tasks), logits, expected)
        return {"learner": bundle.manifest.learner, "variants": rows}


def row(before: Measured, after: Measured, logits: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """What one variant shows."""
    found = compare(before, after)
    return {
        "accuracy": after.average_accuracy,
        "drop": found["drop"]["average"],
        "worst_task": max(d for d in found["drop"]["per_task"] if d is not None),
        "quantisation_forgetting": found["quantisation_forgetting"],
        "calibration_error": after.calibration_error,
        "agreement": 100.0 * float((logits.argmax(1) == expected.argmax(1)).mean()),
        "rmse": float(((logits - expected) ** 2).mean() ** 0.5),
    }


def summary(found: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """learner -> variant -> {figure: [mean, standard deviation]}."""
    gathered: dict[str, dict[str, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for one in found:
        for variant, figures in one["variants"].items():
            gathered[one["learner"]][variant].append(figures)
            gathered["all"][variant].append(figures)
    return {
        learner: {
            variant: {
                key: [statistics.mean(v), statistics.stdev(v) if len(v) > 1 else None]
                for key in rows[0]
                for v in [[r[key] for r in rows]]
            }
            for variant, rows in variants.items()
        }
        for learner, variants in gathered.items()
    }


@torch.no_grad()
def speed(rounds: int, seed: int, learners: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Label -> {"median_ms", "ratio" to REFERENCE, "interval" of it}. learners: of coda (needed) and apt."""
    backbone = backbone_of("tiny")
    side = backbone.preprocessing.size
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, side, side, 3), dtype=np.uint8)
    x = Normalise(backbone.preprocessing, torch.device("cpu"))(pixels[:1])
    feed = {"images": pixels[:1]}
    calls: dict[str, Callable[[], Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bare = Bare(backbone.model)
        by_torch(bare, x, folder / "bare.onnx")
        calls["fp32 bare ViT, torch.onnx, ort"] = ort(folder / "bare.onnx", {"x": x.numpy()}, 1)
        for learner in learners:
            student = trained(backbone, *VARIANTS[learner], 10)
            by_torch(Straight(student), x, folder / f"{learner}.onnx")
            calls[f"{learner} fp32 torch.onnx, ort"] = ort(folder / f"{learner}.onnx", {"x": x.numpy()}, 1)
            for profile, engine in (("ort", "ort"), ("openvino", "openvino")):
                place = folder / f"{learner}-{profile}"
                path = ours(student, backbone, 1, place, profile, ALL)
                graph = FloatGraph(path, named_layers(path, student.two_pass))
                made = quantise({"student": graph}, collect(graph, pixels).tensors, SCHEMES["int8-x86"], METHOD)
                for file, content in made.constants.items():
                    (place / file).write_bytes(content)
                (place / "int8.onnx").write_bytes(made.models["student"])
                if engine == "ort":
                    calls[f"{learner} fp32 ours, ort"] = ort(path, feed, 1)
                    calls[f"{learner} int8 ours, ort"] = ort(place / "int8.onnx", feed, 1)
                    for profile_of_peers in ("ort", "openvino"):
                        place = folder / f"{learner}-peers-{profile_of_peers}"
                        plain = ours(student, backbone, 1, place, profile_of_peers, PEERS_GRAPH)
                        for label in PEERS:
                            add_peer(
                                calls,
                                f"{learner} int8 {label}, opset {PROFILES[profile_of_peers].opset}, ort",
                                peer(label, plain, pixels, place),
                                feed,
                            )
                    continue
                try:
                    for precision in ("f32", "bf16"):
                        calls[f"{learner} {precision} ours, openvino"] = openvino(path, feed, 1, precision)
                        calls[f"{learner} int8 + {precision} ours, openvino"] = openvino(
                            place / "int8.onnx", feed, 1, precision
                        )
                        calls[f"{learner} {precision} torch.onnx, openvino"] = openvino(
                            folder / f"{learner}.onnx", {"x": x.numpy()}, 1, precision
                        )
                except (ImportError, RuntimeError) as error:
                    print(f"openvino: {error}", file=sys.stderr)
        times = race(calls, rounds, REFERENCE, seed, clock_of(1))
    rows = {}
    for label, values in times.items():
        found = ratio(values, times[REFERENCE])
        between = [found.low, found.high]
        rows[label] = {"median_ms": float(np.median(values)), "ratio": found.median, "interval": between}
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--data", help="image source of the runs")
    parser.add_argument("--images", type=int, default=64, help="training images of each task")
    parser.add_argument("--scheme", "--flavour", default="int8-x86", help=", ".join(SCHEMES))
    parser.add_argument("--peers", default="ort,modelopt", help="whose accuracy is measured too: minutes a run")
    parser.add_argument("--no-speed", action="store_true", help="accuracy only")
    parser.add_argument("--rounds", type=int, default=60, help="calls of each graph")
    parser.add_argument("--seed", type=int, default=0, help="of the orders")
    parser.add_argument("--speed-learners", default="coda,apt", help="whose graphs are timed; coda is the reference")
    parser.add_argument("--ceiling-size", type=int, help="of the matrices that show the machine's ceiling")
    arguments = parser.parse_args()
    learners = arguments.speed_learners.split(",")
    if "coda" not in learners or set(learners) - {"coda", "apt"}:
        parser.error(f"--speed-learners: coda, or coda,apt; got {arguments.speed_learners}")
    torch.set_num_threads(1)
    found = []
    for run in arguments.runs:
        peers = [p for p in arguments.peers.split(",") if p]
        rows = accuracy(run, arguments.data, arguments.images, arguments.scheme, peers)
        found.append({"run": str(run), **rows})
        print(f"{run}: done", file=sys.stderr)
    table = summary(found)
    for learner, variants in table.items():
        print(f"{learner}, {arguments.scheme}:")
        for variant, figures in variants.items():
            shown = "  ".join(
                f"{key} {mean:.2f}" + ("" if std is None else f" ± {std:.2f}")
                for key, (mean, std) in figures.items()
                if key in ("accuracy", "drop", "worst_task", "quantisation_forgetting", "agreement")
            )
            print(f"  {variant:10s} {shown}")
    timed = top = None
    if not arguments.no_speed:
        top = ceiling(size=arguments.ceiling_size)
        print(show(top))
        timed = speed(arguments.rounds, arguments.seed, learners)
        title = "graph (one thread, batch 1, ViT-T/16 at 224)"
        print(f"{title:44s} {'ms':>8s} {'ratio':>7s} {'95 % interval':>16s} {'faster':>7s}")
        for label, figures in timed.items():
            between = "{:.3f} .. {:.3f}".format(*figures["interval"])
            print(
                f"{label:44s} {figures['median_ms']:8.2f} {figures['ratio']:7.3f} {between:>16s} "
                f"{1 / figures['ratio']:6.2f}x"
            )
    print(
        json.dumps(
            {
                "benchmark": "int8",
                "method": METHOD,
                "scheme": arguments.scheme,
                "images_per_task": arguments.images,
                "runs": found,
                "summary": table,
                "speed": timed,
                "seed": arguments.seed,
                "reference": REFERENCE,
                "machine": machine(),
                "ceiling": top,
                "versions": {
                    p: version_of(p) for p in ("cdl-edge", "onnxruntime", "openvino", "nvidia-modelopt", "torch")
                },
            }
        )
    )


if __name__ == "__main__":
    onnxruntime.set_default_logger_severity(3)
    main()
