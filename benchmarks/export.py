"""What a prompted student costs on the device, relative to one pass of its bare backbone.

    python benchmarks/export.py [--model TAG] [--tasks 10] [--threads 1] [--rounds 40] [--learners coda,apt,...]

Compared in one process, batch 1, ONNX Runtime CPU, one image of each graph in turn, so that whatever else the machine
does hits all of them alike:
- bare:       the timm ViT without head, exported by torch.onnx, float32 input already normalised (= 1.00);
- straight:   the two-pass CODA + KDP student exported by torch.onnx, the same input;
- the others: our graphs, uint8 input, normalisation inside.
A student is in the state it has after all tasks, with random prompts: the weights do not change the cost. Every graph
is compared with torch first. The floor of a two-pass learner is 2 passes less what both share, of a one-pass learner 1.

With one thread the clock is the CPU time of the calling thread, which does the whole work then: being preempted by
another process does not count. With more threads it is wall time, and the machine has to be idle.

Prints a table; the last line of stdout is JSON, null where a graph could not be made.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnxruntime
import torch

from cdl_edge.export.graph import StudentGraph
from cdl_edge.export.model import assemble
from cdl_edge.train.augment import Normalise
from cdl_edge.train.backbone import load_backbone
from cdl_edge.train.learners.l2p import L2P
from cdl_edge.train.student import PromptedViT

CLASSES = 100
VARIANTS = {
    # name: learner, KD prompts, one-pass
    "coda": ("coda", True, False),
    "dualprompt": ("dualprompt", True, False),
    "l2p": ("l2p", True, False),
    "coda-one-pass": ("coda", True, True),
    "apt": ("apt", True, False),
    "apt-no-kd": ("apt", False, False),
}


class Straight(torch.nn.Module):
    """The student as one calls it: normalised images to combined logits."""

    def __init__(self, student: PromptedViT) -> None:
        super().__init__()
        self.student = student
        self.vit = student.backbone  # registered, so that its weights become initializers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(1, 3, S, S) -> (1, C)."""
        return self.student.combine(self.student(self.student.prepare(x)))


class Bare(torch.nn.Module):
    """Final class token of the backbone."""

    def __init__(self, vit: torch.nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(1, 3, S, S) -> (1, D)."""
        return self.vit.forward_features(x)[:, 0]


@torch.no_grad()
def trained(backbone: Any, learner: str, kd: bool, one_pass: bool, tasks: int) -> PromptedViT:
    """A student with all tasks behind it, its learnt values random."""
    student = PromptedViT(backbone.model, learner, CLASSES, tasks, 0, kd=(12, 6) if kd else None, one_pass=one_pass)
    generator = torch.Generator().manual_seed(0)
    for task in range(tasks):
        student.learner.begin_task(task)
        for parameter in student.trainable():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        student.learner.end_task(task)
    if isinstance(student.learner, L2P):
        student.learner.used[:] = True
    return student.eval().requires_grad_(False)


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """As runtime/backends/onnxruntime.py opens it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    if threads == 1:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def cosine_similarity(a: torch.Tensor, b: torch.Tensor, dim: int) -> torch.Tensor:
    """(B, K, Q), (K, Q) -> (B, K), written out."""
    return (a * b).sum(dim) / (a.norm(dim=dim) * b.norm(dim=-1)).clamp_min(1e-8)


def by_torch(module: torch.nn.Module, x: torch.Tensor, path: Path) -> None:
    """The generic exporter. Raises: whatever it raises."""
    # The tracing exporter's own cosine_similarity takes both operands to have one rank: CODA's have not.
    with warnings.catch_warnings(), patch("torch.nn.functional.cosine_similarity", cosine_similarity):
        warnings.simplefilter("ignore")  # tracing and deprecation, both known
        torch.onnx.export(module.eval(), (x,), str(path), input_names=["x"], opset_version=17, dynamo=False)


def ours(student: PromptedViT, preprocessing: Any, folder: Path) -> Path:
    """student.onnx with its two files of constants."""
    builder = StudentGraph(student, preprocessing, CLASSES, 1)
    graph = builder.build()
    outputs = {"logits": [CLASSES]}
    if builder.weights:
        outputs["prompt_weights"] = [len(builder.weights), builder.entries]
    artefact = assemble(graph, preprocessing.size, outputs, {})
    folder.mkdir()
    for name, content in {"student.onnx": artefact.model, **artefact.constants}.items():
        (folder / name).write_bytes(content)
    return folder / "student.onnx"


def race(sessions: dict[str, tuple[Any, dict[str, np.ndarray]]], rounds: int, threads: int) -> dict[str, list[float]]:
    """Milliseconds of each, one call of each in turn."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for i in range(rounds + 3):
        for name, (graph, feed) in sessions.items():
            begin = clock()
            graph.run(None, feed)
            if i >= 3:
                times[name].append((clock() - begin) * 1e3)
    return times


@torch.no_grad()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:vit_tiny_patch16_224", help="backbone, as for `cdl-edge train`")
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40, help="calls of each graph")
    parser.add_argument("--learners", default=",".join(VARIANTS), help=", ".join(VARIANTS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    backbone = load_backbone(arguments.model)
    side = backbone.preprocessing.size
    pixels = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    x = Normalise(backbone.preprocessing, torch.device("cpu"))(pixels)
    errors: dict[str, float] = {}
    sessions: dict[str, tuple[Any, dict[str, np.ndarray]]] = {}
    missing: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generic = {
            "bare": Bare(backbone.model),
            "straight": Straight(trained(backbone, "coda", True, False, arguments.tasks)),
        }
        for label, module in generic.items():
            try:
                by_torch(module, x, folder / f"{label}.onnx")
            except (torch.onnx.errors.OnnxExporterError, RuntimeError, ImportError) as error:
                print(f"{label}: torch.onnx failed: {str(error).splitlines()[0]}", file=sys.stderr)
                missing.append(label)
                continue
            graph = session(folder / f"{label}.onnx", arguments.threads)
            sessions[label] = (graph, {"x": x.numpy()})
            errors[label] = float(np.abs(graph.run(None, sessions[label][1])[0] - module(x).numpy()).max())
        for label in arguments.learners.split(","):
            student = trained(backbone, *VARIANTS[label], arguments.tasks)
            graph = session(ours(student, backbone.preprocessing, folder / label), arguments.threads)
            sessions[label] = (graph, {"images": pixels})
            expected = student.combine(student(student.prepare(x))).numpy()
            errors[label] = float(np.abs(graph.run(None, sessions[label][1])[0] - expected).max())
        times = race(sessions, arguments.rounds, arguments.threads)

    rows: dict[str, dict[str, float | None] | None] = dict.fromkeys(missing)
    print(f"{arguments.model}, batch 1, {arguments.threads} thread(s), median of {arguments.rounds} interleaved calls")
    print(f"{'graph':16s} {'ms':>8s} {'p10':>8s} {'ratio':>7s}  max |difference to torch|")
    for label, values in times.items():
        # Ratios within one round: a slow round is slow for both.
        pairs = zip(values, times["bare"], strict=True) if "bare" in times else None
        ratio = statistics.median(a / b for a, b in pairs) if pairs else None
        low = float(np.percentile(values, 10))
        rows[label] = {"median_ms": statistics.median(values), "p10_ms": low, "ratio": ratio, "error": errors[label]}
        print(
            f"{label:16s} {statistics.median(values):8.2f} {low:8.2f} "
            f"{'-' if ratio is None else f'{ratio:.3f}':>7s}  {errors[label]:.1e}"
        )
    versions = {p: version(p) for p in ("cdl-edge", "onnxruntime", "torch", "timm")}
    print(
        json.dumps(
            {
                "benchmark": "export",
                "model": arguments.model,
                "threads": arguments.threads,
                "clock": "CPU time of the thread" if arguments.threads == 1 else "wall",
                "rounds": arguments.rounds,
                "tasks": arguments.tasks,
                "graphs": rows,
                "machine": platform.processor() or platform.machine(),
                "versions": versions,
            }
        )
    )


if __name__ == "__main__":
    main()
