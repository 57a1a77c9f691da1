"""Build a TensorRT plan from an ONNX graph: explicitly typed, bounded, refittable where learning changes it.

The `tensorrt` module is an argument: CPU tests pass tensorrt_rtx, whose parser and builder need no GPU.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ...artefacts.external import external_files
from ...errors import InputError
from ...files import atomic_file
from .product import logger

SCORES = "unfused."
"prefix of the extra outputs that `unfuse_attention` adds"


@dataclass(frozen=True)
class Options:
    """What a builder may be told; kept in the sidecar."""

    workspace_mib: int = 1024
    "most scratch memory of one layer; a bound, since a Jetson's memory is shared with everything else"
    level: int = 3
    "TensorRT's builder optimisation level, 0 to 5; 3 is its default"
    max_batch: int = 8
    "largest batch of a graph whose batch axis is free"
    unfuse_attention: bool = False
    "keep softmax apart from its two products: slower, for versions whose fused attention is wrong"
    refit: bool = True
    "new prompts can be put into the engine without building it again"

    def __post_init__(self) -> None:
        for name, low, high in (("workspace_mib", 1, 1 << 20), ("level", 0, 5), ("max_batch", 1, 4096)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise InputError(f"engine option {name}", got=repr(value), expected=f"{low} to {high}")


@dataclass(frozen=True)
class Definition:
    """A graph as TensorRT has understood it, ready to be built."""

    builder: Any
    network: Any
    config: Any
    refittable: tuple[str, ...]
    "constants that can be exchanged later"
    parser: Any
    "kept: weights that the network points to are its own"


@dataclass(frozen=True)
class EnginePlan:
    """A serialised engine and what is known of it."""

    data: bytes
    refittable: tuple[str, ...]
    "constants that can be exchanged in it"


def build(
    trt: ModuleType,
    onnx: Path,
    options: Options = Options(),
    learnt: Sequence[str] = (),
    timing_cache: Path | None = None,
) -> EnginePlan:
    """Build a plan from a graph and the files of constants beside it.

    Args:
        trt: the module `tensorrt` (the driver has been asked), or `tensorrt_rtx` in tests.
        learnt: names of the constants that learning changes; only these are refittable, all else stays optimised.
        timing_cache: measurements of earlier builds by the same version on the same GPU; read and written.

    Raises: InputError, as `define`, and when the builder fails (no kernel, no memory).
    """
    known = define(trt, onnx, options, learnt)
    cache = _read_cache(known.config, timing_cache)
    plan = known.builder.build_serialized_network(known.network, known.config)
    if plan is None:
        raise _failure(onnx, logger(trt).take(), options)
    if cache is not None and timing_cache is not None:
        _write_cache(known.config, timing_cache)
    return EnginePlan(bytes(plan), known.refittable)


def define(trt: ModuleType, onnx: Path, options: Options, learnt: Sequence[str] = ()) -> Definition:
    """Read a graph and say how it is to be built.

    Raises: InputError for a graph that the parser refuses (with each of its errors), for a free axis that is not the
        batch, and when there is no attention to unfuse.
    """
    messages = logger(trt)
    messages.take()
    builder = trt.Builder(messages)
    # Types come from the graph: TensorRT 11 knows nothing else, 10 has to be told.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, messages)
    _parse(trt, parser, onnx)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    config.builder_optimization_level = options.level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector tells types with this only
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32; lower precision is asked for in the graph
    _batches(builder, config, network, onnx, options)
    for attention in _attentions(trt, network):
        # Without it a shape that has no fused kernel is an error; a fused kernel is still preferred.
        attention.decomposable = True
    if options.unfuse_attention:
        _unfuse(trt, network, onnx)
    refittable = _refittable(trt, config, network, learnt) if options.refit else ()
    return Definition(builder, network, config, refittable, parser)


def _parse(trt: ModuleType, parser: Any, onnx: Path) -> None:
    if not onnx.is_file():
        raise InputError(f"{onnx}: missing", expected="an ONNX graph", fix="export the bundle again")
    for name in sorted(external_files(onnx)):
        if not (onnx.parent / name).is_file():
            raise InputError(f"{onnx.parent / name}: missing", expected=f"constants of {onnx.name}", fix="copy it too")
    if parser.parse_from_file(str(onnx)):
        return
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = f"node {error.node_name()} ({error.node_operator()}): " if error.node_name() else ""
        found.append(where + " ".join(str(error.desc()).split()))
    fix = "cdl-edge export RUN --out BUNDLE --profile trt10"
    if "zero point" in " ".join(found):
        fix = "use the graph int8-trt: TensorRT takes symmetric INT8 only"
    said = "\n            ".join(found) or "\n            ".join(logger(trt).take()) or "no reason given"
    raise InputError(
        f"{onnx}: {trt.__name__} {trt.__version__} cannot read the graph",
        got=said,
        expected="a graph of the profile trt10 (TensorRT 10.3 or newer) or trt11 (10.14 or newer)",
        fix=fix,
    )


def _batches(builder: Any, config: Any, network: Any, onnx: Path, options: Options) -> None:
    """One optimisation profile for all inputs when the batch is free: batches of 1 are what a device runs."""
    free = []
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if any(size < 0 for size in shape[1:]):
            raise InputError(
                f"{onnx}: input {tensor.name!r} has free axes besides the batch",
                got=shape,
                expected="fixed sizes",
                fix="export the bundle again",
            )
        if shape and shape[0] < 0:
            free.append((tensor.name, shape[1:]))
    if not free:
        return
    profile = builder.create_optimization_profile()
    for name, rest in free:
        profile.set_shape(name, (1, *rest), (1, *rest), (options.max_batch, *rest))
    config.add_optimization_profile(profile)


def _layers(network: Any) -> Iterator[Any]:
    return (network.get_layer(index) for index in range(network.num_layers))


def _attentions(trt: ModuleType, network: Any) -> Iterator[Any]:
    """The attentions that came from the operator `Attention`; TensorRT has it since 10.14."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for layer in _layers(network):
        if kind is not None and layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer  # get_layer gives the base class; this is the documented cast
            yield layer.attention


def _unfuse(trt: ModuleType, network: Any, onnx: Path) -> None:
    """Make each softmax an output: what has to be written to memory cannot disappear in a fused kernel.

    Seen with tensorrt_rtx 1.7: `_gemm_mha_v2` leaves the plan. `mark_debug` and an Identity do not achieve it.
    """
    softmax = [layer for layer in _layers(network) if layer.type == trt.LayerType.SOFTMAX]
    if not softmax or any(_attentions(trt, network)):
        raise InputError(
            f"{onnx}: its attention cannot be unfused",
            got="the operator Attention" if any(_attentions(trt, network)) else "no softmax",
            expected="MatMul, Softmax, MatMul",
            fix="cdl-edge export RUN --out BUNDLE --profile trt10, then: cdl-edge build BUNDLE --unfuse-attention",
        )
    for number, layer in enumerate(softmax):
        tensor = layer.get_output(0)
        tensor.name = f"{SCORES}{number}"
        network.mark_output(tensor)


def _refittable(trt: ModuleType, config: Any, network: Any, learnt: Sequence[str]) -> tuple[str, ...]:
    """Mark the learnt constants; names that the network does not have (unused ones) are left out."""
    marked = tuple(name for name in learnt if network.mark_weights_refittable(name))
    if marked:
        config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    return marked


def _read_cache(config: Any, path: Path | None) -> Any:
    """The cache in use, None where the product has none (tensorrt_rtx). One that does not fit is started anew."""
    if path is None:
        return None
    kept = path.read_bytes() if path.is_file() else b""
    for content in dict.fromkeys((kept, b"")):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
        if content:
            print(f"{path}: this timing cache does not fit and is started anew", file=sys.stderr)
    return None


def _write_cache(config: Any, path: Path) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(bytes(config.get_timing_cache().serialize()))


_CAUSES = (
    (
        r"out ?of ?memory|std::bad_alloc|cudaErrorMemoryAllocation|insufficient memory",
        "the device ran out of memory while building",
        "close other programs, add swap, and lower --workspace-mib (now {mib})",
    ),
    (
        r"Could not find any implementation for node|No tactic|workspace",
        "TensorRT found no kernel for a layer; most often it was short of memory to try them",
        "free memory on the device and try again, or raise --workspace-mib (now {mib})",
    ),
    (
        r"not supported by a dedicated kernel|decompose_composite_ops|_M_range_check",
        "TensorRT cannot compile a fused part of the graph",
        "cdl-edge export RUN --out BUNDLE --profile trt10, whose attention is written out",
    ),
    (
        r"[Cc]ompute capability|SM version|is not supported by|unsupported SM",
        "this TensorRT does not know this GPU",
        "install the TensorRT that came with the GPU's JetPack or driver",
    ),
    (
        r"CUDA_SUCCESS|Cuda Runtime|cudaError|CUDA initialization",
        "the GPU or its driver failed while building",
        "look at nvidia-smi and cdl-edge doctor, then try again",
    ),
)
"what the builder says, what it means, what to do; the first that fits is reported"


def _failure(onnx: Path, lines: list[str], options: Options) -> InputError:
    text = "\n".join(lines)
    reason, fix = "TensorRT could not build an engine", "read the messages above; cdl-edge doctor shows versions"
    for pattern, meaning, remedy in _CAUSES:
        if re.search(pattern, text, re.IGNORECASE):
            reason, fix = meaning, remedy.format(mib=options.workspace_mib)
            break
    last = "\n            ".join(line[:400] for line in lines[-4:]) or "no message"
    return InputError(f"{onnx}: {reason}", got=last, expected="a plan", fix=fix)
