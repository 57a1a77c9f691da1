"""A sound bundle passes and one whose weights are wrong does not; the comparison knows near from wrong."""

from __future__ import annotations

import io

import numpy as np
import pytest

from cdl_edge.artefacts.bundle import open_bundle, write_bundle
from cdl_edge.errors import GateError, InputError
from cdl_edge.runtime import load
from cdl_edge.runtime.selftest import LIMITS, check, prove, prove_finite, reference, self_test

IMAGES = {"images": np.zeros((20, 8, 8, 3), np.uint8)}
LOGITS = np.random.default_rng(0).normal(0, 3, (20, 7)).astype(np.float32)


def test_a_sound_bundle(make_version):
    result = self_test(open_bundle(make_version(1)), threads=1)
    assert list(result) == ["fp32"]
    assert result["fp32"]["images"] == 2 and result["fp32"]["outputs"]["logits"]["max_abs_error"] < 1e-5


@pytest.mark.parametrize("shift", [0.01, np.nan])
def test_other_answers_are_found(make_version, tmp_path, shift):
    bundle = open_bundle(make_version(1))
    images, logits = bundle.selftest()
    logits[0, 0] += shift
    stream = io.BytesIO()
    np.savez(stream, images=images, logits=logits)
    files = {name: bundle.path / name for name in bundle.manifest.document["files"]} | {
        "selftest.npz": stream.getvalue()
    }
    wrong = write_bundle(tmp_path / "wrong", bundle.manifest.document, files)
    with pytest.raises(InputError, match="the self-test fails"):
        self_test(wrong, threads=1)


@pytest.mark.parametrize("content", [b"", b"no archive", {"images": 1}, {"images": 0, "logits": 0}, {"logits": 1}])
def test_a_self_test_that_is_none(make_version, tmp_path, content):
    bundle = open_bundle(make_version(1))
    if isinstance(content, dict):
        images, logits = bundle.selftest()
        arrays = {"images": images, "logits": logits}
        stream = io.BytesIO()
        np.savez(stream, **{name: arrays[name][: 2 * keep] for name, keep in content.items()})
        content = stream.getvalue()
    files = {name: bundle.path / name for name in bundle.manifest.files} | {"selftest.npz": content}
    with pytest.raises(InputError, match=r"no self-test|does not fit"):
        self_test(write_bundle(tmp_path / "wrong", bundle.manifest.document, files), threads=1)


def test_a_bundle_without_one(bundle):
    with pytest.raises(InputError, match="no self-test"):
        self_test(bundle, threads=1)


# -- the reference -----------------------------------------------------------------------------------------------------


def test_reference_is_the_self_test(make_version):
    feeds, expected = reference(open_bundle(make_version(1)))
    assert feeds["images"].shape == (2, 8, 8, 3) and expected["logits"].shape == (2, 5)


def test_reference_of_the_other_graphs_comes_from_onnxruntime(make_version):
    """Here all three graphs are the same; what counts is who is asked for what."""
    signature = {
        "inputs": {"images": [1, 8, 8, 3]},
        "outputs": {"logits": [1, 5], "prompt_weights": [1, 2, 3]},
    }
    graphs = {"student": "student.onnx", "query": "student.onnx", "prompted": "student.onnx"}
    bundle = open_bundle(make_version(1, signatures=dict.fromkeys(graphs, signature), graphs=graphs))
    feeds, expected = reference(bundle, "query")
    assert set(feeds) == {"images"} and set(expected) == {"logits", "prompt_weights"}


def test_without_a_self_test_there_is_no_reference(bundle):
    with pytest.raises(InputError, match="no self-test in this bundle") as caught:
        reference(bundle)
    assert "cdl-edge export" in str(caught.value)


def test_one_loaded_graph_is_proven(make_version):
    bundle = open_bundle(make_version(1))
    feeds, expected = reference(bundle)
    with load(bundle, threads=1) as runner:
        assert prove(runner, feeds, expected)["outputs"]["logits"]["passed"]
        with pytest.raises(GateError, match="the self-test fails: its logits are not the student's") as caught:
            prove(runner, feeds, {"logits": expected["logits"] + 1})
        assert prove_finite(runner) == {"images": 0}
    assert str(bundle.path) in str(caught.value)


def test_without_a_self_test_answers_are_finite_at_least(make_bundle):
    bundle = make_bundle(graph={"bias": np.array([0, np.nan, 0, 0], np.float32)})
    with load(bundle, threads=1) as runner, pytest.raises(GateError, match="NaN or infinity"):
        prove_finite(runner)


# -- the comparison ----------------------------------------------------------------------------------------------------


def run(logits, precision):
    return check(lambda feeds: {"logits": logits}, IMAGES, {"logits": LOGITS}, precision, "x.engine")


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
    with pytest.raises(GateError, match="not the student's"):
        run(LOGITS + bad * noise, precision)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_refused(precision, value):
    wrong = LOGITS.copy()
    wrong[3, 2] = value
    with pytest.raises(GateError, match="NaN or infinity"):
        run(wrong, precision)


def test_nan_in_an_output_that_nobody_compares():
    outputs = {"logits": LOGITS, "prompt_weights": np.full((20, 1, 1), np.nan, np.float32)}
    with pytest.raises(GateError, match="prompt_weights"):
        check(lambda feeds: outputs, IMAGES, {"logits": LOGITS}, "fp16", "x")


def test_one_clear_image_of_another_class_is_refused():
    """The mean error of 1000 images would hide it."""
    want = np.tile(np.array([[10.0, 0, 0]], np.float32), (1000, 1))
    got = want.copy()
    got[7] = [0, 10, 0]
    assert np.sqrt(np.mean((got - want) ** 2)) / np.sqrt(np.mean((want - want.mean()) ** 2)) < LIMITS["int8"]
    with pytest.raises(GateError) as caught:
        check(lambda feeds: {"logits": got}, IMAGES, {"logits": want}, "int8", "x")
    assert "top1_agreement 0.999" in str(caught.value) and "--unfuse-attention" in str(caught.value)


def test_a_tie_may_fall_either_way():
    want = np.tile(np.array([[5.0, 5.01, -9]], np.float32), (10, 1))
    got = want + np.array([[0.02, 0, 0]], np.float32)
    found = check(lambda feeds: {"logits": got}, IMAGES, {"logits": want}, "fp16", "x")
    assert found["outputs"]["logits"]["top1_agreement"] == 0
