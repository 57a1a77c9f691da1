"""Accuracy and cost of the prompt policies on a stream of frames made from real images.

    python benchmarks/stream.py --bundles BUNDLE ... --data folder:PATH [--frames 2000] [--streams 5]
    python benchmarks/stream.py --vit tiny --data folder:PATH --frames 300        cost only: random weights

How a stream is made: the tasks (contexts) follow each other in random order, with equally many frames; in each, real
validation images that `export` has not taken the selections from are shown one after the other, each for 10 to 40
frames (a scene). Within a scene the camera trembles (shift and brightness do a damped random walk: standard deviation
--tremble of the side and of the brightness, 0.98 of it kept from frame to frame), every twentieth scene is panned by a
third of the side, and each frame has its own sensor noise (standard deviation 3 grey levels).

Cost: CPU time of the process at one thread, everything that `step` does; 20 frames go through one policy after the
other, in random order, over the same loaded graphs, then the next 20. "bare" is the runner of the prompted graph,
called with ready weights. Accuracy is over all --streams, cost from the first. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cdl_edge.artefacts.bundle import Bundle, open_bundle, write_bundle
from cdl_edge.artefacts.layout import SELECTIONS
from cdl_edge.data import Split, load_dataset
from cdl_edge.export.assembly import assemble
from cdl_edge.export.export_bundle import KNOWN_IMAGES
from cdl_edge.export.parity import sample
from cdl_edge.export.profiles import PROFILES
from cdl_edge.export.student_graph import StudentGraph
from cdl_edge.images import Preprocessing
from cdl_edge.machine import cpu_model, version_of
from cdl_edge.runtime import load
from cdl_edge.runtime.confidence import fit, pack_selections
from cdl_edge.runtime.policy import Selector
from cdl_edge.runtime.scene import SceneChange

SCENE = (10, 40)
"frames"
KEPT, NOISE = 0.98, 3.0
PANNED, PAN = 20, 1 / 3
BLOCK = 20
"frames that one policy takes in a row: each keeps the caches for itself, as it would alone"
POLICIES = ("exact", "sticky", "pinned")


@dataclass(frozen=True)
class Stream:
    """Frames uint8 (N, S, S, 3), and for each its class, its task and whether it is the first of a scene."""

    frames: np.ndarray
    labels: np.ndarray
    tasks: np.ndarray
    cuts: np.ndarray


def scene(image: np.ndarray, length: int, pan: float, tremble: float, rng: np.random.Generator) -> np.ndarray:
    """uint8 (S, S, 3) -> (length, S, S, 3)."""
    side = len(image)
    margin = round(side * (PAN + 4 * tremble)) + 1
    wide = Image.fromarray(np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="reflect"))
    x, y, light = rng.normal(0, 1, 3)
    frames = np.empty((length, side, side, 3), np.uint8)
    for i in range(length):
        shift = tremble * side * np.clip([x, y], -3, 3) + (pan * side * i / length, 0)
        cut = (1, 0, margin + shift[0], 0, 1, margin + shift[1])
        seen = np.asarray(wide.transform((side, side), Image.Transform.AFFINE, cut, Image.Resampling.BILINEAR))
        noisy = seen * (1 + tremble * light) + rng.normal(0, NOISE, seen.shape)
        frames[i] = np.clip(noisy, 0, 255).round()
        x, y, light = KEPT * np.array([x, y, light]) + (1 - KEPT**2) ** 0.5 * rng.normal(0, 1, 3)
    return frames


def make_stream(pools: list[tuple[np.ndarray, np.ndarray]], count: int, tremble: float, seed: int) -> Stream:
    """pools: for each task its images uint8 (n, S, S, 3) and their classes (n,)."""
    rng = np.random.default_rng(seed)
    parts: list[tuple[np.ndarray, int, int]] = []
    for task in rng.permutation(len(pools)).tolist():
        images, labels = pools[task]
        left, order = count // len(pools), rng.permutation(len(images))
        shown = 0
        while left:
            length = min(left, int(rng.integers(SCENE[0], SCENE[1] + 1)))
            i = order[shown % len(order)]
            pan = PAN if rng.integers(PANNED) == 0 else 0.0
            parts.append((scene(images[i], length, pan, tremble, rng), int(labels[i]), task))
            left, shown = left - length, shown + 1
    lengths = [len(frames) for frames, _, _ in parts]
    cuts = np.zeros(sum(lengths), bool)
    cuts[np.cumsum([0, *lengths[:-1]])] = True
    return Stream(
        np.concatenate([frames for frames, _, _ in parts]),
        np.repeat([label for _, label, _ in parts], lengths),
        np.repeat([task for _, _, task in parts], lengths),
        cuts,
    )


def pools_of(bundle: Bundle, data: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Validation images of each task without those that `export` has used."""
    dataset = load_dataset(data)
    position = {name: index for index, name in enumerate(bundle.classes)}
    here = np.array([position.get(name, -1) for name in dataset.classes])
    pools = []
    for task in bundle.tasks:
        split = dataset.val.of_classes([i for i, c in enumerate(here) if c in task])
        used = sample(Split(np.arange(len(split)), split.labels), KNOWN_IMAGES).items
        assert isinstance(used, np.ndarray)
        rest = split.take(np.setdiff1d(np.arange(len(split)), used)).decode(bundle.preprocessing)
        pools.append((rest.pixels, here[rest.labels]))
    return pools


def selectors(bundle: Bundle, every: int, change: float) -> dict[str, Selector]:
    """One of each policy, over the same two graphs."""
    runners = {graph: load(bundle, threads=1, graph=graph, verify=False) for graph in ("student", "prompted")}
    side = bundle.preprocessing.size
    return {p: Selector(bundle, runners, p, SceneChange(side, every, change)) for p in POLICIES}


def accuracy(bundle: Bundle, streams: list[Stream], every: int, change: float) -> dict[str, Any]:
    """% of frames, by policy; and how sticky behaves at the cuts."""
    right: dict[str, list[np.ndarray]] = {p: [] for p in POLICIES}
    queried, stale, cuts, frames = 0, 0, 0, 0
    for stream in streams:
        found = selectors(bundle, every, change)
        for policy, selector in found.items():
            answers = np.empty(len(stream.frames), np.int64)
            fresh = np.zeros(len(stream.frames), bool)
            for i, frame in enumerate(stream.frames):
                if policy == "pinned" and (i == 0 or stream.tasks[i] != stream.tasks[i - 1]):
                    selector.pin(int(stream.tasks[i]))
                step = selector.step(frame[None])
                answers[i], fresh[i] = step.logits[0].argmax(), step.paths[0] == "query"
            right[policy].append(answers == stream.labels)
            if policy == "sticky":
                queried, stale = queried + int(fresh.sum()), stale + int((stream.cuts & ~fresh).sum())
        cuts, frames = cuts + int(stream.cuts.sum()), frames + len(stream.frames)
        found["exact"].close()
        found["pinned"].close()
    by_stream = {p: np.array([100 * r.mean() for r in parts]) for p, parts in right.items()}
    lost = by_stream["exact"] - by_stream["sticky"]
    return {
        "accuracy": {p: float(values.mean()) for p, values in by_stream.items()},
        "lost_by_sticky": float(lost.mean()),
        "lost_by_sticky_sd_of_streams": float(lost.std(ddof=1)) if len(lost) > 1 else None,
        "queries": 100 * queried / frames,
        "scenes": cuts,
        "cuts_missed": stale,
        "frames": frames,
    }


def cost(bundle: Bundle, stream: Stream, every: int, change: float) -> dict[str, Any]:
    """Milliseconds of CPU time of one step, by policy; of the bare prompted pass; of what sticky adds to it."""
    found = selectors(bundle, every, change)
    prompted = found["pinned"]._runners["prompted"]
    weights = found["pinned"].certainty.selection(0)
    given = {name: value[None] for name, value in weights.items()}
    detector = SceneChange(bundle.preprocessing.size, every, change)
    read = found["pinned"].step

    def everything(frame: np.ndarray) -> None:
        step = read(frame)
        _ = step.prompts, step.confidence, step.unknown, step.task_posterior

    found["pinned"].pin(0)
    calls = {
        "bare": lambda frame: prompted.run(frame, **given),
        "pinned": found["pinned"].step,
        "sticky": found["sticky"].step,
        "exact": found["exact"].step,
        "pinned, all read": everything,
        "detector": lambda frame: detector(frame[0]),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    rng = np.random.default_rng(0)
    for start in range(0, len(stream.frames), BLOCK):
        for name in rng.permutation(list(calls)).tolist():
            calls[name](stream.frames[max(0, start - 1)][None])  # what ran before had the caches
            for frame in stream.frames[start : start + BLOCK]:
                begin = time.process_time()
                calls[name](frame[None])
                times[name].append((time.process_time() - begin) * 1e3)
    found["exact"].close()
    found["pinned"].close()
    table = {
        name: {"mean": float(np.mean(v)), **{f"p{q}": float(np.percentile(v, q)) for q in (50, 90, 99)}}
        for name, v in times.items()
    }
    ratio = {
        "sticky / pinned, means": table["sticky"]["mean"] / table["pinned"]["mean"],
        "sticky / bare, means": table["sticky"]["mean"] / table["bare"]["mean"],
        "exact / pinned, means": table["exact"]["mean"] / table["pinned"]["mean"],
        "pinned / bare, means": table["pinned"]["mean"] / table["bare"]["mean"],
        # Both within the same fraction of a second: a slow machine is slow for both.
        **{
            f"{a} / {b}, median of blocks": float(np.median(_blocks(times[a]) / _blocks(times[b])))
            for a, b in (("sticky", "pinned"), ("pinned", "bare"))
        },
    }
    return {"ms": table, "ratio": ratio}


def _blocks(times: list[float]) -> np.ndarray:
    """Mean of each block."""
    return np.array([np.mean(times[i : i + BLOCK]) for i in range(0, len(times), BLOCK)])


def random_bundle(name: str, folder: Path, images: np.ndarray) -> Bundle:
    """CODA + KDP on a ViT/16 at 224 with random weights; its selections are those of `images`."""
    from export import CLASSES, backbone_of, trained  # benchmarks/export.py

    backbone = backbone_of(name)
    student = trained(backbone, "coda", True, "", 10)
    parts = ("student", "query", "prompted")
    graphs = {
        p: StudentGraph(student, backbone.preprocessing, CLASSES, 1, PROFILES["ort"], "fp32").build(p) for p in parts
    }
    artefact = assemble(graphs, {})
    side = backbone.preprocessing.size
    outputs = {k: [1, *shape] for k, shape in graphs["student"].outputs.items()}
    manifest: dict[str, Any] = {
        "name": f"vit-{name}",
        "classes": [str(i) for i in range(CLASSES)],
        "tasks": np.arange(CLASSES).reshape(10, -1).tolist(),
        "input": {
            "name": "images",
            "shape": [1, side, side, 3],
            "dtype": "uint8",
            "preprocessing": backbone.preprocessing.to_json(),
        },
        "outputs": outputs,
        "query": "two-pass",
        "selection": {"kind": "weighted", "k": 5, "blocks": list(range(outputs["prompt_weights"][1]))},
        "graphs": {p: f"{p}.onnx" for p in parts},
        "signatures": {p: g.signature for p, g in graphs.items()},
    }
    files: dict[str, Any] = {f"{p}.onnx": model for p, model in artefact.models.items()} | artefact.constants
    draft = write_bundle(folder / "draft", manifest, files)
    with load(draft, threads=1) as runner:
        found = runner.run(images)
    assert found.prompt_weights is not None
    labels = np.arange(len(images)) % 10 * (CLASSES // 10)
    document, means = fit(found.logits, labels, draft.tasks, {"prompt_weights": found.prompt_weights})
    manifest |= {"confidence": document, "selections": SELECTIONS}
    return write_bundle(folder / "bundle", manifest, files | {SELECTIONS: pack_selections(means)})


def shown(name: str, found: dict[str, Any]) -> None:
    """A table for people."""
    if "accuracy" in found:
        line = "  ".join(f"{p} {a:.2f} %" for p, a in found["accuracy"].items())
        print(f"{name}: accuracy {line}; sticky loses {found['lost_by_sticky']:.2f} points")
        print(
            f"    {found['frames']} frames, {found['scenes']} scenes: {found['queries']:.1f} % of the frames queried, "
            f"{found['cuts_missed']} cuts missed"
        )
    print(f"    {'CPU ms':18s} {'mean':>8s} {'p50':>8s} {'p90':>8s} {'p99':>8s}")
    for policy, row in found["ms"].items():
        print(f"    {policy:18s} " + " ".join(f"{row[k]:8.4f}" for k in ("mean", "p50", "p90", "p99")))
    print("    " + "\n    ".join(f"{k}: {v:.3f}" for k, v in found["ratio"].items()), flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", nargs="*", type=Path, default=[])
    parser.add_argument("--vit", nargs="*", default=[], help="tiny, small, base")
    parser.add_argument("--data", required=True)
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--streams", type=int, default=5)
    parser.add_argument("--tremble", type=float, default=0.02, help="share of side and brightness")
    parser.add_argument("--every", type=int, default=60, help="frames")
    parser.add_argument("--change", type=float, default=30.0, help="grey levels")
    arguments = parser.parse_args()
    sticky = (arguments.every, arguments.change)

    results: dict[str, Any] = {}
    for path in arguments.bundles:
        bundle = open_bundle(path)
        pools = pools_of(bundle, arguments.data)
        streams = [make_stream(pools, arguments.frames, arguments.tremble, seed) for seed in range(arguments.streams)]
        results[bundle.name] = {**accuracy(bundle, streams, *sticky), **cost(bundle, streams[0], *sticky)}
        shown(bundle.name, results[bundle.name])
    for name in arguments.vit:
        with tempfile.TemporaryDirectory() as folder:
            val = load_dataset(arguments.data).val
            some = sample(val, 40).decode(Preprocessing(224, 224, "bilinear")).pixels
            bundle = random_bundle(name, Path(folder), some)
            stream = make_stream([(some, np.zeros(len(some), np.int64))], arguments.frames, arguments.tremble, 0)
            results[bundle.name] = cost(bundle, stream, *sticky)
            shown(bundle.name, results[bundle.name])
    print(
        json.dumps(
            {
                "benchmark": "stream",
                "tremble": arguments.tremble,
                "every": arguments.every,
                "change": arguments.change,
                "results": results,
                "clock": "CPU time of the process, one thread",
                "machine": cpu_model(),
                "versions": {p: version_of(p) for p in ("cdl-edge", "onnxruntime", "numpy")},
            }
        )
    )


if __name__ == "__main__":
    main()
