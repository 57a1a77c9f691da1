"""Packs, enrolments, removals and rollbacks in unusual orders, and stores that were copied without their link."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from cdl_edge import api
from cdl_edge.artefacts.bundle import CURRENT, STATE, open_bundle
from cdl_edge.errors import InputError
from cdl_edge.updates import enrolment_checks, packs, store
from cdl_edge.updates.enrol import enrol, export_enrolments, remove, rename
from cdl_edge.updates.fleet import pull, push
from cdl_edge.updates.packs import create, install, listed, rollback
from cdl_edge.updates.store import Installed, State

YELLOW, GREY = (220, 200, 30), (128, 128, 128)


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def teach(colours):
    """teach(bundle, name, colour, seed=0): enrol a class of six pictures."""

    def enrolled(bundle, name, colour, seed=0):
        enrol(bundle, name, colours.pictures(colour, 6, seed=seed), threads=1, max_drop=100)

    return enrolled


@pytest.fixture
def update(make_teachable, colours, tmp_path):
    """A pack from the version of the workshop to its next one, which knows grey too."""
    new = make_teachable("newer", {**colours.CLASSES, "grey": GREY}, created="2099-01-01T00:00:00Z")
    create(make_teachable("old"), new, tmp_path / "update.pack")
    return tmp_path / "update.pack"


def version(bundle):
    return open_bundle(bundle).manifest.version


def kept(bundle):
    return [v["version"] for v in listed(bundle)]


# -- 8 bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_8_bits_reach_a_device_that_has_learnt_a_class(cli, fast_options, colours, tmp_path, monkeypatch):
    """The enrolled version is refused, and what the message says to do gives 8 bits with the class in them."""
    monkeypatch.setattr(enrolment_checks, "DUPLICATE", 1 - 1e-7)  # the tiny student tells colours apart, and no more
    for words in (
        ["train", *fast_options, "--learner", "frozen", "--out", tmp_path / "run"],
        ["export", tmp_path / "run", "--out", tmp_path / "device", "--images", 20, "--statistics"],
    ):
        assert (answer := cli(*words)).code == 0, answer.err
    device = tmp_path / "device"
    enrol(device, "red", colours.different((220, 40, 40), 6), threads=1, max_drop=100, anyway=True)
    refused = cli("calibrate", device, "--out", tmp_path / "eight")
    assert refused.code == 2 and "classes were enrolled" in refused.err and not (tmp_path / "eight").exists()
    workshop = device / "versions" / str(open_bundle(device).manifest.enrolled_on)
    assert f"versions/{workshop.name}" in refused.err
    assert (answer := cli("calibrate", workshop, "--out", tmp_path / "eight")).code == 0, answer.err
    create(workshop, tmp_path / "eight", tmp_path / "update.pack")
    install(tmp_path / "update.pack", device, threads=1)
    assert "student.int8-x86" in open_bundle(device).manifest.graphs and open_bundle(device).classes[-1] == "red"
    remove(device, "red", threads=1)
    assert version(device) == version(tmp_path / "eight")


# -- back again --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_rollback_runs_a_version_that_never_ran(make_teachable, teach, update):
    device = make_teachable("device")
    first = version(device)
    teach(device, "yellow", YELLOW)
    taught = version(device)
    install(update, device, threads=1)
    below = open_bundle(device).manifest.enrolled_on
    assert rollback(device, threads=1)["version"] == taught
    assert rollback(device, threads=1)["version"] == first, "not the new version, which was just left"
    with pytest.raises(InputError, match="nothing to go back to"):
        rollback(device, threads=1)
    assert rollback(device, to=below, threads=1)["version"] == below, "who names it gets it"
    assert rollback(device, threads=1)["version"] != below


@pytest.mark.slow
def test_two_versions_that_ran_are_kept_beside_those_that_classes_were_enrolled_on(make_teachable, teach, update):
    device = make_teachable("device")
    ran = [version(device)]
    for seed in range(2):
        teach(device, "yellow", YELLOW, seed)
        ran.append(version(device))
    install(update, device, threads=1)
    assert [rollback(device, threads=1)["version"] for _ in range(2)] == [ran[2], ran[1]]


@pytest.mark.slow
def test_a_rollback_undoes_the_removal_of_the_last_class(make_teachable, teach, update):
    device = make_teachable("device")
    install(update, device, threads=1)
    below = version(device)
    teach(device, "yellow", YELLOW)
    taught = version(device)
    assert remove(device, "yellow", threads=1)["version"] == below
    assert rollback(device, threads=1)["version"] == taught, "not the version before the workshop's update"
    teach(device, "yellow", YELLOW, seed=1)
    assert below in kept(device), "what classes were enrolled on stays"
    assert rollback(device, threads=1)["version"] == taught
    assert remove(device, "yellow", threads=1)["version"] == below


def test_digits_that_name_two_versions(monkeypatch):
    versions = tuple(Installed(name * 4, 1, "now") for name in ("a1a1", "a1b2", "c3c3"))
    state = SimpleNamespace(state=State("c3c3" * 4, versions, 1))
    monkeypatch.setattr(packs, "locked", lambda path: contextlib.nullcontext(state))
    for to in ("a", "a1"):
        with pytest.raises(InputError, match=r"(?s)more than one version begins with 'a.*a1a1.*a1b2"):
            rollback("device", to)
    with pytest.raises(InputError, match="no other version 'c3'"):
        rollback("device", "c3")


# -- two packs of what was enrolled ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_was_enrolled_later_is_newer(make_teachable, teach, tmp_path):
    device, fleet = make_teachable("device"), make_teachable("fleet")
    base = version(device)
    for i, (name, colour) in enumerate({"yellow": YELLOW, "grey": GREY}.items()):
        teach(device, name, colour)
        made = export_enrolments(device, tmp_path / f"{i}")
        assert install(made["pack"]["pack"], fleet, threads=1)["carried"] is None
        assert version(fleet) == made["pack"]["to"][:16]
    assert open_bundle(fleet).classes == open_bundle(device).classes
    assert remove(fleet, "yellow", threads=1)["classes"] == 4
    assert remove(fleet, "grey", threads=1)["version"] == base


@pytest.mark.slow
def test_the_workshop_s_next_version_comes_on_top_of_such_packs(make_teachable, teach, update, tmp_path):
    device, fleet = make_teachable("device"), make_teachable("fleet")
    teach(device, "yellow", YELLOW)
    install(export_enrolments(device, tmp_path / "out")["pack"]["pack"], fleet, threads=1)
    assert install(update, fleet, threads=1)["carried"]["names"] == ["yellow"]


@pytest.mark.slow
def test_a_device_that_has_learnt_itself_takes_what_others_have_learnt(make_teachable, teach, colours, tmp_path):
    device, own = make_teachable("device"), make_teachable("own")
    teach(own, "grey", GREY)
    for i, seed in enumerate((0, 1)):
        teach(device, "yellow", YELLOW, seed)
        result = install(export_enrolments(device, tmp_path / f"{i}")["pack"]["pack"], own, threads=1)
        assert (result["carried"]["names"], result["carried"]["images"]) == (["grey"], 6) and json.dumps(result)
    assert open_bundle(own).classes == ("red", "green", "blue", "yellow", "grey")
    assert [(e["name"], e["images"]) for e in api.enrolments(own)] == [("yellow", 6), ("yellow", 6), ("grey", 6)]
    shown = [colours.pictures(colour, 1, seed=9)[0] for colour in (YELLOW, GREY)]
    assert [p["label"] for p in api.predict(own, shown, threads=1)["predictions"]] == ["yellow", "grey"]
    # As if all of it had been enrolled in one place.
    for name in ("yellow", "grey"):
        remove(own, name, threads=1)
    assert version(own) == open_bundle(device).manifest.enrolled_on


@pytest.mark.slow
@pytest.mark.parametrize("keep", [False, True])
def test_the_device_that_has_taught_the_others_pulls_too(make_teachable, make_registry, colours, tmp_path, keep):
    """From the same repository, by the same timer: there is nothing to do, and its pictures stay."""
    device, place = make_teachable("device"), f"{make_registry().at}/fruit/camera"
    enrol(device, "yellow", colours.pictures(YELLOW, 6), threads=1, keep_pictures=keep)
    before = version(device)
    push(export_enrolments(device, tmp_path / "out")["pack"]["pack"], place)
    for _ in range(2):
        assert pull(place, device, threads=1)["version"] == before
    assert [e["kept"] for e in api.enrolments(device)] == [6 * keep]
    assert version(device) == before and len(kept(device)) == 2


@pytest.mark.slow
def test_kept_pictures_stay_where_a_pack_has_the_same_ones(make_teachable, teach, colours, tmp_path):
    device, own = make_teachable("device"), make_teachable("own")
    enrol(own, "yellow", colours.pictures(YELLOW, 6), threads=1, keep_pictures=True)
    for name, colour in (("sun", YELLOW), ("grey", GREY)):
        teach(device, name, colour)
    assert install(export_enrolments(device, tmp_path / "out")["pack"]["pack"], own, threads=1)["carried"]
    assert [(e["name"], e["kept"]) for e in api.enrolments(own)] == [("sun", 6), ("grey", 0)]
    assert len(list((open_bundle(own).path / "pictures").iterdir())) == 6


@pytest.mark.slow
def test_pictures_under_another_name_are_not_learnt_twice(make_teachable, teach, tmp_path):
    device, fleet = make_teachable("device"), make_teachable("fleet")
    teach(device, "yellow", YELLOW)
    install(export_enrolments(device, tmp_path / "0")["pack"]["pack"], fleet, threads=1)
    rename(device, "yellow", "sun", threads=1)
    pack = export_enrolments(device, tmp_path / "1", sequence=1 << 40)["pack"]["pack"]
    assert install(pack, fleet, threads=1)["carried"] is None
    assert open_bundle(fleet).classes == ("red", "green", "blue", "sun")


def test_no_pack_to_classes_on_a_version_that_devices_lack(make_teachable, teach, update, tmp_path):
    newer = tmp_path / "newer"
    teach(newer, "yellow", YELLOW)
    with pytest.raises(InputError, match="were enrolled on a version that devices with"):
        create(tmp_path / "old", newer, tmp_path / "two-steps.pack")
    assert not (tmp_path / "two-steps.pack").exists()


# -- copied ------------------------------------------------------------------------------------------------------------


def followed(device: Path, copy: Path) -> None:
    shutil.copytree(device, copy)  # as scp -r and zip -r do


def dropped(device: Path, copy: Path) -> None:
    shutil.copytree(device, copy, ignore=lambda _, names: {CURRENT} & set(names))  # as rsync -r does


def spelt_out(device: Path, copy: Path) -> None:
    dropped(device, copy)
    (copy / CURRENT).write_text(os.readlink(device / CURRENT))  # as file systems without links do


@pytest.mark.quick("followed")
@pytest.mark.parametrize("copied", [followed, dropped, spelt_out])
def test_a_store_that_was_copied_without_its_link(make_teachable, teach, contents, colours, tmp_path, copied):
    device = make_teachable("device")
    teach(device, "yellow", YELLOW)
    assert (device / "manifest.json").is_file(), "the files of the plain bundle, which would be taken for what runs"
    copied(device, tmp_path / "copy")
    before = contents(tmp_path / "copy")
    for command in (open_bundle, listed, lambda b: enrol(b, "grey", colours.pictures(GREY, 6), threads=1)):
        with pytest.raises(InputError, match="the link to the version that runs was lost"):
            command(tmp_path / "copy")
    assert contents(tmp_path / "copy") == before, "nothing was removed"
    shutil.copytree(device, tmp_path / "good", symlinks=True)
    assert open_bundle(tmp_path / "good").classes[-1] == "yellow"


def test_a_store_without_its_versions(make_teachable, teach):
    device = make_teachable("device")
    teach(device, "yellow", YELLOW)
    shutil.rmtree(device / "versions")
    with pytest.raises(InputError, match="names no version of this store"):
        open_bundle(device)
    assert (device / STATE).is_file()


@pytest.mark.parametrize("inside", [CURRENT, "versions"])
def test_a_version_is_no_store_of_its_own(make_teachable, teach, contents, colours, inside):
    device = make_teachable("device")
    teach(device, "yellow", YELLOW)
    path = device / CURRENT if inside == CURRENT else open_bundle(device).path
    before = contents(device)
    with pytest.raises(InputError, match=f"(?s)one version of a store.*name that: {device}"):
        teach(path, "grey", GREY)
    with pytest.raises(InputError, match="one version of a store"):
        rollback(path, threads=1)
    assert contents(device) == before
    assert open_bundle(path).classes == open_bundle(device).classes, "it may be read"


# -- engines -----------------------------------------------------------------------------------------------------------


def test_the_next_version_has_the_engines_to_refit(make_version, tmp_path):
    bundle, names = make_version(0), []
    for i in range(2):
        create(make_version(i) if i else bundle, make_version(i + 1), tmp_path / f"{i}.pack")
    (bundle / "engines").mkdir()
    for name in ("student.fp16.orin.engine", "student.fp16.orin.engine.json"):
        (bundle / "engines" / name).write_text(name)
        names.append(name)
    for i in range(2):
        install(tmp_path / f"{i}.pack", bundle, threads=1)
        found = open_bundle(bundle).path / "engines"
        assert sorted(p.name for p in found.iterdir()) == names
        assert all((found / name).read_text() == name for name in names)
    assert not (bundle / "engines").exists(), "they have gone into the version that they were built for"
    assert all((bundle / "versions" / v / "engines" / names[0]).is_file() for v in kept(bundle))


def test_an_engine_that_cannot_be_handed_on_stops_nothing(make_version, tmp_path, monkeypatch):
    bundle = make_version(0)
    create(bundle, make_version(1), tmp_path / "update.pack")
    (bundle / "engines").mkdir()
    (bundle / "engines" / "student.engine").write_text("whole")
    real = store.link

    def link(source, target):
        if source.suffix == ".engine":
            target.parent.mkdir(exist_ok=True)
            target.write_text("who")
            raise PermissionError(13, "Permission denied")
        real(source, target)

    monkeypatch.setattr(store, "link", link)
    install(tmp_path / "update.pack", bundle, threads=1)
    assert list(open_bundle(bundle).path.glob("engines/*")) == []
    assert (bundle / "engines" / "student.engine").read_text() == "whole"


@pytest.mark.slow
def test_a_report_of_a_store(make_version, tmp_path, cli):
    device = make_version(0)
    create(device, make_version(1, training=None), tmp_path / "update.pack")
    install(tmp_path / "update.pack", device, threads=1)
    (device / "manifest.json").unlink()  # as the next command does
    answer = cli("report", device, "--out", tmp_path / "page.html")
    assert answer.code == 0, answer.err
