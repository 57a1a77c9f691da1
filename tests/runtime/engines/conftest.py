"""Bundles with a self-test, and stand-ins for TensorRT and CUDA.

The stand-ins are for control flow only: which call follows which, what is written when, what is said. They show nothing
about TensorRT. Numbers come from ONNX Runtime on host memory, so that a wrong buffer gives a wrong answer.
"""

from __future__ import annotations

import ctypes
import enum
import importlib.util
import io
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from cdl_edge.artefacts.bundle import Bundle, write_bundle
from cdl_edge.runtime.backends import tensorrt as backend
from cdl_edge.runtime.engines import memory, product
from cdl_edge.runtime.engines.product import Gpu

GPU = Gpu("Orin", "8.7", "12.6", 8 << 30)


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """The students of tests/export: test files cannot import it by name (pytest's importlib mode)."""
    path = Path(__file__).parents[2] / "export" / "conftest.py"
    spec = importlib.util.spec_from_file_location("engines_lab", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.Lab(tmp_path_factory.mktemp("students"), iter(range(10_000)))


# -- bundles ----------------------------------------------------------------------------------------------------------


def session(folder: Path, graph: str = "student.onnx") -> onnxruntime.InferenceSession:
    """A graph on the CPU."""
    return onnxruntime.InferenceSession(str(folder / graph), providers=["CPUExecutionProvider"])


def selftest(folder: Path, side: int, count: int = 5) -> bytes:
    """selftest.npz of a graph in a folder: real answers of ONNX Runtime."""
    images = np.random.default_rng(3).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    images[np.arange(count), :, :, np.arange(count) % 3] |= 128  # one clear colour each
    own = session(folder)
    fixed = own.get_inputs()[0].shape[0]
    step = fixed if isinstance(fixed, int) else count
    if count % step:
        raise ValueError("choose a batch that divides the images")
    parts = [own.run(["logits"], {"images": images[i : i + step]})[0] for i in range(0, count, step)]
    stream = io.BytesIO()
    np.savez(stream, images=images, logits=np.concatenate(parts))
    return stream.getvalue()


@pytest.fixture
def make(tiny, tmp_path) -> Callable[..., Bundle]:
    """Returns make(name="bundle", head=..., batch=1 | None, precisions=(), **manifest fields) -> Bundle."""

    def bundle(
        name: str = "bundle",
        head: np.ndarray | None = None,
        batch: int | None = 1,
        precisions: tuple[str, ...] = (),
        metadata: str = "",
        **fields: Any,
    ) -> Bundle:
        parts = tmp_path / f".{name}"
        parts.mkdir(exist_ok=True)
        model = tiny.make_graph(parts, batch=batch or "batch", head=tiny.HEAD if head is None else head)
        proto = onnx.load_from_string(model)
        onnx.helper.set_model_props(proto, {"note": metadata})
        (parts / "student.onnx").write_bytes(proto.SerializeToString())
        graphs = {"student": "student.onnx", **{f"student.{p}": f"student.{p}.onnx" for p in precisions}}
        files: dict[str, Any] = {name: parts / name for name in ("backbone.bin", "prompts.bin")}
        files |= dict.fromkeys(graphs.values(), parts / "student.onnx")
        files["selftest.npz"] = selftest(parts, tiny.SIDE)
        given = tiny.make_manifest(graphs=graphs, selftest="selftest.npz", **fields)
        given["input"] |= {"shape": [batch or 1, *given["input"]["shape"][1:]], "dynamic_batch": batch is None}
        return write_bundle(tmp_path / name, given, files)

    return bundle


@pytest.fixture
def make_student(lab, tiny, tmp_path) -> Callable[..., Bundle]:
    """Returns make(student, name="student", profile="trt10", precisions=("fp32",)): a bundle as export writes it."""

    def bundle(
        student: Any, name: str = "student", profile: str = "trt10", precisions: tuple[str, ...] = ("fp32",)
    ) -> Bundle:
        from cdl_edge.export.assembly import assemble
        from cdl_edge.export.profiles import PROFILES
        from cdl_edge.export.student_graph import StudentGraph

        parts = {}
        for precision in precisions:
            key = "student" if precision == "fp32" else f"student.{precision}"
            builder = StudentGraph(student, lab.preprocessing, lab.classes, 1, PROFILES[profile], precision)
            parts[key] = builder.build()
        artefact = assemble(parts, {})
        outputs, graphs = parts["student"].outputs, {key: f"{key}.onnx" for key in parts}
        files: dict[str, Any] = {graphs[key]: model for key, model in artefact.models.items()} | artefact.constants
        images = lab.pixels(6)
        stream = io.BytesIO()
        np.savez(stream, images=images, logits=lab.truth(student, images)["logits"])
        files["selftest.npz"] = stream.getvalue()
        shapes = {key: [1, *shape] for key, shape in outputs.items()}
        blocks, entries = (outputs.get("prompt_weights") or [0, 0])[:2]
        given = tiny.make_manifest(
            classes=[f"class {i}" for i in range(lab.classes)],
            tasks=[list(range(lab.classes))],
            outputs=shapes,
            selection={"kind": "top-k", "k": 1, "blocks": list(range(blocks))} if entries else {"kind": "none"},
            graphs=graphs,
            selftest="selftest.npz",
        )
        given["input"] |= {"shape": [1, lab.side, lab.side, 3], "preprocessing": lab.preprocessing.to_json()}
        return write_bundle(tmp_path / name, given, files)

    return bundle


# -- CUDA -------------------------------------------------------------------------------------------------------------


class FakeRuntime:
    """cuda.bindings.runtime on host memory."""

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.calls: list[str] = []
        self.fail: dict[str, int] = {}
        "function -> error code"
        self.cudaMemcpyKind = types.SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

    def answer(self, name: str, *values: Any) -> tuple[Any, ...]:
        self.calls.append(name)
        code = self.fail.get(name, 0)
        kind = enum.IntEnum("cudaError_t", {"cudaSuccess": 0, "cudaErrorMemoryAllocation": 2, "cudaErrorUnknown": 999})
        return (kind(code), *values)

    def allocate(self, name: str, nbytes: int) -> tuple[Any, ...]:
        block = (ctypes.c_uint8 * (0 if name in self.fail else nbytes))()
        self.memory[ctypes.addressof(block)] = block
        return self.answer(name, ctypes.addressof(block))

    def free(self, name: str, address: int) -> tuple[Any, ...]:
        self.memory.pop(address)
        return self.answer(name)

    def __getattr__(self, name: str) -> Any:
        if name in ("cudaMalloc", "cudaMallocHost"):
            return lambda nbytes: self.allocate(name, nbytes)
        if name in ("cudaFree", "cudaFreeHost"):
            return lambda address: self.free(name, address)
        if name == "cudaMemcpyAsync":
            return lambda target, source, nbytes, kind, stream: (
                ctypes.memmove(target, source, nbytes),
                self.answer(name),
            )[1]
        if name in ("cudaStreamCreate", "cudaEventCreate"):
            return lambda: self.answer(name, 77)
        if name == "cudaEventElapsedTime":
            return lambda begin, end: self.answer(name, 0.25)
        if name.startswith("cuda"):
            return lambda *arguments: self.answer(name)
        raise AttributeError(name)


class FakeDriver:
    """pycuda.driver on host memory; its context counts how often it was pushed."""

    class MemoryError(Exception):
        pass

    def __init__(self) -> None:
        self.depth, self.balance, self.freed_outside, self.starts = 0, 0, 0, 0
        self.full = False
        driver = self

        class Block:
            def __init__(self, nbytes: int) -> None:
                self.bytes = (ctypes.c_uint8 * nbytes)()
                driver.balance += 1

            def __int__(self) -> int:
                return ctypes.addressof(self.bytes)

            def __del__(self) -> None:
                driver.balance -= 1
                driver.freed_outside += driver.depth == 0

        class Context:
            @staticmethod
            def push() -> None:
                driver.depth += 1

            @staticmethod
            def pop() -> None:
                driver.depth -= 1

        class Device:
            def __init__(self, number: int) -> None:
                assert number == 0

            def retain_primary_context(self) -> type[Context]:
                return Context

        class Stream:
            handle = 55

            def synchronize(self) -> None:
                assert driver.depth

        class Event:
            def record(self, stream: Stream) -> None:
                assert driver.depth

            def time_till(self, other: Event) -> float:
                return 0.5

        self.Block, self.Context, self.Device, self.Stream, self.Event = Block, Context, Device, Stream, Event

    def init(self) -> None:
        self.starts += 1

    def mem_alloc(self, nbytes: int) -> Any:
        assert self.depth
        if self.full:
            raise self.MemoryError("cuMemAlloc failed: out of memory")
        return self.Block(nbytes)

    def pagelocked_empty(self, count: int, dtype: Any) -> np.ndarray:
        assert self.depth
        if self.full:
            raise self.MemoryError("cuMemHostAlloc failed: out of memory")
        return np.empty(count, dtype)

    def memcpy_htod_async(self, address: int, source: np.ndarray, stream: Any) -> None:
        assert self.depth and source.flags.c_contiguous
        ctypes.memmove(address, source.ctypes.data, source.nbytes)

    def memcpy_dtoh_async(self, target: np.ndarray, address: int, stream: Any) -> None:
        assert self.depth and target.flags.c_contiguous
        ctypes.memmove(target.ctypes.data, address, target.nbytes)


# -- TensorRT ---------------------------------------------------------------------------------------------------------


class FakeTensorRT(ModuleType):
    """Builds "plans" that are ONNX models with their constants inside, and runs them in ONNX Runtime."""

    def __init__(self, version: str = "10.3.0") -> None:
        super().__init__("tensorrt")
        self.__version__ = version
        self.calls: list[str] = []
        self.built: list[dict[str, Any]] = []
        "what each build was told"
        self.error: Callable[[dict[str, Any]], float] = lambda told: 0.0
        "what is added to the first logit of an engine built so"
        self.layers: list[dict[str, Any]] | None = None
        "the inspector's; None: what fits the graph's name"
        self.deaf: set[str] = set()
        "constants that the network does not know"
        self.refuses_refit = False
        self.recording: list[Callable[[], None]] | None = None
        "while a CUDA graph is recorded"
        trt = self

        class ILogger:
            class Severity(enum.IntEnum):
                INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

        class DataType:
            def __init__(self, name: str, numpy: Any) -> None:
                self.name, self.numpy, self.itemsize = name, numpy, np.dtype(numpy).itemsize

        class Network:
            num_layers = 0

            def __init__(self, flags: int) -> None:
                self.model = onnx.ModelProto()
                self.refittable: list[str] = []

            @property
            def num_inputs(self) -> int:
                return len(self.model.graph.input)

            def get_input(self, index: int) -> Any:
                value = self.model.graph.input[index]
                dims = [d.dim_value or -1 for d in value.type.tensor_type.shape.dim]
                return types.SimpleNamespace(name=value.name, shape=tuple(dims))

            def mark_weights_refittable(self, name: str) -> bool:
                known = name in {i.name for i in self.model.graph.initializer} - trt.deaf
                self.refittable += [name] * known
                return known

        class Parser:
            num_errors = 0

            def __init__(self, network: Network, logger: Any) -> None:
                self.network = network

            def parse_from_file(self, path: str) -> bool:
                self.network.model = onnx.load(path)
                self.network.path = path
                return True

        class Config:
            def __init__(self) -> None:
                self.flags, self.limits, self.profiles = {"TF32"}, {}, []

            def set_flag(self, flag: str) -> None:
                self.flags.add(flag)

            def clear_flag(self, flag: str) -> None:
                self.flags.discard(flag)

            def set_memory_pool_limit(self, pool: str, nbytes: int) -> None:
                self.limits[pool] = nbytes

            def create_timing_cache(self, content: bytes) -> Any:
                return None if content == b"broken" else types.SimpleNamespace(content=content)

            def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
                assert ignore_mismatch is False
                self.cache = cache
                return not cache.content.startswith(b"other")

            def get_timing_cache(self) -> Any:
                return types.SimpleNamespace(serialize=lambda: self.cache.content + b"+")

            def add_optimization_profile(self, profile: Any) -> int:
                self.profiles.append(profile.shapes)
                return len(self.profiles) - 1

        class Profile:
            def __init__(self) -> None:
                self.shapes: dict[str, Any] = {}

            def set_shape(self, name: str, *sizes: Any) -> None:
                self.shapes[name] = sizes

        class Builder:
            def __init__(self, logger: Any) -> None:
                trt.calls.append("Builder")

            create_network = staticmethod(Network)
            create_builder_config = staticmethod(Config)
            create_optimization_profile = staticmethod(Profile)

            def build_serialized_network(self, network: Network, config: Config) -> bytes:
                told = {
                    "path": network.path,
                    "flags": sorted(config.flags),
                    "limits": config.limits,
                    "refittable": network.refittable,
                    "profiles": config.profiles,
                }
                trt.built.append(told)
                return json.dumps(told).encode() + b"\n" + network.model.SerializeToString()

        class Runtime:
            def __init__(self, logger: Any) -> None:
                trt.calls.append("Runtime")

            def deserialize_cuda_engine(self, plan: bytes) -> Any:
                return FakeEngine(trt, plan) if b"\n" in plan else None

        class Refitter:
            def __init__(self, engine: FakeEngine, logger: Any) -> None:
                self.engine, self.values = engine, {}

            def get_all_weights(self) -> list[str]:
                return list(self.engine.told["refittable"])

            def set_named_weights(self, name: str, weights: np.ndarray) -> bool:
                self.values[name] = weights
                return True

            def get_missing_weights(self) -> list[str]:
                return []

            def refit_cuda_engine(self) -> bool:
                if trt.refuses_refit:
                    return False
                for tensor in self.engine.model.graph.initializer:
                    if tensor.name in self.values:
                        tensor.CopyFrom(onnx.numpy_helper.from_array(self.values[tensor.name], tensor.name))
                return True

        self.ILogger, self.DataType, self.Builder, self.OnnxParser = ILogger, DataType, Builder, Parser
        self.Runtime, self.Refitter, self.Weights = Runtime, Refitter, np.array
        self.nptype = lambda kind: kind.numpy
        for group, names in (
            ("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 0}),
            ("MemoryPoolType", {"WORKSPACE": "WORKSPACE"}),
            ("ProfilingVerbosity", {"DETAILED": "DETAILED"}),
            ("BuilderFlag", {"TF32": "TF32", "REFIT_INDIVIDUAL": "REFIT_INDIVIDUAL"}),
            ("LayerType", {"SOFTMAX": "SOFTMAX"}),
            ("TensorIOMode", {"INPUT": "INPUT", "OUTPUT": "OUTPUT"}),
            ("LayerInformationFormat", {"JSON": "JSON"}),
        ):
            setattr(self, group, types.SimpleNamespace(**names))


class FakeEngine:
    """A deserialised plan."""

    device_memory_size_v2 = 1000

    def __init__(self, trt: FakeTensorRT, plan: bytes) -> None:
        self.trt = trt
        head, _, model = plan.partition(b"\n")
        self.told = json.loads(head)
        self.model = onnx.load_from_string(model)
        self.values = {v.name: v for v in [*self.model.graph.input, *self.model.graph.output]}
        self.num_io_tensors = len(self.values)

    def serialize(self) -> bytes:
        return json.dumps(self.told).encode() + b"\n" + self.model.SerializeToString()

    def get_tensor_name(self, index: int) -> str:
        return list(self.values)[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(d.dim_value or -1 for d in self.values[name].type.tensor_type.shape.dim)

    def get_tensor_dtype(self, name: str) -> Any:
        kind = onnx.helper.tensor_dtype_to_np_dtype(self.values[name].type.tensor_type.elem_type)
        return self.trt.DataType(str(kind), kind)

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if name in {i.name for i in self.model.graph.input} else "OUTPUT"

    def get_tensor_profile_shape(self, name: str, index: int) -> Any:
        return self.told["profiles"][index][name]

    def create_engine_inspector(self) -> Any:
        own = next((p for p in ("fp16", "bf16", "int8") if p in Path(self.told["path"]).name), "fp32")
        kind = {"fp16": "Half", "bf16": "BFloat16", "int8": "Int8", "fp32": "Float"}[own]
        layers = self.trt.layers
        if layers is None:
            layers = [{"Name": "gemm", "LayerType": "gemm", "Outputs": [{"Name": "x", "Format/Datatype": kind}]}]
        return types.SimpleNamespace(get_engine_information=lambda form: json.dumps({"Layers": layers}))

    def create_execution_context(self) -> FakeContext:
        return FakeContext(self)


class FakeContext:
    """Runs the model on the addresses it was given."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.addresses, self.shapes = engine, {}, {}
        self.session = onnxruntime.InferenceSession(
            engine.model.SerializeToString(), providers=["CPUExecutionProvider"]
        )

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.engine.trt.recording is not None:
            self.engine.trt.recording.append(self.compute)
        else:
            self.engine.trt.calls.append("execute")
            self.compute()
        return True

    def compute(self) -> None:
        feeds = {}
        for value in self.session.get_inputs():
            dtype = np.uint8 if "uint8" in value.type else np.float32
            feeds[value.name] = self.view(value.name, self.shapes.get(value.name, value.shape), dtype).copy()
        names = [o.name for o in self.session.get_outputs()]
        for name, found in zip(names, self.session.run(names, feeds), strict=True):
            if name == "logits":
                found[:, 0] += self.engine.trt.error(self.engine.told)
            self.view(name, found.shape, np.float32)[...] = found

    def view(self, name: str, shape: Any, dtype: Any) -> np.ndarray:
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        block = (ctypes.c_uint8 * count).from_address(self.addresses[name])
        return np.ctypeslib.as_array(block).view(dtype).reshape(shape)


class FakeLibcuda:
    """libcuda.so.1, as far as CUDA graphs and devices go."""

    def __init__(self, trt: FakeTensorRT | None = None, fail: str | None = None) -> None:
        self.trt, self.fail, self.calls, self.work = trt, fail, [], []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == self.fail:
                return 900
            if self.trt is not None and name == "cuStreamBeginCapture_v2":
                self.trt.recording = []
            if self.trt is not None and name == "cuStreamEndCapture":
                self.work, self.trt.recording = self.trt.recording, None
                arguments[1]._obj.value = 5
            if name == "cuGraphInstantiateWithFlags":
                arguments[0]._obj.value = 6
            if name == "cuGraphLaunch":
                for step in self.work:
                    step()
            return 0

        return call


@pytest.fixture
def fake(monkeypatch) -> FakeTensorRT:
    """This process has a GPU, TensorRT and cuda-python, all of them made of paper."""
    trt = FakeTensorRT()
    product._LOGGERS.pop("tensorrt", None)
    monkeypatch.setattr(backend, "find_gpu", lambda: GPU)
    monkeypatch.setattr(backend, "find_tensorrt", lambda: trt)
    trt.cuda = FakeRuntime()
    monkeypatch.setattr(backend, "open_memory", lambda: memory.CudaPython(trt.cuda))
    yield trt
    product._LOGGERS.pop("tensorrt", None)


@pytest.fixture
def kit() -> ModuleType:
    """This module."""
    return sys.modules[__name__]
