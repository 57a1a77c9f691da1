"""What was enrolled, on top of a new version from the workshop; renamed; exported for others."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cdl_edge import api, heads
from cdl_edge.artefacts.bundle import open_bundle, write_bundle
from cdl_edge.artefacts.manifest import Enrolment
from cdl_edge.class_statistics import ClassStatistics
from cdl_edge.data import load_dataset
from cdl_edge.errors import GateError, InputError
from cdl_edge.updates import enrolment_checks as checks
from cdl_edge.updates import enrolment_version, store
from cdl_edge.updates.enrol import enrol, export_enrolments, judge, remove, rename
from cdl_edge.updates.enrolment_record import Enrolled
from cdl_edge.updates.enrolment_version import LIFT, present_head
from cdl_edge.updates.packs import create, install, listed, rollback

YELLOW, GREY = (220, 200, 30), (128, 128, 128)


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def newer(make_teachable, colours):
    """make(name, classes of the new version, **options) -> bundle and pack from the plain three classes to it."""

    def make(name="newer", classes=None, **options):
        classes = classes or {**colours.CLASSES, "grey": GREY}
        return make_teachable(name, classes, created="2099-01-01T00:00:00Z", **options)

    return make


def label(bundle, frame):
    return api.predict(bundle, [frame], threads=1)["predictions"][0]["label"]


def taught(make_teachable, colours, **options):
    device = make_teachable("device", **options)
    enrol(device, "yellow", colours.pictures(YELLOW, 6), threads=1)
    return device


def test_an_evaluation_says_which_pictures_were_enrolled(make_teachable, colours, tmp_path):
    """Also on a device that was taught by the other's pack; in a sample only those of the sample."""
    photos, device = tmp_path / "photos", make_teachable("device")
    for name, colour in {**colours.CLASSES, "yellow": YELLOW}.items():
        (photos / name).mkdir(parents=True)
        for i, frame in enumerate(colours.pictures(colour, 6)):
            (photos / name / f"{i}.png").write_bytes(colours.png(frame))
    enrol(device, "yellow", sorted((photos / "yellow").iterdir())[:3], threads=1)
    enrol(device, "yellow", colours.pictures(YELLOW, 6)[3:5], threads=1)  # frames: as the PNG that is kept of them
    export_enrolments(device, tmp_path / "out")
    api.install_pack(tmp_path / "out" / "enrolments.pack", fleet := make_teachable("fleet"), threads=1)
    for bundle, limit, count in ((device, None, "5 of the 24"), (fleet, None, "5 of the 24"), (device, 2, "of the 8")):
        lines: list[str] = []
        api.evaluate(bundle, f"folder:{photos}", limit, threads=1, split="all", say=lines.append)
        (line,) = [line for line in lines if "were enrolled here" in line]
        assert line.startswith("warning: ") and count in line and "(yellow/" in line
    lines = []
    api.evaluate(remove(device, "yellow", threads=1)["bundle"], f"folder:{photos}", split="all", say=lines.append)
    assert not [line for line in lines if "enrolled" in line]


def test_calibration_is_of_a_version_from_the_workshop(make_teachable, colours, tmp_path):
    """A copy of the enrolled one alone would leave nothing to enrol on."""
    device = taught(make_teachable, colours)
    workshop = device / "versions" / str(open_bundle(device).manifest.enrolled_on)
    for given in (device, open_bundle(device).path):
        with pytest.raises(InputError, match="classes were enrolled") as error:
            api.calibrate(given, tmp_path / "eight")
        assert f"cdl-edge calibrate {workshop} --out" in str(error.value) and not (tmp_path / "eight").exists()
    assert not open_bundle(workshop).manifest.enrolments


def test_digests_that_another_device_knows_are_taken_over():
    """Enrolments of earlier versions have none: an evaluation would not know their pictures."""
    entry, x = Enrolment("red", 2, "2026-11-28T00:00:00Z"), np.ones((2, 3), np.float32)
    known = dataclasses.replace(entry, digests=("0" * 16, "1" * 16))
    for mine, theirs in ((entry, known), (known, entry)):
        assert Enrolled((mine,), x).joined(Enrolled((theirs,), x)).entries == (known,)


# -- a pack from the workshop ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("head", ["slda", "ranpac"])
def test_what_was_enrolled_survives_a_pack(make_teachable, newer, colours, tmp_path, head):
    device = taught(make_teachable, colours, head=head)
    before = open_bundle(device).manifest
    create(make_teachable("old", head=head), newer(head=head), tmp_path / "update.pack")
    result = install(tmp_path / "update.pack", device, threads=1)
    after = open_bundle(device)
    assert after.classes == ("red", "green", "blue", "grey", "yellow") and after.tasks[-1] == (4,)
    assert result["carried"]["names"] == ["yellow"] and not result["carried"]["recomputed"]
    assert result["carried"]["old_classes"]["means"]["drop"] == 0 and json.dumps(result)
    assert (result["previous"], result["version"]) == (before.version, after.manifest.version)
    assert after.manifest.enrolled_on == open_bundle(tmp_path / "newer").manifest.version
    assert {label(device, p) for p in colours.pictures(YELLOW, 4, seed=9)} == {"yellow"}
    assert {label(device, p) for p in colours.pictures(GREY, 4, seed=9)} == {"grey"}
    # It is the version that a device has which enrols on the new one.
    fresh = Path(shutil.copytree(tmp_path / "newer", tmp_path / "fresh"))
    enrol(fresh, "yellow", colours.pictures(YELLOW, 6), threads=1)
    assert np.abs(present_head(open_bundle(fresh)).weight - present_head(after).weight).max() < 1e-6
    remove(device, "yellow", threads=1)
    assert open_bundle(device).manifest.version == open_bundle(tmp_path / "newer").manifest.version


def test_a_rollback_after_such_a_pack_goes_to_what_ran(make_teachable, newer, colours, tmp_path):
    device = taught(make_teachable, colours)
    before = open_bundle(device).manifest.version
    create(make_teachable("old"), newer(), tmp_path / "update.pack")
    install(tmp_path / "update.pack", device, threads=1)
    assert rollback(device, threads=1)["version"] == before
    assert remove(device, "yellow", threads=1)["classes"] == 3, "its workshop version is kept too"
    with pytest.raises(InputError, match="a replay"):
        install(tmp_path / "update.pack", device, threads=1)


def test_the_next_pack_is_made_for_the_workshop_s_version(make_teachable, newer, colours, tmp_path):
    device = taught(make_teachable, colours)
    first = newer()
    create(make_teachable("old"), first, tmp_path / "1.pack")
    install(tmp_path / "1.pack", device, threads=1)
    with pytest.raises(InputError, match="already installed"):
        install(tmp_path / "1.pack", device, threads=1)
    more = {**colours.CLASSES, "grey": GREY, "yellow": YELLOW}
    create(first, newer("newest", more), tmp_path / "2.pack", sequence=1 << 40)
    result = install(tmp_path / "2.pack", device, threads=1)
    assert result["carried"]["names"] == ["yellow"]
    assert open_bundle(device).classes == tuple(more), "a class that the workshop knows now is one class"
    assert remove(device, "yellow", threads=1)["classes"] == 5
    assert len(listed(device)) <= 6


def test_an_accent_that_is_a_character_of_its_own_makes_no_second_class(make_teachable, newer, colours, tmp_path):
    """The workshop's folder may come from another system than the keyboard that the class was enrolled with."""
    device = make_teachable("device")
    enrol(device, "g\u00fcn", colours.pictures(YELLOW, 4), threads=1)
    create(make_teachable("old"), newer(classes={**colours.CLASSES, "gu\u0308n": YELLOW}), tmp_path / "update.pack")
    assert install(tmp_path / "update.pack", device, threads=1)["carried"]["names"] == ["gu\u0308n"]
    assert open_bundle(device).classes == (*colours.CLASSES, "gu\u0308n")
    assert remove(device, "g\u00fcn", threads=1)["images"] == 4


def test_features_that_are_others_are_refused_or_computed_again(make_teachable, newer, colours, contents, tmp_path):
    device = make_teachable("device")
    other = newer(gain=0.4)
    create(make_teachable("old"), other, tmp_path / "update.pack")
    kept = Path(shutil.copytree(device, tmp_path / "kept"))
    enrol(device, "yellow", colours.pictures(YELLOW, 6), threads=1)
    before = contents(device / "versions"), open_bundle(device).path
    with pytest.raises(InputError, match="yellow: its features are others"):
        install(tmp_path / "update.pack", device, threads=1)
    assert (contents(device / "versions"), open_bundle(device).path) == before
    enrol(kept, "yellow", colours.pictures(YELLOW, 6), threads=1, keep_pictures=True)
    result = install(tmp_path / "update.pack", kept, threads=1)
    assert result["carried"]["recomputed"]
    enrol(other, "yellow", colours.pictures(YELLOW, 6), threads=1)
    heads_ = [present_head(open_bundle(b)).weight for b in (kept, other)]
    assert np.abs(heads_[0] - heads_[1]).max() < 1e-6
    assert api.enrolments(kept)[0]["kept"] == 6


def test_a_version_that_can_take_nothing_is_refused(make_teachable, newer, colours, contents, tmp_path):
    device = taught(make_teachable, colours)
    create(make_teachable("old"), newer(training={"config": {"head": "learned"}}), tmp_path / "update.pack")
    before = contents(device / "versions"), open_bundle(device).path
    with pytest.raises(InputError, match="yellow: a head that cannot be made on a device"):
        install(tmp_path / "update.pack", device, threads=1)
    assert (contents(device / "versions"), open_bundle(device).path) == before


def test_a_self_test_that_fails_on_top_leaves_everything(
    make_teachable, newer, colours, contents, tmp_path, monkeypatch
):
    device = taught(make_teachable, colours)
    create(make_teachable("old"), newer(), tmp_path / "update.pack")
    before = contents(device / "versions"), open_bundle(device).path
    monkeypatch.setattr(
        "cdl_edge.updates.enrolment_version.answers", lambda head, map, x: np.zeros((len(x), len(head.weight)))
    )
    with pytest.raises(GateError):
        install(tmp_path / "update.pack", device, threads=1)
    assert (contents(device / "versions"), open_bundle(device).path) == before


def test_a_pack_for_another_version_is_still_refused(make_teachable, newer, colours, tmp_path):
    device = taught(make_teachable, colours)
    other = make_teachable("other", {**colours.CLASSES, "black": (0, 0, 0)})
    create(other, newer(), tmp_path / "update.pack")
    with pytest.raises(InputError, match="made for another version"):
        install(tmp_path / "update.pack", device, threads=1)


def expected_head(held, frames, colours, ridge=None):
    """ranpac with a class of these frames, which count as the 20 pictures of every other class."""
    count, h = len(frames), held.map.apply(colours.features(frames))
    total = held + ClassStatistics.of(held.map, colours.features(frames), np.zeros(count, int), ("yellow",))
    times = 20 / count
    sums = total.sums.copy()
    sums[-1] *= times ** (1 + LIFT)
    weighted = dataclasses.replace(total, sums=sums, moment=held.moment + times * h.T @ h)
    return heads.ranpac(weighted, heads.best_ridge(total) if ridge is None else ridge)


# -- the ridge ---------------------------------------------------------------------------------------------------------


def test_the_ridge_of_the_workshop_is_taken(make_teachable, colours, monkeypatch):
    device = make_teachable("device", head="ranpac")
    manifest = open_bundle(device).manifest
    monkeypatch.setattr(enrolment_version, "best_ridge", None)
    frames = colours.pictures(YELLOW, 6, side=8)
    enrol(device, "yellow", frames, threads=1)
    held = ClassStatistics.load(open_bundle(device).path / "statistics.npz").ordered(manifest.classes)
    expected = expected_head(held, frames, colours, manifest.ridge)
    assert np.abs(present_head(open_bundle(device)).weight - expected.weight).max() < 1e-6
    assert expected.chosen == manifest.ridge == heads.best_ridge(held)


@pytest.mark.parametrize("count", [6, 16])
def test_it_is_chosen_again_where_it_is_not_known_or_was_for_others(make_teachable, colours, tmp_path, count):
    device = make_teachable("device", head="ranpac", **({"ridge": None} if count == 6 else {}))
    frames = colours.pictures(YELLOW, count, side=8)
    enrol(device, "yellow", frames, threads=1)
    held = ClassStatistics.load(open_bundle(device).path / "statistics.npz").ordered(("red", "green", "blue"))
    expected = expected_head(held, frames, colours)
    assert np.abs(present_head(open_bundle(device)).weight - expected.weight).max() < 1e-6


# -- judged, in spite of it --------------------------------------------------------------------------------------------


def test_judged_without_a_change(make_teachable, colours, contents):
    device = make_teachable("device")
    before = contents(device)
    found = judge(device, "yellow", colours.pictures(YELLOW, 10), threads=1)
    assert found["leave_one_out"]["enough"] and contents(device) == before
    result = enrol(device, "yellow", colours.pictures(YELLOW, 10), threads=1)
    same = ("leave_one_out", "old_classes", "classes", "pictures", "images", "new_class")
    assert {k: result[k] for k in same} == {k: found[k] for k in same}
    with pytest.raises(InputError, match="too few"):
        judge(device, "grey", colours.pictures(GREY, 2), threads=1)


def test_anyway(make_teachable, colours):
    device = make_teachable("device")
    with pytest.raises(InputError, match="too few"):
        enrol(device, "yellow", colours.pictures(YELLOW, 1), threads=1)
    enrol(device, "yellow", colours.pictures(YELLOW, 1), threads=1, anyway=True)
    assert label(device, colours.pictures(YELLOW, 1, seed=3)[0]) == "yellow"
    scarlet = colours.pictures(colours.CLASSES["red"], 5, seed=8)
    with pytest.raises(InputError, match="look like the class 'red'"):
        enrol(device, "scarlet", scarlet, threads=1, max_drop=100)
    enrol(device, "scarlet", scarlet, threads=1, max_drop=100, anyway=True)
    with pytest.raises(InputError, match="nearly the same"):
        enrol(device, "scarlet", scarlet[:1], threads=1, max_drop=100, anyway=True)


# -- another name ------------------------------------------------------------------------------------------------------


def test_renamed(make_teachable, colours):
    device = taught(make_teachable, colours)
    before, frame = open_bundle(device), colours.pictures(YELLOW, 1, seed=3)[0]
    result = rename(device, "yellow", "sun", threads=1)
    after = open_bundle(device)
    assert (result["before"], result["name"], result["images"]) == ("yellow", "sun", 6)
    assert after.classes == ("red", "green", "blue", "sun") and label(device, frame) == "sun"
    assert np.array_equal(present_head(after).weight, present_head(before).weight)
    assert remove(device, "sun", threads=1)["version"] == before.manifest.enrolled_on


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("orange", "sun", "no class 'orange' was enrolled"),
        ("yellow", "red", "there is a class 'red' already"),
        ("red", "scarlet", "was named in training"),
        ("yellow", " sun", "cannot be the name"),
    ],
)
def test_names_that_are_refused(make_teachable, colours, contents, old, new, words):
    device = taught(make_teachable, colours)
    enrol(device, "red", colours.pictures(colours.CLASSES["red"], 3, seed=5), threads=1)
    before = contents(device)
    with pytest.raises(InputError, match=words):
        rename(device, old, new, threads=1)
    assert contents(device) == before


# -- for others --------------------------------------------------------------------------------------------------------


def test_exported_for_the_fleet_and_the_workshop(make_teachable, colours, tmp_path, cli):
    device, fleet = make_teachable("device"), make_teachable("fleet")
    (tmp_path / "new").mkdir()
    for i, frame in enumerate(colours.pictures(YELLOW, 7)):
        (tmp_path / "new" / f"{i}.png").write_bytes(colours.png(frame))
    enrol(device, "yellow", [tmp_path / "new"], threads=1, keep_pictures=True)
    enrol(device, "grey", colours.pictures(GREY, 5), threads=1)
    answer = cli("enrol", "export", device, tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    result = answer.json
    assert result["classes"] == {"yellow": {"images": 7, "kept": 7}, "grey": {"images": 5, "kept": 0}}
    photos = load_dataset(f"folder:{tmp_path / 'out' / 'photos'}")
    assert photos.classes == ["yellow"] or tuple(photos.classes) == ("yellow",)
    assert (len(photos.train.labels), len(photos.val.labels)) == (6, 1)
    given = {p.read_bytes() for p in (tmp_path / "new").iterdir()}
    assert {p.read_bytes() for p in (tmp_path / "out" / "photos").rglob("*.png")} == given
    held = ClassStatistics.load(tmp_path / "out" / "statistics.npz")
    assert held.classes == ("yellow", "grey") and held.counts.tolist() == [7, 5]
    # The pack teaches another device the same, without a picture.
    api.install_pack(tmp_path / "out" / "enrolments.pack", fleet, threads=1)
    mine, theirs = open_bundle(device), open_bundle(fleet)
    assert theirs.classes == mine.classes and not (theirs.path / "pictures").exists()
    assert np.array_equal(present_head(theirs).weight, present_head(mine).weight)
    assert [e["kept"] for e in api.enrolments(fleet)] == [0, 0]
    assert remove(fleet, "yellow", threads=1)["classes"] == 4
    cli("enrol", "export", device, tmp_path / "out").assert_refused("is there already")


def test_kept_pictures_go_with_their_class_and_into_no_pack(make_teachable, colours, tmp_path):
    device = make_teachable("device")
    workshop = Path(shutil.copytree(device, tmp_path / "workshop"))
    enrol(device, "yellow", colours.pictures(YELLOW, 4), threads=1, keep_pictures=True)
    enrol(device, "grey", colours.pictures(GREY, 4), threads=1, keep_pictures=True)
    assert len(list((open_bundle(device).path / "pictures").iterdir())) == 8
    with pytest.raises(InputError, match="would give them to every device"):
        create(workshop, device, tmp_path / "leak.pack")
    remove(device, "grey", threads=1)
    opened = open_bundle(device)
    (entry,) = opened.manifest.enrolments
    assert sorted(p.name for p in (opened.path / "pictures").iterdir()) == sorted(
        n.split("/")[1] for n in entry.pictures
    )


def test_too_much_to_keep(make_teachable, colours, contents, monkeypatch):
    monkeypatch.setattr("cdl_edge.updates.enrolment_record.KEPT_BYTES", 500)
    device = make_teachable("device")
    before = contents(device)
    with pytest.raises(InputError, match="too many pictures to keep"):
        enrol(device, "yellow", colours.pictures(YELLOW, 6), threads=1, keep_pictures=True)
    assert contents(device) == before


@pytest.mark.parametrize("names", [["student.onnx"] * 4, ["pictures/no.png"] * 4, ["pictures/a.png"]])
def test_records_of_pictures_that_are_none(make_teachable, colours, tmp_path, names):
    device = make_teachable("device")
    enrol(device, "yellow", colours.pictures(YELLOW, 4), threads=1)
    opened = open_bundle(device)
    files = {name: opened.path / name for name in opened.manifest.files}
    entry = {"name": "yellow", "images": 4, "at": "now", "pictures": names}
    with pytest.raises(InputError, match="pictures"):
        write_bundle(tmp_path / "odd", {**opened.manifest.document, "enrolments": [entry]}, files)


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "a\\b"])
def test_a_class_that_no_folder_can_have_the_name_of(make_teachable, colours, tmp_path, name):
    device = make_teachable("device")
    enrol(device, name, colours.pictures(YELLOW, 4), threads=1)
    with pytest.raises(InputError, match="enrol rename"):
        export_enrolments(device, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_to_export(make_teachable, tmp_path):
    with pytest.raises(InputError, match="nothing was enrolled"):
        export_enrolments(make_teachable("device"), tmp_path / "out")


def test_as_many_answers_after_a_removal(make_teachable, colours, tmp_path):
    """Enrol and remove: the head, and what it says of 500 pictures, is that of before."""
    device = make_teachable("device", head="ranpac")
    rng = np.random.default_rng(0)
    asked = list(rng.integers(0, 256, (500, 8, 8, 3), dtype=np.uint8))
    enrol(device, "yellow", colours.pictures(YELLOW, 5), threads=1)
    first = present_head(open_bundle(device)).weight
    before = [p["label"] for p in api.predict(device, asked, threads=1)["predictions"]]
    enrol(device, "grey", colours.pictures(GREY, 5), threads=1, max_drop=100)
    remove(device, "grey", threads=1)
    assert np.abs(present_head(open_bundle(device)).weight - first).max() <= 1e-6
    assert [p["label"] for p in api.predict(device, asked, threads=1)["predictions"]] == before


def test_a_damaged_older_version_stops_nothing(make_teachable, colours):
    device = taught(make_teachable, colours)
    first = open_bundle(device)
    enrol(device, "yellow", colours.pictures(YELLOW, 3, seed=7), threads=1)
    (first.path / "manifest.json").write_text("{")
    enrol(device, "yellow", colours.pictures(YELLOW, 3, seed=8), threads=1)
    assert open_bundle(device).manifest.enrolled_on in {v.version for v in store.read_store(device)[1].versions}


def test_a_class_of_few_is_judged_as_the_head_without_each_picture_would(make_teachable, colours):
    """Left out in closed form with weights, against heads that were made without the picture at the same weights."""
    device = make_teachable("device", head="ranpac")
    frames = colours.pictures(YELLOW, 6, side=8)
    bundle = open_bundle(device)
    held = ClassStatistics.load(bundle.path / "statistics.npz").ordered(bundle.classes)
    x = colours.features(frames)
    entry = Enrolment("yellow", 6, "now")
    enrolled = Enrolled((), x[:0]).plus(entry, x)
    made = enrolment_version.made(bundle, held, enrolled, "yellow")
    h, times = held.map.apply(x), 20 / 6
    assert made.target == pytest.approx(times**LIFT)
    expected, own = [], []
    for i in range(6):
        rest = np.arange(6) != i
        moment = held.moment + times * h[rest].T @ h[rest]
        sums = np.concatenate([held.sums, times ** (1 + LIFT) * h[rest].sum(0, keepdims=True)])
        weight = np.linalg.solve(moment + made.head.chosen * np.eye(len(moment)), sums.T).T
        expected.append(made.total.classes[int((h[i] @ weight.T).argmax())])
        own.append(6.0 * h[i] @ weight[-1])
    found = checks.left_out("ranpac", made.total, made.head, h, "yellow", made.leverages, made.target)
    assert found == expected
    direct = (h @ made.head.weight[-1] - 6.0 * made.target * made.leverages) / (1 - made.leverages)
    assert np.abs(direct - own).max() < 1e-6
