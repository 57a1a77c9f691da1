"""RUN -> BUNDLE: whole or not at all, and what the device finds in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cdl_edge.data import load_dataset
from cdl_edge.errors import GateError, InputError
from cdl_edge.export import export_bundle as module
from cdl_edge.export.export_bundle import export
from cdl_edge.files import sha256
from cdl_edge.images import Preprocessing
from cdl_edge.log import told
from cdl_edge.measurement.evaluate import evaluate
from cdl_edge.runtime import load, open_bundle
from cdl_edge.runtime.confidence import Confidence
from cdl_edge.runtime.policy import open_policy
from cdl_edge.train.config import TrainConfig
from cdl_edge.train.evaluate import evaluate_run
from cdl_edge.train.loop import train
from cdl_edge.train.run import load_run


@pytest.fixture(scope="session")
def make_run(tmp_path_factory, short_training):
    """make(learner=..., distill=...) -> a finished run on digits with tiny backbones, made once."""
    made: dict[str, Path] = {}

    def make(**options: Any) -> Path:
        key = repr(sorted(options.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("run")
            settings = {**short_training, "tasks": 5, "limit_per_class": 8, **options}
            train(TrainConfig("digits", str(out), **settings), quiet=True)
            made[key] = out
        return made[key]

    return make


@pytest.fixture(scope="session")
def bundle(make_run, tmp_path_factory):
    """A CODA + KDP bundle and what export returned."""
    out = tmp_path_factory.mktemp("bundles") / "coda"
    return out, export(make_run(learner="coda", distill="kdp"), out, images=100)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("learner", "distill", "query"),
    [
        ("l2p", "none", "two-pass"),
        ("dualprompt", "kdp", "one-pass"),
        ("coda", "kd", "one-pass-patches"),
        ("apt", "kdp", "two-pass"),
    ],
)
def test_every_learner_from_training_to_the_device(make_run, tmp_path, learner, distill, query):
    run = make_run(learner=learner, distill=distill, query=query)
    result = export(run, tmp_path / "bundle", images=64)
    assert result["parity"]["max_abs_error"] <= 1e-4
    # One number, measured three times: at the end of training, by torch from the run folder, by the graph.
    trained = load_run(run).metrics.document["student"]
    for measured in (evaluate_run(run, "digits"), result["accuracy"]):
        for name in ("average_accuracy", "forgetting"):
            assert measured[name] == pytest.approx(trained[name], abs=1e-6), name
    manifest = open_bundle(tmp_path / "bundle").manifest.document
    assert (manifest["learner"], manifest["distiller"]) == (learner, distill)
    assert manifest["query"] == ("none" if learner == "apt" else query)
    assert manifest["confidence"]["temperature"] > 0 and manifest["confidence"]["task"]["scale"] >= 0
    assert manifest["selections"] == (None if learner == "apt" else "selections.npz")
    with open_policy(tmp_path / "bundle", "sticky", threads=1) as stream:
        assert stream.policy == ("sticky" if (learner, query) == ("l2p", "two-pass") else "exact")
        assert stream.step(np.zeros((2, 16, 16, 3), np.uint8)).task_posterior.shape == (2, 5)
    if learner == "apt":
        assert manifest["selection"]["kind"] == "none"
        assert "prompt_weights" not in manifest["outputs"]
    else:
        assert len(manifest["selection"]["blocks"]) == manifest["outputs"]["prompt_weights"][1]


@pytest.mark.slow
@pytest.mark.parametrize(("learner", "kd_head"), [("coda", "normalised"), ("apt", "linear")])
def test_a_kd_head_of_another_kind(make_run, tmp_path, learner, kd_head):
    run = make_run(learner=learner, distill="kdp", kd_head=kd_head)
    result = export(run, tmp_path / "bundle", images=64)
    assert result["parity"]["max_abs_error"] <= 1e-4
    assert result["accuracy"]["average_accuracy"] == pytest.approx(
        evaluate_run(run, "digits")["average_accuracy"], abs=1e-6
    )


@pytest.mark.slow
def test_with_the_backbones_that_are_shipped(tmp_path):
    run = tmp_path / "run"
    train(TrainConfig("digits", str(run), learner="coda", tasks=5, epochs=1, limit_per_class=20), quiet=True)
    result = export(run, tmp_path / "bundle", images=64)
    assert result["parity"]["max_abs_error"] <= 1e-4
    with load(tmp_path / "bundle", threads=1) as runner:
        size = runner.bundle.preprocessing.size
        assert runner.infer(np.zeros((2, size, size, 3), np.uint8)).shape == (2, 10)


def test_result_and_manifest(bundle, make_run):
    out, result = bundle
    run = load_run(make_run(learner="coda", distill="kdp"))
    manifest = json.loads((out / "manifest.json").read_text())
    assert Path(result["bundle"]) == out
    graphs = ("student.onnx", "query.onnx", "prompted.onnx")
    files = {*graphs, "backbone.bin", "prompts.bin", "selftest.npz", "ranges.npz", "selections.npz", "layers.json"}
    assert set(result["bytes"]) <= files and files - set(result["bytes"]) <= {"ranges.npz"}
    assert result["bytes"] == {name: (out / name).stat().st_size for name in result["bytes"]}
    assert manifest["graphs"] == {name.removesuffix(".onnx"): name for name in graphs}
    assert manifest["graph_parity"].keys() == {"student", "prompted"}
    assert manifest["graph_parity"]["prompted"]["max_abs_error"] <= 1e-4
    assert manifest["signatures"]["prompted"] == {
        "inputs": {"images": [1, 16, 16, 3], "prompt_weights": [1, 5, 20]},
        "outputs": {"logits": [1, 10]},
    }
    assert result["manifest_sha256"] == manifest["manifest_sha256"]
    assert manifest["classes"] == run.metrics.document["classes"]
    assert manifest["tasks"] == run.metrics.document["tasks"]
    assert manifest["input"] == {
        "name": "images",
        "shape": [1, 16, 16, 3],
        "layout": "NHWC",
        "dtype": "uint8",
        "dynamic_batch": False,
        "preprocessing": run.preprocessing.to_json(),
        "normalisation": "in graph",
    }
    assert manifest["outputs"] == {"logits": [1, 10], "prompt_weights": [1, 5, 20]}
    assert manifest["selection"] == {"kind": "weighted", "k": 5, "blocks": [0, 1, 2, 3, 4]}
    assert manifest["parity"] == result["parity"]
    assert manifest["parity"]["images"] == 100
    assert manifest["accuracy"] == result["accuracy"]
    assert manifest["accuracy"]["source"] == "digits"
    assert len(manifest["accuracy"]["per_task"]) == 5
    assert manifest["profile"] == "ort" and manifest["precision"] == "fp32" and manifest["opset"] == 23
    assert manifest["training"]["student"]["matrix"] == run.metrics.document["student"]["matrix"]
    assert "loss" not in manifest["training"]["student"] and "loss" not in manifest["training"]["teacher"]
    assert manifest["backbone"]["identity"] == run.backbone.identity
    assert {"cdl-edge", "torch", "timm", "onnx", "onnxruntime"} <= manifest["versions"].keys()


@pytest.mark.slow
def test_the_device_answers_as_the_run_did(bundle):
    out, result = bundle
    with load(out, threads=1) as runner:
        measured = evaluate(runner, "digits")
        assert measured["per_task"] == result["accuracy"]["per_task"]
        pixels = load_dataset("digits").val.take(np.arange(3)).decode(runner.bundle.preprocessing).pixels
        outputs = runner.run(pixels)
        assert outputs.logits.shape == (3, 10)
        assert outputs.prompt_weights is not None and outputs.prompt_weights.shape == (3, 5, 20)


def test_confidence_and_selections(bundle):
    opened = open_bundle(bundle[0])
    document = opened.manifest.document["confidence"]
    certainty = Confidence.of(opened)
    assert certainty.unknown_below is not None and document["images"] == sum(document["images_per_task"]) > 100
    assert document["nll"]["after"] <= document["nll"]["before"]
    dataset = load_dataset("digits")
    position = {name: index for index, name in enumerate(opened.classes)}
    task = opened.tasks[2]
    split = dataset.val.of_classes([i for i, name in enumerate(dataset.classes) if position[name] in task])
    with load(opened, threads=1) as runner:
        outputs = runner.run(split.decode(opened.preprocessing).pixels)
    # Fewer than KNOWN_IMAGES of each task: all were taken.
    assert document["images_per_task"][2] == len(split) < module.KNOWN_IMAGES
    mean = outputs.prompt_weights.mean(0)
    np.testing.assert_allclose(certainty.selection(2)["prompt_weights"], mean, atol=1e-4)
    assert set(certainty.selection(2)) == {"prompt_weights"}
    with open_policy(opened, "pinned", threads=1, task=2) as stream:
        assert stream.step(np.zeros((1, 16, 16, 3), np.uint8)).logits.shape == (1, 10)


def test_policies_agree_with_the_fused_graph(bundle):
    pixels = load_dataset("digits").val.take(np.arange(6)).decode(open_bundle(bundle[0]).preprocessing).pixels
    with open_policy(bundle[0], threads=1) as exact, open_policy(bundle[0], "pinned", threads=1, task=0) as pinned:
        expected = exact.step(pixels)
        assert set(expected.paths) == {"query"} and expected.unknown is not None
        for i in range(len(pixels)):
            pinned.pin(weights=expected.prompt_weights[i])
            np.testing.assert_allclose(pinned.step(pixels[i : i + 1]).logits[0], expected.logits[i], atol=1e-4)


@pytest.mark.slow
def test_the_same_backbone_gives_the_same_file(bundle, make_run, tmp_path):
    export(make_run(learner="apt", distill="kdp"), tmp_path / "apt", images=20)
    assert sha256(tmp_path / "apt" / "backbone.bin") == sha256(bundle[0] / "backbone.bin")


@pytest.mark.slow
def test_dynamic_batch(make_run, bundle, tmp_path):
    export(make_run(learner="coda", distill="kdp"), tmp_path / "dynamic", dynamic_batch=True, images=40)
    for file in ("backbone.bin", "prompts.bin"):
        assert sha256(tmp_path / "dynamic" / file) == sha256(bundle[0] / file)
    with load(tmp_path / "dynamic", threads=1) as many, load(bundle[0], threads=1) as one:
        assert many.bundle.batch is None and one.bundle.batch == 1
        pixels = load_dataset("digits").val.take(np.arange(7)).decode(one.bundle.preprocessing).pixels
        np.testing.assert_allclose(many.infer(pixels), one.infer(pixels), atol=1e-4)


@pytest.mark.slow
def test_parity_takes_training_images_when_the_validation_images_are_few(short_training, image_folder, tmp_path):
    data = image_folder(tmp_path / "data", train={"a": 9, "b": 9}, val={"a": 2, "b": 3})
    run = tmp_path / "run"
    train(TrainConfig(f"folder:{data}", str(run), learner="apt", tasks=2, **short_training), quiet=True)
    assert export(run, tmp_path / "bundle")["parity"]["images"] == 18 + 5
    assert export(run, tmp_path / "bundle", images=4, replace=True)["parity"]["images"] == 4
    # The images have moved away: nothing can be proven on them.
    shutil.move(str(data), tmp_path / "elsewhere")
    before = sha256(tmp_path / "bundle" / "manifest.json")
    with pytest.raises(InputError, match="data"):
        export(run, tmp_path / "bundle", replace=True)
    assert sha256(tmp_path / "bundle" / "manifest.json") == before


@pytest.fixture
def moved(short_training, image_folder, tmp_path):
    """(a run, its images, the same images in another place)."""
    data = image_folder(tmp_path / "data", train=dict.fromkeys("ab", 4), val=dict.fromkeys("ab", 3))
    config = TrainConfig(f"folder:{data}", str(tmp_path / "run"), learner="apt", tasks=2, **short_training)
    train(config, quiet=True)
    return tmp_path / "run", data, Path(shutil.copytree(data, tmp_path / "elsewhere"))


def test_an_image_that_could_not_be_read_is_named_without_its_folder():
    line = "/home/me/my photos/a/x.jpg: not a readable image got: cannot identify image file"
    assert module._without_folder(line) == "x.jpg: not a readable image got: cannot identify image file"


def exchange(folder: Path) -> None:
    one, two = folder / "a" / "000.png", folder / "b" / "000.png"
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


@pytest.mark.slow
def test_images_that_have_moved_are_named_anew(moved, tmp_path):
    run, data, elsewhere = moved
    first = export(run, tmp_path / "first")
    shutil.rmtree(data)
    shutil.rmtree(elsewhere / "train" / "a")  # they are not needed, nor are other classes in the way
    shutil.copytree(elsewhere / "val" / "a", elsewhere / "val" / "c")
    lines: list[str] = []
    with told(lines.append):
        again = export(run, tmp_path / "again", data=f"folder:{elsewhere}")
    assert again["accuracy"] == first["accuracy"] and again["accuracy"]["source"] == f"folder:{data.name}"
    for bundle in ("first", "again"):  # a bundle goes out of the house: no path of this machine is in it
        assert str(tmp_path) not in (tmp_path / bundle / "manifest.json").read_text()
    assert lines[0] == f"folder:{elsewhere}: 3 classes, 4 train, 9 validation, 0 left out"


@pytest.mark.slow
def test_other_images_are_refused(moved, tmp_path):
    run, data, elsewhere = moved
    exchange(elsewhere / "val")
    with pytest.raises(InputError, match="not the images that the run was trained with") as caught:
        export(run, tmp_path / "bundle", data=f"folder:{elsewhere}")
    assert "other pictures of a, b in validation" in str(caught.value)
    exchange(data / "val")  # also where the run itself says they are
    with pytest.raises(InputError, match="not the images that the run was trained with"):
        export(run, tmp_path / "bundle")
    shutil.rmtree(data / "val" / "b")
    with pytest.raises(InputError, match="without b"):
        export(run, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
def test_from_another_working_directory(moved, short_training, image_folder, tmp_path, monkeypatch):
    _, data, _ = moved
    monkeypatch.chdir(tmp_path)
    config = TrainConfig("folder:data", "typed", learner="apt", tasks=2, **short_training)
    train(config, quiet=True)
    # Another place that has another `data`.
    image_folder(tmp_path / "other" / "data", train=dict.fromkeys("ab", 3), val=dict.fromkeys("ab", 9))
    monkeypatch.chdir(tmp_path / "other")
    assert export(tmp_path / "typed", tmp_path / "bundle")["accuracy"]["images"] == 6
    manifest = (tmp_path / "bundle" / "manifest.json").read_text()
    assert str(data) not in manifest  # a bundle goes out of the house
    training = json.loads(manifest)["training"]
    assert training["config"]["data"] == training["data"]["given"] == "folder:data"
    assert set(training["data"]["fingerprint"]) == {"sha256", "val", "pictures"}


@pytest.mark.slow
def test_a_run_of_an_early_version_has_no_fingerprint(moved, tmp_path):
    run, _, elsewhere = moved
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({k: v for k, v in metrics.items() if k != "data"}))
    assert export(run, tmp_path / "bundle", data=f"folder:{elsewhere}")["accuracy"]["images"] == 6


def spoiled(monkeypatch: pytest.MonkeyPatch, file: str, where: float) -> None:
    """From now on one constant of what is built is wrong."""
    assemble = module.assemble

    def wrong(*arguments: Any) -> Any:
        artefact = assemble(*arguments)
        values = np.frombuffer(artefact.constants[file], np.float32).copy()
        values[int(len(values) * where)] += 1.0
        artefact.constants[file] = values.tobytes()
        return artefact

    monkeypatch.setattr(module, "assemble", wrong)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "where"), [("backbone.bin", 0.3), ("backbone.bin", 0.7), ("prompts.bin", 0.5)])
def test_one_wrong_constant_fails_and_leaves_nothing(make_run, tmp_path, monkeypatch, file, where):
    spoiled(monkeypatch, file, where)
    with pytest.raises(GateError, match=r"max .*mean "):
        # A learnt head: every constant of its bundle matters, one of 4,000 random features need not.
        export(make_run(learner="coda", distill="kdp", head="learned"), tmp_path / "new" / "bundle", images=16)
    assert [p for p in tmp_path.rglob("*") if p.name != "new"] == []


def test_a_failed_export_keeps_the_bundle_that_was_there(make_run, tmp_path, monkeypatch):
    run, out = make_run(learner="apt", distill="kdp"), tmp_path / "bundle"
    first = export(run, out, images=16)
    with pytest.raises(InputError, match="--force"):
        export(run, out, images=16)
    assert export(run, out, images=16, replace=True)["bytes"] == first["bytes"]
    before = sha256(out / "manifest.json")
    spoiled(monkeypatch, "backbone.bin", 0.5)
    with pytest.raises(GateError):
        export(run, out, images=16, replace=True)
    assert sha256(out / "manifest.json") == before
    open_bundle(out)
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_what_is_no_bundle_is_not_replaced(make_run, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="bundle"):
        export(make_run(learner="apt", distill="kdp"), tmp_path / "precious")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="bundle"):
        export(make_run(learner="apt", distill="kdp"), tmp_path / "file")
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"


def test_wrong_input(make_run, tmp_path):
    run = make_run(learner="apt", distill="kdp")
    with pytest.raises(InputError, match="did you mean 'ort'"):
        export(run, tmp_path / "bundle", profile="otr")
    with pytest.raises(InputError, match="not a finished run"):
        export(tmp_path / "nowhere", tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_sample_may_lose_a_class_to_a_picture_that_cannot_be_read(tmp_path, image_folder):
    """The run has skipped it, and has others of the class; one image a class was drawn, and nothing was written."""
    root = image_folder(tmp_path / "p", train={"a": 4, "b": 4}, val={"a": 3, "b": 3})
    for broken in ("val/a/000.png", "train/a/000.png", "train/b/003.png"):
        (root / broken).write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    data, run = load_dataset(f"folder:{root}"), SimpleNamespace(preprocessing=Preprocessing(16, 16))
    assert len(module._real_images(run, data, 2)) == 2  # the last of b, then a training image in its place
    with pytest.raises(InputError, match="no readable image is left of 1 class"):
        data.val.take(np.array([0, 5])).decode(run.preprocessing)
    with pytest.raises(InputError, match="no readable image is left"):
        data.val.take(np.array([0])).decode(run.preprocessing, sampled=True)
