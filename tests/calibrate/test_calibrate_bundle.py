"""BUNDLE -> BUNDLE, from the three situations that there are: no images, those of the last task, all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from cdl_edge.artefacts.bundle import write_bundle
from cdl_edge.calibrate import calibrate_bundle as module
from cdl_edge.calibrate import floor, latency, trial
from cdl_edge.calibrate import opset as opset_module
from cdl_edge.calibrate.calibrate_bundle import calibrate
from cdl_edge.calibrate.collect import collect
from cdl_edge.calibrate.constants import read
from cdl_edge.calibrate.float_graph import float_graph
from cdl_edge.calibrate.opset import here
from cdl_edge.calibrate.search import Verdict
from cdl_edge.errors import GateError, InputError
from cdl_edge.files import sha256
from cdl_edge.log import told
from cdl_edge.ranges import Ranges, TaskRanges
from cdl_edge.runtime import load, open_bundle
from cdl_edge.runtime.runner import INT8


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch):
    """One test measures latency; the others would wait for OpenVINO's compiler."""
    monkeypatch.setattr(module, "time_candidates", lambda bundle, images: [timed(bundle, images, "fp32", 1.0)])
    monkeypatch.setattr(floor, "AGREEMENT", 0.0)  # of tiny students, whose answers lie near each other
    monkeypatch.setattr(floor, "ERROR", np.inf)
    monkeypatch.setattr(trial, "SENSITIVITY_IMAGES", 8)


def timed(bundle, images, precision, compute_ms):
    """What it would say, with real answers; fp32 takes 2 ms."""
    with load(bundle, threads=1, precision=precision) as runner:
        return latency.TimedCandidate("onnxruntime", precision, compute_ms, compute_ms / 2, runner.infer(images))


@pytest.fixture
def lines():
    """What was said."""
    found = []
    with told(found.append):
        yield found


def warnings(lines):
    """Those that warn, but for the one that 80 images are few."""
    return [line for line in lines if line.startswith("warning") and "images are compared" not in line]


@pytest.fixture(scope="module")
def kept_only(exported, tmp_path_factory):
    """A CODA + KDP bundle calibrated from its kept ranges: folder, result."""
    out = tmp_path_factory.mktemp("calibrated") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "CALLS", 2)
        return out, calibrate(exported(), out)


def changed(bundle: Path, out: Path, **fields) -> Path:
    """A copy with other fields in its manifest; ranges: other kept ranges, None: none."""
    opened = open_bundle(bundle)
    files = {name: opened.path / name for name in opened.manifest.document["files"]}
    if "ranges" in fields:
        ranges = fields.pop("ranges")
        files.pop("ranges.npz", None)
        fields["ranges"] = None
        if ranges is not None:
            ranges.save(out.parent / "new.npz")
            files["ranges.npz"] = (out.parent / "new.npz").read_bytes()
            fields["ranges"] = "ranges.npz"
    write_bundle(out, {**opened.manifest.document, **fields}, files)
    return out


def last_classes(bundle: Path) -> list[str]:
    opened = open_bundle(bundle)
    return [opened.classes[c] for c in opened.tasks[-1]]


@pytest.mark.vnni
def test_from_kept_ranges_alone(kept_only, exported):
    out, result = kept_only
    before, written = open_bundle(exported()), open_bundle(out)
    document = written.manifest.document["quantisation"]
    assert result == {**document, "bundle": str(out), "bytes": result["bytes"]}
    assert document["ranges"] == {"kept_tasks": 3, "images": 0, "tasks_with_images": []}
    assert set(document["flavours"]) == {"int8-x86", "int8-arm"}
    for name, scheme in document["flavours"].items():
        assert scheme["before"] is None and scheme["after"] is None and "drop" not in scheme
        layers = 22 if name == "int8-x86" else 21  # bytes go into the patch embedding as they come
        assert scheme["layers_int8"] == layers and scheme["layers_float"] == []
        assert scheme["images"] == 4 and scheme["agreement"] >= 75  # the bundle's own self-test
    new = {f"{g}.{f}": f"{g}.{f}.onnx" for g in ("student", "query", "prompted") for f in ("int8-x86", "int8-arm")}
    assert written.manifest.document["graphs"] == {**before.manifest.document["graphs"], **new}
    for key in new:
        assert (
            written.manifest.document["signatures"][key]
            == before.manifest.document["signatures"][key.partition(".")[0]]
        )
    assert set(written.manifest.document["files"]) - set(before.manifest.document["files"]) == {
        *new.values(), "backbone.int8.bin", "scales.int8-x86.bin", "scales.int8-arm.bin",
    }  # fmt: skip
    for name, entry in before.manifest.document["files"].items():
        assert written.manifest.document["files"][name] == entry, name
    assert result["bytes"] == {name: (out / name).stat().st_size for name in written.manifest.document["files"]}
    assert written.name == "bundle"


@pytest.mark.vnni
def test_the_device_runs_it(kept_only, source, exported):
    out, _ = kept_only
    bundle = open_bundle(out)
    pixels = module.images_of(bundle, source, 1, None).validation
    with load(out, threads=1, precision="fp32") as runner:
        expected = runner.run(pixels)
    with load(out, threads=1, precision="int8") as runner:
        assert runner.describe()["precision"] == "int8" and runner.path.name.startswith("student.int8-")
        got = runner.run(pixels)
    assert not np.array_equal(got.logits, expected.logits)
    assert (got.logits.argmax(1) == expected.logits.argmax(1)).mean() >= 0.85
    assert np.abs(got.logits - expected.logits).max() <= 0.1 * np.ptp(expected.logits)
    # The passes apart give what they give together.
    with load(out, graph="query", precision="int8") as query, load(out, graph="prompted", precision="int8") as prompted:
        weights = query.compute({"images": pixels})["prompt_weights"]
        assert weights == pytest.approx(got.prompt_weights, abs=0.02)
        apart = prompted.run(pixels, prompt_weights=weights).logits
        assert np.abs(apart - got.logits).max() <= 0.05 * np.ptp(got.logits)


@pytest.mark.slow
def test_openvino_agrees(kept_only, source):
    pytest.importorskip("openvino")
    out, _ = kept_only
    pixels = module.images_of(open_bundle(out), source, 1, 4).validation
    with load(out, threads=1, precision="int8") as runner:
        expected = runner.infer(pixels)
    with load(out, "openvino", threads=1, precision="int8") as runner:
        assert runner.describe()["precision"] == "int8"
        got = runner.infer(pixels)
    assert np.abs(got - expected).max() <= 0.1 * np.ptp(expected)


def test_a_changed_byte_is_refused(kept_only, tmp_path):
    shutil.copytree(kept_only[0], tmp_path / "copy")
    file = tmp_path / "copy" / "backbone.int8.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"backbone\.int8\.bin: changed since it was written"):
        open_bundle(tmp_path / "copy")


@pytest.mark.vnni
def test_images_of_the_last_task_only(exported, digits, tmp_path, lines):
    """They join the kept ranges, and give the accuracy of their task."""
    bundle = exported()
    result = calibrate(bundle, tmp_path / "out", digits(last_classes(bundle)), schemes=["int8-x86"])
    assert result["ranges"]["kept_tasks"] == 3 and result["ranges"]["tasks_with_images"] == [2]
    found = result["flavours"]["int8-x86"]
    assert found["before"]["per_task"][:2] == [None, None] and found["before"]["per_task"][2] is not None
    assert found["quantisation_forgetting"] is None and found["drop"]["average"] == found["drop"]["per_task"][2]
    assert warnings(lines) == []


@pytest.mark.vnni
def test_all_images(exported, source, tmp_path, lines):
    result = calibrate(exported(), tmp_path / "out", source, schemes=["int8-x86"])
    # Enough by themselves: kept ranges, with their guess of the drift, are left out.
    assert result["ranges"] == {"kept_tasks": 0, "images": 3 * 64, "tasks_with_images": [0, 1, 2]}
    found = result["flavours"]["int8-x86"]
    recorded = open_bundle(exported()).manifest.document["accuracy"]["per_task"]
    assert found["before"]["per_task"] == pytest.approx(recorded)
    with load(tmp_path / "out", precision="int8") as runner:
        from cdl_edge.measurement.evaluate import evaluate

        measured = evaluate(runner, source)
    assert found["after"]["per_task"] == pytest.approx(measured["per_task"])
    assert found["drop"]["average"] == pytest.approx(
        found["before"]["average_accuracy"] - found["after"]["average_accuracy"]
    )
    assert warnings(lines) == []


@pytest.mark.vnni
@pytest.mark.slow
def test_sources_of_ranges(exported, source, tmp_path):
    options = {"schemes": ["int8-x86"], "images": 40}
    kept = calibrate(exported(), tmp_path / "kept", source, "kept", **options)
    images = calibrate(exported(), tmp_path / "images", source, "images", **options)
    assert kept["ranges"] == {"kept_tasks": 3, "images": 0, "tasks_with_images": []}
    assert images["ranges"]["kept_tasks"] == 0 and images["ranges"]["images"] == 120
    scales = [sha256(tmp_path / f / "scales.int8-x86.bin") for f in ("kept", "images")]
    weights = [sha256(tmp_path / f / "backbone.int8.bin") for f in ("kept", "images")]
    assert scales[0] != scales[1] and weights[0] == weights[1]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("l2p", "dualprompt")]  # test_quantize has all of them


@pytest.mark.vnni
@pytest.mark.parametrize("learner", ["apt", *SLOW])
def test_every_learner(exported, tmp_path, learner):
    result = calibrate(exported(learner, epochs=2), tmp_path / "out", method="percentile", smooth=0.5)
    assert all(f["agreement"] >= 75 for f in result["flavours"].values())
    bundle = open_bundle(tmp_path / "out")
    images, logits = bundle.selftest()
    with load(bundle, precision="int8") as runner:
        assert np.abs(runner.infer(images) - logits).max() <= 0.15 * np.ptp(logits)


@pytest.mark.vnni
@pytest.mark.slow
def test_a_kd_head_of_another_kind(exported, tmp_path):
    result = calibrate(exported("coda", kd_head="normalised", epochs=2), tmp_path / "out", smooth=0.5)
    assert all(f["agreement"] >= 75 for f in result["flavours"].values())


@pytest.mark.vnni
@pytest.mark.quick("trt10")
@pytest.mark.parametrize("profile", ["trt10", "trt11", "openvino"])
def test_every_profile(exported, tmp_path, profile):
    result = calibrate(exported("coda", profile), tmp_path / "out")
    scheme = "int8-x86" if profile == "openvino" else "int8-trt"
    assert list(result["flavours"]) == [scheme]
    assert result["flavours"][scheme]["agreement"] >= 75
    assert {"student", "query", "prompted"} == {
        n.partition(".")[0] for n in open_bundle(tmp_path / "out").manifest.document["graphs"] if n.endswith(scheme)
    }


@pytest.mark.vnni
@pytest.mark.slow
def test_a_free_batch(exported, tmp_path):
    result = calibrate(exported(dynamic_batch=True), tmp_path / "out", schemes=["int8-x86"])
    assert result["flavours"]["int8-x86"]["agreement"] >= 75
    bundle = open_bundle(tmp_path / "out")
    images, _ = bundle.selftest()
    with load(bundle, precision="int8") as runner:
        assert runner.infer(images).shape == (4, 10)


# -- the gate ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def spoiled(exported, tmp_path):
    """A bundle whose kept ranges of one layer are a thousand times too small: quantised, it cannot answer."""
    kept = Ranges.load(exported() / "ranges.npz")
    spoilt = ("query.blocks.0.fc2", "prompted.blocks.0.fc2")
    tasks = [
        TaskRanges(t.images, {n: r.scaled(1e-3, 1e-3) if n in spoilt else r for n, r in t.tensors.items()}, t.drift)
        for t in kept.tasks
    ]
    return changed(exported(), tmp_path / "spoiled", ranges=Ranges(tuple(tasks)))


def loses(bundle, out, source):
    """Points that the worst task loses without a gate."""
    found = calibrate(bundle, out, source, "kept", schemes=["int8-x86"], smooth=None)["flavours"]["int8-x86"]
    return max(d for d in found["drop"]["per_task"])


@pytest.mark.vnni
def test_a_gate_that_is_met_by_leaving_a_layer_in_float(spoiled, source, tmp_path, lines):
    worst = loses(spoiled, tmp_path / "free", source)
    assert worst > 8
    result = calibrate(spoiled, tmp_path / "out", source, "kept", schemes=["int8-x86"], max_drop=worst / 2)
    found = result["flavours"]["int8-x86"]
    assert found["layers_float"] == ["blocks.0.fc2"] and found["layers_int8"] == 21
    assert next(iter(found["sensitivity"])) == "blocks.0.fc2" and len(found["sensitivity"]) == 22
    assert max(found["drop"]["per_task"]) <= worst / 2
    assert any("looking for layers" in line for line in lines)
    with load(tmp_path / "out", precision="int8") as runner:
        from cdl_edge.measurement.evaluate import evaluate

        assert evaluate(runner, source)["per_task"] == pytest.approx(found["after"]["per_task"])


@pytest.mark.vnni
@pytest.mark.slow
def test_schemes_that_leave_different_layers_in_float_stay_whole(spoiled, exported, source, tmp_path, monkeypatch):
    """They share the file of weights: one scheme's layers in float may not move the other's bytes."""
    found = iter([["blocks.0.fc2"], ["blocks.0.fc2", "blocks.0.qkv", "blocks.1.fc1"]])
    monkeypatch.setattr(trial, "search", lambda failing, order: (lambda s: (failing(s), s)[1])(next(found)))
    calibrate(spoiled, tmp_path / "out", source, "kept", max_drop=0.0, smooth=None)
    bundle = open_bundle(tmp_path / "out")
    schemes = bundle.manifest.document["quantisation"]["flavours"]
    assert [len(f["layers_float"]) for f in schemes.values()] == [1, 3]
    images, logits = bundle.selftest()
    for name, scheme in schemes.items():
        assert scheme["agreement"] >= 85
        path = bundle.graph(f"student.{name}")
        answers = module.CpuSession(path.read_bytes(), bundle.path, as_written=True).logits(images)
        assert np.abs(answers - logits).max() <= 0.15 * np.ptp(logits), name


@pytest.fixture
def missed(monkeypatch):
    """Options of a gate that nothing passes."""
    verdict = Verdict(["task 1 loses 9.00 points", "the average loses 4.00 points"], [])
    monkeypatch.setattr(trial.Gate, "judge", lambda *_: verdict)
    return {"max_drop": 1.0, "smooth": None}


@pytest.mark.vnni
@pytest.mark.quick("True")
@pytest.mark.parametrize("searching", [True, False])
def test_a_gate_that_is_missed_writes_nothing(missed, exported, source, tmp_path, searching):
    with pytest.raises(GateError) as error:
        calibrate(exported(), tmp_path / "new" / "out", source, schemes=["int8-x86"], searching=searching, **missed)
    text = str(error.value)
    for words in (
        "task 1 loses",
        "the average loses",
        "blocks.",
        "nothing was written",
    ):
        assert words in text, text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.vnni
def test_a_refusal_keeps_the_bundle_that_was_there(missed, kept_only, exported, source, tmp_path):
    shutil.copytree(kept_only[0], tmp_path / "out")
    before = sha256(tmp_path / "out" / "manifest.json")
    with pytest.raises(GateError):
        calibrate(exported(), tmp_path / "out", source, schemes=["int8-x86"], searching=False, replace=True, **missed)
    assert sha256(tmp_path / "out" / "manifest.json") == before
    open_bundle(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_gate_needs_images(exported, tmp_path):
    with pytest.raises(InputError, match="--max-drop needs images"):
        calibrate(exported(), tmp_path / "out", max_drop=1.0)
    assert list(tmp_path.iterdir()) == []


# -- the floor --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wild(exported, tmp_path_factory):
    """The same function with two channels behind each LayerNorm 200 times as large: 8 bits see little but them."""
    opened = open_bundle(exported())
    initial = {t.name: t for t in onnx.load(str(opened.graph()), load_external_data=False).graph.initializer}
    content = bytearray((opened.path / "backbone.bin").read_bytes())

    def scale(name: str, factor: float) -> None:
        """The channels, which are the first axis of what is kept as (in, out)."""
        tensor = initial.get(name)
        if tensor is None:
            return
        entries = {e.key: e.value for e in tensor.external_data}
        assert entries["location"] == "backbone.bin"
        values = read(tensor, opened.path).copy()
        values[[3, 20]] *= factor
        offset = int(entries["offset"])
        content[offset : offset + values.nbytes] = values.tobytes()

    for block in range(6):
        for norm, linears in (("norm1", "qkv"), ("norm2", ["fc1"])):
            if all(f"blocks.{block}.{name}.weight" in initial for name in linears):
                for part in ("weight", "bias"):
                    scale(f"blocks.{block}.{norm}.{part}", 200.0)
                for name in linears:
                    scale(f"blocks.{block}.{name}.weight", 1 / 200.0)
    files = {name: opened.path / name for name in opened.manifest.document["files"]}
    out = tmp_path_factory.mktemp("wild") / "bundle"
    write_bundle(out, opened.manifest.document, {**files, "backbone.bin": bytes(content)})
    return out


def fast_int8(monkeypatch):
    """The machine finds 8 bits twice as fast."""

    def time_candidates(bundle, images):
        made = {"fp32": 2.0} | ({"int8": 1.0} if "student.int8-x86" in bundle.manifest.document["graphs"] else {})
        return [timed(bundle, images, precision, ms) for precision, ms in made.items()]

    monkeypatch.setattr(module, "time_candidates", time_candidates)


@pytest.mark.vnni
def test_what_answers_otherwise_is_not_recommended(wild, source, tmp_path, lines, monkeypatch):
    fast_int8(monkeypatch)
    monkeypatch.setattr(floor, "AGREEMENT", 97.0)
    result = calibrate(wild, tmp_path / "out", source, "images", smooth="none", schemes=["int8-x86"])
    found = result["flavours"]["int8-x86"]
    assert found["agreement"] < 90 and "same answer as fp32 on" in found["shortfall"]
    assert result["recommended"] == {"backend": "onnxruntime", "precision": "fp32"}
    (refused,) = result["refused"]
    assert (refused["precision"], refused["reason"]) == ("int8", found["shortfall"])
    assert any(line.startswith("warning: int8-x86: the same answer") for line in lines)
    with load(tmp_path / "out") as runner:
        assert runner.describe()["precision"] == "fp32"
    with load(tmp_path / "out", precision="int8") as runner:  # who asks for it gets it
        assert runner.describe()["precision"] == "int8"


@pytest.mark.vnni
def test_smoothing_is_tried_before_layers_go_back_to_float(wild, source, tmp_path, monkeypatch):
    fast_int8(monkeypatch)
    options = {"data": source, "ranges": "images", "schemes": ["int8-x86"]}
    plain = calibrate(wild, tmp_path / "plain", smooth="none", **options)["flavours"]["int8-x86"]["agreement"]
    assert plain < 70
    monkeypatch.setattr(floor, "AGREEMENT", 75.0)
    result = calibrate(wild, tmp_path / "out", max_drop=90.0, **options)
    assert result["smooth"] in (0.5, 0.8)
    found = result["flavours"]["int8-x86"]
    assert found["layers_float"] == [] and found["shortfall"] is None and found["agreement"] >= 75
    assert result["recommended"] == {"backend": "onnxruntime", "precision": "int8"}


@pytest.mark.vnni
def test_where_8_bits_answer_like_fp32_nothing_is_smoothed(exported, source, tmp_path, monkeypatch):
    monkeypatch.setattr(floor, "AGREEMENT", 80.0)
    assert calibrate(exported(), tmp_path / "out", source, schemes=["int8-x86"])["smooth"] is None


@pytest.mark.vnni
def test_four_pictures_are_said_to_be_few(exported, tmp_path, lines):
    calibrate(exported(), tmp_path / "out", schemes=["int8-x86"])
    assert "warning: int8-x86: the answers of 4 images are compared; give more with --data" in lines


@pytest.mark.slow
def test_a_scheme_of_another_processor_has_a_floor_of_its_own(kept_only, tmp_path):
    """What x86 is recommended says nothing about a graph of ARM's that answers otherwise."""
    opened = open_bundle(kept_only[0])
    found = opened.manifest.document["quantisation"]
    advice = {"backend": "onnxruntime", "precision": "int8"}
    for shortfall, precision in ((None, "int8"), ("it answers otherwise", "fp32")):
        schemes = {n: {**f, "shortfall": shortfall} for n, f in found["flavours"].items()}
        changed(kept_only[0], tmp_path / precision, quantisation={**found, "recommended": advice, "flavours": schemes})
        with load(tmp_path / precision) as runner:
            assert runner.describe()["precision"] == precision


@pytest.mark.slow
def test_a_runtime_of_python_3_10(exported, tmp_path, monkeypatch):
    """ONNX Runtime 1.23 has no QuantizeLinear of opset 23: such a graph is not taken unasked, none is made for it."""
    fast_int8(monkeypatch)
    newer = here() is None
    result = calibrate(exported(), tmp_path / "new")
    assert {n: f["opset"] for n, f in result["flavours"].items()} == {"int8-x86": 23 if newer else 21, "int8-arm": 21}
    old = calibrate(exported(), tmp_path / "old", opset=21)
    assert {f["opset"] for f in old["flavours"].values()} == {21}
    monkeypatch.setattr("onnxruntime.__version__", "1.23.2")
    for folder, precision in (("new", "fp32" if newer else "int8"), ("old", "int8")):
        with load(tmp_path / folder) as runner:
            assert runner.describe()["precision"] == precision or INT8 == "int8-arm"
    monkeypatch.setattr(opset_module, "VERSION", "1.23.2")
    result = calibrate(exported(), tmp_path / "there")
    assert {f["opset"] for f in result["flavours"].values()} == {21}
    with pytest.raises(InputError, match="loads no newer one"):
        calibrate(exported(), tmp_path / "out", opset=23)


# -- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_to_take_ranges_from(exported, source, tmp_path):
    bare = changed(exported(), tmp_path / "bare", ranges=None)
    with pytest.raises(InputError, match="nothing to take ranges from"):
        calibrate(bare, tmp_path / "out")
    with pytest.raises(InputError, match="no ranges were kept"):
        calibrate(bare, tmp_path / "out", source, "kept")
    with pytest.raises(InputError, match="nothing to take ranges from"):
        calibrate(exported(), tmp_path / "out", ranges="images")
    assert not (tmp_path / "out").exists()
    result = calibrate(bare, tmp_path / "out", source, schemes=["int8-x86"])
    assert result["ranges"]["kept_tasks"] == 0


@pytest.mark.slow
def test_a_version_that_came_in_a_pack_has_left_its_ranges_in_the_workshop(exported, source, tmp_path):
    """The manifest names them, the file is not there: calibrating from images was refused all the same."""
    device = Path(shutil.copytree(exported(), tmp_path / "device"))
    (device / "ranges.npz").unlink()
    for options in ({}, {"data": source, "ranges": "kept"}):
        with pytest.raises(InputError, match="packs leave the ranges out: calibrate in the workshop"):
            calibrate(device, tmp_path / "out", **options)
    result = calibrate(device, tmp_path / "out", source, schemes=["int8-x86"])
    assert result["ranges"]["kept_tasks"] == 0 and result["ranges"]["images"] > 0
    written = open_bundle(tmp_path / "out").manifest
    assert written.ranges is None and "ranges.npz" not in written.files


def test_wrong_options(exported, image_folder, tmp_path):
    for options, words in (
        ({"ranges": "keept"}, "did you mean 'kept'"),
        ({"method": "msse"}, "did you mean 'mse'"),
        ({"schemes": ["int8-x68"]}, "did you mean 'int8-x86'"),
        ({"smooth": 1.5}, "0 to 1"),
        ({"smooth": "much"}, "0 to 1"),
        ({"max_drop": -1.0}, "0 or more points"),
        ({"opset": 22}, "opset of 8-bit graphs is out of range"),
        ({"limit_per_class": 3}, "--limit-per-class chooses among validation images"),
        ({"images": 3}, "--images counts training images of --data"),
        (
            {"data": f"folder:{image_folder(tmp_path / 'other', unsplit={'cat': 3, 'dog': 3})}"},
            "no class of the bundle",
        ),
    ):
        with pytest.raises(InputError, match=words):
            calibrate(exported(), tmp_path / "out", **options)
    with pytest.raises(InputError, match="no such bundle"):
        calibrate(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_for_ranges_alone(exported, source, tmp_path, lines):
    """One picture a class cannot be divided: it gives ranges, and the self-test is compared. It was a trace."""
    for name in "01":
        (tmp_path / "one" / name).mkdir(parents=True)
        picture = next((Path(source.removeprefix("folder:")) / "train" / name).iterdir())
        shutil.copy(picture, tmp_path / "one" / name)
    source = f"folder:{tmp_path / 'one'}"
    result = calibrate(exported(), tmp_path / "out", source, schemes=["int8-x86"])
    found = result["flavours"]["int8-x86"]
    assert (found["images"], found["after"], result["ranges"]["images"]) == (4, None, 2)
    assert f"warning: {source}: no validation image of the bundle's classes: no accuracy is measured" in lines
    with pytest.raises(InputError, match="no validation image of the bundle's classes"):
        calibrate(exported(), tmp_path / "gated", source, max_drop=1.0)


def test_what_is_no_bundle_is_not_replaced(exported, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not just a bundle"):
        calibrate(exported(), tmp_path / "precious", schemes=["int8-x86"])
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"


def test_a_constant_that_is_not_a_number(exported, source, tmp_path):
    opened = open_bundle(exported())
    files = {name: opened.path / name for name in opened.manifest.document["files"]}
    values = np.fromfile(opened.path / "backbone.bin", np.float32)
    values[len(values) // 2] = np.nan
    broken = write_bundle(tmp_path / "broken", opened.manifest.document, {**files, "backbone.bin": values.tobytes()})
    with pytest.raises(InputError, match="not finite"):
        calibrate(broken, tmp_path / "out", source)
    with pytest.raises(InputError, match="not finite"):
        calibrate(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.vnni
@pytest.mark.quick("inverted")
@pytest.mark.parametrize("change", [lambda x: 255 - x, lambda x: x // 200], ids=["inverted", "of another scale"])
def test_other_images_than_those_that_were_learnt(exported, digits, tmp_path, lines, change):
    recorded = open_bundle(exported()).manifest.document["accuracy"]["average_accuracy"]
    assert recorded > 25  # a student that has learnt something
    calibrate(exported(), tmp_path / "out", digits(change=change), schemes=["int8-x86"])
    (line,) = [line for line in lines if "fp32 has" in line]
    assert "preprocessing?" in line and f"{recorded:.1f} %" in line


@pytest.mark.vnni
def test_few_images(exported, source, tmp_path, lines):
    calibrate(exported(), tmp_path / "out", source, schemes=["int8-x86"], images=5)
    assert warnings(lines) == ["warning: ranges of 15 images only; 500 are the usual advice"]


@pytest.mark.vnni
def test_values_that_a_method_clips(exported, tmp_path, lines):
    """Two far groups of values: a range that a method takes leaves one outside."""
    kept = Ranges.load(exported() / "ranges.npz")
    name = "prompted.blocks.2.fc1"

    def with_tail(tensor):
        counts = tensor.histogram.counts.copy()
        filled = np.flatnonzero(counts)
        counts[filled[-1]] += counts.sum() // 20  # a twentieth of all values at the end
        return type(tensor)(
            type(tensor.histogram)(tensor.histogram.low, tensor.histogram.high, counts), tensor.channels
        )

    tasks = [
        TaskRanges(t.images, {n: with_tail(r) if n == name else r for n, r in t.tensors.items()}, t.drift)
        for t in kept.tasks
    ]
    bundle = changed(exported(), tmp_path / "tail", ranges=Ranges(tuple(tasks)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module, "choose_range", lambda histogram, method, symmetric: (histogram.low / 2, histogram.high / 2)
        )
        calibrate(bundle, tmp_path / "out", schemes=["int8-x86"])
    assert any(line.startswith(f"warning: {name}: ") and "are clipped by 'max'" in line for line in lines)
    lines.clear()
    calibrate(bundle, tmp_path / "out", schemes=["int8-x86"])
    assert warnings(lines) == []  # `max` clips nothing


# -- and then ---------------------------------------------------------------------------------------------------------


def test_what_is_recommended_is_followed_where_there_is_a_graph(exported, tmp_path, monkeypatch):
    fast_int8(monkeypatch)
    result = calibrate(exported(), tmp_path / "both", smooth=None)
    assert result["recommended"] == {"backend": "onnxruntime", "precision": "int8"}
    with load(tmp_path / "both") as runner:
        assert runner.describe()["precision"] == "int8"
    with load(tmp_path / "both", precision="fp32") as runner:
        assert runner.path.name == "student.onnx"
    calibrate(exported(), tmp_path / "other", schemes=["int8-trt"], smooth=None)
    with load(tmp_path / "other") as runner:  # this backend has no graph of 8 bits
        assert runner.describe()["precision"] == "fp32"
    with pytest.raises(InputError, match="no graph"):
        load(tmp_path / "other", precision="int8")


def test_latency_of_what_runs_here(kept_only):
    _, result = kept_only
    measured = {(e["backend"], e["precision"]): e for e in result["latency"]}
    assert {("onnxruntime", "fp32"), ("onnxruntime", "int8")} <= set(measured)
    assert result["latency"][0]["ratio"] == 1.0 and all(e["compute_ms"] > 0 for e in result["latency"])
    refused = {(e["backend"], e["precision"]) for e in result["refused"]}  # bytes that saturate, on an old processor
    allowed = [e for key, e in measured.items() if key not in refused]
    fastest = min(allowed, key=lambda e: e["ratio"])
    assert result["recommended"] == {"backend": fastest["backend"], "precision": fastest["precision"]}


@pytest.mark.slow
def test_calibrating_again_replaces_the_earlier_calibration(kept_only, tmp_path):
    """Also in its own place. The earlier schemes' graphs would read constants that are no longer theirs."""
    shutil.copytree(kept_only[0], tmp_path / "out")
    result = calibrate(tmp_path / "out", tmp_path / "out", smooth=0.5, schemes=["int8-arm"], replace=True)
    bundle = open_bundle(tmp_path / "out")
    assert [g for g in bundle.manifest.document["graphs"] if "int8" in g] == [
        "student.int8-arm", "query.int8-arm", "prompted.int8-arm",
    ]  # fmt: skip
    assert {f for f in bundle.manifest.document["files"] if "int8" in f} == {
        "backbone.int8.bin", "scales.int8-arm.bin", "student.int8-arm.onnx", "query.int8-arm.onnx",
        "prompted.int8-arm.onnx",
    }  # fmt: skip
    assert list(result["flavours"]) == ["int8-arm"]
    assert set(bundle.manifest.document["signatures"]) == set(bundle.manifest.document["graphs"])
    images, logits = bundle.selftest()
    path = bundle.graph("student.int8-arm")
    answers = module.CpuSession(path.read_bytes(), bundle.path, as_written=True).logits(images)
    assert np.abs(answers - logits).max() <= 0.15 * np.ptp(logits)


def test_ranges_of_the_graph_and_of_training_name_the_same_tensors(exported):
    bundle = open_bundle(exported())
    kept = Ranges.load(bundle.path / "ranges.npz")
    images, _ = bundle.selftest()
    assert set(collect(float_graph(bundle, "student"), images).tensors) <= set(kept.tasks[0].tensors)


@pytest.mark.vnni
def test_the_command(cli, exported, source, tmp_path, request):
    bundle, out = exported(), tmp_path / "out"
    done = cli("calibrate", bundle, "--out", out, "--data", source, "--scheme", "int8-x86", "--max-drop", 90, "--json")
    assert done.code == 0, done.err
    document = json.loads(json.dumps(done.json))
    assert document["bundle"] == str(out) and document["max_drop"] == 90.0
    assert document["flavours"] == open_bundle(out).manifest.document["quantisation"]["flavours"]
    plain = cli("calibrate", bundle, "--out", out, "--scheme", "int8-x86")
    assert plain.code == 0 and "layers in 8 bits" in plain.out and "next: cdl-edge profile" in plain.out
    missed = request.getfixturevalue("missed")
    before = sha256(out / "manifest.json")
    options = ("--scheme", "int8-x86", "--max-drop", missed["max_drop"], "--smooth", "none", "--no-search")
    refused = cli("calibrate", bundle, "--out", out, "--data", source, *options)
    assert refused.code == 1 and refused.out == ""
    assert "failed: int8-x86" in refused.err and "task 1 loses" in refused.err and "Traceback" not in refused.err
    cli("calibrate", bundle, "--out", out, "--max-drop", 1).assert_refused("--max-drop needs images")
    cli("calibrate", bundle, "--out", out, "--method", "mx").assert_refused("did you mean 'max'")
    assert sha256(out / "manifest.json") == before
