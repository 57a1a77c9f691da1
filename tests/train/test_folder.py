"""Who may work in a RUN folder, and on which images a stopped run goes on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cdl_edge.errors import InputError
from cdl_edge.train import loop
from cdl_edge.train.batches import Validation
from cdl_edge.train.checkpoint import before, load_state
from cdl_edge.train.loop import _Training, train

CLASSES = "abcdef"


class Stopped(Exception):
    pass


@pytest.fixture
def photos(tmp_path, image_folder):
    """Six classes with parts."""
    return image_folder(tmp_path / "photos", train=dict.fromkeys(CLASSES, 3), val=dict.fromkeys(CLASSES, 1))


@pytest.fixture
def stop(monkeypatch):
    """stop(config, at=(task, side, epochs)): train until that checkpoint is written."""

    def run(config, at=(1, "", 0), resume=False):
        real = loop.save_state

        def save(path, state):
            real(path, state)
            if tuple(state["position"]) == at:
                raise Stopped

        monkeypatch.setattr(loop, "save_state", save)
        with pytest.raises(Stopped):
            train(config, resume, quiet=True)
        monkeypatch.setattr(loop, "save_state", real)

    return run


@pytest.fixture
def config(make_config, tmp_path, photos):
    """config(**changes) of six classes in three tasks, the student alone."""

    def make(out="run", **changes):
        options = {"data": f"folder:{photos}", "tasks": 3, "epochs": 1, "distill": "none", "learner": "apt"}
        return make_config(tmp_path / out, **{**options, "range_images": 0, **changes})

    return make


def refused(config, *words, resume=True):
    with pytest.raises(InputError) as info:
        train(config, resume, quiet=True)
    for word in words:
        assert word in str(info.value), str(info.value)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


# -- the images -------------------------------------------------------------------------------------------------------


def rename(photos):
    for part in ("train", "val"):
        (photos / part / "b").rename(photos / part / "zebra_ant")
    return "without b in training", "new zebra_ant in training"


def add(photos):
    for part in ("train", "val"):
        shutil.copytree(photos / part / "a", photos / part / "g")
    return "new g in training", "new g in validation"


def exchange(photos):
    one, two = photos / "val" / "a" / "000.png", photos / "val" / "b" / "000.png"
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    return ("other pictures of a, b in validation",)


@pytest.mark.parametrize("change", [rename, add, exchange])
@pytest.mark.parametrize("finished", [False, True])
def test_a_run_goes_on_with_its_own_images_only(config, photos, stop, change, finished):
    if finished:
        train(config(), quiet=True)
    else:
        stop(config())
    found = contents(config().out)
    words = change(photos)
    refused(config(), "not the images that", *words, "bring these images back")
    assert contents(config().out) == found


@pytest.mark.slow
def test_a_run_goes_on_where_its_images_have_moved(config, photos, stop, tmp_path, monkeypatch):
    train(config("whole"), quiet=True)
    monkeypatch.chdir(photos.parent)
    stop(config(data="folder:photos"))
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["data"] == f"folder:{photos}"  # it means the same from everywhere
    moved = photos.rename(tmp_path / "elsewhere")
    monkeypatch.chdir("/")
    metrics = train(config(data=f"folder:{moved}"), True, quiet=True)
    whole = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert metrics["student"]["loss"] == whole["student"]["loss"]
    assert metrics["config"]["data"] == metrics["data"]["source"] == f"folder:{moved}"
    assert metrics["data"]["fingerprint"] == whole["data"]["fingerprint"]


def test_what_a_run_says_of_its_images(config, photos, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(photos.parent)
    (photos / "train" / "a" / "notes.txt").write_text("x")
    (photos / "train" / "a" / "broken.png").write_bytes(b"no picture")
    metrics = train(config(data="folder:photos"))
    first = capfd.readouterr().err.splitlines()[0]
    assert first == "folder:photos: 6 classes, 19 train, 6 validation, 1 left out (1 of type .txt)"
    data = metrics["data"]
    assert (data["given"], data["source"]) == ("folder:photos", f"folder:{photos}")
    assert (data["classes"], data["train"], data["validation"]) == (6, 19, 6)
    assert data["left_out"] == {"of type .txt": 1, "unreadable": 1}
    assert set(data["fingerprint"]["val"]) == set(CLASSES)


def as_of_an_early_version(run):
    """Without what says which images there were."""
    path = run / "checkpoint.safetensors"
    state = load_state(path)
    del state["data"]
    loop.save_state(path, state)


@pytest.mark.slow
def test_a_run_that_an_early_version_has_begun(config, photos, stop, tmp_path, image_folder):
    stop(config())
    as_of_an_early_version(tmp_path / "run")
    moved = shutil.copytree(photos, tmp_path / "moved")
    refused(config(data=f"folder:{moved}"), "other options", "data=")
    train(config(), True, quiet=True)
    flat = image_folder(tmp_path / "flat", unsplit=dict.fromkeys(CLASSES, 6))
    stop(config("second", data=f"folder:{flat}"))
    as_of_an_early_version(tmp_path / "second")
    refused(config("second", data=f"folder:{flat}"), "stopped by an earlier version")


# -- one training at a time -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_trainings_in_one_folder(config, tmp_path):
    one = _Training(config(), False, True)
    for resume, words in ((True, "another training works there now"), (False, "a run is there already")):
        refused(config(), words, resume=resume)
    one.close()
    two = _Training(config(), True, True)
    two.run()
    two.close()
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.slow
def test_the_lock_goes_with_its_process(config, tmp_path):
    # A process that holds the lock and is killed: nothing of it stays in the way.
    (tmp_path / "run").mkdir()
    code = (
        "import sys, time; from pathlib import Path; from cdl_edge.files import hold\n"
        "lock = hold(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        refused(config(), "another training works there now")
        process.kill()
    train(config(), True, quiet=True)


@pytest.mark.parametrize("resume", [False, True])
def test_killed_before_the_options_have_their_name(config, tmp_path, resume):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.x1y2.part").write_text("{")
    (tmp_path / "run" / ".lock").write_text("")
    train(config(), resume, quiet=True)
    assert not list((tmp_path / "run").glob(".*"))


def test_a_foreign_folder_is_left_alone(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".secret").write_text("x")
    refused(config(), "exists and is not a run")
    assert contents(tmp_path / "run") == {".secret": b"x"}


# -- the checkpoint before --------------------------------------------------------------------------------------------


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


@pytest.mark.slow
def test_a_damaged_checkpoint_gives_way_to_the_one_before(config, stop, tmp_path, capfd):
    train(config("whole"), quiet=True)
    stop(config(), at=(2, "", 0))
    path = tmp_path / "run" / "checkpoint.safetensors"
    flip(path)
    metrics = train(config(), resume=True)
    assert f"{path}: damaged; going on from the checkpoint before it" in capfd.readouterr().err
    whole = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert metrics["student"]["loss"] == whole["student"]["loss"]
    assert metrics["student"]["matrix"] == whole["student"]["matrix"]
    assert not path.exists() and not before(path).exists()


def test_both_damaged(config, stop, tmp_path):
    stop(config(), at=(2, "", 0))
    path = tmp_path / "run" / "checkpoint.safetensors"
    flip(path)
    flip(before(path))
    refused(config(), "checkpoint.before.safetensors", "damaged since it was written")


# -- memory -----------------------------------------------------------------------------------------------------------


class Counted:
    def __init__(self, pixels, inputs):
        self.pixels, self.inputs = pixels, inputs

    @property
    def size_bytes(self):
        return self.pixels + self.inputs

    def forget(self):
        self.inputs = 0


def test_validation_images_are_kept_as_far_as_the_memory_goes():
    read = []

    def make(task):
        read.append(task)
        return Counted(10, 30)

    validation = Validation(make, limit_bytes=55)
    for tasks in range(1, 5):
        assert len(list(validation.each(tasks))) == tasks
        assert sum(i.size_bytes for i in validation.kept.values()) <= 55
    # The first whole, the second as pixels only, the others anew each time.
    assert validation.kept[0].size_bytes == 40 and validation.kept[1].size_bytes == 10
    assert read == [0, 1, 2, 2, 3]


@pytest.mark.slow
def test_a_run_measures_the_same_without_memory(config, monkeypatch):
    kept = train(config("kept"), quiet=True)
    real = loop.Validation
    monkeypatch.setattr(loop, "Validation", lambda read: real(read, limit_bytes=0))
    again = train(config("again"), quiet=True)
    assert kept["student"]["matrix"] == again["student"]["matrix"]
    assert torch.tensor(kept["student"]["matrix"][-1]).isfinite().all()


def test_pictures_that_are_learnt_and_measured_on_are_said(config, photos, capsys):
    (photos / "val" / "a" / "copy.png").write_bytes((photos / "train" / "a" / "000.png").read_bytes())
    train(config(tasks=1))
    assert "warning: 1 of the 7 validation pictures are training pictures too (a/copy.png)" in capsys.readouterr().err
