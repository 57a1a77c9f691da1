"""What is compared does the same work: the same photograph, the same cut, the same answer."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from cdl_edge.images import Preprocessing

PREPROCESSING = Preprocessing(224, 248, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


@pytest.fixture(scope="module")
def bench(root):
    sys.path.insert(0, str(root / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("end_to_end", root / "benchmarks" / "end_to_end.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(root / "benchmarks"))


class Graph:
    """Keeps what it was given."""

    def __call__(self, value):
        self.given = value
        return np.eye(100)[:1] * 9

    def pixels(self):
        """(224, 224, 3) in 0..255, whatever was fed."""
        if self.given.dtype == np.uint8:
            return self.given[0].astype(float)
        planes = self.given[0].transpose(1, 2, 0)
        return (planes * np.array(PREPROCESSING.std) + np.array(PREPROCESSING.mean)) * 255


@pytest.mark.parametrize("size", [(640, 480), (480, 700)])
def test_every_way_sees_the_same_picture(bench, size):
    source = bench.photograph(size, None)
    seen = {}
    ways = {
        "ours": lambda g: bench.with_ours(g, 2, PREPROCESSING),
        "rule 1": lambda g: bench.with_ours(g, 1, PREPROCESSING),
        "timm": lambda g: bench.with_timm(g, PREPROCESSING),
    }
    if importlib.util.find_spec("cv2"):
        ways["opencv"] = lambda g: bench.with_opencv(g, PREPROCESSING)
    for name, way in ways.items():
        graph = Graph()
        assert way(graph)(source).startswith("class 0 ")
        seen[name] = graph.pixels()
    for name, pixels in seen.items():
        assert pixels.shape == (224, 224, 3), name
        assert np.abs(pixels - seen["rule 1"]).mean() < 4, name
    assert np.abs(seen["ours"] - seen["ours"][::-1]).mean() > 8  # otherwise the comparison says little


@pytest.mark.slow
def test_the_command(root, tmp_path):
    command = [sys.executable, "benchmarks/end_to_end.py", "--rounds", "1", "--sizes", "64x64", "--ceiling-size", "64"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    document = json.loads(done.stdout.splitlines()[-1])
    assert set(document["cases"]) == {"JPEG 64 x 64", "frame 1920 x 1080"}
    for rows in document["cases"].values():
        assert rows["ours, int8"]["median_ms"] > 0 and rows[document["reference"]]["ratio"] == pytest.approx(1, rel=1)


def test_the_tables_of_the_page_are_those_of_the_kept_results(root):
    done = subprocess.run([sys.executable, "docs/make_benchmarks.py", "--check"], cwd=root, check=False)
    assert done.returncode == 0, "run: python docs/make_benchmarks.py"
