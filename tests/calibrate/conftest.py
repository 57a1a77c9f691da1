"""Tiny students as graphs on disk, their 8-bit forms in ONNX Runtime, and calibrated bundles of digits."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from cdl_edge.artefacts.layer_table import Layer, LayerTable
from cdl_edge.calibrate.collect import collect
from cdl_edge.calibrate.constants import read
from cdl_edge.calibrate.float_graph import FloatGraph
from cdl_edge.calibrate.opset import here
from cdl_edge.calibrate.quantize import Quantised, quantise
from cdl_edge.calibrate.schemes import get_scheme
from cdl_edge.calibrate.smooth import smoothing
from cdl_edge.data import load_dataset
from cdl_edge.ranges import TensorRange

PARTS = ("student", "query", "prompted")


@pytest.fixture(scope="session")
def students(tmp_path_factory) -> Any:
    """The lab of tests/export: test files cannot import it by name (pytest's importlib mode)."""
    path = Path(__file__).parents[1] / "export" / "conftest.py"
    spec = importlib.util.spec_from_file_location("calibrate_students", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.Lab(tmp_path_factory.mktemp("students"), itertools.count())


@dataclass(frozen=True)
class Graphs:
    """The graphs of one student on disk, as `export` writes them."""

    student: Any
    folder: Path
    names: tuple[str, ...]
    "all of them, `student.fp16` among them where the profile has it"
    layers: LayerTable
    "of them all"
    ranges: dict[str, TensorRange]
    "of every Linear, by the student's graph"
    pixels: np.ndarray

    def path(self, name: str = "student") -> Path:
        return self.folder / f"{name}.onnx"

    def graph(self, name: str = "student") -> FloatGraph:
        """With its layers."""
        return FloatGraph(self.path(name), self.layers.graphs[name])

    def whole(self, name: str = "student") -> dict[str, Layer]:
        """The layers that see all tokens, by node; not the patch embedding."""
        return {layer.node: layer for layer in self.graph(name).whole if layer.unit != "stem"}

    def quantise(
        self,
        scheme: str = "int8-x86",
        method: str = "max",
        smooth: float | None = None,
        skip: Collection[str] = (),
        suffix: str = "",
        names: Sequence[str] = PARTS,
    ) -> Quantised:
        """suffix: ".fp16" for graphs of half precision."""
        graphs = {n: self.graph(n + suffix) for n in names if n + suffix in self.names}
        smoothed = smoothing(self.graph(), self.ranges, smooth) if smooth is not None else None
        return quantise(graphs, self.ranges, get_scheme(scheme), method, smoothed, skip, opset=here())

    def write(self, quantised: Quantised, tag: str = "int8") -> Path:
        """Beside the constants of the float graphs: a folder."""
        folder = self.folder / tag
        folder.mkdir(exist_ok=True)
        for file in ("backbone.bin", "prompts.bin"):
            (folder / file).write_bytes((self.folder / file).read_bytes())
        for name, model in quantised.models.items():
            (folder / f"{name}.onnx").write_bytes(model)
        for file, content in quantised.constants.items():
            (folder / file).write_bytes(content)
        return folder


def run_graph(
    path: Path, feeds: dict[str, np.ndarray], outputs: Sequence[str] = (), as_written: bool = True
) -> dict[str, np.ndarray]:
    """One image a call, joined; outputs: also values from inside of the graph."""
    model = onnx.load(str(path), load_external_data=False)
    known = {o.name for o in model.graph.output}
    for name in outputs:
        if name not in known:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    count = len(feeds["images"])
    parts = [session.run(names, {k: v[i : i + 1] for k, v in feeds.items()}) for i in range(count)]
    return {name: np.concatenate([p[j] for p in parts]) for j, name in enumerate(names)}


@dataclass(frozen=True)
class Tools:
    """What the tests of this folder share."""

    make: Callable[..., Graphs]
    "make(learner=..., profile=..., patch=..., one_pass=..., ...) -> Graphs, made once"
    run: Callable[..., dict[str, np.ndarray]] = run_graph

    @staticmethod
    def constants(path: Path) -> dict[str, np.ndarray]:
        """Every initializer of a graph."""
        model = onnx.load(str(path), load_external_data=False)
        return {t.name: read(t, path.parent) for t in model.graph.initializer}

    @staticmethod
    def nodes(path: Path) -> dict[str, onnx.NodeProto]:
        """By name."""
        return {n.name: n for n in onnx.load(str(path), load_external_data=False).graph.node}


@pytest.fixture(scope="session")
def tools(students, tmp_path_factory) -> Tools:
    """Makes graphs of tiny students and runs them."""
    from cdl_edge.export.assembly import assemble
    from cdl_edge.export.profiles import PROFILES
    from cdl_edge.export.student_graph import StudentGraph

    made: dict[str, Graphs] = {}

    def make(
        learner: str = "coda", profile: str = "ort", kd: tuple[int, int] | None = (12, 6), **options: Any
    ) -> Graphs:
        key = repr((learner, profile, kd, sorted(options.items())))
        if key not in made:
            student = students.student(learner, kd, **options)
            parts = PARTS if student.two_pass else PARTS[:1]
            graphs = {}
            for precision in PROFILES[profile].precisions:
                for part in parts:
                    builder = StudentGraph(
                        student, students.preprocessing, students.classes, 1, PROFILES[profile], precision
                    )
                    graphs[part if precision == "fp32" else f"{part}.{precision}"] = builder.build(part)
            artefact = assemble(graphs, {})
            folder = tmp_path_factory.mktemp("graphs")
            for name, model in artefact.models.items():
                (folder / f"{name}.onnx").write_bytes(model)
            for name, content in artefact.constants.items():
                (folder / name).write_bytes(content)
            pixels = students.pixels(6)
            layers = LayerTable.read(artefact.layers.to_bytes(), "layers.json")
            ranges = dict(collect(FloatGraph(folder / "student.onnx", layers.graphs["student"]), pixels).tensors)
            made[key] = Graphs(student, folder, tuple(graphs), layers, ranges, pixels)
        return made[key]

    return Tools(make)


COLOUR = np.array([1.0, 0.55, 0.15])
"of the digits: red and blue are not alike"


def write_digits(root: Path, classes: Sequence[str], change: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> str:
    """Orange digits as PNG files of some classes, 24 to learn and 8 to validate each: a data source.

    change: of uint8 (8, 8, 3), what a wrong preprocessing would do.
    """
    dataset = load_dataset("digits")
    for part, split, count in (("train", dataset.train, 24), ("val", dataset.val, 8)):
        for label, name in enumerate(dataset.classes):
            if name not in classes:
                continue
            (root / part / name).mkdir(parents=True)
            for number, index in enumerate(np.flatnonzero(split.labels == label)[:count]):
                grey = np.asarray(split.items[index]).reshape(8, 8, -1)[:, :, :1]
                image = change((grey * COLOUR).astype(np.uint8))
                Image.fromarray(image).save(root / part / name / f"{number:03d}.png")
    return f"folder:{root}"


DIGITS = tuple("0123456789")


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Callable[..., str]:
    """make(classes=all, change=nothing) -> data source."""

    def make(classes: Sequence[str] = DIGITS, change: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> str:
        return write_digits(tmp_path_factory.mktemp("digits"), classes, change)

    return make


@pytest.fixture(scope="session")
def source(digits) -> str:
    """All classes, as they were learnt."""
    return digits()


@pytest.fixture(scope="session")
def make_run(tmp_path_factory, tiny_vit, short_training, source) -> Callable[..., Path]:
    """make(learner=..., ...) -> a finished run of three tasks with tiny backbones and kept ranges, made once."""
    from cdl_edge.train.config import TrainConfig
    from cdl_edge.train.loop import train

    made: dict[str, Path] = {}

    def make(learner: str = "coda", **options: Any) -> Path:
        key = repr((learner, sorted(options.items())))
        if key not in made:
            out = tmp_path_factory.mktemp("run")
            settings = {**short_training, "distill": "kdp", "tasks": 3, "epochs": 12, "learning_rate": 0.02}
            settings |= {"student": tiny_vit("student", 32, seed=3), "range_images": 16, **options}
            train(TrainConfig(source, str(out), learner=learner, **settings), quiet=True)
            made[key] = out
        return made[key]

    return make


@pytest.fixture(scope="session")
def exported(make_run, tmp_path_factory) -> Callable[..., Path]:
    """make(learner, profile="ort", dynamic_batch=False, **options of the run) -> a bundle, made once: for reading."""
    from cdl_edge.export.export_bundle import export

    made: dict[str, Path] = {}

    def make(learner: str = "coda", profile: str = "ort", dynamic_batch: bool = False, **options: Any) -> Path:
        key = repr((learner, profile, dynamic_batch, sorted(options.items())))
        if key not in made:
            out = tmp_path_factory.mktemp("bundles") / "bundle"
            export(make_run(learner, **options), out, profile, dynamic_batch, images=64)
            made[key] = out
        return made[key]

    return make
