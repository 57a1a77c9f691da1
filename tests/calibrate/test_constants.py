"""Constants in files: read where they lie, packed where they go."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from cdl_edge.calibrate.constants import Packed, place_of, read
from cdl_edge.packing import ALIGNMENT


def test_what_is_packed_can_be_read(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.integers(-127, 128, (3, 5)).astype(np.int8),
        "scale": np.array(0.25, np.float32),
        "half": rng.standard_normal(7).astype(np.float16),
        "zero": np.array(7, np.uint8),
        "bias": np.array([2**31 - 1, -(2**31)], np.int32),
    }
    packed = Packed("some.bin")
    for name, array in arrays.items():
        assert packed.add(name, array) == name
    content, tensors = packed.layout()
    (tmp_path / "some.bin").write_bytes(content)
    assert set(tensors) == set(arrays)
    for name, array in arrays.items():
        assert place_of(tensors[name]) == "some.bin"
        got = read(tensors[name], tmp_path)
        assert got.dtype == array.dtype and got.shape == array.shape and np.array_equal(got, array)
        offset = next(int(e.value) for e in tensors[name].external_data if e.key == "offset")
        assert offset % ALIGNMENT == 0


def test_inside_of_the_graph(tmp_path):
    tensor = onnx.numpy_helper.from_array(np.arange(4), "inner")
    assert place_of(tensor) == "" and np.array_equal(read(tensor, tmp_path), np.arange(4))


def test_one_name_is_one_constant():
    packed = Packed("some.bin")
    packed.add("a", np.zeros(3))
    packed.add("a", np.zeros(3))
    with pytest.raises(ValueError, match="'a'"):
        packed.add("a", np.ones(3))
    with pytest.raises(ValueError, match="'a'"):
        packed.add("a", np.zeros(4))


def test_the_order_of_adding_changes_nothing():
    one, other = Packed("f"), Packed("f")
    for packed, names in ((one, "abc"), (other, "cab")):
        for name in names:
            packed.add(name, np.full(5, ord(name)))
    assert one.layout()[0] == other.layout()[0]
