"""Temperature, unknown, tasks: fitted on data whose truth is known."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from cdl_edge.artefacts.bundle import write_bundle
from cdl_edge.artefacts.layout import SELECTIONS
from cdl_edge.errors import InputError
from cdl_edge.runtime.confidence import Confidence, cosines, energy, fit, pack_selections

TASKS = ((0, 1), (2, 3))


def drawn(n: int = 4000, sharpness: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits (n, 4), and labels drawn from their softmax: `sharpness` times them is what a wrong scale gives."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (n, 4))
    noise = rng.gumbel(size=logits.shape)  # argmax(logits + Gumbel) is a draw from the softmax
    return (sharpness * logits).astype(np.float32), (logits + noise).argmax(1)


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 3.0])
def test_the_temperature_is_found_again(sharpness):
    logits, labels = drawn(sharpness=sharpness)
    document, _ = fit(logits, labels, TASKS, {})
    assert document["temperature"] == pytest.approx(sharpness, rel=0.08)
    assert document["nll"]["after"] <= document["nll"]["before"] + 1e-9
    # It is the best there is: a little more or less is worse.
    for factor in (0.9, 1.1):
        scaled = logits.astype(np.float64) / (document["temperature"] * factor)
        nll = (energy(scaled) - scaled[np.arange(len(labels)), labels]).mean()
        assert nll > document["nll"]["after"]


def test_probabilities_are_calibrated():
    logits, labels = drawn(20000, sharpness=3.0)
    document, _ = fit(logits, labels, TASKS, {})
    share = Confidence(TASKS, document["temperature"]).probabilities(logits)
    np.testing.assert_allclose(share.sum(1), 1)
    right = share.argmax(1) == labels
    assert share.max(1).mean() == pytest.approx(right.mean(), abs=0.01)
    assert Confidence(TASKS).probabilities(logits).max(1).mean() > right.mean() + 0.1, "without it: too sure"


def test_all_right_does_not_mean_endlessly_sure():
    logits = np.eye(4, dtype=np.float32)[[0, 1, 2, 3] * 3]
    document, _ = fit(logits, logits.argmax(1), TASKS, {})
    assert document["temperature"] == pytest.approx(1 / 8, rel=1e-3)


def test_unknown_is_what_excites_no_class():
    logits, labels = drawn()
    document, _ = fit(logits, labels, TASKS, {})
    confidence = Confidence(TASKS, unknown_below=document["unknown"]["below"])
    assert confidence.unknown(logits).mean() == pytest.approx(0.05, abs=0.001)
    assert confidence.unknown(np.full((1, 4), -20, np.float32)).tolist() == [True]
    assert Confidence(TASKS).unknown(logits) is None and Confidence(TASKS).unknown_below is None


def test_the_task_posterior_uses_the_prompts_as_far_as_they_help():
    logits, labels = drawn()
    truth = labels // 2
    rng = np.random.default_rng(1)
    telling = np.eye(2)[truth][:, None] + 0.5 * rng.normal(size=(len(labels), 1, 2))
    silent = rng.normal(size=(len(labels), 1, 2))
    for weights, helps in ((telling, True), (silent, False)):
        given = {"prompt_weights": weights.astype(np.float32)}
        document, selections = fit(logits, labels, TASKS, given)
        task = document["task"]
        assert (task["accuracy"] > task["accuracy_by_classes"] + 3) is helps
        assert (task["scale"] > 1) is helps
        confidence = Confidence(TASKS, document["temperature"], 0.0, task["scale"], selections)
        posterior = confidence.posterior(logits, given["prompt_weights"])
        np.testing.assert_allclose(posterior.sum(1), 1)
        if helps:
            assert (posterior.argmax(1) == truth).mean() > 0.9
        alone = confidence.posterior(logits)
        share = confidence.probabilities(logits)
        np.testing.assert_allclose(alone, np.stack([share[:, :2].sum(1), share[:, 2:].sum(1)], 1), atol=1e-9)


def test_selections_are_means_of_each_task():
    logits = np.zeros((6, 4), np.float32)
    labels = np.array([0, 1, 2, 2, 3, 0])
    weights = np.arange(6, dtype=np.float32).reshape(6, 1, 1)
    _, selections = fit(logits, labels, TASKS, {"prompt_weights": weights, "mapped_weights": 2 * weights})
    np.testing.assert_allclose(selections["prompt_weights"].ravel(), [2, 3])  # of 0, 1, 5 and of 2, 3, 4
    np.testing.assert_allclose(selections["mapped_weights"].ravel(), [4, 6])
    with pytest.raises(InputError, match="task 2"):
        fit(logits[:2], labels[:2], TASKS, {})


def test_cosines():
    a = np.array([[[3, 4]], [[0, 0]]], np.float32)
    np.testing.assert_allclose(cosines(a, np.array([[[3, 4]], [[-4, 3]]], np.float32)), [[1, 0], [0, 0]], atol=1e-7)


def with_confidence(tmp_path, bundle, document, selections=None, content=None):
    files = {name: bundle.path / name for name in bundle.manifest.document["files"]}
    manifest = {**bundle.manifest.document, "confidence": document}
    if selections is not None or content is not None:
        manifest["selections"] = SELECTIONS
        files[SELECTIONS] = content if content is not None else pack_selections(selections)
    return write_bundle(tmp_path / "with", manifest, files)


def test_through_a_bundle(bundle, tmp_path):
    logits, labels = drawn(200)
    weights = np.random.default_rng(0).normal(size=(200, 2, 3)).astype(np.float32)
    document, selections = fit(logits, labels, TASKS, {"prompt_weights": weights})
    json.dumps(document, allow_nan=False)
    found = Confidence.of(with_confidence(tmp_path, bundle, document, selections))
    assert (found.temperature, found.unknown_below) == (document["temperature"], document["unknown"]["below"])
    assert found.unknown_below is not None and found.tasks == bundle.tasks
    np.testing.assert_array_equal(found.selection(1)["prompt_weights"], selections["prompt_weights"][1])
    with pytest.raises(InputError, match="0 to 1"):
        found.selection(2)


def test_the_same_images_give_the_same_bytes():
    weights = {"prompt_weights": np.ones((2, 3, 4), np.float32)}
    assert pack_selections(weights) == pack_selections(weights)


def test_an_old_bundle_says_less(bundle):
    found = Confidence.of(bundle)
    assert (found.temperature, found.unknown_below, found.selections) == (1.0, None, None)
    logits = np.array([[1, 2, 3, 4]], np.float32)
    np.testing.assert_allclose(found.probabilities(logits).sum(), 1)
    assert found.posterior(logits).shape == (1, 2)
    with pytest.raises(InputError, match="recorded"):
        found.selection(0)


@pytest.mark.parametrize(
    "document",
    [{}, {"temperature": "warm"}, {"temperature": 1.0, "unknown": None, "task": {"scale": 0}}, [1]],
)
def test_what_is_not_understood(bundle, tmp_path, document):
    with pytest.raises(InputError, match="confidence"):
        Confidence.of(with_confidence(tmp_path, bundle, document))


@pytest.mark.parametrize("content", [b"", b"no zip", pack_selections({"prompt_weights": np.zeros((3, 2, 3))})])
def test_selections_that_are_broken(bundle, tmp_path, content):
    document = {"temperature": 1.0, "unknown": {"below": 0.0}, "task": {"scale": 1.0}}
    with pytest.raises(InputError, match="confidence"):
        Confidence.of(with_confidence(tmp_path, bundle, document, content=content))


def test_selections_that_no_hash_covers(bundle, tmp_path):
    (tmp_path / "elsewhere.npz").write_bytes(pack_selections({"prompt_weights": np.zeros((2, 2, 3), np.float32)}))
    document = {"temperature": 1.0, "unknown": {"below": 0.0}, "task": {"scale": 1.0}}
    made = with_confidence(tmp_path, bundle, document)
    made = replace(made, manifest=replace(made.manifest, selections="../elsewhere.npz"))
    with pytest.raises(InputError, match="under no hash"):
        Confidence.of(made)
