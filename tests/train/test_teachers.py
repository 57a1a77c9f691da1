"""Kept teachers: what their key says, that a kept one changes no number, and what is refused."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cdl_edge.errors import InputError
from cdl_edge.train import loop, teachers
from cdl_edge.train.checkpoint import load_state, save_state
from cdl_edge.train.loop import _Training, train
from cdl_edge.train.phase import Phase


class Stopped(Exception):
    pass


@pytest.fixture
def phases(monkeypatch):
    """(name, task) of each phase that was trained."""
    seen = []
    real = Phase.__init__

    def watch(self, config, devices, models, name, task, *rest):
        seen.append((name, task))
        real(self, config, devices, models, name, task, *rest)

    monkeypatch.setattr(Phase, "__init__", watch)
    return seen


def numbers(folder, side):
    metrics = json.loads((folder / "metrics.json").read_text())[side]
    kept = {k: v for k, v in metrics.items() if k not in ("seconds", "images_per_second", "tasks_reused")}
    return kept, load_file(folder / f"{side}.safetensors")


def assert_same(one, two, sides=("teacher", "student")):
    for side in sides:
        (texts, tensors), (other_texts, other_tensors) = numbers(one, side), numbers(two, side)
        assert texts == other_texts
        assert tensors.keys() == other_tensors.keys()
        assert all(torch.equal(v, other_tensors[k]) for k, v in tensors.items())


def reused(folder):
    return json.loads((folder / "metrics.json").read_text())["teacher"]["tasks_reused"]


# -- a kept teacher ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "other"),
    [
        ({"learner": "coda"}, {"distill": "kdp"}),
        ({"learner": "l2p", "augment": "crop-flip"}, {"distill": "reviewkd", "alpha": 0.2}),
        ({"learner": "apt", "compat": True}, {"distill": "fitnets", "tau": 3.0}),
        ({"learner": "dualprompt", "query": "one-pass", "query_regulariser": 0.1}, {"distill": "blockwise"}),
        ({"learner": "finetune", "learning_rate": 0.003}, {"distill": "dkd"}),
    ],
    ids=lambda o: o.get("learner", o.get("distill")),
)
def test_a_kept_teacher_changes_no_number(tmp_path, make_config, phases, options, other):
    keep = {"teachers": str(tmp_path / "kept"), "distill": "kd", **options}
    train(make_config(tmp_path / "first", **keep), quiet=True)
    assert phases == [("teacher", 0), ("student", 0), ("teacher", 1), ("student", 1)]
    phases.clear()
    train(make_config(tmp_path / "second", **{**keep, **other}), quiet=True)
    assert phases == [("student", 0), ("student", 1)]
    train(make_config(tmp_path / "without", **{**options, **other}), quiet=True)
    assert_same(tmp_path / "second", tmp_path / "without")
    assert_same(tmp_path / "first", tmp_path / "second", ["teacher"])
    assert [reused(tmp_path / n) for n in ("first", "second", "without")] == [[], [0, 1], []]
    times = [json.loads((tmp_path / n / "metrics.json").read_text())["teacher"]["seconds"] for n in ("first", "second")]
    assert times[0] == times[1]  # what its training took


@pytest.mark.slow
def test_what_is_kept_is_small_and_says_whose_it_is(tmp_path, make_config):
    config = make_config(tmp_path / "run", teachers=str(tmp_path / "kept"), learner="l2p", distill="kd")
    train(config, quiet=True)
    (folder,) = (tmp_path / "kept").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["key.json", "task-01.safetensors", "task-02.safetensors"]
    key = json.loads((folder / "key.json").read_text())
    assert (key["learner"], key["epochs"], key["seed"], key["tasks"]) == ("l2p", 2, 0, 2)
    assert key["teacher"].startswith("sha256:") and key["student"].startswith("sha256:")
    assert key["classes"] == json.loads((tmp_path / "run" / "metrics.json").read_text())["classes"]
    stored = load_state(folder / "task-01.safetensors")
    assert stored["key"] == key and stored["logits"].shape == (40, 5) and len(stored["row"]) == 1
    assert not any(k.startswith(("network", "blocks")) for k in stored["state"])
    last = load_state(tmp_path / "run" / "teacher.safetensors")["state"]
    kept = load_state(folder / "task-02.safetensors")["state"]
    assert kept.keys() == last.keys() and all(torch.equal(v, last[k]) for k, v in kept.items())


@pytest.mark.slow
def test_progress_says_where_the_teacher_comes_from(tmp_path, make_config, capfd):
    for name in ("a", "b"):
        train(make_config(tmp_path / name, teachers=str(tmp_path / "kept"), distill="kd"))
    err = capfd.readouterr().err
    assert err.count("task 1/2 teacher: loss") == 1
    assert f"task 1/2 teacher: kept, from {tmp_path / 'kept'}" in err


@pytest.mark.slow
def test_without_a_teacher_nothing_is_kept(tmp_path, make_config):
    train(make_config(tmp_path / "run", teachers=str(tmp_path / "kept"), distill="none"), quiet=True)
    assert not (tmp_path / "kept").exists()


# -- the key ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory, image_folder):
    return image_folder(tmp_path_factory.mktemp("p"), train=dict.fromkeys("abcd", 4), val=dict.fromkeys("abcd", 2))


@pytest.fixture
def key(tmp_path, make_config, photos):
    """key(**changes) of a run on photographs; nothing is trained."""
    count = itertools.count()

    def make(**changes):
        options = {"data": f"folder:{photos}", "learner": "coda", "distill": "kd", "precision": "fp32", **changes}
        config = make_config(tmp_path / f"run{next(count)}", teachers=str(tmp_path / "kept"), **options)
        return _Training(config, False, True).teachers.key

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"epochs": 3},
        {"learning_rate": 0.01},
        {"batch_size": 8},
        {"learner": "l2p"},
        {"query": "one-pass"},
        {"tasks": 4},
        {"limit_per_class": 2},
        {"augment": "none"},
        {"compat": True},
        {"precision": "bf16"},
        {"data": "digits"},
    ],
    ids=lambda c: "-".join(map(str, next(iter(c.items())))),
)
def test_what_a_teacher_depends_on(key, change):
    assert key().name != key(**change).name


def test_the_seed_counts_where_the_class_order_does_not_show_it(key):
    one, two = key(compat=True), key(compat=True, seed=1)  # the authors never shuffle
    assert one.classes == two.classes and one.name != two.name


@pytest.mark.slow
def test_backbones_are_known_by_their_weights(key, tiny_vit, tmp_path):
    base = key()
    assert key(teacher=tiny_vit("teacher", 24, seed=1)).name != base.name
    copied = shutil.copy(tiny_vit("teacher", 24).removeprefix("file:"), tmp_path / "other-name.safetensors")
    assert key(teacher=f"file:{copied}").name == base.name
    # The query is the student's, except where each block asks itself, or nobody is asked.
    other = {"student": tiny_vit("student", 16, seed=1)}
    assert key(**other).name != base.name
    assert key(**other, query="one-pass").name == key(query="one-pass").name
    assert key(**other, learner="apt").name == key(learner="apt").name
    assert key(**other, learner="finetune").name == key(learner="finetune").name


@pytest.mark.slow
def test_the_regulariser_belongs_to_one_pass_teachers(key):
    assert key(query="one-pass", query_regulariser=0.1).name != key(query="one-pass").name


def test_images_are_part_of_it(key, photos, tmp_path):
    base = key()
    moved = shutil.copytree(photos, tmp_path / "moved")
    assert key(data=f"folder:{moved}").name == base.name  # the same images elsewhere
    one, two = moved / "train" / "a" / "000.png", moved / "train" / "b" / "000.png"
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())  # exchanged: the same names
    two.write_bytes(content)
    assert key(data=f"folder:{moved}").name != base.name


@pytest.mark.parametrize(
    "change",
    [
        {"distill": "kdp"},
        {"distill": "reviewkd"},
        {"alpha": 0.1},
        {"tau": 7.0},
        {"kd_blocks": 3},
        {"kd_length": 2},
        {"kd_head": "normalised"},
        {"kd_head": "normalised", "distill": "kdp"},
        {"devices": "cpu"},
    ],
    ids=lambda c: "-".join(map(str, next(iter(c.items())))),
)
def test_what_it_does_not_depend_on(key, change):
    assert key().name == key(**change).name


# -- stopped ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stopped_in_the_second_task_the_first_is_kept(tmp_path, make_config, phases, monkeypatch):
    options = {"learner": "l2p", "distill": "kdp"}
    keep = {**options, "teachers": str(tmp_path / "kept")}
    real = loop.save_state

    def save(path, state):
        real(path, state)
        if state["position"] == [1, "teacher", 1]:
            raise Stopped

    monkeypatch.setattr(loop, "save_state", save)
    with pytest.raises(Stopped):
        train(make_config(tmp_path / "first", **keep), quiet=True)
    monkeypatch.setattr(loop, "save_state", real)
    phases.clear()
    train(make_config(tmp_path / "second", **keep), quiet=True)
    assert phases == [("student", 0), ("teacher", 1), ("student", 1)] and reused(tmp_path / "second") == [0]
    # The first one goes on: what it had begun is there by now, and counts once.
    train(make_config(tmp_path / "first", **keep), resume=True, quiet=True)
    assert reused(tmp_path / "first") == [1]
    train(make_config(tmp_path / "without", **options), quiet=True)
    assert_same(tmp_path / "first", tmp_path / "without")
    assert_same(tmp_path / "second", tmp_path / "without")


@pytest.mark.slow
@pytest.mark.parametrize("lost", [False, True])
def test_a_run_on_kept_teachers_stopped_at_every_checkpoint(tmp_path, make_config, monkeypatch, lost):
    # Also where the folder has gone in between: what the checkpoint holds is enough.
    options = {"learner": "dualprompt", "distill": "kdp"}
    keep = {**options, "teachers": str(tmp_path / "kept")}
    train(make_config(tmp_path / "first", **keep), quiet=True)
    real, stops = loop.save_state, 0

    def save(path, state):
        real(path, state)
        raise Stopped

    monkeypatch.setattr(loop, "save_state", save)
    while not (tmp_path / "broken" / "metrics.json").exists():
        try:
            train(make_config(tmp_path / "broken", **keep), resume=stops > 0, quiet=True)
        except Stopped:
            stops += 1
            if lost and stops == 1:
                shutil.rmtree(tmp_path / "kept")
    assert_same(tmp_path / "first", tmp_path / "broken")
    assert reused(tmp_path / "broken") == ([0] if lost else [0, 1])


@pytest.mark.slow
def test_a_write_that_failed_leaves_no_teacher(tmp_path, make_config, phases, monkeypatch):
    keep = {"learner": "apt", "distill": "kd", "teachers": str(tmp_path / "kept")}
    real = teachers.save_state
    monkeypatch.setattr(teachers, "save_state", lambda *_: (_ for _ in ()).throw(Stopped))
    with pytest.raises(Stopped):
        train(make_config(tmp_path / "first", **keep), quiet=True)
    monkeypatch.setattr(teachers, "save_state", real)
    assert not list((tmp_path / "kept").rglob("task-*"))
    phases.clear()
    train(make_config(tmp_path / "second", **keep), quiet=True)
    assert ("teacher", 0) in phases and reused(tmp_path / "second") == []
    train(make_config(tmp_path / "first", **keep), resume=True, quiet=True)
    assert_same(tmp_path / "first", tmp_path / "second")


@pytest.mark.slow
def test_the_folder_may_be_named_anew_when_a_run_is_resumed(tmp_path, make_config, monkeypatch):
    real = loop.save_state

    def save(path, state):
        real(path, state)
        raise Stopped

    monkeypatch.setattr(loop, "save_state", save)
    with pytest.raises(Stopped):
        train(make_config(tmp_path / "run", distill="kd"), quiet=True)
    monkeypatch.setattr(loop, "save_state", real)
    train(make_config(tmp_path / "run", distill="kd", teachers=str(tmp_path / "kept")), resume=True, quiet=True)
    assert len(list((tmp_path / "kept").rglob("task-*"))) == 2


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(tmp_path_factory, make_config):
    """A folder with a run `first` and its teachers in `kept`."""
    folder = tmp_path_factory.mktemp("kept")
    options = {"learner": "apt", "distill": "kd", "teachers": str(folder / "kept")}
    train(make_config(folder / "first", **options), quiet=True)
    return folder


@pytest.fixture
def kept(first, tmp_path, make_config):
    """(config of a second run, file of the first task's teacher), in a copy."""
    shutil.copytree(first, tmp_path, dirs_exist_ok=True)
    (path,) = (tmp_path / "kept").rglob("task-01.safetensors")
    options = {"learner": "apt", "distill": "kd", "teachers": str(tmp_path / "kept")}
    return make_config(tmp_path / "second", **options), path


def refused(config, *words):
    with pytest.raises(InputError) as info:
        train(config, quiet=True)
    for word in words:
        assert word in str(info.value), str(info.value)
    assert not (Path(config.out) / "metrics.json").exists()


@pytest.mark.slow
def test_a_damaged_file(kept):
    config, path = kept
    path.write_bytes(path.read_bytes()[:-9])
    refused(config, str(path), "not a checkpoint of this project", "delete it")


@pytest.mark.slow
def test_a_foreign_file(kept):
    config, path = kept
    save_file({"a": torch.zeros(2)}, path)
    refused(config, str(path), "not a checkpoint of this project")
    shutil.copy(Path(config.out).parent / "first" / "teacher.safetensors", path)  # ours, but no kept teacher
    refused(make_again(config), str(path), "the teacher of another run")


def make_again(config):
    shutil.rmtree(config.out)
    return config


def test_the_teacher_of_another_run_under_this_name(kept):
    config, path = kept
    stored = load_state(path)
    save_state(path, {**stored, "key": {**stored["key"], "seed": 7}})
    refused(config, str(path), "the teacher of another run", "delete the folder")


def test_no_folder(tmp_path, make_config):
    (tmp_path / "file").write_text("x")
    refused(make_config(tmp_path / "run", teachers=str(tmp_path / "file")), "not a folder", "--teachers")
    assert not (tmp_path / "run").exists() and (tmp_path / "file").read_text() == "x"
