"""What a prompted student costs on the device, relative to one pass of its bare backbone, and to the generic exports.

    python benchmarks/export.py [--models tiny,small,base] [--batches 1,8] [--threads 1,2] [--learners coda,apt,...]
                                [--engines ort,openvino,openvino-bf16,torch,compile] [--rewrites] [--growth]

One image batch of each graph in a round, in one process and an order drawn anew for each round (rounds.py), so that
whatever else the machine does hits all of them alike. Every ratio is to the same thing: one pass of the bare timm ViT
without head, as torch.onnx exports it, in ONNX Runtime fp32 (= 1.00), which a round times as often as all others
together. Beside a ratio stands its 95 % interval. For each engine:
- bare:      that ViT, the floor of a one-pass student. Two passes less what both share are the floor of the others;
- straight:  the student as torch.onnx exports it ("coda" has two passes, "apt" one), fp32 input, normalised outside;
- others:    our graph of that learner in the engine's profile, uint8 input, normalisation inside.
`torch` and `compile` run the plain module, eager and by torch.compile (inductor).
--growth: our graphs in ONNX Runtime for 100 tasks beside those for --tasks.
--rewrites: our two-pass CODA graph in ONNX Runtime with one rewrite switched off at a time, and with none of them.

A student is in the state it has after all tasks, with random prompts, norms and biases: a fresh ViT's norms are ones
and zeros, which OpenVINO folds away. Every graph is compared with torch; the last column is |difference of logits|.

With one thread the clock is the CPU time of the process, which one thread spends then: being preempted by another
process does not count. With more threads it is wall time, and the machine has to be idle. Printed beside the ratios:
what one bare pass would take at the machine's ceiling, the fastest matrix product that it shows in the same run.

Prints tables; the last line of stdout is JSON, null where a graph could not be made.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnxruntime
import torch
from rounds import ceiling, clock_of, machine, peak, race, ratio, show, version_of
from torch.utils.flop_counter import FlopCounterMode

from cdl_edge.export.assembly import assemble
from cdl_edge.export.profiles import PROFILES
from cdl_edge.export.rewrites import ALL, Rewrites
from cdl_edge.export.student_graph import StudentGraph
from cdl_edge.train.augment import Normalise
from cdl_edge.train.backbone import Backbone, load_backbone
from cdl_edge.train.learners.l2p import L2P
from cdl_edge.train.student import ModelSpec, PromptedViT

CLASSES = 100
MANY_TASKS = 100
VARIANTS = {
    # name: learner, KD prompts, own query of one pass (key of train.student.OWN_QUERY), or empty: two passes
    "coda": ("coda", True, ""),
    "dualprompt": ("dualprompt", True, ""),
    "l2p": ("l2p", True, ""),
    "coda-one-pass": ("coda", True, "class"),
    "coda-patches": ("coda", True, "patches"),
    "apt": ("apt", True, ""),
    "apt-no-kd": ("apt", False, ""),
}
STRAIGHT = ("coda", "apt")
ENGINES = ("ort", "openvino", "openvino-bf16", "torch", "compile")
REFERENCE = "ort bare"
"what every ratio is to; among the graphs whatever engines are asked for"
Call = Callable[[], np.ndarray]
"one batch -> logits (or the class token of the bare ViT)"


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
        return self.vit.forward_features(x)[:, 0]  # type: ignore[operator]


@torch.no_grad()
def backbone_of(name: str) -> Backbone:
    """A ViT with norms and biases that no engine can fold away."""
    backbone = load_backbone(f"random:vit_{name}_patch16_224")
    generator = torch.Generator().manual_seed(0)
    for key, value in backbone.model.state_dict().items():
        if "norm" in key or key.endswith("bias"):
            value += 0.05 * torch.randn(value.shape, generator=generator)
    return backbone


@torch.no_grad()
def trained(backbone: Any, learner: str, kd: bool, own_query: str, tasks: int) -> PromptedViT:
    """A student with all tasks behind it, its learnt values random. own_query: of one pass; empty: two passes."""
    spec = ModelSpec(
        learner,
        CLASSES,
        tasks,
        0,
        kd=(12, 6) if kd else None,
        one_pass=bool(own_query),
        query_of=own_query or "class",
    )
    student = PromptedViT(backbone.model, spec)
    generator = torch.Generator().manual_seed(0)
    for task in range(tasks):
        student.learner.begin_task(task)
        for parameter in student.trainable():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        student.learner.end_task(task)
    if isinstance(student.learner, L2P):
        student.learner.used[:] = True
    return student.eval().requires_grad_(False)


def ort(path: Path, feed: dict[str, np.ndarray], threads: int) -> Call:
    """As runtime/backends/onnxruntime.py opens it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    if threads == 1:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    else:  # between calls the other threads would go on spinning, against whatever decodes the next picture
        options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feed)[0]


def openvino(path: Path, feed: dict[str, np.ndarray], threads: int, precision: str) -> Call:
    """As runtime/backends/openvino.py opens it. Raises: ImportError without OpenVINO."""
    import openvino as ov

    core = ov.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise RuntimeError("this CPU has no bf16")
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "ENABLE_CPU_PINNING": False,
    }
    compiled = core.compile_model(str(path), "CPU", settings)
    request, output = compiled.create_infer_request(), compiled.output(0)
    return lambda: request.infer(feed)[output]


def cosine_similarity(a: torch.Tensor, b: torch.Tensor, dim: int) -> torch.Tensor:
    """(B, K, Q), (K, Q) -> (B, K), written out."""
    return (a * b).sum(dim) / (a.norm(dim=dim) * b.norm(dim=-1)).clamp_min(1e-8)


def by_torch(module: torch.nn.Module, x: torch.Tensor, path: Path) -> None:
    """The generic exporter. Raises: whatever it raises."""
    # The tracing exporter's own cosine_similarity takes both operands to have one rank: CODA's have not.
    with warnings.catch_warnings(), patch("torch.nn.functional.cosine_similarity", cosine_similarity):
        warnings.simplefilter("ignore")  # tracing and deprecation, both known
        torch.onnx.export(module.eval(), (x,), str(path), input_names=["x"], opset_version=17, dynamo=False)


def ours(student: PromptedViT, backbone: Backbone, batch: int, folder: Path, profile: str, rewrites: Rewrites) -> Path:
    """student.onnx with its two files of constants."""
    builder = StudentGraph(student, backbone.preprocessing, CLASSES, batch, PROFILES[profile], rewrites=rewrites)
    artefact = assemble({"student": builder.build()}, {})
    folder.mkdir()
    for name, content in {"student.onnx": artefact.models["student"], **artefact.constants}.items():
        (folder / name).write_bytes(content)
    return folder / "student.onnx"


class Field:
    """All who take part in one race: a model, a batch, a number of threads."""

    def __init__(self, model: str, batch: int, threads: int, tasks: int, folder: Path) -> None:
        self.batch, self.threads, self.tasks, self.folder = batch, threads, tasks, folder
        self.backbone = backbone_of(model)
        side = self.backbone.preprocessing.size
        self.pixels = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
        self.x = Normalise(self.backbone.preprocessing, torch.device("cpu"))(self.pixels)
        self.calls: dict[str, Call] = {}
        self.truth: dict[str, np.ndarray] = {}
        self.missing: list[str] = []
        self.exported: dict[str, Path] = {}
        bare = Bare(self.backbone.model)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            truth = bare(self.x).numpy()
        self.flops = int(counter.get_total_flops())
        "of one bare pass"
        path = self.generic(bare, "bare")
        self.add(REFERENCE, truth, lambda: self.open("ort", path, {"x": self.x.numpy()}))

    def in_torch(self, module: Callable[[torch.Tensor], torch.Tensor]) -> Call:
        """A module on the image."""
        return lambda: module(self.x).numpy()

    def opened(self, engine: str, module: torch.nn.Module, name: str, feed: dict[str, np.ndarray]) -> Call:
        """torch's own export of a module in an engine."""
        return self.open(engine, self.generic(module, name.replace(" ", "-")), feed)

    def add(self, label: str, truth: np.ndarray, make: Callable[[], Call]) -> None:
        """One more; what cannot be made is said and listed."""
        try:
            call = make()
            call()
        except (ImportError, RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
            print(f"{label}: {(str(error) or type(error).__name__).splitlines()[0]}", file=sys.stderr)
            self.missing.append(label)
            return
        self.calls[label], self.truth[label] = call, truth

    def generic(self, module: torch.nn.Module, name: str) -> Path:
        """The file of the generic exporter, made once."""
        if name not in self.exported:
            by_torch(module, self.x, self.folder / f"{name}.onnx")
            self.exported[name] = self.folder / f"{name}.onnx"
        return self.exported[name]

    @torch.no_grad()
    def enter(self, engine: str, learners: list[str]) -> None:
        """The bare ViT, the plain exports and our graphs in an engine."""
        plain: dict[str, torch.nn.Module] = {"bare": Bare(self.backbone.model)}
        students = {n: trained(self.backbone, *VARIANTS[n], self.tasks) for n in dict.fromkeys([*learners, *STRAIGHT])}
        plain |= {f"straight {n}": Straight(students[n]) for n in STRAIGHT if n in learners}
        for name, module in plain.items():
            truth = module(self.x).numpy()
            feed = {"x": self.x.numpy()}
            if engine == "torch":
                self.add(f"torch {name}", truth, functools.partial(self.in_torch, module))
            elif f"{engine} {name}" == REFERENCE:
                continue
            elif engine == "compile":
                compiled = torch.compile(module)
                self.add(f"compile {name}", truth, functools.partial(self.in_torch, compiled))
            else:
                self.add(f"{engine} {name}", truth, functools.partial(self.opened, engine, module, name, feed))
        if engine in ("torch", "compile"):
            return
        profile = "ort" if engine == "ort" else "openvino"
        for name in learners:
            self.graph(f"{engine} {name}", engine, students[name], profile, ALL)

    def graph(self, label: str, engine: str, student: PromptedViT, profile: str, rewrites: Rewrites) -> None:
        """Our graph of a student."""
        path = ours(student, self.backbone, self.batch, self.folder / label.replace(" ", "-"), profile, rewrites)
        truth = student.combine(student(student.prepare(self.x))).numpy()
        self.add(label, truth, lambda: self.open(engine, path, {"images": self.pixels}))

    @torch.no_grad()
    def without(self) -> None:
        """The two-pass CODA student with one rewrite switched off at a time, and without any."""
        student = trained(self.backbone, *VARIANTS["coda"], self.tasks)
        names = [f.name for f in fields(Rewrites)]
        for name in names:
            self.graph(f"ort coda without {name}", "ort", student, "ort", replace(ALL, **{name: False}))
        self.graph("ort coda without all", "ort", student, "ort", Rewrites(**dict.fromkeys(names, False)))

    @torch.no_grad()
    def grown(self, learners: list[str]) -> None:
        """Our graphs when ten times as many tasks have been learnt."""
        for name in learners:
            student = trained(self.backbone, *VARIANTS[name], MANY_TASKS)
            self.graph(f"ort {name}, {MANY_TASKS} tasks", "ort", student, "ort", ALL)

    def open(self, engine: str, path: Path, feed: dict[str, np.ndarray]) -> Call:
        """A loaded graph."""
        if engine == "ort":
            return ort(path, feed, self.threads)
        return openvino(path, feed, self.threads, "bf16" if engine.endswith("bf16") else "f32")

    @torch.no_grad()
    def table(self, rounds: int, seed: int) -> dict[str, Any]:
        """Race, print, and give the rows."""
        times = race(self.calls, rounds, REFERENCE, seed, clock_of(self.threads))
        rows: dict[str, dict[str, Any] | None] = dict.fromkeys(self.missing)
        print(f"{'graph':34s} {'ms':>8s} {'p10':>8s} {'ratio':>7s} {'95 % interval':>16s}  max |difference to torch|")
        for label, values in times.items():
            found = ratio(values, times[REFERENCE])
            low, middle = float(np.percentile(values, 10)), float(np.median(values))
            error = float(np.abs(self.calls[label]() - self.truth[label]).max())
            rows[label] = {
                "median_ms": middle,
                "p10_ms": low,
                "ratio": found.median,
                "interval": [found.low, found.high],
                "error": error,
            }
            between = f"{found.low:.3f} .. {found.high:.3f}"
            print(f"{label:34s} {middle:8.2f} {low:8.2f} {found.median:7.3f} {between:>16s}  {error:.1e}", flush=True)
        return rows

    def floor_ms(self, top: dict[str, Any]) -> dict[str, float | None]:
        """Precision -> milliseconds of one bare pass whose products are as fast as the machine's fastest."""
        rates = {precision: peak(top, precision) for precision in top["gflop_per_second"]}
        return {precision: self.flops / rate / 1e6 if rate else None for precision, rate in rates.items()}


def numbers(text: str) -> list[int]:
    """ "1,8" -> [1, 8]."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="tiny", help="tiny, small, base: ViT/16 at 224")
    parser.add_argument("--batches", type=numbers, default=[1])
    parser.add_argument("--threads", type=numbers, default=[1])
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=40, help="calls of each graph")
    parser.add_argument("--seed", type=int, default=0, help="of the orders")
    parser.add_argument("--ceiling-size", type=int, help="of the matrices that show the machine's ceiling")
    parser.add_argument("--learners", default=",".join(VARIANTS), help=", ".join(VARIANTS))
    parser.add_argument("--engines", default="ort,openvino,openvino-bf16", help=", ".join(ENGINES))
    parser.add_argument("--growth", action="store_true", help="also what 100 tasks cost (ONNX Runtime)")
    parser.add_argument("--rewrites", action="store_true", help="also what each rewrite is worth (ONNX Runtime)")
    arguments = parser.parse_args()
    engines = arguments.engines.split(",")
    if unknown := set(engines) - set(ENGINES):
        parser.error(f"unknown engines {sorted(unknown)}; there are {', '.join(ENGINES)}")

    tops = {threads: ceiling(threads, size=arguments.ceiling_size) for threads in arguments.threads}
    races = []
    for model in arguments.models.split(","):
        for batch in arguments.batches:
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                print(f"ViT-{model}/16, batch {batch}, {threads} thread(s), {arguments.tasks} tasks")
                with tempfile.TemporaryDirectory() as name:
                    field = Field(model, batch, threads, arguments.tasks, Path(name))
                    for engine in engines:
                        field.enter(engine, arguments.learners.split(","))
                    if arguments.growth:
                        field.grown(arguments.learners.split(","))
                    if arguments.rewrites:
                        field.without()
                    floor = field.floor_ms(tops[threads])
                    print(show(tops[threads]))
                    shown = [f"{p} {ms:.2f} ms" for p, ms in floor.items() if ms is not None]
                    print(f"one bare pass, {field.flops / 1e9:.2f} GFLOP, at that speed: {', '.join(shown)}")
                    races.append(
                        {
                            **{"model": model, "batch": batch, "threads": threads},
                            "bare": {"gflop": field.flops / 1e9, "floor_ms": floor},
                            "graphs": field.table(arguments.rounds, arguments.seed),
                        }
                    )
                print()
    print(
        json.dumps(
            {
                "benchmark": "export",
                "races": races,
                "clock": "1 thread: CPU time of the process; more: wall",
                "rounds": arguments.rounds,
                "seed": arguments.seed,
                "reference": REFERENCE,
                "tasks": arguments.tasks,
                "machine": machine(),
                "ceiling": list(tops.values()),
                "versions": {p: version_of(p) for p in ("cdl-edge", "onnxruntime", "openvino", "torch", "timm")},
            }
        )
    )


if __name__ == "__main__":
    main()
