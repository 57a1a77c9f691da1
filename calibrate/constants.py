"""The constants of a bundle's graphs, read where they lie and packed where they go."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..packing import pack


def place_of(tensor: onnx.TensorProto) -> str:
    """Name of the file that a tensor lies in; empty: inside of the graph."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return ""
    return next(str(entry.value) for entry in tensor.external_data if entry.key == "location")


def read(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    """The values of an initializer, which may lie in a file of `folder`."""
    if not place_of(tensor):
        return np.asarray(numpy_helper.to_array(tensor))
    entries = {entry.key: entry.value for entry in tensor.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    offset, length = int(entries["offset"]), int(entries["length"])
    flat = np.fromfile(folder / entries["location"], dtype, length // np.dtype(dtype).itemsize, offset=offset)
    return flat.reshape(tuple(tensor.dims))


class Packed:
    """A file of constants that grows: name -> array, the same name is the same array."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.arrays: dict[str, np.ndarray] = {}

    def add(self, name: str, array: np.ndarray) -> str:
        """Keep an array. Raises: ValueError when the name stands for another one."""
        if not np.array_equal(self.arrays.setdefault(name, array), array):
            raise ValueError(f"{self.name}: two different constants of the name {name!r}")
        return name

    def layout(self) -> tuple[bytes, dict[str, onnx.TensorProto]]:
        """The content, and for each constant the initializer that points into it."""
        content, where = pack(self.arrays)
        tensors = {}
        for name, (offset, length) in where.items():
            array = self.arrays[name]
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            tensor = TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
            for key, value in (("location", self.name), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
            tensors[name] = tensor
        return content, tensors
