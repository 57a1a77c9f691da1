"""The benchmark that times bundles beside each other, as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*words):
    command = [sys.executable, ROOT / "benchmarks" / "bundles.py", *words, "--rounds", "3", "--ceiling-size", "32"]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


@pytest.mark.slow
def test_ratios_are_to_the_first_one_and_sizes_are_of_what_the_graph_reads(make_teachable):
    first, second = make_teachable("first"), make_teachable("second", head="ranpac")
    done = run(first, second)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["bundles"]
    assert list(found) == [str(first), str(second)] and found[str(first)]["ratio"]["median"] == 1
    assert found[str(second)]["ms"] > 0 and found[str(second)]["ratio"]["low"] > 0
    for bundle in (first, second):
        read = sum((bundle / name).stat().st_size for name in ("student.onnx", "backbone.bin", "prompts.bin"))
        assert found[str(bundle)]["mb"] == pytest.approx(read / 1e6)


@pytest.mark.slow
def test_one_bundle_has_nothing_beside_it(tmp_path):
    done = run(tmp_path, tmp_path)
    assert done.returncode == 2 and "two different bundles" in done.stderr
