"""The whole way by commands: what each one prints, what it takes, and what it refuses."""

import json
import os
import shutil
import struct
import zlib

import pytest


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cli, fast_options):
    """(run folder, the answer of `train --json`)."""
    out = tmp_path_factory.mktemp("cli") / "run"
    answer = cli("train", *fast_options, "--learner", "l2p", "--out", out, "--json")
    assert answer.code == 0, answer.err
    return out, answer


@pytest.fixture(scope="module")
def bundle(trained, cli):
    """A bundle exported from that run, and the answer of `export --json`."""
    out = trained[0].parent / "bundle"
    answer = cli("export", trained[0], "--out", out, "--images", 20, "--json")
    assert answer.code == 0, answer.err
    return out, answer


@pytest.fixture
def broken(bundle, tmp_path):
    """A copy of the bundle to damage."""
    return shutil.copytree(bundle[0], tmp_path / "bundle")


def test_train_json(trained):
    out, answer = trained
    document = answer.json
    metrics = json.loads((out / "metrics.json").read_text())
    for side in ("teacher", "student"):
        assert set(document[side]) == {"average_accuracy", "forgetting", "matrix"}
        assert document[side]["matrix"] == metrics[side]["matrix"]
    assert document["run"] == str(out) and document["seconds"] > 0
    assert (out / "report.html").read_text().lower().startswith("<!doctype html>")
    assert answer.out.count("\n") == 1  # progress went to stderr
    assert "task 1/2 student" in answer.err


@pytest.mark.slow
def test_train_for_people(cli, tmp_path, fast_options):
    answer = cli("train", *fast_options, "--distill", "none", "--learner", "apt", "--out", tmp_path / "run")
    assert answer.code == 0
    assert "after task" in answer.out and "student accuracy %" in answer.out and "teacher" not in answer.out
    assert "average_accuracy: mean of the last row" in answer.out  # each number is defined where it is printed
    assert f"cdl-edge export {tmp_path / 'run'}" in answer.out


def test_the_frozen_baseline_stands_beside_the_result(cli, trained, tmp_path, monkeypatch):
    """Also where it is better, which a fake says here: then stderr warns, and stdout stays one JSON document."""
    from cdl_edge import api

    baseline = json.loads((trained[0] / "metrics.json").read_text())["baseline"]
    assert trained[1].json["baseline"] == baseline
    text = cli("evaluate", trained[0], "--data", "digits").out
    assert f"frozen baseline ({baseline['head']}) {baseline['average_accuracy']:.2f} %" in text
    metrics = json.loads((trained[0] / "metrics.json").read_text())
    for average, warned in ((0.0, False), (100.0, True)):
        metrics["baseline"] = {"head": "slda", "average_accuracy": average}
        monkeypatch.setattr(api, "train", lambda *_, **__: metrics)
        answer = cli("train", "--data", "digits", "--out", tmp_path / "x")
        assert f"frozen baseline (slda) {average:.2f} %" in answer.out
        assert ("warning: the student is" in answer.err and "--learner frozen" in answer.err) == warned
        answer = cli("train", "--data", "digits", "--out", tmp_path / "x", "--json")
        assert answer.json["baseline"] == metrics["baseline"] and ("warning" in answer.err) == warned
    metrics["baseline"] = None  # of an old run
    answer = cli("train", "--data", "digits", "--out", tmp_path / "x")
    assert answer.code == 0 and "frozen baseline unknown" in answer.out


def test_an_existing_run_is_refused(cli, trained, fast_options):
    before = contents(trained[0])
    cli("train", *fast_options, "--learner", "l2p", "--out", trained[0]).assert_refused("already", "--resume")
    cli("train", *fast_options, "--learner", "apt", "--out", trained[0], "--resume").assert_refused("learner='apt'")
    assert contents(trained[0]) == before


def test_evaluate_a_run(cli, trained):
    document = cli("evaluate", trained[0], "--data", "digits", "--json").json
    assert document["backend"] == "torch"
    assert document["average_accuracy"] == pytest.approx(trained[1].json["student"]["average_accuracy"])
    text = cli("evaluate", trained[0], "--data", "digits", "--limit-per-class", 2).out
    assert "20 images" in text and "average_accuracy: mean" in text
    cli("evaluate", trained[0], "--data", "folder:/nowhere").assert_refused("no such folder")
    for options in (["--backend", "openvino"], ["--precision", "int8"]):  # they were silently without effect
        cli("evaluate", trained[0], "--data", "digits", *options).assert_refused("a run is evaluated by torch in fp32")


def test_export_json(bundle):
    out, answer = bundle
    parity = answer.json["parity"]
    assert parity["max_abs_error"] <= parity["tolerance"] <= 1e-4 and parity["images"] == 20
    assert (out / "manifest.json").is_file()


def test_evaluate_a_bundle(cli, bundle, trained):
    document = cli("evaluate", bundle[0], "--data", "digits", "--json").json
    assert document["per_task"] == pytest.approx(trained[1].json["student"]["matrix"][-1])
    assert set(document) >= {"average_accuracy", "forgetting", "per_task", "images", "backend", "precision"}


def test_predict(cli, bundle, photo, tmp_path):
    one, two = photo(tmp_path / "a.png", 1), photo(tmp_path / "b.jpg", 2)
    document = cli("predict", bundle[0], one, two, "--json").json
    assert [p["image"] for p in document["predictions"]] == [str(one), str(two)]
    for p in document["predictions"]:
        assert p["label"] in "0123456789" and 0 < p["probability"] <= 1
        assert len(p["prompts"]["selected"]) == len(p["prompts"]["weights"]) == 5
    alone = cli("predict", bundle[0], two, "--json").json["predictions"][0]
    assert alone["probability"] == pytest.approx(document["predictions"][1]["probability"], abs=1e-6)
    text = cli("predict", bundle[0], one, "--top", 3).out
    assert text.startswith(f"{one}: ") and text.splitlines()[3].startswith("by onnxruntime in")


@pytest.mark.slow
def test_predict_of_what_is_no_image(cli, bundle, photo, tmp_path):
    good = photo(tmp_path / "a.png", 1)
    (tmp_path / "letter.jpg").write_text("dear aunt")
    (tmp_path / "empty.png").write_bytes(b"")
    reasons = {"letter.jpg": "not a readable image", "empty.png": "not a readable image", "missing.png": "no such file"}
    for name, reason in reasons.items():
        cli("predict", bundle[0], tmp_path / name, "--json").assert_refused(name, reason)
        answer = cli("predict", bundle[0], good, tmp_path / name, "--json")
        assert answer.code == 1 and f"left out: {tmp_path / name}: {reason}" in answer.err and "Errno" not in answer.err
        assert [p["image"] for p in answer.json["predictions"]] == [str(good)]
        assert [u["image"] for u in answer.json["unreadable"]] == [str(tmp_path / name)]
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    empty = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + empty)
    cli("predict", bundle[0], tmp_path / "huge.png").assert_refused("too large")


def test_predict_a_folder(cli, bundle, photo, tmp_path):
    root = tmp_path / "photos"
    files = [photo(root / "b" / "1.png", 1), photo(root / "a.png", 2), photo(root / "a" / "2.png", 3)]
    photo(root / ".trash" / "old.png", 4)
    (root / "notes.txt").write_text("x")
    answer = cli("predict", bundle[0], root, "--json")
    assert answer.code == 0 and answer.err.startswith("3 image(s), 2 left out (1 ")
    assert [p["image"] for p in answer.json["predictions"]] == sorted(map(str, files), key=lambda n: n.split("/"))
    assert answer.json["data"] == {"images": 3, "left_out": {"hidden": 1, "of type .txt": 1}}
    assert answer.json["unreadable"] == []
    os.rename(files[1], os.fsencode(root) + b"/caf\xe9.png")  # not UTF-8: of no account where nothing is kept of it
    answer = cli("predict", bundle[0], root, "--json")
    assert answer.code == 0 and len(answer.json["predictions"]) == 3
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.txt").write_text("x")
    cli("predict", bundle[0], tmp_path / "empty").assert_refused("no picture in this folder", "1 of type .txt")


def test_what_is_read_is_said_first_and_in_json(cli, bundle, trained, tmp_path):
    counts = json.loads((trained[0] / "metrics.json").read_text())["data"]
    first = f"digits: 10 classes, {counts['train']} train, {counts['validation']} validation, 0 left out"
    summary = {"classes": 10, "train": counts["train"], "validation": counts["validation"], "left_out": {}}
    assert trained[1].err.splitlines()[0] == bundle[1].err.splitlines()[0] == first
    assert trained[1].json["data"] == {"given": "digits", **summary} and bundle[1].json["data"] == summary
    for source in (trained[0], bundle[0]):
        answer = cli("evaluate", source, "--data", "digits", "--limit-per-class", 1, "--json")
        assert answer.err.splitlines()[:2] == [first, "scored: validation images"]
        assert answer.json["data"] == summary and answer.json["split"] == "validation images"


def test_a_folder_without_its_kind_gets_a_hint(cli, trained, tmp_path):
    (tmp_path / "photos").mkdir()
    cli("evaluate", trained[0], "--data", tmp_path / "photos").assert_refused(f"give folder:{tmp_path / 'photos'}")


def test_predict_within_a_task(cli, bundle, photo, tmp_path):
    one = photo(tmp_path / "a.png", 1)
    manifest = json.loads((bundle[0] / "manifest.json").read_text())
    for task in (1, 2):  # the first task is 1 for people, index 0 in JSON
        got = cli("predict", bundle[0], one, "--task", task, "--json").json["predictions"][0]
        assert got["index"] in manifest["tasks"][task - 1]
    cli("predict", bundle[0], one, "--task", 3).assert_refused("got:      task 3", "tasks 1 to 2")
    cli("predict", bundle[0], one, "--task", 0).assert_refused("0")
    cli("predict", bundle[0], one, "--task", -1).assert_refused("-1")


def test_the_text_says_what_answered_and_what_its_numbers_mean(cli, bundle, photo, tmp_path):
    one = photo(tmp_path / "a.png", 1)
    found = cli("predict", bundle[0], one, "--json").json
    (shown,) = found["predictions"]
    text = cli("predict", bundle[0], one).out
    assert f"task {shown['task'] + 1} " in text
    assert f"confidence {100 * shown['confidence']:.1f} %" in text
    assert "by onnxruntime in fp32" in text and (found["backend"], found["precision"]) == ("onnxruntime", "fp32")
    for word in ("probability", "confidence"):
        assert f"{word}: {found['definitions'][word]}" in text


def test_predict_by_policy(cli, bundle, photo, tmp_path):
    one = photo(tmp_path / "a.png", 1)
    way = {}
    for policy, extra in (("exact", ()), ("sticky", ()), ("pinned", ("--task", 2))):
        found = cli("predict", bundle[0], one, one, "--policy", policy, *extra, "--json").json["predictions"]
        way[policy] = [p["path"] for p in found]
        assert all(0 <= p["confidence"] <= 1 and p["unknown"] in (True, False) for p in found)
        assert all(sum(p["task_posterior"]) == pytest.approx(1) for p in found)
    assert way == {"exact": ["query"] * 2, "sticky": ["query", "reused"], "pinned": ["pinned"] * 2}
    cli("predict", bundle[0], one, "--policy", "pinned").assert_refused("pinned to what?")
    cli("predict", bundle[0], one, "--policy", "stiky").assert_refused("did you mean 'sticky'?")


@pytest.mark.slow
def test_profile_compare(cli, bundle, tmp_path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    for trace in (a, b):
        cli("profile", bundle[0], "--runs", 40, "--trace", trace)
    found = cli("profile", "compare", a, b, "--floor", "0.99", "--json").json
    assert found["verdict"] == "no difference" and found["a"]["n"] == found["b"]["n"] == 40
    for trace, ms in ((a, 1.0), (b, 4.0)):  # what a busy machine measures says nothing about the command
        report = json.loads(trace.read_text())
        trace.write_text(json.dumps({**report, "end_to_end_ms": [ms + 0.01 * (i % 7) for i in range(40)]}))
    assert cli("profile", "compare", a, b, "--floor", "0.1").out.splitlines()[2] == "B: slower"
    cli("profile", "compare", a, tmp_path / "none.json").assert_refused("no latency report", "No such file")
    assert "A B" in cli("profile", "compare", "--help").out.splitlines()[0]
    assert "profile compare A B" in cli("profile", "--help").out


def test_profile(cli, bundle, tmp_path):
    answer = cli("profile", bundle[0], "--runs", 5, "--threads", 1, "--json")
    document = answer.json
    for stage in ("end_to_end_ms", "preprocess_ms", "compute_ms"):
        assert set(document[stage]) >= {"p50", "p90", "p99", "mean", "std", "cv", "n"}
    assert isinstance(document["flags"], list)
    saved = tmp_path / "profile.json"
    saved.write_text(answer.out)
    page = tmp_path / "page.html"
    assert cli("report", bundle[0], "--profile", saved, "--out", page, "--json").json == {"report": str(page)}
    assert page.is_file()
    assert "end to end" in cli("profile", bundle[0], "--runs", 5).out


def test_inspect_validate_doctor(cli, bundle):
    assert cli("inspect", bundle[0], "--json").json["learner"] == "l2p"
    assert "task 2:" in cli("inspect", bundle[0]).out
    assert cli("validate", bundle[0], "--json").code == 0
    assert "valid" in cli("validate", bundle[0]).out
    assert cli("doctor", "--json").json["checks"]


def every_reader(cli, path, image):
    """All verbs that open a bundle."""
    yield "predict", cli("predict", path, image)
    yield "evaluate", cli("evaluate", path, "--data", "digits")
    yield "profile", cli("profile", path, "--runs", 2)
    yield "inspect", cli("inspect", path)
    yield "validate", cli("validate", path)


def refused_by_all(cli, path, image, *words):
    before = contents(path) if path.is_dir() else None
    for verb, answer in every_reader(cli, path, image):
        assert answer.code == 2, f"{verb}: {answer.out}"
        answer.assert_refused(*words)
    if before is not None:
        assert contents(path) == before


def test_a_bundle_that_is_none(cli, photo, tmp_path):
    image = photo(tmp_path / "a.png", 1)
    refused_by_all(cli, tmp_path / "nowhere", image, "nowhere")
    (tmp_path / "empty").mkdir()
    refused_by_all(cli, tmp_path / "empty", image, "manifest.json")


@pytest.mark.parametrize("name", ["student.onnx", "backbone.bin", "prompts.bin", "manifest.json"])
def test_a_truncated_bundle(cli, broken, photo, tmp_path, name):
    image = photo(tmp_path / "a.png", 1)
    (broken / name).write_bytes((broken / name).read_bytes()[:-7])
    refused_by_all(cli, broken, image, name)
    (broken / name).unlink()
    refused_by_all(cli, broken, image, name)


@pytest.mark.parametrize("name", ["student.onnx", "backbone.bin", "prompts.bin", "manifest.json"])
def test_one_changed_byte(cli, broken, photo, tmp_path, name):
    content = bytearray((broken / name).read_bytes())
    content[len(content) // 2] ^= 1
    (broken / name).write_bytes(content)
    for verb, answer in every_reader(cli, broken, photo(tmp_path / "a.png", 1)):
        assert answer.code == 2 and "Traceback" not in answer.err, (verb, answer.err)


def test_a_newer_schema(cli, broken, photo, tmp_path):
    text = (broken / "manifest.json").read_text()
    (broken / "manifest.json").write_text(text.replace('"schema": 2', '"schema": 99', 1))
    refused_by_all(cli, broken, photo(tmp_path / "a.png", 1), "99", "upgrade")


def test_export_refuses_what_is_no_run(cli, tmp_path, trained):
    out = tmp_path / "bundle"
    cli("export", tmp_path, "--out", out).assert_refused("not a finished run")
    run = shutil.copytree(trained[0], tmp_path / "run")
    (run / "metrics.json").unlink()
    cli("export", run, "--out", out).assert_refused("not a finished run", "--resume")
    cli("export", trained[0], "--out", out, "--profile", "otr").assert_refused("ort")
    assert not out.exists()


def test_report_refuses(cli, tmp_path, trained):
    out = tmp_path / "page.html"
    cli("report", tmp_path, "--out", out).assert_refused("neither a finished run nor a bundle")
    again = shutil.copytree(trained[0], tmp_path / "again")
    cli("report", again, trained[0], "--out", out).assert_refused("a page is about one run", str(again))
    assert not out.exists()


@pytest.mark.slow
def test_training_and_export_say_what_they_do(cli, trained, tmp_path):
    assert "images/s, about " in trained[1].err and " left" in trained[1].err
    said = cli("export", trained[0], "--out", tmp_path / "bundle", "--images", 20, "--json").err
    for words in ("student: compared with the trained student on 20 images", "accuracy of the graph: ", "confidence"):
        assert words in said
