"""A quarter of an hour on one GPU: does it compute what the CPU computes, and how fast is it?

    python benchmarks/gpu.py [--minutes 14] [--data PACK.npz] [--authors PATH] [--sections agreement,speed,...]
    python benchmarks/gpu.py --pack FOLDER PACK.npz [--pack-side 64] [--pack-mib 60]
    python benchmarks/gpu.py --device cpu        the same, tiny, on a CPU: a test of the script, not a measurement

It needs this repository, as it lies there, and a machine with torch, timm and onnx; nothing is downloaded. What else is
installed is measured too: ONNX Runtime (its CPU, CUDA and TensorRT providers), TensorRT, Accelerate. Sections
(gpu_sections.py), each in a process of its own, so that a crash or an endless loop in one costs only that one:
- agreement: losses and accuracies of a short run on the device, in fp32 and bf16, beside fp32 on the CPU, by learner;
- resume:    a run that was stopped and resumed on the device beside the same run left alone;
- torchrun:  the same run as one process of torchrun, with Accelerate's sums, beside the plain one;
- speed:     images per second of teacher and student, ViT-B -> ViT-T and ViT-B -> ViT-S at 224 with random weights,
             and the most memory they held; beside the CDL authors' code where --authors names a checkout of it;
- engines:   parity, latency and achieved precision of an exported bundle in every engine; TensorRT also a refit;
- pretrain:  the convnet, then a teacher and a student that learn from it, for what time is left (--pretrain-minutes).

PACK.npz holds photographs as uint8, so that at most 64 MiB travel with the repository; without it pictures are
synthetic. The last line of stdout is JSON: of each section its status ("done", "failed", "stopped" by the time limit,
or "not run"), the reason, and the results; null is what was not run. A section that was stopped keeps what it had.
Exit code: 1 if a section failed, otherwise 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PATHS = [str(ROOT / ".pkg"), str(ROOT / "benchmarks")]
"a checkout, installed or not"
sys.path[:0] = PATHS

from rounds import machine, version_of  # noqa: E402

from cdl_edge.data import load_dataset  # noqa: E402
from cdl_edge.errors import InputError  # noqa: E402
from cdl_edge.images import Preprocessing  # noqa: E402

SHARES = {"agreement": 3.0, "resume": 0.7, "torchrun": 0.8, "speed": 3.5, "engines": 3.0, "pretrain": 3.0}
"section -> its share of the time: what one does not use is divided among those behind it"
LEAST_S = 5.0
"with less time than this a section is not begun"
GRACE_S = 5.0
"of the time limit, kept for the end"
PARTS = ("train", "val")
PACKAGES = ("torch", "timm", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "accelerate", "numpy")


# -- photographs ------------------------------------------------------------------------------------------------------


def pack(folder: Path, out: Path, side: int, mib: int) -> dict[str, Any]:
    """Photographs of FOLDER/train/<class> and FOLDER/val/<class> into one file of at most `mib` MiB.

    Every class gives as many as all others, drawn by a seed; four of five are training images.

    Returns: {"out", "bytes", "classes", "train", "val"}. Raises: InputError where not even one a class would fit.
    """
    dataset = load_dataset(f"folder:{folder}")
    room = (mib << 20) // (side * side * 3 + 16)
    per_class = room // len(dataset.classes)
    if per_class < 2:
        raise InputError(
            "the photographs do not fit",
            got=f"{len(dataset.classes)} classes of {side} x {side} pixels",
            expected=f"at least two images of each in {mib} MiB",
            fix="lower --pack-side, raise --pack-mib, or pack a folder of fewer classes",
        )
    held = max(1, per_class // 5)
    arrays: dict[str, np.ndarray] = {"classes": np.array(dataset.classes)}
    for part, split, count in (("train", dataset.train, per_class - held), ("val", dataset.val, held)):
        decoded = split.limited(count, 0).decode(Preprocessing(side, side))
        arrays |= {f"{part}_pixels": decoded.pixels, f"{part}_labels": decoded.labels.astype(np.int64)}
    temporary = out.with_name(f".{out.name}.{os.getpid()}.npz")
    try:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    counts = {part: len(arrays[f"{part}_labels"]) for part in PARTS}
    return {"out": str(out), "bytes": out.stat().st_size, "classes": len(dataset.classes), **counts}


def unpack(path: Path, root: Path, classes: int | None = None, per_class: int | None = None) -> Path:
    """A pack as an image folder of PNG files below `root`; of each class and part at most `per_class`.

    Raises: InputError for a file that is not a pack.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names = [str(name) for name in file["classes"]][:classes]
            arrays = {part: (file[f"{part}_pixels"], file[f"{part}_labels"]) for part in PARTS}
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path}: not a pack of photographs", got=str(error), fix="make it with --pack") from error
    for part, (pixels, labels) in arrays.items():
        for index, name in enumerate(names):
            target = root / part / name
            target.mkdir(parents=True)
            for number, image in enumerate(pixels[labels == index][:per_class]):
                Image.fromarray(image).save(target / f"{number:05d}.png", compress_level=1)
    return root


def synthetic(path: Path, classes: int = 8, per_class: int = 40, side: int = 64) -> Path:
    """A pack of pictures that can be told apart: each class has a pattern of its own under noise."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (classes, 4, 4, 3), dtype=np.uint8)
    arrays: dict[str, np.ndarray] = {"classes": np.array([f"c{i}" for i in range(classes)])}
    for part, count in (("train", per_class), ("val", max(2, per_class // 4))):
        labels = np.repeat(np.arange(classes), count)
        large = np.kron(patterns[labels], np.ones((1, side // 4, side // 4, 1)))
        noisy = np.clip(large + rng.normal(0, 40, large.shape), 0, 255).astype(np.uint8)
        arrays |= {f"{part}_pixels": noisy, f"{part}_labels": labels}
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


# -- sections ---------------------------------------------------------------------------------------------------------


def run_section(name: str, job: dict[str, Any], seconds: float) -> dict[str, Any]:
    """One section in a process of its own, with its children killed when its time is over."""
    begun = time.perf_counter()
    notes = Path(job["folder"]) / f"{name}.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_sections.py"), name, str(notes)]
    kept = [p for p in (os.environ.get("PYTHONPATH"),) if p]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*PATHS, *kept])}
    limited = {**job, "seconds": seconds}
    log = notes.with_suffix(".log")
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, json.dumps(limited)], stdout=stream, stderr=stream, env=environment, start_new_session=True
        )
        status = "done"
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status, code = "stopped", None
        finally:
            # Its own group: what it has started ends with it. First politely: torchrun passes that on to its workers,
            # which are in groups of their own.
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=2)
            process.wait()
    found: dict[str, Any] = {"results": {}, "failed": []}
    if notes.is_file():
        found = json.loads(notes.read_text())
    reason = None
    if status == "stopped":
        reason = f"the time limit of {seconds:.0f} s"
    elif code or found["failed"]:
        status = "failed"
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        reason = "; ".join(found["failed"]) or (lines or [f"exit status {code}"])[-1]
    if status != "done":
        sys.stderr.write("".join(f"{name}: {line}\n" for line in log.read_text(errors="replace").splitlines()[-15:]))
    results = found["results"] or None
    return {"status": status, "reason": reason, "seconds": time.perf_counter() - begun, "results": results}


def run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every section in turn; the JSON document."""
    begun, end = time.monotonic(), time.monotonic() + arguments.minutes * 60 - GRACE_S
    names = arguments.sections.split(",")
    sections: dict[str, dict[str, Any]] = {
        name: {"status": "not run", "reason": "not asked for", "seconds": 0.0, "results": None} for name in SHARES
    }
    tiny = arguments.device == "cpu"
    with tempfile.TemporaryDirectory(prefix="cdl-edge-gpu-") as temporary:
        folder = Path(temporary)
        data = arguments.data.resolve() if arguments.data else synthetic(folder / "synthetic.npz")
        job = {
            "folder": temporary,
            "device": arguments.device,
            "tiny": tiny,
            "few": str(unpack(data, folder / "few", *((4, 8) if tiny else (8, 40)))),
            "pack": str(data),
            "authors": str(arguments.authors.resolve()) if arguments.authors else None,
            "learners": arguments.learners.split(","),
            "pretrain_seconds": arguments.pretrain_minutes * 60,
        }
        for name in (n for n in SHARES if n in names):
            left = end - time.monotonic()
            ahead = [SHARES[n] for n in list(SHARES)[list(SHARES).index(name) :] if n in names]
            seconds = left * SHARES[name] / sum(ahead)
            if seconds < LEAST_S:
                sections[name]["reason"] = f"only {max(left, 0):.0f} s left"
                continue
            print(f"{name}: at most {seconds:.0f} s", file=sys.stderr, flush=True)
            try:
                sections[name] = run_section(name, job, seconds)
            except KeyboardInterrupt:
                sections[name] |= {"status": "stopped", "reason": "interrupted"}
                break
            state = sections[name]
            print(
                f"{name}: {state['status']} in {state['seconds']:.0f} s" + f" ({state['reason']})"
                if state["reason"]
                else f"{name}: done in {state['seconds']:.0f} s",
                flush=True,
            )
    return {
        "benchmark": "gpu",
        "device": arguments.device,
        "tiny": tiny,
        "gpu": gpu_name() if arguments.device == "cuda" else None,
        "photographs": arguments.data is not None,
        "minutes": arguments.minutes,
        "seconds": time.monotonic() - begun,
        "sections": sections,
        "machine": machine(),
        "versions": {p: version_of(p) for p in PACKAGES},
    }


def gpu_name() -> str:
    """As torch calls the first one."""
    import torch

    return str(torch.cuda.get_device_name(0))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=14.0, help="for everything together")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: tiny, a test of the script")
    parser.add_argument("--data", type=Path, metavar="PACK.npz", help="photographs; without: synthetic pictures")
    parser.add_argument("--authors", type=Path, help="your checkout of github.com/IRVLUTD/CDL")
    parser.add_argument("--sections", default=",".join(SHARES), help="of " + ", ".join(SHARES))
    parser.add_argument("--learners", default="coda,dualprompt,l2p,apt,finetune,frozen", help="of agreement")
    parser.add_argument("--pretrain-minutes", type=float, default=4.0, help="at most, of the time that is left")
    parser.add_argument("--pack", nargs=2, type=Path, metavar=("FOLDER", "OUT.npz"), help="make PACK.npz, do no more")
    parser.add_argument("--pack-side", type=int, default=64, help="pixels")
    parser.add_argument("--pack-mib", type=int, default=60, help="largest size of the pack")
    arguments = parser.parse_args()
    if unknown := set(arguments.sections.split(",")) - set(SHARES):
        parser.error(f"no such section: {', '.join(sorted(unknown))}; there are {', '.join(SHARES)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end the section and print what there is
    try:
        if arguments.pack:
            source, out = arguments.pack
            print(json.dumps(pack(source, out, arguments.pack_side, arguments.pack_mib)))
            return
        if arguments.device == "cuda":
            import torch

            if not torch.cuda.is_available():
                parser.error(f"torch {torch.__version__} finds no CUDA device; --device cpu tests the script")
        document = run_all(arguments)
    except InputError as error:
        parser.error(str(error))
    print(json.dumps(document))
    sys.exit(int(any(s["status"] == "failed" for s in document["sections"].values())))


if __name__ == "__main__":
    main()
