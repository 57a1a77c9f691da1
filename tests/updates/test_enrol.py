"""A class from a few pictures on the device: exact, all or nothing, and back again."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shlex
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from cdl_edge import api, heads
from cdl_edge.artefacts.bundle import Bundle, open_bundle, write_bundle
from cdl_edge.calibrate.calibrate_bundle import calibrate
from cdl_edge.class_statistics import ClassStatistics
from cdl_edge.errors import GateError, InputError
from cdl_edge.export.export_bundle import export
from cdl_edge.heads import CLOSED_FORM, feature_map
from cdl_edge.runtime import load, selftest
from cdl_edge.train.config import TrainConfig
from cdl_edge.train.loop import train
from cdl_edge.updates import enrol as module
from cdl_edge.updates import enrolment_checks as checks
from cdl_edge.updates.enrol import enrol, enrolments, remove
from cdl_edge.updates.enrolment_record import Enrolled
from cdl_edge.updates.enrolment_version import LIFT, present_head
from cdl_edge.updates.packs import listed, rollback

PICTURES = np.random.default_rng(5).integers(0, 256, (100, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def taught(tmp_path_factory, short_training, image_folder):
    """make(head): a bundle of three classes (mostly red, green, blue) in two tasks, with their statistics."""
    root, made = tmp_path_factory.mktemp("taught"), {}
    image_folder(root / "photos", train=dict.fromkeys("rgb", 12), val=dict.fromkeys("rgb", 6))

    def make(head="ranpac"):
        if head not in made:
            options = {**short_training, "tasks": 2, "batch_size": 8, "head": head, "learner": "frozen"}
            train(TrainConfig(f"folder:{root / 'photos'}", str(root / head), **options), quiet=True)
            made[head] = root / f"bundle-{head}"
            export(root / head, made[head], images=12, statistics=True)
        return made[head]

    return make


@pytest.fixture
def device(taught, tmp_path, monkeypatch):
    """A copy of that bundle; tiny random networks see all pictures as more alike than real ones do."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(checks, "DUPLICATE", 1 - 1e-9)
    return Path(shutil.copytree(taught(), tmp_path / "device"))


def frames(count, seed=0, kind="stripes"):
    """RGB frames of a class that is not there: black and white stripes, or checks."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        frame = rng.integers(0, 40, (20, 20, 3))
        frame[:, :: 2 if kind == "stripes" else 3] += 200
        if kind == "checks":
            frame[::3] += rng.integers(120, 200)
        made.append(np.clip(frame, 0, 255).astype(np.uint8))
    return made


def more_of(colour, count, seed=77):
    """Frames of a class that is there."""
    rng = np.random.default_rng(seed)
    base = rng.integers(20, 120, (count, 1, 1, 3))
    base[..., colour] = 220
    return list(np.clip(base + rng.integers(-20, 20, (count, 20, 24, 3)), 0, 255).astype(np.uint8))


def logits(bundle, precision="fp32"):
    with load(bundle, "onnxruntime", threads=1, precision=precision) as runner:
        return np.concatenate([runner.infer(picture[None]) for picture in PICTURES])


def test_a_class_is_learnt_and_answered(device):
    workshop = open_bundle(device)
    before = workshop.manifest.version
    result = enrol(device, "stripes", frames(10), threads=1)
    assert result["new_class"] and (result["images"], result["pictures"], result["classes"]) == (10, 10, 4)
    assert result["previous"] == before != result["version"] == open_bundle(device).manifest.version
    assert result["leave_one_out"]["accuracy"] >= 80 and "pictures" in result["leave_one_out"]["sentence"]
    assert result["old_classes"]["selftest"] == {"images": 4, "changed": 0, "drop": 0.0}
    assert (result["class"], result["enough"]) == ("stripes", result["leave_one_out"]["enough"])
    assert result["leave_one_out_accuracy"] == result["leave_one_out"]["accuracy"]
    assert result["old_classes_drop"] == max(0.0, result["old_classes"]["means"]["drop"])
    assert result["data"] == {"images": 10, "left_out": {}}
    answers = api.predict(device, frames(6, seed=9), threads=1)["predictions"]
    assert sum(p["label"] == "stripes" for p in answers) >= 5
    opened = open_bundle(device)
    assert opened.classes == (*workshop.classes, "stripes") and opened.tasks == (*workshop.tasks, (3,))
    (entry,) = opened.manifest.enrolments
    assert (entry.name, entry.images) == ("stripes", 10) and enrolments(device) == [
        {"name": "stripes", "images": 10, "at": entry.at, "kept": 0}
    ]
    assert json.dumps(result)


def test_the_new_head_is_that_of_all_pictures_together(device):
    enrol(device, "stripes", frames(6), threads=1)
    enrol(device, "checks", frames(5, kind="checks"), max_drop=100, threads=1)
    enrol(device, "stripes", frames(4, seed=3), max_drop=100, threads=1)
    opened = open_bundle(device)
    assert [e.images for e in opened.manifest.enrolments] == [6, 5, 4]
    workshop = ClassStatistics.load(opened.path / "statistics.npz")
    assert workshop.counts.tolist() == [12, 12, 12], "the workshop's statistics stay as they are"
    pictures = [*frames(6), *frames(5, kind="checks"), *frames(4, seed=3)]
    with load(opened, threads=1) as runner:
        read = [opened.preprocessing.read(p)[None] for p in pictures]
        x = np.concatenate([runner.compute({"images": p})["features"] for p in read])
    labels = np.array([3] * 6 + [4] * 5 + [3] * 4)
    names = (*workshop.classes, "stripes", "checks")
    kept = dataclasses.replace(
        workshop,
        classes=names,
        counts=np.append(workshop.counts, [0, 0]),
        sums=np.concatenate([workshop.sums, np.zeros((2, 64))]),
    )
    total = kept + ClassStatistics.of(kept.map, x, labels, names)
    # Of the median class of the workshop there are 12: each of the 10 and of the 5 counts for more than one.
    more = np.concatenate([[12 / 10 - 1] * 6, [12 / 5 - 1] * 5, [12 / 10 - 1] * 4])
    h = kept.map.apply(x)
    sums = total.sums + np.stack([(more * (labels == c)) @ h for c in range(5)])
    sums *= np.array([[1], [1], [1], [(12 / 10) ** LIFT], [(12 / 5) ** LIFT]])
    weighted = dataclasses.replace(total, sums=sums, moment=total.moment + (h.T * more) @ h)
    made = heads.ranpac(weighted, heads.best_ridge(total))
    assert np.abs(present_head(opened).weight - made.weight).max() < 1e-6
    expected = kept.map.apply(_features(opened)) @ made.weight.T + made.bias
    assert np.abs(logits(device) - expected).max() < 1e-3


def _features(opened: Bundle):
    with load(opened, threads=1) as runner:
        return np.concatenate([runner.compute({"images": picture[None]})["features"] for picture in PICTURES])


def test_removed_is_as_never_enrolled(device):
    first, answers = present_head(open_bundle(device)), logits(device)
    enrol(device, "stripes", frames(6), threads=1)
    result = remove(device, "stripes", threads=1)
    assert (result["images"], result["classes"]) == (6, 3) and enrolments(device) == []
    assert np.abs(present_head(open_bundle(device)).weight - first.weight).max() <= 1e-6
    assert np.array_equal(logits(device), answers)


@pytest.mark.slow
def test_one_of_two_is_removed(device, tmp_path):
    other = Path(shutil.copytree(device, tmp_path / "other"))
    enrol(device, "stripes", frames(6), threads=1)
    enrol(device, "checks", frames(5, kind="checks"), max_drop=100, threads=1)
    result = remove(device, "stripes", threads=1)
    enrol(other, "checks", frames(5, kind="checks"), max_drop=100, threads=1)
    assert result["classes"] == 4 and open_bundle(device).classes == open_bundle(other).classes
    heads = [present_head(open_bundle(b)) for b in (device, other)]
    assert np.abs(heads[0].weight - heads[1].weight).max() <= 1e-6
    assert np.array_equal(logits(device), logits(other))


def test_a_known_class_gets_more_pictures(device):
    classes = open_bundle(device).classes
    result = enrol(device, "r", more_of(0, 4), max_drop=100, threads=1)
    opened = open_bundle(device)
    assert not result["new_class"] and result["pictures"] == 16 and opened.classes == classes
    assert len(opened.tasks) == 2 and [e.images for e in opened.manifest.enrolments] == [4]
    assert remove(device, "r", threads=1)["classes"] == 3


@pytest.mark.slow
def test_the_workshop_version_is_kept_however_many_follow(device):
    workshop = open_bundle(device).manifest.version
    for i in range(4):
        enrol(device, "stripes", frames(3, seed=i), max_drop=100, threads=1)
    versions = [v["version"] for v in listed(device)]
    assert versions[0] == workshop and len(versions) == 4
    rollback(device, threads=1)
    assert sum(e["images"] for e in enrolments(device)) == 9


@pytest.mark.slow
def test_other_graphs_get_the_class_too(taught, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "DUPLICATE", 1 - 1e-9)
    monkeypatch.setitem(selftest.LIMITS, "int8", 0.6)  # of 16 channels, 8 bits are coarse
    calibrate(taught(), tmp_path / "device", schemes=["int8-x86"], searching=False)
    enrol(tmp_path / "device", "stripes", frames(8), threads=1)
    opened = open_bundle(tmp_path / "device")
    int8 = [name for name in opened.manifest.graphs if "int8" in name]
    assert int8 and opened.signature(int8[0]).outputs.keys() == {"features", "logits"}
    coarse, fine = logits(opened, "int8"), logits(opened)
    assert coarse.shape == fine.shape == (100, 4)
    assert np.abs(coarse - fine).mean() < 0.3 * np.ptp(fine)


def test_features_cost_one_name(taught, tmp_path):
    given = open_bundle(taught())
    export(taught().parent / "ranpac", tmp_path / "plain", images=8)
    plain = open_bundle(tmp_path / "plain")
    assert set(plain.signature().outputs) == {"logits"} and given.signature().outputs["features"] == (1, 5 * 16)
    nodes = [[n.op_type for n in onnx.load(b.graph(), load_external_data=False).graph.node] for b in (plain, given)]
    assert sorted(nodes[1]) == sorted([*nodes[0], "Identity"])
    for name in ("backbone.bin", "prompts.bin"):
        assert plain.manifest.files[name] == given.manifest.files[name]
    with pytest.raises(InputError, match="no class statistics"):
        enrol(plain.path, "stripes", frames(5))


def altered(bundle, out, **fields):
    """The same bundle with another manifest."""
    opened = open_bundle(bundle)
    files = {name: opened.path / name for name in opened.manifest.files}
    write_bundle(out, {**opened.manifest.document, **fields}, files)
    return out


def test_a_version_without_the_workshop_s_is_refused(device, tmp_path):
    enrol(device, "stripes", frames(4), threads=1)
    alone = Path(shutil.copytree(open_bundle(device).path, tmp_path / "alone"))
    assert api.predict(alone, frames(1), threads=1)["predictions"]
    with pytest.raises(InputError, match="is not kept here"):
        remove(alone, "stripes", threads=1)


@pytest.mark.parametrize("damage", [{"images": 0}, {"images": -4}, {"images": 5}, {"name": ""}])
def test_records_that_contradict_the_features(device, tmp_path, damage):
    enrol(device, "stripes", frames(4), threads=1)
    entry = {"name": "stripes", "images": 4, "at": "whole"}
    whole = open_bundle(device).path

    def read(records):
        return Enrolled.of(open_bundle(altered(whole, tmp_path / records[0]["at"], enrolments=records)))

    assert len(read([entry]).features) == 4
    with pytest.raises(InputError, match=r"enrolments\[0\]|not whole"):
        read([entry | damage | {"at": "damaged"}])


def test_heads_that_no_device_can_make_are_refused(taught, tmp_path):
    training = dict(open_bundle(taught()).manifest.document["training"])
    training["config"] = {**training["config"], "head": "aligned"}
    with pytest.raises(InputError, match="cannot be made on a device"):
        enrol(altered(taught(), tmp_path / "aligned", training=training), "stripes", frames(5))


def test_graphs_of_an_earlier_release_are_refused(taught, tmp_path):
    document = open_bundle(taught()).manifest.document
    outputs = {"logits": document["outputs"]["logits"]}
    signatures = {"student": {**document["signatures"]["student"], "outputs": outputs}}
    old = altered(taught(), tmp_path / "old", outputs=outputs, signatures=signatures)
    with pytest.raises(InputError, match="does not give features"):
        enrol(old, "stripes", frames(5))


@pytest.mark.parametrize(
    ("name", "pictures", "words"),
    [
        ("stripes", frames(2), "too few pictures"),
        ("stripes", ["missing.jpg"], "missing.jpg: no such file"),
        ("stripes", [*frames(3), frames(3)[1]], "nearly the same"),
        ("scarlet", more_of(0, 8), "look like the class 'r'"),
        (" stripes", frames(5), "cannot be the name"),
        ("stripes", [*frames(3), b"no picture"], "not a readable image"),
    ],
)
def test_refused_and_nothing_has_changed(device, contents, name, pictures, words):
    before = contents(device)
    with pytest.raises(InputError, match=words):
        enrol(device, name, pictures, threads=1)
    assert contents(device) == before


def test_a_picture_that_was_enrolled_before_is_refused(device):
    enrol(device, "stripes", frames(4), threads=1)
    with pytest.raises(InputError, match="enrolled before"):
        enrol(device, "stripes", [*frames(3, seed=8), frames(4)[2]], threads=1)
    assert [e["images"] for e in enrolments(device)] == [4]


@pytest.mark.slow
def test_an_accent_makes_no_second_class(make_teachable, colours):
    """In two characters or in one: both look the same, and were two classes."""
    device, one, two = make_teachable(), "th\xe9", "the\u0301"
    yellow, purple = (colours.pictures(c, 8) for c in ((220, 220, 40), (140, 40, 160)))
    enrol(device, two, yellow[:4], threads=1)
    assert enrol(device, one, yellow[4:], threads=1)["new_class"] is False
    assert {e["name"] for e in enrolments(device)} == {one}
    enrol(device, "tea", purple, threads=1)
    with pytest.raises(InputError, match="there is a class"):
        module.rename(device, "tea", two, threads=1)
    assert remove(device, two, threads=1)["images"] == 8
    with pytest.raises(InputError, match="cannot be the name"):
        enrol(device, "th\ufffd", yellow, threads=1)


def test_a_loss_of_the_others_is_refused(device, contents, monkeypatch):
    before = contents(device)
    worse = {"selftest": {"images": 4, "changed": 1, "drop": 25.0}, "means": {"drop": 0.0}}
    monkeypatch.setattr(module, "losses", lambda *_: worse)
    with pytest.raises(GateError, match="would lose too much"):
        enrol(device, "stripes", frames(5), threads=1)
    assert contents(device) == before
    enrol(device, "stripes", frames(5), max_drop=25, threads=1)


def test_removing_what_was_never_enrolled(device, contents):
    before = contents(device)
    with pytest.raises(InputError, match="nothing was enrolled"):
        remove(device, "r")
    assert contents(device) == before


@pytest.mark.parametrize("kind", CLOSED_FORM)
def test_left_out_one_by_one(kind):
    rng = np.random.default_rng(1)
    map = feature_map(kind, ("class",), 12, 40)
    centres = rng.normal(size=(4, 12))
    labels = np.repeat(range(4), [30, 25, 20, 8])
    x = centres[labels] + 1.6 * rng.normal(size=(83, 12))
    total = ClassStatistics.of(map, x, labels, "abcd")
    make = CLOSED_FORM[kind][1]
    head, h, leverages = make(total), map.apply(x[labels == 3]), np.zeros(8)
    if kind == "ranpac":
        head, leverages = heads.ridge_regression(total, heads.best_ridge(total), h)
    expected = []
    for i in np.flatnonzero(labels == 3):
        rest = np.arange(len(x)) != i
        part = ClassStatistics.of(map, x[rest], labels[rest], "abcd")
        if kind == "ranpac":  # at the ridge of all pictures
            weight = np.linalg.solve(part.moment + head.chosen * np.eye(40), part.sums.T).T
            answers = map.apply(x[i : i + 1]) @ weight.T
        else:
            made = make(part)
            answers = map.apply(x[i : i + 1]) @ made.weight.T + made.bias
        expected.append("abcd"[int(answers.argmax())])
    assert checks.left_out(kind, total, head, h, "d", leverages) == expected
    assert 0 < expected.count("d") < 8, "a test that tells answers apart"


def test_what_the_others_lose():
    map = feature_map("slda", ("class",), 3)
    before = ClassStatistics.of(map, np.eye(3)[[0, 0, 1, 1]], np.array([0, 0, 1, 1]), "ab")
    after = before + ClassStatistics.of(map, np.eye(3)[[2, 2]], np.zeros(2, np.int64), "c")
    old = checks.LinearMap(np.eye(3)[:2], np.zeros(2), 0.0)
    new = checks.LinearMap(np.array([[1.0, 0, 0], [0, 1, 0], [0, 2, 3]]), np.zeros(3), 0.0)
    kept = np.eye(3)[[0, 0, 0, 1]]
    found = checks.losses(before, old, after, new, [kept @ old.weight.T, kept @ new.weight.T])
    assert found["selftest"] == {"images": 4, "changed": 1, "drop": 25.0}
    assert found["means"] == {"classes": 2, "recognised_before": 2, "recognised_after": 1, "drop": 50.0}
    with pytest.raises(GateError, match=r"50\.00 points"):
        checks.check_losses("c", found, 49.0)
    checks.check_losses("c", found, 50.0)


@pytest.mark.parametrize(("right", "count", "words"), [(10, 10, "Enough"), (3, 3, "A few more"), (4, 10, "Not enough")])
def test_are_there_enough(right, count, words):
    found = checks.enough(right, count)
    assert found["sentence"].startswith(words) and found["enough"] == (words == "Enough")
    assert found["low"] <= found["accuracy"] <= found["high"]


def test_the_way_back_can_be_copied(device, cli, tmp_path, photo):
    """A class of two words is what the page of the command shows."""
    for i in range(4):
        photo(tmp_path / "new" / f"{i}.png", seed=i, colour=0)
    more = ("--max-drop", 100, "--anyway", "--threads", 1)
    found = cli("enrol", device, "green kiwi", tmp_path / "new", *more)
    assert found.code == 0
    assert shlex.split(found.out.splitlines()[-1])[1:] == ["cdl-edge", "enrol", "remove", str(device), "green kiwi"]


def test_on_the_command_line(device, cli, tmp_path, photo):
    pictures = [photo(tmp_path / "new" / f"{i}.png", seed=i, colour=0) for i in range(4)]
    found = cli("enrol", device, "r", tmp_path / "new", "--max-drop", 100, "--threads", 1, "--json")
    result = json.loads(found.out.splitlines()[-1])
    assert found.code == 0 and (result["images"], result["pictures"]) == (len(pictures), 16)
    assert "r: 4 picture(s)" in cli("enrol", "list", device).out
    assert "4 picture(s) taken out" in cli("enrol", "remove", device, "r", "--threads", 1).out
    assert "nothing was enrolled" in cli("enrol", "list", device).out
    cli("enrol", device, "new", pictures[0]).assert_refused("too few pictures")


@pytest.mark.slow
def test_killed_at_random_moments(device, tmp_path):
    def child(action):
        number = os.fork()
        if number == 0:
            try:
                action()
                os._exit(0)
            finally:
                os._exit(9)
        return number

    rng, known = random.Random(0), {open_bundle(device).manifest.version: 0}
    begin = time.perf_counter()
    once = Path(shutil.copytree(device, tmp_path / "once"))
    os.waitpid(child(lambda: enrol(once, "stripes", frames(6), threads=1)), 0)
    longest = time.perf_counter() - begin
    seen = []
    for i in range(12):
        bundle = Path(shutil.copytree(device, tmp_path / f"killed{i}"))
        number = child(lambda b=bundle: enrol(b, "stripes", frames(6), threads=1))
        time.sleep(rng.uniform(0, longest))
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        opened = open_bundle(bundle)  # every hash
        seen.append(opened.manifest.version not in known)
        assert len(enrolments(bundle)) == seen[-1] and logits(bundle).shape == (100, 3 + seen[-1])
        if not seen[-1]:
            enrol(bundle, "stripes", frames(6), threads=1)
        assert open_bundle(bundle).classes[-1] == "stripes"
        shutil.rmtree(bundle)
    assert False in seen
