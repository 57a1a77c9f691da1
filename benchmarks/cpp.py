"""The program in C++ beside `cdl-edge predict` and beside a short Python loop: start, milliseconds a picture, bytes.

    cmake -S examples/cpp -B build && cmake --build build
    python benchmarks/cpp.py BUNDLE build/classify --photos FOLDER [--count 60] [--rounds 10]

Each way is a process of its own, once with one picture and once with many, in an order drawn anew each round (see
rounds.py). The time with one picture is the start; what the others add, divided by their number, is a picture. The
loop is what one writes without any of this: Pillow, ONNX Runtime, no hash, no self-test, and not the picture's pixels
as training had them. One thread. CPU time of the process, so that other work on the machine counts less. The last
line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from functools import partial
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
from rounds import Ratio, machine, race, ratio, version_of

LOOP = """
import json, pathlib, sys
import numpy as np, onnxruntime
from PIL import Image
folder, *pictures = sys.argv[1:]
manifest = json.loads((pathlib.Path(folder) / "manifest.json").read_text())
size = manifest["input"]["preprocessing"]["size"]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(f"{folder}/{manifest['graphs']['student']}", options)
for picture in pictures:
    pixels = np.asarray(Image.open(picture).convert("RGB").resize((size, size)))[None]
    logits = session.run(["logits"], {"images": pixels})[0][0]
    print(picture, manifest["classes"][logits.argmax()])
"""
"a Python program that classifies pictures, as short as it can be"
NEEDED = ("numpy", "pillow", "onnxruntime", "protobuf", "flatbuffers", "packaging")
"what the loop needs; ours needs click and itself, too"


def installed(*names: str) -> int:
    """Bytes of the files of some distributions, without bytecode. Of an editable install the sources do not count."""
    files = [file for name in names for file in distribution(name).files or ()]
    return sum(
        Path(str(f.locate())).stat().st_size for f in files if f.suffix != ".pyc" and Path(str(f.locate())).is_file()
    )


def library() -> Path:
    """ONNX Runtime's shared library, as the wheel has it."""
    return next(Path(str(f.locate())) for f in distribution("onnxruntime").files or () if "libonnxruntime.so" in f.name)


def cpu_time() -> float:
    """Seconds of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("program", type=Path, help="classify, built from examples/cpp")
    parser.add_argument("--photos", type=Path, required=True, help="folder of JPEGs")
    parser.add_argument("--count", type=int, default=60, help="pictures of the long call")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    pictures = [str(p) for p in sorted(arguments.photos.rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg")]
    pictures = (pictures * arguments.count)[: arguments.count]
    predict = [sys.executable, "-m", "cdl_edge.cli", "predict", "--threads", "1", "--precision", "fp32"]
    ways = {"cpp": [arguments.program, "--threads=1"], "predict": predict, "loop": [sys.executable, "-c", LOOP]}
    calls = {
        (name, count): partial(
            subprocess.run, [*words, arguments.bundle, *pictures[:count]], check=True, capture_output=True
        )
        for name, words in ways.items()
        for count in (1, len(pictures))
    }
    times = race(calls, arguments.rounds, clock=cpu_time, warm_up=1)
    start = {name: times[name, 1] for name in ways}
    each = {name: (times[name, len(pictures)] - times[name, 1]) / (len(pictures) - 1) for name in ways}
    size = {
        "cpp": arguments.program.stat().st_size + library().stat().st_size,
        "predict": installed("cdl-edge", "click", *NEEDED),
        "loop": installed(*NEEDED),
    }
    found = {
        name: {
            "start_ms": float(np.median(start[name])),
            "start": ratio(start[name], start["loop"])._asdict(),
            "picture_ms": float(np.median(each[name])),
            "picture": ratio(each[name], each["loop"])._asdict(),
            "bytes": size[name],
        }
        for name in ways
    }
    print("beside the loop in Python, in brackets the 95 % interval")
    for name, row in found.items():
        begin, one = Ratio(**row["start"]), Ratio(**row["picture"])
        print(
            f"{name:8s} start {row['start_ms']:6.0f} ms, {begin}; picture {row['picture_ms']:6.2f} ms, {one}; "
            f"{row['bytes'] / 1e6:.1f} MB"
        )
    about = {"bundle": arguments.bundle.name, "pictures": len(pictures), "rounds": arguments.rounds}
    versions = {p: version_of(p) for p in ("cdl-edge", "onnxruntime", "pillow")}
    print(json.dumps({"benchmark": "cpp", **about, "ways": found, "machine": machine(), "versions": versions}))


if __name__ == "__main__":
    main()
