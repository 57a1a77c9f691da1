"""From the bytes of a photograph, or a camera's frame, to the answer: ours beside what a user would write instead.

    python benchmarks/end_to_end.py [--rounds 30] [--sizes 64x64,640x480,1920x1080,...] [--image PHOTO.jpg]

The student is a ViT-T/16 at 224 with APT + KDP in one pass, 100 classes (random weights: they do not change the cost),
batch 1, one thread. Every candidate starts from the same JPEG bytes, or from the same 1080p frame, and ends with the
name of the class:
- ours, fp32 and int8:        `Preprocessing.read` (decoder rule 2), our graph in ONNX Runtime, softmax;
- ours, int8, decoder rule 1: the same as it was before JPEGs were decoded at a smaller scale;
- ours, OpenVINO:             `Preprocessing.read`, our graph there in fp32;
- Pillow + timm:              timm's evaluation transform, the plain torch.onnx export in ONNX Runtime (the reference);
- OpenCV:                     cv2.imdecode, INTER_AREA, numpy; the plain export in ONNX Runtime;
- OpenVINO's preprocessing:   cv2.imdecode; resizing, cutting and normalising inside the compiled model (fp32);
- ultralytics:                its classification transform, the plain export in ONNX Runtime; where it is installed.
What is not installed is said and null. "stage": what our way in int8 is made of; its floor is decoding alone at the
smallest useful scale, and computing.

Each round times every candidate, in an order drawn anew (rounds.py); ratios are to the reference, which a round times
as often as all others together. The clock is the CPU time of the process. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from PIL import Image
from rounds import ceiling, clock_of, machine, race, ratio, show, version_of

from cdl_edge.calibrate.collect import collect
from cdl_edge.calibrate.float_graph import FloatGraph, named_layers
from cdl_edge.calibrate.quantize import quantise
from cdl_edge.calibrate.schemes import SCHEMES
from cdl_edge.export.rewrites import ALL
from cdl_edge.images import Preprocessing
from cdl_edge.measurement.profile import synthetic_jpeg
from cdl_edge.train.augment import Normalise
from export import CLASSES, VARIANTS, Straight, backbone_of, by_torch, openvino, ours, trained

SIDE, RESIZE = 224, 248
FRAME = (1920, 1080)
REFERENCE = "Pillow + timm, plain export"
NAMES = [f"class {at}" for at in range(CLASSES)]
Source = bytes | np.ndarray
"a JPEG, or an RGB frame, uint8 (H, W, 3)"
Graph = Callable[[np.ndarray], np.ndarray]
"an input of batch 1 -> logits (1, C)"
Candidate = Callable[[Source], str]


def answer(logits: np.ndarray) -> str:
    """Class and probability in %, as a line."""
    exponents = np.exp(logits[0] - logits[0].max())
    best = int(exponents.argmax())
    return f"{NAMES[best]} {100 * exponents[best] / exponents.sum():.1f}"


def in_ort(path: Path, name: str) -> Graph:
    """As runtime/backends/onnxruntime.py opens it, with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = 1, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda value: session.run(None, {name: value})[0]


def photograph(size: tuple[int, int], photo: Path | None) -> bytes:
    """A JPEG of (width, height), quality 90."""
    if photo is None:
        return bytes(synthetic_jpeg(*size))
    stream = io.BytesIO()
    Image.open(photo).convert("RGB").resize(size, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def opened(source: Source) -> Image.Image:
    """As everybody opens it with Pillow."""
    return Image.fromarray(source) if isinstance(source, np.ndarray) else Image.open(io.BytesIO(source)).convert("RGB")


def with_ours(graph: Graph, decoder: int, preprocessing: Preprocessing) -> Candidate:
    """Our decoder and one of our graphs."""
    read = Preprocessing(**{**vars(preprocessing), "decoder": decoder}).read
    return lambda source: answer(graph(read(source)[None]))


def with_timm(graph: Graph, preprocessing: Preprocessing) -> Candidate:
    """What timm's documentation shows."""
    from timm.data import create_transform

    transform = create_transform(
        input_size=(3, SIDE, SIDE),
        interpolation="bicubic",
        crop_pct=SIDE / RESIZE,
        mean=preprocessing.mean,
        std=preprocessing.std,
    )
    return lambda source: answer(graph(transform(opened(source))[None].numpy()))


def with_ultralytics(graph: Graph, preprocessing: Preprocessing) -> Candidate:
    """Its pipeline of classification: shorter side scaled, centre cut. Raises: ImportError."""
    from ultralytics.data.augment import classify_transforms

    transform = classify_transforms(SIDE, mean=preprocessing.mean, std=preprocessing.std)
    return lambda source: answer(graph(transform(opened(source))[None].numpy()))


def bgr(source: Source) -> np.ndarray:
    """OpenCV's picture, uint8 (H, W, 3), BGR. A frame is taken as a camera gives it."""
    import cv2

    if isinstance(source, np.ndarray):
        return source
    return np.asarray(cv2.imdecode(np.frombuffer(source, np.uint8), cv2.IMREAD_COLOR))


def with_opencv(graph: Graph, preprocessing: Preprocessing) -> Candidate:
    """imdecode, resize, cut, normalise. Raises: ImportError."""
    import cv2

    cv2.setNumThreads(1)
    mean, std = (np.float32(255) * np.asarray(v, np.float32) for v in (preprocessing.mean, preprocessing.std))

    def call(source: Source) -> str:
        picture = bgr(source)
        scale = RESIZE / min(picture.shape[:2])
        size = (max(SIDE, round(picture.shape[1] * scale)), max(SIDE, round(picture.shape[0] * scale)))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
        top, left = (picture.shape[0] - SIDE) // 2, (picture.shape[1] - SIDE) // 2
        cut = picture[top : top + SIDE, left : left + SIDE, ::-1]
        return answer(graph(np.ascontiguousarray(((cut - mean) / std).transpose(2, 0, 1)[None], np.float32)))

    return call


def with_openvino(path: Path, preprocessing: Preprocessing) -> Candidate:
    """Its PrePostProcessor around the plain export: the picture goes in as it was decoded. Raises: ImportError."""
    import cv2
    import openvino as ov
    from openvino.preprocess import ColorFormat, PrePostProcessor, ResizeAlgorithm

    cv2.setNumThreads(1)
    core = ov.Core()
    steps = PrePostProcessor(core.read_model(str(path)))
    steps.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC")).set_spatial_dynamic_shape()
    steps.input().tensor().set_color_format(ColorFormat.BGR)
    steps.input().model().set_layout(ov.Layout("NCHW"))
    chain = steps.input().preprocess().convert_color(ColorFormat.RGB).convert_element_type(ov.Type.f32)
    chain.resize(ResizeAlgorithm.RESIZE_LINEAR)
    chain.mean([255 * v for v in preprocessing.mean]).scale([255 * v for v in preprocessing.std])
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(steps.build(), "CPU", {**settings, "ENABLE_CPU_PINNING": False})
    request, output = compiled.create_infer_request(), compiled.output(0)

    def call(source: Source) -> str:
        picture = bgr(source)
        side = round(min(picture.shape[:2]) * SIDE / RESIZE)
        top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
        cut = np.ascontiguousarray(picture[top : top + side, left : left + side])
        return answer(request.infer([cut[None]])[output])

    return call


class Candidates:
    """All who start from the same picture."""

    def __init__(self, folder: Path) -> None:
        backbone = backbone_of("tiny")
        student = trained(backbone, *VARIANTS["apt"], 10)
        mean, std = backbone.preprocessing.mean, backbone.preprocessing.std
        self.preprocessing = Preprocessing(SIDE, RESIZE, mean=mean, std=std)
        pixels = np.random.default_rng(0).integers(0, 256, (8, SIDE, SIDE, 3), dtype=np.uint8)
        plain = folder / "plain.onnx"
        by_torch(Straight(student), Normalise(backbone.preprocessing, torch.device("cpu"))(pixels[:1]), plain)
        path = ours(student, backbone, 1, folder / "ort", "ort", ALL)
        graph = FloatGraph(path, named_layers(path, student.two_pass))
        made = quantise({"student": graph}, collect(graph, pixels).tensors, SCHEMES["int8-x86"], "max")
        for file, content in made.constants.items():
            (path.parent / file).write_bytes(content)
        (path.parent / "int8.onnx").write_bytes(made.models["student"])
        self.eight = in_ort(path.parent / "int8.onnx", "images")
        exported = in_ort(plain, "x")
        self.all: dict[str, Candidate] = {}
        self.missing: list[str] = []
        self._add("ours, fp32", lambda: with_ours(in_ort(path, "images"), 2, self.preprocessing))
        self._add("ours, int8", lambda: with_ours(self.eight, 2, self.preprocessing))
        self._add("ours, int8, decoder rule 1", lambda: with_ours(self.eight, 1, self.preprocessing))
        self._add(
            "ours, OpenVINO fp32",
            lambda: with_ours(self._openvino(student, backbone, folder), 2, self.preprocessing),
        )
        self._add(REFERENCE, lambda: with_timm(exported, self.preprocessing))
        self._add("OpenCV, plain export", lambda: with_opencv(exported, self.preprocessing))
        self._add("OpenVINO's preprocessing, plain export", lambda: with_openvino(plain, self.preprocessing))
        self._add("ultralytics, plain export", lambda: with_ultralytics(exported, self.preprocessing))

    def _openvino(self, student: Any, backbone: Any, folder: Path) -> Graph:
        feed = {"images": np.zeros((1, SIDE, SIDE, 3), np.uint8)}
        call = openvino(ours(student, backbone, 1, folder / "openvino", "openvino", ALL), feed, 1, "f32")

        def graph(pixels: np.ndarray) -> np.ndarray:
            feed["images"] = pixels
            return call()

        return graph

    def _add(self, name: str, make: Callable[[], Candidate]) -> None:
        try:
            self.all[name] = make()
        except ImportError as error:
            print(f"{name}: {error}", file=sys.stderr)
            self.missing.append(name)

    def stages(self, source: Source) -> dict[str, Callable[[], Any]]:
        """What the way of ours in 8 bits is made of, and its floor."""
        pixels = self.preprocessing.read(source)[None]
        logits = self.eight(pixels)
        parts: dict[str, Callable[[], Any]] = {
            "stage: decode and resize": lambda: self.preprocessing.read(source),
            "stage: compute, int8": lambda: self.eight(pixels),
            "stage: post": lambda: answer(logits),
        }
        if isinstance(source, bytes):
            parts["stage: decode alone, smallest useful scale"] = lambda: decoded(source, 2 * SIDE)
        return parts


def decoded(source: bytes, least: int) -> None:
    """libjpeg's work alone: the smallest scale whose sides are at least this long."""
    with Image.open(io.BytesIO(source)) as image:
        image.draft("RGB", (least, least))
        image.load()


def measured(candidates: Candidates, source: Source, rounds: int, seed: int) -> dict[str, Any]:
    """Race, print, and give the rows."""
    calls: dict[str, Callable[[], Any]] = {n: lambda c=c: c(source) for n, c in candidates.all.items()}  # type: ignore[misc]
    calls |= candidates.stages(source)
    times = race(calls, rounds, REFERENCE, seed, clock_of(1), warm_up=2)
    rows: dict[str, Any] = dict.fromkeys(candidates.missing)
    for name, values in times.items():
        found = ratio(values, times[REFERENCE])
        rows[name] = {"median_ms": float(np.median(values)), "ratio": found.median, "interval": [found.low, found.high]}
        print(f"  {name:46s}{np.median(values):9.2f} ms   {found}", flush=True)
    goal = ratio(times["ours, int8"], times["ours, int8, decoder rule 1"])
    rows["rule 2 against rule 1, int8"] = {"ratio": goal.median, "interval": [goal.low, goal.high]}
    print(f"  {'rule 2 against rule 1, int8':46s}{'':12}   {goal}")
    return rows


def sizes(text: str) -> list[tuple[int, int]]:
    """ "64x64,640x480" -> [(64, 64), (640, 480)]."""
    return [(int(w), int(h)) for w, h in (part.split("x") for part in text.split(","))]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--sizes", type=sizes, default=sizes("64x64,640x480,1920x1080,4032x3024,8064x6048"))
    parser.add_argument("--image", type=Path, help="photograph to make the pictures of; without: synthetic")
    parser.add_argument("--seed", type=int, default=0, help="of the orders")
    parser.add_argument("--ceiling-size", type=int, help="of the matrices that show the machine's ceiling")
    options = parser.parse_args()
    torch.set_num_threads(1)
    top = ceiling(size=options.ceiling_size)
    print(show(top))
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        candidates = Candidates(Path(folder))
        sources: dict[str, Source] = {f"JPEG {w} x {h}": photograph((w, h), options.image) for w, h in options.sizes}
        sources["frame {} x {}".format(*FRAME)] = np.asarray(opened(photograph(FRAME, options.image)))
        for name, source in sources.items():
            print(name)
            found[name] = measured(candidates, source, options.rounds, options.seed)
    print(
        json.dumps(
            {
                "benchmark": "end_to_end",
                "reference": REFERENCE,
                "cases": found,
                "rounds": options.rounds,
                "seed": options.seed,
                "preprocessing": candidates.preprocessing.to_json(),
                "machine": machine(),
                "ceiling": top,
                "versions": {
                    p: version_of(p, f"{p}-headless")
                    for p in ("cdl-edge", "pillow", "onnxruntime", "openvino", "opencv-python", "timm", "ultralytics")
                },
            }
        )
    )


if __name__ == "__main__":
    main()
