"""Training throughput beside the CDL authors' code: same machine, same backbones, same batch, one run.

    python benchmarks/throughput.py --authors PATH [--size paper] [--learners coda,dualprompt,l2p] [--distillers kdp,kd]
                                    [--batch-size 64] [--threads N] [--steps 2] [--repeats 3] [--variants ...]

PATH is your own checkout of github.com/IRVLUTD/CDL. Nothing of it is part of cdl-edge: its `learners` are imported from
there, and its own loop over a task, `learn_batch`, is driven with its own settings. It also needs torchvision.

Compared, each in a process of its own, one after the other, `--repeats` times round:
- authors:        their loop on image tensors that lie in memory, normalised and cropped: no data pipeline at all
- authors-loader: the same with their data pipeline (JPEG files, `--workers` processes as in their configuration)
- ours-fp32:      `cdl_edge.train.loop.train`, fp32 as theirs, random crops and mirrors: the like for like
- ours-fp32-kept: the same without augmentation: what frozen parts compute is kept, the teacher is asked once an image
- ours, ours-kept: the same two in our default precision (bf16 where the device computes it)
A process trains teacher and student on one task. The first epoch warms up (and counts the FLOPs), the second is
measured: from the first batch asked for to the last step done. Images are synthetic, 224 pixels, 10 classes.

`images/s` of ours has in it what is done once a task (decoding, kept tokens, kept answers), spread over the 20 epochs
of the papers. A ratio is taken between two processes of the same round; the table has the median of the rounds.

What is put around the authors' code from outside, and why none of it makes it slower:
- `timm.models.vit_*(pretrained=True)` gives random weights instead of a download: before anything is measured;
- on a CPU, `Tensor.cuda()` gives the tensor itself, or a copy of a leaf that wants a gradient (as a move to a GPU
  would: the code adds to it in place): copying a batch to a device costs nothing here. Their learner runs with
  `gpuid -1`, its own CPU setting, or `gpuid 0`, one GPU; no DataParallel;
- `numpy.fromstring` of bytes, gone from numpy 2.3, is frombuffer and a copy, as it was (authors-loader only);
- clocks around query, forward, backward, step: microseconds each.

With one thread the clock is the CPU time of that thread, so that other processes do not count; with more it is wall
time, and the machine has to be idle. authors-loader is always wall time, and so are the ratios to it.

The floor is the FLOPs of the matrix products done / the fastest matrix product of this machine in that precision.
Prints tables; the last line of stdout is JSON, null where a variant could not run (the reason is on stderr).
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
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDES = ("teacher", "student")
SIZES = {"paper": ("base", "small"), "small": ("small", "tiny"), "tiny": ("tiny", "tiny")}
VARIANTS: dict[str, dict[str, str]] = {
    "authors": {},
    "authors-loader": {},
    "ours-fp32": {"precision": "fp32", "augment": "crop-flip"},
    "ours-fp32-kept": {"precision": "fp32", "augment": "none"},
    "ours": {"precision": "auto", "augment": "crop-flip"},
    "ours-kept": {"precision": "auto", "augment": "none"},
}
THEIR_LEARNERS = {  # class and the parameters of experiments/*.sh; the pool sizes are ours too
    "coda": ("CODAPrompt", [100, 8, 0.0]),
    "dualprompt": ("DualPrompt", [10, 20, 6]),
    "l2p": ("L2P", [30, 20, -1]),
    "apt": ("APT", [0.01]),
}
THEIR_DISTILLERS = {"kd": "KD", "kdp": "KD_Token", "dkd": "DKD", "fitnets": "FitNets", "reviewkd": "ReviewKD"}
PARTS = ("data", "query", "teacher", "forward", "backward", "optimiser", "rest")
PIXELS, CLASSES, TOKENS = 224, 10, 197
PAPER_EPOCHS = 20
GOAL = 3.0
NOTHING: dict[str, Any] = {"median": None, "range": None}
Rounds = list[dict[str, Any] | None]


# -- what is measured, in a process of its own -------------------------------------------------------------------------


class Recorder:
    """Epochs of either code: wall and CPU seconds, FLOPs of the first, and where the time of the last one went."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.epochs: dict[str, list[dict[str, Any]]] = {s: [] for s in SIDES}
        self.once: dict[str, float] = dict.fromkeys(SIDES, 0.0)
        self.pending = 0.0
        self._flops: Any = None
        self._start: tuple[float, float] = (0.0, 0.0)
        self._parts: dict[str, float] = {}
        self._stack: list[float] = []

    def now(self) -> tuple[float, float]:
        """Wall and this thread's CPU seconds, when the device has done its work."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter(), time.thread_time()

    def begin(self, side: str) -> None:
        """An epoch of `side` begins."""
        from torch.utils.flop_counter import FlopCounterMode

        if not self.epochs[side]:
            self.once[side], self.pending = self.pending, 0.0
            self._flops = FlopCounterMode(display=False, custom_mapping=_more_flops())
            self._flops.__enter__()
        self._parts = {}
        self._start = self.now()

    def end(self, side: str, images: int) -> None:
        """Its last step is done."""
        wall, cpu = (b - a for a, b in zip(self._start, self.now(), strict=True))
        flops = None
        if self._flops is not None:
            self._flops.__exit__(None, None, None)
            flops = self._flops.get_total_flops() / images
            self._flops = None
        clock = cpu if not self.cuda and one_thread() else wall
        parts = {**self._parts, "rest": clock - sum(self._parts.values())}
        self.epochs[side].append({"wall": wall, "cpu": cpu, "images": images, "flops": flops, "parts": parts})

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time in here counts for `name`, less what parts inside it count."""
        index = 1 if one_thread() and not self.cuda else 0
        begin = self.now()[index]
        self._stack.append(0.0)
        try:
            yield
        finally:
            spent = self.now()[index] - begin
            inner = self._stack.pop()
            self._parts[name] = self._parts.get(name, 0.0) + spent - inner
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

        torch.Tensor.backward = self.wrap(torch.Tensor.backward, "backward")  # type: ignore[method-assign]
        running: list[Any] = []

        def before(*_: Any) -> None:
            running.append(self.part("optimiser"))
            running[-1].__enter__()

        torch.optim.optimizer.register_optimizer_step_pre_hook(before)
        torch.optim.optimizer.register_optimizer_step_post_hook(lambda *_: running.pop().__exit__(None, None, None))

    def result(self, precision: str) -> dict[str, Any]:
        """Of each side: the last epoch, with the FLOPs of the first."""
        sides = {}
        for side, epochs in self.epochs.items():
            if len(epochs) < 2 or not np.isfinite(epochs[-1]["wall"]):
                raise RuntimeError(f"{side}: {len(epochs)} epoch(s) seen, 2 expected")
            sides[side] = {**epochs[-1], "flops": epochs[0]["flops"], "once": self.once[side]}
        return {**sides, "precision": precision, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def one_thread() -> bool:
    """Whether torch computes in the calling thread alone."""
    import torch

    return torch.get_num_threads() == 1


def _more_flops() -> dict[Any, Any]:
    """Matrix products that torch's counter does not know: oneDNN's."""
    import torch

    try:
        linear = torch.ops.mkldnn._linear_pointwise.default
    except (AttributeError, RuntimeError):  # torch without oneDNN
        return {}

    def product(x_shape: Any, w_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 2 * int(np.prod(out_shape)) * int(x_shape[-1])

    return {linear: product}


def run_ours(job: dict[str, Any], recorder: Recorder) -> str:
    """One short run of the toolkit, with clocks in it; returns the precision it ran in."""
    import torch

    from cdl_edge.train.batches import Images
    from cdl_edge.train.config import TrainConfig
    from cdl_edge.train.loop import train
    from cdl_edge.train.phase import Phase
    from cdl_edge.train.student import PromptedViT

    side = ["teacher"]
    epochs, epoch, init = Phase.epochs, Images.epoch, Images.__init__

    def timed_init(self: Any, *args: Any, **kwargs: Any) -> None:
        begin = recorder.now()
        init(self, *args, **kwargs)
        recorder.pending += recorder.now()[0] - begin[0]

    def timed_epochs(self: Any, images: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        side[0] = self.name
        begin = recorder.now()
        timed_epochs.before = lambda: recorder.now()[0] - begin[0]  # type: ignore[attr-defined]
        for done in epochs(self, images, *args, **kwargs):
            recorder.end(self.name, len(images))
            yield done

    def timed_epoch(self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        # Called when all that is done once is done: tokens and answers kept.
        if not recorder.epochs[side[0]]:
            recorder.pending += timed_epochs.before()  # type: ignore[attr-defined]
        recorder.begin(side[0])
        return epoch(self, *args, **kwargs)

    Images.__init__, Images.epoch, Phase.epochs = timed_init, timed_epoch, timed_epochs  # type: ignore[method-assign]
    Images.batch = recorder.wrap(Images.batch, "data")  # type: ignore[method-assign]
    PromptedViT.query = recorder.wrap(PromptedViT.query, "query")  # type: ignore[method-assign]
    PromptedViT.forward = recorder.wrap(  # type: ignore[method-assign]
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
    )
    return "bf16" if "bf16" in train(config, quiet=True)["precision"] else "fp32"


def run_authors(job: dict[str, Any], recorder: Recorder) -> str:
    """Their loop over one task, with clocks around its parts; returns the precision it ran in."""
    import torch
    from torch.utils.data import DataLoader

    cuda = job["device"] == "cuda"
    sys.path.insert(0, job["authors"])
    prepare_for_authors([job["teacher"], job["student"]], cuda)
    import dataloaders
    import learners

    files = sorted((Path(job["folder"]) / "train").glob("*/*.jpg"))
    labels = [int(f.parent.name[1:]) for f in files]
    classes = max(labels) + 1
    name, parameters = THEIR_LEARNERS[job["learner"]]
    learner = getattr(learners.prompt, name)(
        {
            # configs/*.yaml
            **{"schedule": [2], "schedule_type": "cosine", "optimizer": "Adam", "lr": 1e-3, "momentum": 0.9},
            **{"weight_decay": 0, "model_type": "zoo", "model_name": "vit_pt_imnet", "batch_size": job["batch_size"]},
            # run.py and trainer.py
            **{"num_classes": classes, "out_dim": classes, "tasks": [list(range(classes))], "top_k": 1, "memory": 0},
            **{"DW": False, "overwrite": True, "upper_bound_flag": False, "debug_mode": False, "ema_coeff": 0.7},
            **{"gpuid": [0 if cuda else -1], "prompt_param": [1, parameters], "learner_name": name},
            **{"t_model": job["teacher"], "s_model": job["student"], "KD_method": THEIR_DISTILLERS[job["distiller"]]},
            **{"kd_alpha": 0.5, "Soft_T": 2.0, "kd_prompt_param": [12, 6]},
        }
    )
    learner.add_valid_output_dim(classes)
    for model in (learner.model, learner.s_model):
        model.task_id = 0
        model.s_feat.forward = recorder.wrap(model.s_feat.forward, "query")
        model.forward = recorder.wrap(model.forward, lambda: "forward" if torch.is_grad_enabled() else "teacher")

    source: Iterable[Any]
    if job["loader"]:
        dataset = their_dataset(dataloaders, job["folder"], [str(f) for f in files], labels)
        source = DataLoader(
            dataset, batch_size=job["batch_size"], shuffle=True, drop_last=True, num_workers=job["workers"]
        )
    else:
        pixels = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files])
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        parts = (x[order].split(job["batch_size"]), torch.tensor(labels)[order].split(job["batch_size"]))
        source = [(a, b, torch.zeros(len(b))) for a, b in zip(*parts, strict=True)]

    class Feed:
        """What their loop takes for a data loader: an iteration of it is an epoch."""

        count = 0

        def __iter__(self) -> Iterator[Any]:
            side = SIDES[self.count // 2]  # two epochs of the teacher, then two of the student
            self.count += 1
            recorder.begin(side)
            iterator = iter(source)
            images = 0
            while True:
                with recorder.part("data"):
                    batch = next(iterator, None)
                if batch is None:
                    break
                images += len(batch[1])
                yield batch
            recorder.end(side, images)

    learner.learn_batch(Feed(), None, "", None, None)
    return "fp32"


def prepare_for_authors(models: list[str], cuda: bool) -> None:
    """The shims of the docstring. models: timm names; cuda: whether there is a device to move tensors to."""
    import timm
    import torch

    def untrained(name: str) -> Callable[..., Any]:
        def make(pretrained: bool = False, **options: Any) -> Any:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return timm.create_model(name, pretrained=False, **options)

        return make

    for name in models:
        setattr(timm.models, name, untrained(name))
    if cuda:
        torch.backends.cudnn.deterministic = True  # as their run.py
    else:
        torch.Tensor.cuda = lambda self, *_, **__: self.clone() if self.requires_grad and self.is_leaf else self
    np.fromstring = lambda data, dtype=float: np.frombuffer(data, dtype).copy()  # type: ignore[assignment]


def their_dataset(dataloaders: Any, folder: str, files: list[str], labels: list[int]) -> Any:
    """Their ImageNet-R data set with their training transforms; only its list of files is another."""

    class Photographs(dataloaders.iIMAGENET_R):  # type: ignore[misc, name-defined]
        """Files and labels from outside in place of their YAML file."""

        def load(self) -> None:
            self.data, self.targets = files, labels

    transform = dataloaders.utils.get_transform(dataset="ImageNet_R", phase="train", aug=True, resize_imnet=True)
    tasks = [list(range(max(labels) + 1))]
    dataset = Photographs(folder, train=True, tasks=tasks, transform=transform, seed=0, rand_split=True)
    dataset.load_dataset(0, train=True)
    return dataset


def run_gemm(job: dict[str, Any]) -> dict[str, Any]:
    """The fastest x W^T of the teacher's MLP shape, GFLOP/s for each precision, and how it was called."""
    import torch
    import torch.nn.functional as F

    device = torch.device(job["device"])
    width = {"tiny": 192, "small": 384, "base": 768}[job["teacher"].split("_")[1]]
    rows = job["batch_size"] * TOKENS
    found: dict[str, Any] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        ways: dict[str, Callable[..., Any]] = {"torch": F.linear}
        if device.type == "cpu" and _more_flops():
            ways["oneDNN"] = lambda x, w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
        rates: dict[str, float] = {}
        for way, call in ways.items():
            times = []
            for shape in ((4 * width, width), (width, 4 * width)):
                x, w = torch.randn(rows, shape[1]).to(device, dtype), torch.randn(*shape).to(device, dtype)
                for i in range(9):
                    recorder = Recorder(device.type == "cuda")
                    begin = recorder.now()
                    call(x, w)
                    if i >= 2:
                        index = 1 if device.type == "cpu" and one_thread() else 0
                        times.append(recorder.now()[index] - begin[index])
            rates[way] = 2 * rows * 4 * width * width / min(times) / 1e9
        found[name] = rates
    return found


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Do one job in this process."""
    import torch

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    if job["kind"] == "gemm":
        return run_gemm(job)
    recorder = Recorder(job["device"] == "cuda")
    recorder.watch_torch()
    with contextlib.redirect_stdout(sys.stderr):  # their code prints
        precision = (run_authors if job["kind"] == "authors" else run_ours)(job, recorder)
    return recorder.result(precision)


# -- the comparison ----------------------------------------------------------------------------------------------------


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
    return float(side["images"] * PAPER_EPOCHS / (PAPER_EPOCHS * side[clock] + side["once"]))


def ratios(rounds: Rounds, reference: Rounds, side: str, clock: str) -> dict[str, Any]:
    """How many times faster, round by round."""
    found = [
        images_per_second(a[side], clock) / images_per_second(b[side], clock)
        for a, b in zip(rounds, reference, strict=True)
        if a and b
    ]
    return {"median": statistics.median(found), "range": [min(found), max(found)]} if found else NOTHING


def summary(name: str, all_rounds: dict[str, Rounds], clock: str, gemm: dict[str, Any]) -> dict[str, Any] | None:
    """One variant over its rounds, beside the authors' over the same."""
    rounds = all_rounds[name]
    ran = [r for r in rounds if r]
    if not ran:
        return None
    clock = "wall" if name == "authors-loader" else clock
    precision = ran[-1]["precision"]
    rate = max(gemm[precision].values()) if gemm else None
    row: dict[str, Any] = {"precision": precision, "peak_gb": max(r["peak_gb"] for r in ran)}
    missing: Rounds = [None] * len(rounds)
    for side in SIDES:
        speeds = [images_per_second(r[side], clock) for r in ran]
        gflop = ran[-1][side]["flops"] / 1e9
        row[side] = {
            "images_per_second": statistics.median(speeds),
            "images_per_second_rounds": speeds,
            "ratio": ratios(rounds, all_rounds.get("authors", missing), side, clock),
            "ratio_to_loader": ratios(rounds, all_rounds.get("authors-loader", missing), side, "wall"),
            "gflop_per_image": gflop,
            "floor_ms_per_image": 1e3 * gflop / rate if rate else None,
            "floor_share": gflop / rate * statistics.median(speeds) if rate else None,
            "once_seconds": statistics.median(r[side]["once"] for r in ran),
            "ms_per_image": {
                p: statistics.median(1e3 * r[side]["parts"].get(p, 0.0) / r[side]["images"] for r in ran) for p in PARTS
            },
        }
    return row


def show(title: str, rows: dict[str, dict[str, Any] | None]) -> None:
    """Speeds, and where the time goes."""

    def ratio(found: dict[str, Any]) -> str:
        if found["median"] is None:
            return f"{'-':>18s}"
        return f"{found['median']:6.2f} ({found['range'][0]:.2f}-{found['range'][1]:.2f})"

    head = f"{'images/s':>9s} {'to authors':>18s} {'to their loader':>18s} {'GFLOP':>7s} {'floor':>6s}"
    for side in SIDES:
        print(f"\n{title}, {side}\n{'':15s} {head} | ms an image: " + " ".join(f"{p:>9s}" for p in PARTS))
        for name, row in rows.items():
            if row is None:
                print(f"{name:15s} {'-':>9s}")
                continue
            s = row[side]
            share = "-" if s["floor_share"] is None else f"{s['floor_share']:.0%}"
            print(
                f"{name:15s} {s['images_per_second']:9.2f} {ratio(s['ratio']):>18s} {ratio(s['ratio_to_loader']):>18s} "
                f"{s['gflop_per_image']:7.1f} {share:>6s} | {'':12s} "
                + " ".join(f"{s['ms_per_image'][p]:9.1f}" for p in PARTS)
            )


def commit_of(folder: Path) -> str | None:
    """Of a git checkout."""
    process = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True)
    return process.stdout.strip() or None


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run everything; prints the tables and returns the JSON document."""
    teacher, student = (f"vit_{name}_patch16_224" for name in SIZES[arguments.size])
    base = {
        **{"batch_size": arguments.batch_size, "threads": arguments.threads, "device": arguments.device},
        **{"teacher": teacher, "student": student, "authors": str(arguments.authors.resolve())},
    }
    gemm = spawn({**base, "kind": "gemm", "variant": "matrix product"}) or {}
    clock = "cpu" if arguments.threads == 1 and arguments.device == "cpu" else "wall"
    names = arguments.variants.split(",")
    print(
        f"{teacher} -> {student}, {PIXELS} pixels, batch {arguments.batch_size}, {arguments.device}, "
        f"{arguments.threads} thread(s), {clock} time, median of {arguments.repeats} round(s)"
    )
    for precision, rates in gemm.items():
        print(f"matrix product {precision}: " + ", ".join(f"{w} {r:.0f} GFLOP/s" for w, r in rates.items()))
    cells: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_folder(Path(temporary) / "images", arguments.steps * arguments.batch_size)
        pairs = [(a, b) for a in arguments.learners.split(",") for b in arguments.distillers.split(",")]
        for learner, distiller in pairs:
            rounds: dict[str, Rounds] = {name: [] for name in names}
            for i, name in ((i, name) for i in range(arguments.repeats) for name in names):
                job = {
                    **{**base, **VARIANTS[name], "variant": name, "kind": name.split("-")[0]},
                    **{"learner": learner, "distiller": distiller, "folder": str(folder)},
                    **{"loader": name == "authors-loader", "workers": arguments.workers},
                    "out": f"{temporary}/{learner}-{distiller}-{name}-{i}",
                }
                rounds[name].append(spawn(job))
            rows = {name: summary(name, rounds, clock, gemm) for name in names}
            cells.setdefault(learner, {})[distiller] = rows
            show(f"{learner}, {distiller}", rows)
    packages = ("cdl-edge", "torch", "torchvision", "timm", "numpy")
    return {
        "benchmark": "throughput",
        "authors_commit": commit_of(arguments.authors),
        **{k: base[k] for k in ("teacher", "student", "batch_size", "device", "threads")},
        "clock": clock,
        "steps": arguments.steps,
        "repeats": arguments.repeats,
        "gemm_gflop_per_second": gemm or None,
        "cells": cells,
        "goal": GOAL,
        "machine": platform.processor() or platform.machine(),
        "versions": {**{p: version(p) for p in packages}, "python": platform.python_version()},
    }


def main() -> None:
    """Command line."""
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(work(json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--authors", required=True, type=Path, help="your checkout of github.com/IRVLUTD/CDL")
    parser.add_argument("--learners", default="coda,dualprompt,l2p", help=", ".join(THEIR_LEARNERS))
    parser.add_argument("--distillers", default="kdp", help=", ".join(THEIR_DISTILLERS))
    parser.add_argument("--size", default="paper", choices=list(SIZES), help="paper: ViT-B teaches ViT-S")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2, help="an epoch")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=4, help="of the authors' data loader")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--variants", default=",".join(VARIANTS), help=", ".join(VARIANTS))
    arguments = parser.parse_args()
    print(json.dumps(compare(arguments)))


if __name__ == "__main__":
    main()
