"""Training throughput beside the CDL authors' code: same machine, same backbones, same batch, one run.

    python benchmarks/throughput.py --authors PATH [--size paper] [--learners coda,dualprompt,l2p] [--distillers kdp,kd]
                                    [--batch-size 64] [--threads N] [--steps 2] [--repeats 3] [--variants ...]

PATH is your own checkout of github.com/IRVLUTD/CDL; authors.py says how it is driven. Compared, each in a process of
its own, one after the other, `--repeats` times round:
- authors:        their loop on image tensors that lie in memory, normalised and cropped: no data pipeline at all
- authors-loader: the same with their data pipeline (JPEG files, `--workers` processes as in their configuration)
- ours-fp32:      `cdl_edge.train.loop.train`, fp32 as theirs, random crops and mirrors: the like for like
- ours-fp32-kept: the same without augmentation: what frozen parts compute is kept, the teacher is asked once an image
- ours, ours-kept: the same two in our default precision (bf16 where the device computes it)
A process trains teacher and student on one task. The first epoch warms up (and counts the FLOPs), the second is
measured: from the first batch asked for to the last step done. TaskImages are synthetic, 224 pixels, 10 classes.

images/s of ours has in it what is done once a task (decoding, kept tokens, kept answers), spread over the 20 epochs
of the papers. A ratio is taken between two processes of the same round; the table has the median of the rounds.

With one thread on a CPU the clock is the CPU time of the process, so that other processes hardly count; otherwise it is
wall time, and the machine has to be idle. authors-loader, and ratios to it, are always wall time.

Floor: the FLOPs of the matrix products done / the fastest matrix product of this machine in that precision; the table
says how close to it each one comes. Prints tables; the last line of stdout is JSON, null where a variant could not run
(the reason is on stderr).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDES = ("teacher", "student")
WIDTHS = {"tiny": 192, "small": 384, "base": 768}
SIZES = {"paper": ("base", "small"), "small": ("small", "tiny"), "tiny": ("tiny", "tiny")}
VARIANTS: dict[str, dict[str, str]] = {
    "authors": {},
    "authors-loader": {},
    "ours-fp32": {"precision": "fp32", "augment": "crop-flip"},
    "ours-fp32-kept": {"precision": "fp32", "augment": "none"},
    "ours": {"precision": "auto", "augment": "crop-flip"},
    "ours-kept": {"precision": "auto", "augment": "none"},
}
PARTS = ("data", "query", "teacher", "forward", "backward", "optimiser", "rest")
PIXELS, CLASSES, TOKENS = 224, 10, 197
PAPER_EPOCHS = 20
GOAL = 3.0
Rounds = list[dict[str, Any] | None]


# -- what is measured, in a process of its own ------------------------------------------------------------------------


class Recorder:
    """Epochs of either code: seconds, FLOPs of the first, and where the time of the last one went."""

    def __init__(self, clock: str, cuda: bool) -> None:
        """clock: wall | cpu, of the parts; epochs are timed by both."""
        self.clock, self.cuda = clock, cuda
        self.epochs: dict[str, list[dict[str, Any]]] = {s: [] for s in SIDES}
        self.once = {s: {"wall": 0.0, "cpu": 0.0} for s in SIDES}
        "seconds before a side's first epoch"
        self._flops: Any = None
        self._start: dict[str, float] = {}
        self._parts: dict[str, float] = {}
        self._stack: list[float] = []

    def now(self) -> dict[str, float]:
        """Seconds by both clocks, when the device has done its work."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        return {"wall": time.perf_counter(), "cpu": time.process_time()}

    def since(self, start: dict[str, float]) -> dict[str, float]:
        """Seconds by both clocks."""
        return {k: v - start[k] for k, v in self.now().items()}

    def begin(self, side: str) -> None:
        """An epoch of `side` begins."""
        from torch.utils.flop_counter import FlopCounterMode

        if not self.epochs[side]:
            self._flops = FlopCounterMode(display=False, custom_mapping=more_flops())
            self._flops.__enter__()
        self._parts = {}
        self._start = self.now()

    def end(self, side: str, images: int) -> None:
        """Its last step is done."""
        spent = self.since(self._start)
        flops = None
        if self._flops is not None:
            self._flops.__exit__(None, None, None)
            flops, self._flops = self._flops.get_total_flops() / images, None
        parts = {**self._parts, "rest": spent[self.clock] - sum(self._parts.values())}
        self.epochs[side].append({**spent, "images": images, "flops": flops, "parts": parts})

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time in here counts for `name`, less what parts inside it count."""
        begin = self.now()
        self._stack.append(0.0)
        try:
            yield
        finally:
            spent = self.since(begin)[self.clock]
            self._parts[name] = self._parts.get(name, 0.0) + spent - self._stack.pop()
            if self._stack:
                self._stack[-1] += spent

    def wrap(self, function: Callable[..., Any], name: str | Callable[[], str]) -> Callable[..., Any]:
        """The same function, its time counted."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name if isinstance(name, str) else name()):
                return function(*args, **kwargs)

        return timed

    def watch_torch(self) -> None:
        """Backward passes and optimiser steps, whoever calls them."""
        import torch
        import torch.optim.optimizer as torch_optimizer

        torch.Tensor.backward = self.wrap(torch.Tensor.backward, "backward")
        running: list[Any] = []

        def before(*_: Any) -> None:
            running.append(self.part("optimiser"))
            running[-1].__enter__()

        torch_optimizer.register_optimizer_step_pre_hook(before)
        torch_optimizer.register_optimizer_step_post_hook(lambda *_: running.pop().__exit__(None, None, None))

    def result(self, precision: str) -> dict[str, Any]:
        """Of each side: the last epoch, with the FLOPs of the first. Raises: RuntimeError where an epoch is missing."""
        sides = {}
        for side, epochs in self.epochs.items():
            if len(epochs) != 2:
                raise RuntimeError(f"{side}: {len(epochs)} epoch(s) seen, 2 expected")
            sides[side] = {**epochs[1], "flops": epochs[0]["flops"], "once": self.once[side]}
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        device = None
        if self.cuda:
            import torch

            device = torch.cuda.max_memory_allocated() / 2**30
        return {**sides, "precision": precision, "peak_gb": memory, "peak_device_gb": device}


def more_flops() -> dict[Any, Any]:
    """A matrix product that torch's counter does not know: oneDNN's. Empty where torch has no oneDNN."""
    import torch

    if not torch.backends.mkldnn.is_available():
        return {}

    def product(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 2 * int(np.prod(out_shape)) * int(x[-1])

    return {torch.ops.mkldnn._linear_pointwise: product}


def run_ours(job: dict[str, Any], recorder: Recorder) -> str:
    """One short run of the toolkit, with clocks in it; returns the precision it ran in."""
    import torch

    from cdl_edge.train.batches import TaskImages
    from cdl_edge.train.config import TrainConfig
    from cdl_edge.train.loop import train
    from cdl_edge.train.phase import Phase
    from cdl_edge.train.student import PromptedViT

    epochs, epoch, decode = Phase.epochs, TaskImages.epoch, TaskImages.__init__
    running: dict[str, Any] = {}

    def add_once(side: str, begun: dict[str, float]) -> None:
        for clock, seconds in recorder.since(begun).items():
            recorder.once[side][clock] += seconds

    def timed_decode(self: Any, *args: Any, **kwargs: Any) -> None:
        begun = recorder.now()
        decode(self, *args, **kwargs)
        if not recorder.epochs["teacher"]:  # afterwards it is the validation images
            add_once("teacher", begun)

    def timed_epochs(self: Any, images: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        running.update(side=self.name, begun=recorder.now())
        for done in epochs(self, images, *args, **kwargs):
            recorder.end(self.name, len(images))
            yield done

    def timed_epoch(*args: Any, **kwargs: Any) -> Iterator[Any]:
        # Called when tokens and answers have been kept.
        if not recorder.epochs[running["side"]]:
            add_once(running["side"], running["begun"])
        recorder.begin(running["side"])
        return epoch(*args, **kwargs)

    TaskImages.__init__, TaskImages.epoch, Phase.epochs = timed_decode, timed_epoch, timed_epochs
    TaskImages.batch = recorder.wrap(TaskImages.batch, "data")
    PromptedViT.query = recorder.wrap(PromptedViT.query, "query")
    PromptedViT.forward = recorder.wrap(
        PromptedViT.forward, lambda: "forward" if torch.is_grad_enabled() else "teacher"
    )
    config = TrainConfig(
        data=f"folder:{job['folder']}",
        out=job["out"],
        teacher=f"random:{job['teacher']}",
        student=f"random:{job['student']}",
        learner=job["learner"],
        distill=job["distiller"],
        tasks=1,
        epochs=2,
        batch_size=job["batch_size"],
        augment=job["augment"],
        precision=job["precision"],
        devices=job["device"],
        # As the papers and the authors' code: heads that learn with the prompts, and two epochs are two.
        head="learned",
        min_steps=0,
        learning_rate=1e-3,
    )
    return "bf16" if "bf16" in train(config, quiet=True)["precision"] else "fp32"


def run_product(job: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The fastest x W^T of the shapes in the teacher's MLP: precision -> way to call it -> GFLOP/s."""
    import torch
    import torch.nn.functional as F

    device, width = torch.device(job["device"]), WIDTHS[job["teacher"].split("_")[1]]
    rows, recorder = job["batch_size"] * TOKENS, Recorder(job["clock"], job["device"] == "cuda")
    found: dict[str, dict[str, float]] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        ways: dict[str, Callable[..., Any]] = {"torch": F.linear}
        if device.type == "cpu" and more_flops():
            ways["oneDNN"] = lambda x, w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
        found[name] = {}
        for way, call in ways.items():
            times = []
            for out, into in ((4 * width, width), (width, 4 * width)):
                x, w = (torch.randn(n, into, device=device, dtype=dtype) for n in (rows, out))
                for i in range(9):
                    begun = recorder.now()
                    call(x, w)
                    times += [recorder.since(begun)[job["clock"]]] if i >= 2 else []
            found[name][way] = 2 * rows * 4 * width * width / min(times) / 1e9
    return found


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Do one job in this process."""
    import torch

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    if job["variant"] == "product":
        return run_product(job)
    recorder = Recorder(job["clock"], job["device"] == "cuda")
    recorder.watch_torch()
    with contextlib.redirect_stdout(sys.stderr):  # their code prints
        if job["variant"].startswith("authors"):
            import authors

            return recorder.result(authors.run(job, recorder))
        return recorder.result(run_ours(job, recorder))


# -- the comparison ---------------------------------------------------------------------------------------------------


def make_folder(root: Path, images: int) -> Path:
    """JPEG files train/cN/*.jpg, and one a class in val/: smooth noise, so that they decode as photographs do."""
    rng = np.random.default_rng(0)
    classes = min(CLASSES, images)
    for part, count in (("train", images), ("val", classes)):
        for i in range(count):
            path = root / part / f"c{i % classes}" / f"{i:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8))
            coarse.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC).save(path, quality=90)
    return root


def spawn(job: dict[str, Any]) -> dict[str, Any] | None:
    """Do a job in a new process; None, and the reason on stderr, where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(job)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
        print(f"{job['variant']}, {job.get('learner')}, {job.get('distiller')}: {lines[-1]}", file=sys.stderr)
        return None
    result: dict[str, Any] = json.loads(process.stdout.strip().splitlines()[-1])
    return result


def images_per_second(side: dict[str, Any], clock: str) -> float:
    """With what is done once a task spread over the papers' epochs."""
    return float(side["images"] * PAPER_EPOCHS / (PAPER_EPOCHS * side[clock] + side["once"][clock]))


def ratios(rounds: Rounds, reference: Rounds, side: str, clock: str) -> dict[str, Any]:
    """How many times faster, round by round."""
    found = [
        images_per_second(a[side], clock) / images_per_second(b[side], clock)
        for a, b in zip(rounds, reference, strict=True)
        if a and b
    ]
    return {"median": statistics.median(found) if found else None, "range": [min(found), max(found)] if found else None}


def summary(name: str, measured: dict[str, Rounds], clock: str, product: dict[str, Any]) -> dict[str, Any] | None:
    """One variant over its rounds, beside the authors' over the same; None where it never ran."""
    rounds = measured[name]
    missing: Rounds = [None] * len(rounds)
    ran = [r for r in rounds if r]
    if not ran:
        return None
    own = "wall" if name == "authors-loader" else clock
    precision = ran[-1]["precision"]
    rate = max(product[precision].values()) if product else None
    row: dict[str, Any] = {"precision": precision, "peak_gb": max(r["peak_gb"] for r in ran)}
    row["peak_device_gb"] = max((r["peak_device_gb"] for r in ran if r.get("peak_device_gb")), default=None)
    for side in SIDES:
        speeds = [images_per_second(r[side], own) for r in ran]
        gflop = ran[-1][side]["flops"] / 1e9
        row[side] = {
            "images_per_second": statistics.median(speeds),
            "images_per_second_rounds": speeds,
            "ratio": ratios(rounds, measured.get("authors", missing), side, own),
            "ratio_to_loader": ratios(rounds, measured.get("authors-loader", missing), side, "wall"),
            "gflop_per_image": gflop,
            "floor_ms_per_image": 1e3 * gflop / rate if rate else None,
            "floor_share": gflop / rate * statistics.median(speeds) if rate else None,
            "once_seconds": statistics.median(r[side]["once"][own] for r in ran),
            "ms_per_image": {
                p: statistics.median(1e3 * r[side]["parts"].get(p, 0.0) / r[side]["images"] for r in ran) for p in PARTS
            },
        }
    return row


def show(title: str, rows: dict[str, dict[str, Any] | None]) -> None:
    """Speeds, and where the time goes."""

    def ratio(found: dict[str, Any]) -> str:
        if found["median"] is None:
            return "-"
        return f"{found['median']:.2f} ({found['range'][0]:.2f}-{found['range'][1]:.2f})"

    for side in SIDES:
        print(f"\n{title}, {side}")
        print(f"{'':14s} {'images/s':>8s} {'to authors':>17s} {'to loader':>17s} {'GFLOP':>6s} {'floor':>5s}", end="")
        print(" | ms an image: " + " ".join(f"{p:>9s}" for p in PARTS))
        for name, row in rows.items():
            if row is None:
                print(f"{name:14s} {'-':>8s}")
                continue
            s = row[side]
            share = "-" if s["floor_share"] is None else f"{s['floor_share']:.0%}"
            print(
                f"{name:14s} {s['images_per_second']:8.2f} {ratio(s['ratio']):>17s} {ratio(s['ratio_to_loader']):>17s} "
                f"{s['gflop_per_image']:6.1f} {share:>5s} | {'':12s} "
                + " ".join(f"{s['ms_per_image'][p]:9.1f}" for p in PARTS)
            )


def commit_of(folder: Path) -> str | None:
    """Of a git checkout."""
    process = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True)
    return process.stdout.strip() or None


def version_of(package: str) -> str | None:
    """None where it is not installed."""
    with contextlib.suppress(ModuleNotFoundError):
        return version(package)
    return None


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run everything; prints the tables and returns the JSON document."""
    teacher, student = (f"vit_{name}_patch16_224" for name in SIZES[arguments.size])
    base = {
        "teacher": teacher,
        "student": student,
        "batch_size": arguments.batch_size,
        "device": arguments.device,
        "threads": arguments.threads,
        "clock": "cpu" if arguments.threads == 1 and arguments.device == "cpu" else "wall",
        "authors": str(arguments.authors.resolve()),
    }
    product = spawn({**base, "variant": "product"}) or {}
    print(
        f"{teacher} -> {student}, {PIXELS} pixels, batch {arguments.batch_size}, {arguments.device}, "
        f"{arguments.threads} thread(s), {base['clock']} time, median of {arguments.repeats} round(s)"
    )
    for precision, rates in product.items():
        print(f"matrix product {precision}: " + ", ".join(f"{w} {r:.0f} GFLOP/s" for w, r in rates.items()))
    names = arguments.variants.split(",")
    cells: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_folder(Path(temporary) / "images", arguments.steps * arguments.batch_size)
        pairs = [(a, b) for a in arguments.learners.split(",") for b in arguments.distillers.split(",")]
        for learner, distiller in pairs:
            measured: dict[str, Rounds] = {name: [] for name in names}
            for i, name in ((i, name) for i in range(arguments.repeats) for name in names):
                job = {
                    **{**base, **VARIANTS[name], "variant": name, "learner": learner, "distiller": distiller},
                    **{"folder": str(folder), "out": f"{temporary}/{learner}-{distiller}-{name}-{i}"},
                    "workers": arguments.workers,
                }
                measured[name].append(spawn(job))
            rows = {name: summary(name, measured, base["clock"], product) for name in names}
            cells.setdefault(learner, {})[distiller] = rows
            show(f"{learner}, {distiller}", rows)
    return {
        "benchmark": "throughput",
        "authors_commit": commit_of(arguments.authors),
        **{k: v for k, v in base.items() if k != "authors"},
        "steps": arguments.steps,
        "repeats": arguments.repeats,
        "product_gflop_per_second": product or None,
        "cells": cells,
        "goal": GOAL,
        "machine": platform.processor() or platform.machine(),
        "versions": {
            **{p: version_of(p) for p in ("cdl-edge", "torch", "torchvision", "timm", "numpy")},
            "python": platform.python_version(),
        },
    }


def main() -> None:
    """Command line."""
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(work(json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--authors", required=True, type=Path, help="your checkout of github.com/IRVLUTD/CDL")
    parser.add_argument("--learners", default="coda,dualprompt,l2p", help="of these and apt")
    parser.add_argument("--distillers", default="kdp", help="kd, kdp, dkd, fitnets, reviewkd")
    parser.add_argument("--size", default="paper", choices=list(SIZES), help="paper: ViT-B teaches ViT-S")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2, help="an epoch")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=4, help="of the authors' data loader")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--variants", default=",".join(VARIANTS), help=", ".join(VARIANTS))
    arguments = parser.parse_args()
    unknown = set(arguments.variants.split(",")) - set(VARIANTS)
    if unknown:
        parser.error(f"no such variant: {', '.join(sorted(unknown))}")
    print(json.dumps(compare(arguments)))


if __name__ == "__main__":
    main()
