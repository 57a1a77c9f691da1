"""What every benchmark of this folder shares: rounds in random order, intervals of ratios, the machine and its ceiling.

A round times every call in an order drawn anew (seeded). The reference of a comparison is timed as often in it as all
others together, so that it meets the same neighbours and the same moments as they do. A ratio is taken within a round
(a slow round is slow for both); its interval comes from drawing whole rounds again (bootstrap, 95 %).

The ceiling is the fastest matrix product by precision and the fastest copy of memory that this machine shows in the
same run: figures of two machines, or of one that is busy, can then be told apart.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Hashable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple, TypeVar

import numpy as np

from cdl_edge.machine import cpu_flags, cpu_model

Key = TypeVar("Key", bound=Hashable)
Clock = Callable[[], float]
"seconds"

DRAWS = 2000
"resamples behind an interval"
WARM_UP = 3
"rounds that are not counted"
SIZE = {"cpu": 1536, "cuda": 8192}
"rows and columns of the ceiling's matrices: large enough that starting them costs nothing"
COPIED_BYTES = 256 << 20
"of one copy: larger than any cache"
LEAST_CALLS, LEAST_SECONDS = 2, 0.5
"of each product and copy"


class Ratio(NamedTuple):
    """How many times as long one call takes as another."""

    median: float
    "of the ratios within a round"
    low: float
    high: float
    "ends of its 95 % interval"

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} .. {self.high:.3f})"


def race(
    calls: Mapping[Key, Callable[[], Any]],
    rounds: int,
    reference: Key | None = None,
    seed: int = 0,
    clock: Clock = time.perf_counter,
    warm_up: int = WARM_UP,
) -> dict[Key, np.ndarray]:
    """Milliseconds of each call, (rounds, times in a round): 1, and for the reference as many as all others together.

    reference: a key of `calls`; None: there is none, every call is timed once a round. seed: of the orders.

    Raises: ValueError for a reference that is no call.
    """
    keys = list(calls)
    if reference is not None and reference not in calls:
        raise ValueError(f"the reference {reference!r} is not among {keys}")
    slots = [at for at, key in enumerate(keys) for _ in range(max(1, len(keys) - 1) if key == reference else 1)]
    times: dict[Key, list[list[float]]] = {key: [] for key in keys}
    rng = np.random.default_rng(seed)
    for turn in range(warm_up + rounds):
        spent: list[list[float]] = [[] for _ in keys]
        for at in rng.permutation(slots):
            begin = clock()
            calls[keys[at]]()
            spent[at].append((clock() - begin) * 1e3)
        if turn >= warm_up:
            for key, values in zip(keys, spent, strict=True):
                times[key].append(values)
    return {key: np.asarray(values) for key, values in times.items()}


def ratio(new: np.ndarray, old: np.ndarray, seed: int = 0) -> Ratio:
    """Of two rows of `race` over the same rounds, (R, n) and (R, m); a round counts by its median."""
    by_round = np.median(new, axis=1) / np.median(old, axis=1)
    drawn = np.random.default_rng(seed).integers(0, len(by_round), (DRAWS, len(by_round)))
    low, high = np.percentile(np.median(by_round[drawn], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(by_round)), float(low), float(high))


def version_of(*packages: str) -> str | None:
    """Of the first of these distributions that is installed."""
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def machine() -> dict[str, Any]:
    """What a figure was measured on, as JSON values."""
    return {
        "cpu": cpu_model(),
        "cpu_flags": sorted(cpu_flags()),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


# -- the ceiling ------------------------------------------------------------------------------------------------------


def ceiling(
    threads: int = 1,
    device: str = "cpu",
    size: int | None = None,
    copied_bytes: int = COPIED_BYTES,
    seconds: float = LEAST_SECONDS,
) -> dict[str, Any]:
    """The fastest matrix product by precision and way of computing it, and the fastest copy of memory.

    Args:
        threads: of the CPU. device: cpu | cuda. size: of the matrices, see SIZE.
        seconds: for how long each product and copy is tried, at least.

    Returns: {"threads", "device", "size", "gflop_per_second": {precision: {way: rate or None}}, "copy_gb_per_second"}.
        A multiplication and an addition are two operations, also in int8. A copy reads and writes each byte. A way
        that this machine does not have is None.
    """
    import torch

    size = size or SIZE[device]
    clock = _clock(device, threads)
    rates: dict[str, dict[str, float | None]] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for precision, ways in _products(torch, size, device, threads).items():
            rates[precision] = {}
            for way, make in ways.items():
                try:
                    rates[precision][way] = 2 * size**3 / _fastest(make(), clock, seconds) / 1e9
                except (ImportError, RuntimeError, NotImplementedError, AttributeError):
                    rates[precision][way] = None
        source = torch.ones(copied_bytes // 4, device=device)
        target = torch.empty_like(source)
        copy = 2 * source.numel() * 4 / _fastest(lambda: target.copy_(source), clock, seconds) / 1e9
    finally:
        torch.set_num_threads(before)
    return {"threads": threads, "device": device, "size": size, "gflop_per_second": rates, "copy_gb_per_second": copy}


def peak(found: Mapping[str, Any], precision: str) -> float | None:
    """GFLOP/s of the best way of a `ceiling` in a precision; None where it has none."""
    rates = [rate for rate in found["gflop_per_second"].get(precision, {}).values() if rate]
    return max(rates, default=None)


def show(found: Mapping[str, Any]) -> str:
    """A `ceiling` in one line."""
    parts = [
        f"{precision} {best:.0f} GFLOP/s ({max((w for w in ways if ways[w]), key=lambda w: ways[w])})"
        for precision, ways in found["gflop_per_second"].items()
        if (best := peak(found, precision))
    ]
    return (
        f"ceiling of this {found['device']}, {found['threads']} thread(s): matrix product {', '.join(parts)}; "
        f"copy {found['copy_gb_per_second']:.1f} GB/s"
    )


def clock_of(threads: int) -> Clock:
    """CPU time of the process for one thread: being preempted by others does not count. Wall time for more."""
    return time.process_time if threads == 1 else time.perf_counter


def _clock(device: str, threads: int) -> Clock:
    if device == "cpu":
        return clock_of(threads)
    import torch

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now


def _fastest(call: Callable[[], Any], clock: Clock, seconds: float) -> float:
    """Seconds of the fastest of some calls; the first only warms up."""
    call()
    spent: list[float] = []
    while len(spent) < LEAST_CALLS or sum(spent) < seconds:
        begin = clock()
        call()
        # A clock too coarse for one call must not divide by nothing.
        spent.append(max(clock() - begin, 1e-9))
    return min(spent)


def _products(torch: Any, size: int, device: str, threads: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """precision -> way -> what makes the call. Engines differ in their kernels: the best is the machine's."""

    def by_torch(dtype: Any) -> Callable[[], Any]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        return lambda: torch.nn.functional.linear(a, b)

    def by_onednn() -> Callable[[], Any]:
        a, b = torch.randn(size, size), torch.randn(size, size)
        return lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")

    def int8() -> Callable[[], Any]:
        a, b = (torch.randint(-127, 127, (size, size), dtype=torch.int8, device=device) for _ in range(2))
        return lambda: torch._int_mm(a, b.t())

    ways: dict[str, dict[str, Callable[[], Any]]] = {"fp32": {"torch": lambda: by_torch(torch.float32)}}
    ways["bf16"] = {"torch": lambda: by_torch(torch.bfloat16)}
    if device == "cuda":
        ways["fp16"] = {"torch": lambda: by_torch(torch.float16)}
    else:
        ways["fp32"] |= {"oneDNN": by_onednn, "ONNX Runtime": lambda: _by_ort("fp32", size, threads)}
    ways["int8"] = {"torch": int8}
    if device == "cpu":
        ways["int8"]["ONNX Runtime"] = lambda: _by_ort("int8", size, threads)
    return ways


def _by_ort(precision: str, size: int, threads: int) -> Callable[[], Any]:
    """x W of ONNX Runtime: MatMul, or MatMulInteger of uint8 by int8, whose kernels its quantised graphs use."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    if precision == "fp32":
        x, w = rng.standard_normal((2, size, size), np.float32)
        operator, types = "MatMul", (TensorProto.FLOAT, TensorProto.FLOAT)
    else:
        x, w = rng.integers(0, 255, (size, size), np.uint8), rng.integers(-127, 127, (size, size), np.int8)
        operator, types = "MatMulInteger", (TensorProto.UINT8, TensorProto.INT32)
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", types[0], (size, size))],
        [helper.make_tensor_value_info("y", types[1], (size, size))],
        [numpy_helper.from_array(w, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x})
