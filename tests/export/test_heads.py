"""Heads from class statistics on their way to a device: the same answers as torch at every station."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

from cdl_edge.calibrate.calibrate_bundle import calibrate
from cdl_edge.class_statistics import ClassStatistics
from cdl_edge.errors import InputError
from cdl_edge.export.export_bundle import export
from cdl_edge.export.parity import TOLERANCE, student_logits
from cdl_edge.export.profiles import PROFILES
from cdl_edge.files import sha256
from cdl_edge.runtime import load, open_bundle
from cdl_edge.server.live_model import LiveModel
from cdl_edge.train.closed_form import statistics_heads
from cdl_edge.train.config import TrainConfig
from cdl_edge.train.extend import inherit
from cdl_edge.train.loop import train
from cdl_edge.train.run import load_run
from cdl_edge.updates.packs import create, install

LEARNERS = {
    "frozen": {"learner": "frozen"},
    "apt": {"learner": "apt", "distill": "none"},
    "coda": {"learner": "coda", "distill": "none"},
    "coda-kdp": {"learner": "coda", "distill": "kdp"},
}


@pytest.fixture(scope="session")
def photos(tmp_path_factory, image_folder):
    """Folders `old` of four classes and `more` of these and two new ones."""
    root = tmp_path_factory.mktemp("photos")
    for name, classes in (("old", "abcd"), ("more", "abcdef")):
        image_folder(root / name, train=dict.fromkeys(classes, 6), val=dict.fromkeys(classes, 4))
    return root


@pytest.fixture(scope="session")
def run_of(tmp_path_factory, short_training, photos):
    """run_of(learner, head): a run of two tasks, made once."""
    made = {}

    def make(learner, head):
        if (learner, head) not in made:
            out = tmp_path_factory.mktemp("run")
            options = {**short_training, "tasks": 2, "batch_size": 8, "head": head, **LEARNERS[learner]}
            train(TrainConfig(f"folder:{photos / 'old'}", str(out), **options), quiet=True)
            made[learner, head] = out
        return made[learner, head]

    return make


def pictures(count=16):
    """Not those of the run: uint8 (count, 16, 16, 3)."""
    return np.random.default_rng(5).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def answers(bundle, precision="fp32"):
    with load(bundle, "onnxruntime", threads=1, precision=precision) as runner:
        return np.concatenate([runner.infer(picture[None]) for picture in pictures()])


def truth(run):
    opened = load_run(run)
    return student_logits(opened, pictures(), len(opened.metrics.document["classes"]))


def statistics_of(bundle):
    opened = open_bundle(bundle)
    return opened, ClassStatistics.load(opened.path / opened.manifest.document["statistics"])


@pytest.mark.slow
@pytest.mark.parametrize("head", statistics_heads())
@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("profile", PROFILES)
def test_the_graph_answers_as_torch_does(tmp_path, run_of, profile, learner, head):
    run = run_of(learner, head)
    made = export(run, tmp_path / "bundle", profile=profile, images=20, statistics=True)
    assert made["parity"]["max_abs_error"] < TOLERANCE / 2
    expected, got = truth(run), answers(tmp_path / "bundle")
    assert np.abs(got - expected).max() < TOLERANCE and np.ptp(expected) > 0.1
    opened, held = statistics_of(tmp_path / "bundle")
    assert opened.manifest.document["statistics"] == "statistics.npz"
    assert held.classes == opened.classes and held.counts.tolist() == [6] * 4
    assert sha256(opened.path / "statistics.npz") == sha256(run / "statistics" / "student-2.npz")


@pytest.mark.slow
@pytest.mark.parametrize("head", statistics_heads())
@pytest.mark.parametrize("learner", LEARNERS)
def test_from_int8_and_a_pack_to_what_is_served(tmp_path, run_of, photos, learner, head):
    run = run_of(learner, head)
    more = TrainConfig.from_json(
        inherit({"extend": str(run), "data": f"folder:{photos / 'more'}", "out": str(tmp_path / "more"), "seed": 3})
    )
    train(more, quiet=True)
    for name, source in (("old", run), ("new", tmp_path / "more")):
        export(source, tmp_path / f"{name}-fp32", images=20, statistics=True)
        calibrate(tmp_path / f"{name}-fp32", tmp_path / name, schemes=["int8-x86"], searching=False)
        assert np.abs(answers(tmp_path / name) - truth(source)).max() < TOLERANCE
        assert statistics_of(tmp_path / name)[0].manifest.document["statistics"] == "statistics.npz"
    new, expected = tmp_path / "new", truth(tmp_path / "more")
    int8 = answers(new, "int8")
    assert np.abs(int8 - expected).mean() < 0.3 * np.ptp(expected)  # of 16 channels, 8 bits are coarse
    device = tmp_path / "device"
    shutil.copytree(tmp_path / "old", device)
    create(tmp_path / "old", new, tmp_path / "update.pack")
    install(tmp_path / "update.pack", device, threads=1)
    assert np.array_equal(answers(device), answers(new)) and np.array_equal(answers(device, "int8"), int8)
    opened, held = statistics_of(device)
    assert held.classes == opened.classes and len(held.classes) == 6
    assert sha256(opened.path / "statistics.npz") == sha256(tmp_path / "more" / "statistics" / "student-3.npz")
    with LiveModel(device, threads=1, backend="onnxruntime", precision="fp32") as live:
        futures = [live.submit(lambda runner, picture=picture: runner.infer(picture[None])) for picture in pictures()]
        served = np.concatenate([future.result() for future in futures])
    assert np.abs(served - expected).max() < TOLERANCE


@pytest.mark.slow
def test_a_learnt_head_has_none(tmp_path, run_of):
    export(run_of("apt", "learned"), tmp_path / "bundle", images=8)
    opened = open_bundle(tmp_path / "bundle")
    assert opened.manifest.document["statistics"] is None and "statistics.npz" not in opened.manifest.document["files"]
    with pytest.raises(InputError, match="no class statistics to put into the bundle"):
        export(run_of("apt", "learned"), tmp_path / "asked", images=8, statistics=True)
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize("damage", ["gone", "cut", "of other classes"])
def test_without_its_statistics_nothing_is_exported(tmp_path, run_of, damage):
    run = tmp_path / "run"
    shutil.copytree(run_of("frozen", "slda"), run)
    path = run / "statistics" / "student-2.npz"
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-30])
    else:
        held = ClassStatistics.load(path)
        dataclasses.replace(held, classes=("x", *held.classes[1:])).save(path)
    with pytest.raises(InputError, match="statistics"):
        export(run, tmp_path / "bundle", images=8, statistics=True)
    assert not (tmp_path / "bundle").exists()
