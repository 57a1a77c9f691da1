"""A graph in memory on the CPU, with its constants in a folder: what is tried before it becomes a bundle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from ..cores import default_threads

VERSION = str(onnxruntime.__version__)
CHUNK = 16
"images between two looks at their outputs: bounds the memory of collected activations"


class CpuSession:
    """ONNX Runtime on the CPU.

    Symmetric graphs are run as written, without the runtime's own changes: on x86 those are slow or refused,
    and the numbers are what matters here.
    """

    def __init__(self, model: bytes, folder: Path, as_written: bool = False, threads: int | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads or default_threads(), 1
        options.log_severity_level = 3
        if as_written:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        self._session: Any = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.input = self._session.get_inputs()[0].name
        self.batch = self._session.get_inputs()[0].shape[0]

    def chunks(self, pixels: np.ndarray, outputs: Sequence[str]) -> Iterator[list[np.ndarray]]:
        """The named outputs for pixels uint8 (N, S, S, 3), some images at a time."""
        step = 1 if self.batch == 1 else CHUNK
        for start in range(0, len(pixels), step):
            yield self._session.run(list(outputs), {self.input: pixels[start : start + step]})

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """Logits float32 (N, C) of pixels uint8 (N, S, S, 3)."""
        return np.concatenate([chunk[0] for chunk in self.chunks(pixels, ["logits"])])
