"""The comparison with fp32: passes what is near, refuses what is not. Arithmetic only, no engine."""

from __future__ import annotations

import numpy as np
import pytest

from cdl_edge.errors import InputError
from cdl_edge.runtime.engines import gate

IMAGES = {"images": np.zeros((20, 8, 8, 3), np.uint8)}
LOGITS = np.random.default_rng(0).normal(0, 3, (20, 7)).astype(np.float32)


def run(logits, precision):
    return gate.check(lambda feeds: {"logits": logits}, IMAGES, {"logits": LOGITS}, precision, "x.engine")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_the_same_answers_pass(precision):
    result = run(LOGITS.copy(), precision)
    assert result["images"] == 20 and result["outputs"]["logits"]["max_abs_error"] == 0


@pytest.mark.parametrize(
    ("precision", "good", "bad"), [("fp32", 5e-4, 2e-3), ("fp16", 0.03, 0.12), ("bf16", 0.1, 0.6), ("int8", 0.3, 1.2)]
)
def test_limits(precision, good, bad):
    noise = np.random.default_rng(1).choice([-1.0, 1.0], LOGITS.shape).astype(np.float32)
    found = run(LOGITS + good * noise, precision)["outputs"]["logits"]
    assert found["max_abs_error"] == pytest.approx(good, rel=0.01)
    with pytest.raises(gate.GateError, match="not the student's"):
        run(LOGITS + bad * noise, precision)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_refused(precision, value):
    wrong = LOGITS.copy()
    wrong[3, 2] = value
    with pytest.raises(gate.GateError, match="NaN or infinity"):
        run(wrong, precision)


def test_nan_in_an_output_that_nobody_compares():
    outputs = {"logits": LOGITS, "prompt_weights": np.full((20, 1, 1), np.nan, np.float32)}
    with pytest.raises(gate.GateError, match="prompt_weights"):
        gate.check(lambda feeds: outputs, IMAGES, {"logits": LOGITS}, "fp16", "x")


def test_one_clear_image_of_another_class_is_refused():
    """The mean error of 1000 images would hide it."""
    want = np.tile(np.array([[10.0, 0, 0]], np.float32), (1000, 1))
    got = want.copy()
    got[7] = [0, 10, 0]
    assert np.sqrt(np.mean((got - want) ** 2)) / np.sqrt(np.mean((want - want.mean()) ** 2)) < gate.LIMITS["int8"]
    with pytest.raises(gate.GateError) as caught:
        gate.check(lambda feeds: {"logits": got}, IMAGES, {"logits": want}, "int8", "x")
    assert "top1_agreement 0.999" in str(caught.value) and "--unfuse-attention" in str(caught.value)


def test_a_tie_may_fall_either_way():
    want = np.tile(np.array([[5.0, 5.01, -9]], np.float32), (10, 1))
    got = want + np.array([[0.02, 0, 0]], np.float32)
    found = gate.check(lambda feeds: {"logits": got}, IMAGES, {"logits": want}, "fp16", "x")
    assert found["outputs"]["logits"]["top1_agreement"] == 0


def test_reference_is_the_self_test(make):
    bundle = make()
    feeds, expected = gate.reference(bundle, "student")
    assert feeds["images"].shape == (5, 8, 8, 3) and expected["logits"].shape == (5, 4)


def test_reference_of_the_other_graphs_comes_from_onnxruntime(make):
    """Here all three graphs are the same; what counts is who is asked for what."""
    signature = {
        "inputs": {"images": [1, 8, 8, 3]},
        "outputs": {"logits": [1, 4], "prompt_weights": [1, 2, 3]},
    }
    graphs = {"student": "student.onnx", "query": "student.onnx", "prompted": "student.onnx"}
    bundle = make(signatures=dict.fromkeys(graphs, signature))
    bundle.manifest["graphs"] = graphs
    feeds, expected = gate.reference(bundle, "query")
    assert set(feeds) == {"images"} and set(expected) == {"logits", "prompt_weights"}


def test_without_a_self_test_nothing_is_built(bundle):
    with pytest.raises(InputError, match="no self-test"):
        gate.reference(bundle, "student")
