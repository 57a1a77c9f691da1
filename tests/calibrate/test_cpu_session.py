"""A graph in memory with its constants in a folder."""

from __future__ import annotations

import numpy as np
import pytest

from cdl_edge.calibrate.cpu_session import CHUNK, CpuSession
from cdl_edge.runtime import open_bundle


def test_it_answers_as_the_file_does(tools):
    graphs = tools.make("coda")
    expected = tools.run(graphs.path(), {"images": graphs.pixels})["logits"]
    for as_written in (False, True):
        session = CpuSession(graphs.path().read_bytes(), graphs.folder, as_written, threads=1)
        assert (session.input, session.batch) == ("images", 1)
        assert session.logits(graphs.pixels) == pytest.approx(expected, abs=1e-4)


def test_symmetric_graphs_run_as_they_are_written(tools):
    graphs = tools.make("coda")
    folder = graphs.write(graphs.quantise("int8-arm"))
    expected = tools.run(folder / "student.onnx", {"images": graphs.pixels})["logits"]
    got = CpuSession((folder / "student.onnx").read_bytes(), folder, as_written=True).logits(graphs.pixels)
    assert np.array_equal(got, expected)


@pytest.mark.slow
def test_any_number_of_images(exported):
    """A free batch goes in chunks, a fixed one image by image: the same answers."""
    one, many = open_bundle(exported()), open_bundle(exported(dynamic_batch=True))
    side = one.preprocessing.size
    pixels = np.random.default_rng(0).integers(0, 256, (2 * CHUNK + 3, side, side, 3), dtype=np.uint8)
    answers = [CpuSession(b.graph().read_bytes(), b.path).logits(pixels) for b in (one, many)]
    assert answers[0].shape == (len(pixels), 10)
    assert answers[0] == pytest.approx(answers[1], abs=1e-4)
