"""Ranges of images that are at hand, by the graph itself."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from ..errors import InputError
from ..ranges import Histogram, TaskRanges, TensorRange, merge_tensors
from .cpu_session import CpuSession
from .float_graph import FloatGraph

BEHIND_NORM = ("qkv", "fc1")


def collect(graph: FloatGraph, pixels: np.ndarray) -> TaskRanges:
    """Of the inputs of all linear layers of a graph over uint8 (N, S, S, 3), by the layers' ranges.

    Raises: InputError when a value is not finite.
    """
    model = onnx.load(str(graph.path), load_external_data=False)
    names = {layer.range: layer.input for layer in graph.whole if layer.range is not None}
    outputs = list(dict.fromkeys(names.values()))
    for name in outputs:
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = CpuSession(model.SerializeToString(), graph.path.parent)
    found: dict[str, TensorRange] = {}
    for chunk in session.chunks(pixels, outputs):
        values = dict(zip(outputs, chunk, strict=True))
        for tensor, name in names.items():
            x = values[name].reshape(-1, values[name].shape[-1])
            if not np.isfinite(x).all():
                raise InputError(
                    f"{tensor}: not finite on these images",
                    got=f"{int((~np.isfinite(x)).sum())} of {x.size} values NaN or infinite",
                    expected="finite numbers",
                    fix="export the run again, or look at the images",
                )
            channels = np.stack([x.min(0), x.max(0)]) if tensor.rpartition(".")[2] in BEHIND_NORM else None
            new = TensorRange(Histogram.of(x), channels)
            found[tensor] = merge_tensors([found[tensor], new]) if tensor in found else new
    return TaskRanges(len(pixels), found)
