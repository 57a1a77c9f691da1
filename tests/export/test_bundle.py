from __future__ import annotations

import numpy as np
import pytest

import cdl_edge.export.bundle as bundle_module
from cdl_edge.errors import InputError
from cdl_edge.export import ParityError, export
from cdl_edge.export.parity import Parity, sample, student_logits
from cdl_edge.images import Preprocessing
from cdl_edge.runtime import load, open_bundle
from cdl_edge.train.config import TrainConfig
from cdl_edge.train.loop import train
from cdl_edge.train.run import load_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    train(TrainConfig("digits", str(out), learner="dualprompt", tasks=5, epochs=1, limit_per_class=12), quiet=True)
    return out


def test_a_run_becomes_a_bundle_that_predicts_what_the_student_predicts(run, tmp_path):
    result = export(run, tmp_path / "b", images=40)
    bundle = open_bundle(tmp_path / "b")
    opened = load_run(run)
    assert list(bundle.classes) == opened.metrics["classes"]
    assert result["parity"]["images"] == 40
    assert result["parity"]["max_abs_error"] <= 1e-4
    assert bundle.manifest["parity"] == result["parity"]
    # One number, measured twice: by torch at the end of training and by the graph.
    trained = opened.metrics["student"]
    assert result["accuracy"]["average_accuracy"] == pytest.approx(trained["average_accuracy"], abs=1e-6)
    assert result["accuracy"]["forgetting"] == pytest.approx(trained["forgetting"], abs=1e-6)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    with load(bundle) as runner:
        assert np.abs(runner.infer(pixels) - student_logits(opened, pixels, 10)).max() <= 1e-4


def test_the_gate_fails_when_one_constant_is_perturbed(run, tmp_path, monkeypatch):
    real = bundle_module.assemble

    def perturbed(graph, *rest):
        graph.constants["blocks.5.fc1.bias"] = graph.constants["blocks.5.fc1.bias"] + np.float32(0.05)
        return real(graph, *rest)

    monkeypatch.setattr(bundle_module, "assemble", perturbed)
    with pytest.raises(ParityError, match=r"max .*mean "):
        export(run, tmp_path / "b", images=20)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_failed_export_leaves_the_old_bundle(run, tmp_path, monkeypatch):
    export(run, tmp_path / "b", images=10)
    before = open_bundle(tmp_path / "b").manifest["manifest_sha256"]

    def refuse(*_):
        raise ParityError("no")

    monkeypatch.setattr(bundle_module, "check", refuse)
    with pytest.raises(ParityError):
        export(run, tmp_path / "b", images=10)
    assert open_bundle(tmp_path / "b").manifest["manifest_sha256"] == before
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_nan_does_not_pass_the_gate():
    assert not Parity(float("nan"), 0.0, 100.0, 1, 1e-4).max_abs_error <= 1e-4


def test_refusals(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not a bundle"):
        export(run, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(InputError, match="unknown export profile"):
        export(run, tmp_path / "b", profile="otr")
    with pytest.raises(InputError, match="not a finished run"):
        export(tmp_path / "nowhere", tmp_path / "b")


def test_dynamic_batch(run, tmp_path):
    export(run, tmp_path / "b", images=10, dynamic_batch=True)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    with load(tmp_path / "b") as runner:
        together = runner.infer(pixels)
        alone = np.concatenate([runner.infer(p[None]) for p in pixels])
    assert np.abs(together - alone).max() <= 1e-5


def test_sample_spreads_over_the_split():
    from cdl_edge.data import Split

    labels = np.repeat(np.arange(10), 7)
    split = Split(np.zeros((70, 4, 4, 3), np.uint8), labels)
    assert set(sample(split, 20).labels.tolist()) == set(range(10))
    assert len(sample(split, 100)) == 70
    assert sample(split, 20).decode(Preprocessing(4, 4)).pixels.shape == (20, 4, 4, 3)
