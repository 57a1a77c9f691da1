"""The sections of gpu.py, each run as a process of its own: gpu_sections.py SECTION NOTES.json JOB.

A section notes each result as soon as it has it: one that is stopped, or dies, leaves behind what it had done. A part
that fails is noted with its reason, and the next one goes on; a part that needs what is not installed is null.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cdl_edge.errors import InputError
from cdl_edge.files import write_json
from cdl_edge.train.config import TrainConfig
from cdl_edge.train.devices import Devices
from cdl_edge.train.loop import train
from cdl_edge.train.phase import Phase

SIDES = ("teacher", "student")
OTHERWISE = {"frozen": {"head": "ranpac"}, "finetune": {"distill": "kd"}}
"learner -> options: nothing of a frozen network learns, and the default distiller needs prompts"
PROMPTED = "coda"
"learner of the sections that need one only"


class Notes:
    """What a section has found so far, in a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.results, self.failed = path, dict[str, Any](), list[str]()

    def put(self, value: Any, *keys: str) -> None:
        """results[key][key]... = value, and write all."""
        place = self.results
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = value
        self._write()

    @contextlib.contextmanager
    def part(self, *keys: str) -> Iterator[None]:
        """What fails in here is noted under the keys and stops nothing else; what cannot run here is no failure."""
        try:
            yield
        except (ImportError, InputError) as error:
            self.put({"not_run": " ".join(str(error).split())[:500]}, *keys)
        except Exception as error:  # a foreign engine on a foreign device: whatever it raises is its answer
            traceback.print_exc()
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.failed.append(f"{' '.join(keys)}: {said}")
            self.put({"error": said}, *keys)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _write(self) -> None:
        write_json(self.path, {"results": self.results, "failed": self.failed})


# -- training ---------------------------------------------------------------------------------------------------------


def config_of(job: dict[str, Any], out: str, **changes: Any) -> TrainConfig:
    """A short run on the few pictures: two tasks, learnt heads, so that every loss has all its terms."""
    settings: dict[str, Any] = {
        **{"data": f"folder:{job['few']}", "out": str(Path(job["folder"]) / "runs" / out), "devices": job["device"]},
        **{"learner": PROMPTED, "tasks": 2, "epochs": 2, "min_steps": 0, "batch_size": 16, "head": "learned"},
        **{"precision": "fp32", "range_images": 0, "augment": "none"},
    }
    if job["tiny"]:
        # The older student is the cheapest backbone that lies in the package.
        settings |= {"teacher": "builtin:student-v1", "student": "builtin:student-v1", "image_size": 32}
    return TrainConfig(**{**settings, **changes})


def short(config: TrainConfig, **more: Any) -> dict[str, Any]:
    """Train; {"loss": {side: epochs}, "accuracy", "forgetting", "precision", "seconds", "matrix"} of the student."""
    begun = time.perf_counter()
    metrics = train(config, quiet=True, **more)
    student = metrics["student"]
    losses = {side: list(itertools.chain(*metrics[side]["loss"])) for side in SIDES if metrics.get(side)}
    return {
        "loss": losses,
        "accuracy": student["average_accuracy"],
        "matrix": student["matrix"],
        "precision": metrics["precision"],
        "device": metrics["device"],
        "seconds": time.perf_counter() - begun,
    }


def apart(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """How two `short` runs differ: the largest difference of a loss as a share of it, and of the accuracy in points."""
    share = 0.0
    for side, expected in a["loss"].items():
        got = b["loss"][side]
        if len(got) != len(expected):
            raise RuntimeError(f"{side}: {len(expected)} and {len(got)} epochs")
        share = max([share, *(abs(x - y) / max(abs(x), 1e-9) for x, y in zip(expected, got, strict=True))])
    points = abs(a["accuracy"] - b["accuracy"])
    return {"loss_share": share, "accuracy_points": points, "identical_losses": a["loss"] == b["loss"]}


def agreement(job: dict[str, Any], notes: Notes) -> None:
    """fp32 and bf16 on the device beside fp32 on the CPU."""
    for learner in job["learners"]:
        reference: dict[str, Any] | None = None
        changes = {"learner": learner, **OTHERWISE.get(learner, {})}
        for label, device, precision in (
            ("cpu fp32", "cpu", "fp32"),
            (f"{job['device']} fp32 again" if job["device"] == "cpu" else "cuda fp32", job["device"], "fp32"),
            (f"{job['device']} bf16", job["device"], "bf16"),
        ):
            with notes.part(learner, label):
                out = f"{learner}-{label.replace(' ', '-')}"
                found = short(config_of(job, out, devices=device, precision=precision, **changes))
                reference = reference or (found if label == "cpu fp32" else None)
                notes.put({**found, "to_cpu_fp32": apart(reference, found) if reference else None}, learner, label)


class Stopped(Exception):
    """Where a run is interrupted on purpose."""


def resume(job: dict[str, Any], notes: Notes) -> None:
    """Stopped in the student's phase of the first task, then resumed."""
    with notes.part("resume"):
        whole = short(config_of(job, "whole"))
        epochs = Phase.epochs

        def stopping(self: Phase, *args: Any, **kwargs: Any) -> Iterator[Any]:
            for number, done in enumerate(epochs(self, *args, **kwargs)):
                if self.is_student and number == 1:  # the first epoch's checkpoint is written, the second's is not
                    raise Stopped
                yield done

        Phase.epochs = stopping  # type: ignore[method-assign]
        broken = config_of(job, "broken")
        try:
            train(broken, quiet=True)
            raise RuntimeError("the run was not stopped")
        except Stopped:
            pass
        finally:
            Phase.epochs = epochs  # type: ignore[method-assign]
        resumed = short(broken, resume=True)
        same = whole["matrix"] == resumed["matrix"]
        notes.put({**apart(whole, resumed), "identical_matrices": same, "device": resumed["device"]}, "resume")


def torchrun(job: dict[str, Any], notes: Notes) -> None:
    """One process that sums with nobody: NCCL or Gloo start, and nothing else changes."""
    with notes.part("torchrun"):
        import accelerate  # noqa: F401

        plain = short(config_of(job, "plain"))
        answer = notes.path.with_suffix(".torchrun.json")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
        command = [sys.executable, *launcher, str(Path(__file__).resolve()), "joined", str(answer), json.dumps(job)]
        environment = dict(os.environ)
        if sys.platform == "linux":
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        process = subprocess.run(command, capture_output=True, text=True, env=environment)
        if process.returncode:
            raise RuntimeError(f"torchrun: exit status {process.returncode}: {process.stderr[-400:]}")
        found = json.loads(answer.read_text())["results"]["joined"]
        if "loss" not in found:
            raise RuntimeError(f"torchrun: {found}")
        notes.put({**apart(plain, found), "device": found["device"], "backend": found["backend"]}, "torchrun")


def joined(job: dict[str, Any], notes: Notes) -> None:
    """The run of one process, made to join a group of one: by itself a single process sums nothing."""
    begin = Devices.__init__

    def joining(self: Devices, devices: str, precision: str) -> None:
        begin(self, devices, precision)
        self._join(self.device.type == "cuda")

    backends = []
    leave = Devices.close

    def leaving(self: Devices) -> None:
        backends.append(torch.distributed.get_backend() if torch.distributed.is_initialized() else None)
        leave(self)

    Devices.__init__, Devices.close = joining, leaving  # type: ignore[method-assign]
    with notes.part("joined"):
        notes.put({**short(config_of(job, "joined")), "backend": (backends or [None])[0]}, "joined")


# -- speed ------------------------------------------------------------------------------------------------------------


def speed(job: dict[str, Any], notes: Notes) -> None:
    """Images per second of a step, through the processes of throughput.py, and the device's ceiling."""
    import throughput
    from rounds import ceiling

    cuda, tiny = job["device"] == "cuda", job["tiny"]
    threads = 1 if tiny else os.cpu_count() or 1
    with notes.part("ceiling"):
        top = ceiling(threads, job["device"], *((128, 8 << 20, 0.01) if tiny else ()))
        notes.put(top, "ceiling")
    pairs = [("tiny", "tiny")] if tiny else [("base", "tiny"), ("base", "small")]
    batch, steps = (2, 1) if tiny else (64, 8)
    folder = throughput.make_folder(Path(job["folder"]) / "speed", batch * steps)
    variants = ["ours-kept"] if tiny else ["ours-fp32", "ours", "ours-kept"]
    if job["authors"]:
        variants.append("authors")
    for (teacher, student), variant in itertools.product(pairs, variants):
        pair = f"ViT-{teacher} -> ViT-{student}"
        with notes.part(pair, variant):
            work = {
                **{**throughput.VARIANTS[variant], "variant": variant, "learner": PROMPTED, "distiller": "kdp"},
                **{"teacher": f"vit_{teacher}_patch16_224", "student": f"vit_{student}_patch16_224"},
                **{"batch_size": batch, "device": job["device"], "threads": threads, "workers": 0},
                **{"clock": "wall" if cuda else "cpu", "authors": job["authors"], "folder": str(folder)},
                "out": str(Path(job["folder"]) / "speed-runs" / f"{teacher}-{student}-{variant}"),
            }
            found = throughput.spawn(work)
            if found is None:
                raise RuntimeError("it could not run: see above")
            rates = {s: throughput.images_per_second(found[s], work["clock"]) for s in SIDES}
            gflops = {s: found[s]["flops"] / 1e9 for s in SIDES}
            memory = {key: found[key] for key in ("precision", "peak_gb", "peak_device_gb")}
            notes.put({"images_per_second": rates, "gflop_per_image": gflops, "batch": batch, **memory}, pair, variant)
    if not job["authors"]:
        for teacher, student in pairs:
            notes.put(None, f"ViT-{teacher} -> ViT-{student}", "authors")


# -- engines ----------------------------------------------------------------------------------------------------------


def engines(job: dict[str, Any], notes: Notes) -> None:
    """A bundle in every engine that is here; TensorRT also takes new prompts into an engine that it has built."""
    from cdl_edge.export.export_bundle import export
    from cdl_edge.runtime import load, open_bundle

    folder, images = Path(job["folder"]), 8 if job["tiny"] else 64
    model = {} if job["tiny"] else {"student": "random:vit_tiny_patch16_224"}
    bundles: dict[str, Path] = {}
    for number, profile in enumerate(("ort", "trt10")):
        with notes.part("export", profile):
            for seed in (0, 1):  # the second has other prompts for the same graph
                run = folder / "runs" / f"bundle-{seed}"
                if not (run / "metrics.json").is_file():
                    train(config_of(job, f"bundle-{seed}", distill="none", epochs=1, seed=seed, **model), quiet=True)
                if seed == 0 or number == 1:
                    export(run, folder / f"{profile}-{seed}", profile, images=images)
            bundles[profile] = folder / f"{profile}-0"
            notes.put({"parity": open_bundle(bundles[profile]).manifest.document["graph_parity"]}, "export", profile)
    available = [("onnxruntime", "ort"), ("cuda", "ort"), ("ort-tensorrt", "trt10"), ("tensorrt", "trt10")]
    for backend, profile in available[:1] if job["device"] == "cpu" else available:
        if profile not in bundles:
            continue
        for precision in ("fp32", "fp16"):
            if precision == "fp16" and "student.fp16" not in open_bundle(bundles[profile]).manifest.graphs:
                notes.put(None, backend, precision)
                continue
            with notes.part(backend, precision):
                notes.put(
                    in_engine(bundles[profile], backend, precision, 20 if job["tiny"] else 300), backend, precision
                )
    with notes.part("tensorrt", "refit"):
        if job["device"] == "cpu":
            raise InputError("TensorRT needs a GPU", got="--device cpu")
        notes.put(refit(folder / "trt10-0", folder / "trt10-1", load), "tensorrt", "refit")


def in_engine(bundle: Path, backend: str, precision: str, runs: int) -> dict[str, Any]:
    """Parity with torch's answers to the self-test, latency of one image, and what it says it computes in."""
    from cdl_edge.measurement.profile import profile
    from cdl_edge.runtime import load, open_bundle
    from cdl_edge.runtime.selftest import prove, reference

    opened = open_bundle(bundle)
    feeds, expected = reference(opened)
    with load(opened, backend, precision=precision) as runner:
        parity, described = prove(runner, feeds, expected), runner.describe()
        logits = runner.compute(feeds)["logits"]
        document = getattr(runner.engine, "sidecar", None) or {}
    measured = profile(bundle, backend, runs=runs, precision=precision)
    keep = ("n", "mean", "p50", "p90", "p99")
    stages = {k: v for k, v in measured.items() if k.endswith("_ms") and isinstance(v, dict)}
    return {
        "parity": parity,
        "largest_difference": float(np.abs(logits - expected["logits"]).max()),
        "latency": {stage: {k: v[k] for k in keep if k in v} for stage, v in stages.items()},
        "load_ms": measured["load_ms"],
        "resolved": described,
        "achieved": document.get("achieved"),
        "build_seconds": document.get("build_seconds"),
    }


def refit(old: Path, new: Path, load: Callable[..., Any]) -> dict[str, Any]:
    """The engine that was built for `old` gets the prompts of `new`, whose graph is the same: was it a refit?"""
    import shutil

    shutil.copytree(old / "engines", new / "engines")
    begun = time.perf_counter()
    with load(new, "tensorrt", precision="fp32") as runner:
        document = runner.engine.sidecar
    seconds = time.perf_counter() - begun
    return {"refitted": document["refits"] == 1, "seconds": seconds, "gate": document["gate"]}


# -- pre-training -----------------------------------------------------------------------------------------------------


def pretrain(job: dict[str, Any], notes: Notes) -> None:
    """A convnet, then both ViTs that learn from it, each for a third of the time: one epoch tells how many fit."""
    from gpu import unpack

    from cdl_edge.train.pretrain import PretrainConfig
    from cdl_edge.train.pretrain import pretrain as run

    data = job["few"] if job["tiny"] else str(unpack(Path(job["pack"]), Path(job["folder"]) / "all"))
    # A fifth is kept back: decoding, and epochs that are slower than the first.
    budget = 0.8 * min(job["seconds"], job["pretrain_seconds"]) / 3
    convnet = Path(job["folder"]) / "convnet.safetensors"
    for arch in ("convnet", "teacher", "student"):
        with notes.part(arch):
            behind = {} if arch == "convnet" else {"distill_from": str(convnet)}
            batch = {"batch_size": 16 if job["tiny"] else 256}
            begun = time.perf_counter()
            probe = PretrainConfig(
                f"folder:{data}", arch, str(convnet.with_name(f"{arch}-probe.safetensors")), epochs=1
            )
            first = run(PretrainConfig(**{**vars(probe), **behind, **batch}))
            spent = time.perf_counter() - begun
            epochs = 1 if job["tiny"] else max(1, int((budget - spent) / max(float(first["seconds"]), 1e-3)))
            out = str(convnet.with_name(f"{arch}.safetensors"))
            config = PretrainConfig(**{**vars(probe), **behind, **batch, "out": out, "epochs": epochs})
            found = run(config)
            curve = json.loads(Path(out).with_suffix(".curve.json").read_text())["curve"]
            images = sum(1 for _ in (Path(data) / "train").glob("*/*"))
            rate = images * int(found["epochs"]) / float(found["seconds"])
            keep = ("val_accuracy", "epochs", "seconds")
            notes.put({**{k: found[k] for k in keep}, "images_per_second": rate, "curve": curve}, arch)


SECTIONS: dict[str, Callable[[dict[str, Any], Notes], None]] = {
    **{"agreement": agreement, "resume": resume, "torchrun": torchrun, "joined": joined},
    **{"speed": speed, "engines": engines, "pretrain": pretrain},
}


def main() -> None:
    """SECTION NOTES JOB."""
    name, path, job = sys.argv[1:]
    given = json.loads(job)
    if given["tiny"]:
        torch.set_num_threads(1)
    SECTIONS[name](given, Notes(Path(path)))


if __name__ == "__main__":
    main()
