"""Summary and validation of a bundle."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cdl_edge.errors import InputError
from cdl_edge.measurement.inspect import inspect, validate


def test_summary(bundle):
    summary = inspect(bundle.path)
    assert summary == inspect(bundle)
    assert summary["tasks"] == [["red", "green"], ["blue", "grey"]]
    assert (summary["class_count"], summary["task_count"]) == (4, 2)
    assert summary["size_bytes"] == sum((bundle.path / n).stat().st_size for n in summary["files"])
    assert summary["files"] == bundle.manifest.document["files"]
    for key in ("learner", "accuracy", "parity", "precision", "backbone"):
        assert summary[key] == bundle.manifest.document[key]
    json.dumps(summary)


def test_valid(bundle):
    report = validate(bundle.path, threads=1)
    assert report["valid"] is True
    assert (report["files"], report["backend"], report["threads"]) == (3, "onnxruntime", 1)
    json.dumps(report)


def test_changed_byte(bundle):
    data = bytearray((bundle.path / "prompts.bin").read_bytes())
    data[-1] ^= 1
    (bundle.path / "prompts.bin").write_bytes(data)
    for look in (inspect, validate):
        with pytest.raises(InputError, match=r"prompts\.bin"):
            look(bundle.path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_not_finite(make_bundle, tiny, value):
    bias = tiny.BIAS.copy()
    bias[2] = value
    bundle = make_bundle(graph={"bias": bias})
    with pytest.raises(InputError, match="output 'logits' is not finite"):
        validate(bundle.path, threads=1)


def test_a_graph_that_does_not_fit(make_bundle):
    bundle = make_bundle(graph={"side": 9})
    with pytest.raises(InputError, match="does not fit"):
        validate(bundle.path, threads=1)


def test_names_are_made_once(bundle):
    """Of 20,000 classes `inspect` made 20,000 tuples of 20,000 names each."""
    assert bundle.classes is bundle.classes and bundle.tasks is bundle.tasks
