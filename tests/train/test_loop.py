"""A run from start to end: what it writes, what it refuses, what reaches the loss."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cdl_edge.errors import InputError
from cdl_edge.images import Preprocessing
from cdl_edge.train import batches, loop, phase
from cdl_edge.train import devices as devices_module
from cdl_edge.train.config import TrainConfig
from cdl_edge.train.loop import _Training, train
from cdl_edge.train.metrics import DEFINITIONS
from cdl_edge.train.phase import Phase
from cdl_edge.train.run import preprocessing_of

LEARNERS = ("l2p", "dualprompt", "coda", "apt")


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(config, *words, resume=False):
    with pytest.raises(InputError) as info:
        train(config, resume, quiet=True)
    for word in words:
        assert word in str(info.value), str(info.value)


# -- what a run leaves ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def usual(tmp_path_factory, make_config):
    """(its configuration, what train returned) of a finished run of the usual options; for reading and copying."""
    config = make_config(tmp_path_factory.mktemp("usual") / "deep" / "run")
    return config, train(config, quiet=True)


@pytest.fixture
def copied(usual, make_config, tmp_path):
    """(the configuration, what train returned) of a copy of that run to work on."""
    shutil.copytree(usual[0].out, tmp_path / "run")
    return make_config(tmp_path / "run"), usual[1]


def test_a_run_writes_its_folder(usual):
    config, returned = usual
    out = Path(config.out)
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "metrics.json",
        "ranges.npz",
        "statistics",
        "student.safetensors",
        "student_matrix.csv",
        "teacher.safetensors",
        "teacher_matrix.csv",
    ]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics == returned
    assert json.loads((out / "config.json").read_text()) == replace(config, tau=2.0).to_json() == metrics["config"]
    assert metrics["schema"] == 1 and metrics["definitions"] == DEFINITIONS and metrics["skipped"] == []
    assert sorted(metrics["classes"]) == list("0123456789") and metrics["classes"] != list("0123456789")
    assert metrics["tasks"] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    for side, width in (("teacher", 24), ("student", 16)):
        got = metrics[side]
        assert [[a is None for a in row] for row in got["matrix"]] == [[False, True], [False, False]]
        assert all(0 <= a <= 100 for row in got["matrix"] for a in row if a is not None)
        assert got["average_accuracy"] == pytest.approx(sum(got["matrix"][1]) / 2)
        assert got["forgetting"] == pytest.approx((got["matrix"][0][0] - got["matrix"][1][0]) / 2)
        assert len(got["accuracy_after_task"]) == len(got["forgetting_after_task"]) == len(got["seconds"]) == 2
        assert [len(epochs) for epochs in got["loss"]] == [2, 2]
        assert got["images_per_second"]["train"] > 0 and "incremental_accuracy" in got
        assert metrics["backbones"][side]["width"] == width and metrics["backbones"][side]["depth"] == 6
        assert metrics["backbones"][side]["identity"].startswith("sha256:")
        lines = (out / f"{side}_matrix.csv").read_text().splitlines()
        assert lines[1] == f"task1,{got['matrix'][0][0]:.4f},"
    assert set(metrics["versions"]) == {"cdl-edge", "torch", "timm", "numpy", "python"}
    assert metrics["device"] in ("cpu", "cuda") and metrics["seconds"] > 0 and metrics["processes"] == 1
    assert metrics["teacher"]["tasks_reused"] == [] and metrics["distiller"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("learner", LEARNERS)
def test_without_distillation_no_teacher_is_trained(tmp_path, make_config, learner):
    metrics = train(make_config(tmp_path / "run", learner=learner, distill="none", teacher="builtin:none"), quiet=True)
    assert metrics["teacher"] is None and set(metrics["backbones"]) == {"student"}
    assert not list((tmp_path / "run").glob("teacher*"))


@pytest.mark.quick("coda")
@pytest.mark.parametrize("learner", LEARNERS)
def test_it_learns(tmp_path, make_config, image_folder, learner):
    # Red, green and blue: a ViT of random weights is enough to tell them apart.
    root = image_folder(tmp_path / "p", train=dict.fromkeys("rgb", 16), val=dict.fromkeys("rgb", 6))
    config = make_config(tmp_path / "run", learner=learner, data=f"folder:{root}", tasks=1, epochs=6, augment="none")
    metrics = train(config, quiet=True)
    for side in ("teacher", "student"):
        losses = metrics[side]["loss"][0]
        assert losses[-1] < 0.8 * losses[0]
        assert metrics[side]["average_accuracy"] > 70  # 33 by chance


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_and_another_another(tmp_path, make_config):
    runs = [train(make_config(tmp_path / str(i), seed=s), quiet=True) for i, s in enumerate((3, 3, 4))]
    assert runs[0]["student"]["loss"] == runs[1]["student"]["loss"] != runs[2]["student"]["loss"]
    assert runs[0]["classes"] == runs[1]["classes"] != runs[2]["classes"]


@pytest.mark.slow
def test_the_teacher_does_not_depend_on_the_student(tmp_path, make_config):
    # Phase one is done and frozen before phase two looks at it.
    names = ("kd", "kdp", "blockwise", "cdl-prompt")  # blockwise goes back through the teacher's own blocks
    for name in names:
        train(make_config(tmp_path / name, distill=name, epochs=1, limit_per_class=4), quiet=True)
    one, *others = (load_file(tmp_path / name / "teacher.safetensors") for name in names)
    for other in others:
        assert all(torch.equal(one[k], other[k]) for k in one) and one.keys() == other.keys()


@pytest.mark.slow
def test_progress_goes_to_stderr(tmp_path, make_config, capfd):
    train(make_config(tmp_path / "run", epochs=1))
    out, err = capfd.readouterr()
    assert out == "" and "--min-steps" not in err
    assert "task 1/2 teacher: loss" in err and "task 2/2 student: average accuracy" in err and "images/s" in err


@pytest.mark.slow
def test_more_epochs_than_were_asked_for_are_said(tmp_path, make_config, capfd):
    train(make_config(tmp_path / "run", distill="none", epochs=1, min_steps=4, batch_size=64, limit_per_class=4))
    assert "images/s, 4 epochs instead of 1 (--min-steps 4)" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_is_recorded_and_evaluation_is_fp32(tmp_path, make_config, precision, monkeypatch):
    seen = []
    real = loop.accuracy

    def watch(*arguments):
        seen.append(torch.is_autocast_enabled("cpu"))
        return real(*arguments)

    monkeypatch.setattr(loop, "accuracy", watch)
    metrics = train(make_config(tmp_path / "run", precision=precision), quiet=True)
    assert metrics["precision"] == {"fp32": "fp32", "bf16": "bf16 autocast"}[precision]
    assert seen and not any(seen)


@pytest.mark.slow
def test_the_number_of_tasks_that_was_taken_is_stored(tmp_path, make_config, image_folder, capfd):
    root = image_folder(tmp_path / "p", train=dict.fromkeys("abcd", 3), val=dict.fromkeys("abcd", 2))
    config = make_config(tmp_path / "run", data=f"folder:{root}", tasks=None, distill="none", epochs=1)
    assert train(config)["config"]["tasks"] == 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["tasks"] == 1
    assert "warning" not in capfd.readouterr().err
    train(config, resume=True)  # None again means the same
    single = make_config(tmp_path / "single", data=f"folder:{root}", tasks=4, distill="kdp", epochs=1)
    train(single)
    said = capfd.readouterr().err
    assert "warning: a task of one class teaches prompts nothing" in said and "one class alone" not in said
    lonely = image_folder(tmp_path / "lonely", train={"a": 3}, val={"a": 2})
    train(make_config(tmp_path / "one", data=f"folder:{lonely}", tasks=1, distill="none", epochs=1))
    assert "warning: there is one class alone" in capfd.readouterr().err


@pytest.mark.slow
def test_what_is_kept_in_memory_changes_no_number(tmp_path, make_config, monkeypatch):
    kept = train(make_config(tmp_path / "kept", precision="fp32"), quiet=True)
    monkeypatch.setattr(batches, "KEPT_BYTES", 0)
    computed = train(make_config(tmp_path / "computed", precision="fp32"), quiet=True)
    for side in ("teacher", "student"):
        assert np.allclose(kept[side]["loss"], computed[side]["loss"], rtol=1e-3)


def test_limit_per_class_is_of_training_images_only(tmp_path, make_config):
    made = _Training(make_config(tmp_path / "run", limit_per_class=3), False, True)
    assert np.bincount(made.dataset.train.labels).tolist() == [3] * 10
    assert len(made.dataset.val) > 300


@pytest.mark.slow
def test_one_bar_a_phase_with_its_loss_and_its_end(tmp_path, make_config, monkeypatch):
    made = []

    class Bar:
        def __init__(self, total, initial, desc, disable, **_):
            self.total, self.count, self.desc, self.notes = total, initial, desc, []
            assert not disable
            made.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def set_postfix_str(self, text, refresh):
            self.notes.append(text)

        def update(self):
            self.count += 1

    monkeypatch.setattr(phase, "tqdm", Bar)
    monkeypatch.setattr(phase.sys.stderr, "isatty", lambda: True, raising=False)
    metrics = train(make_config(tmp_path / "run", epochs=2))
    assert [bar.desc for bar in made][:2] == ["task 1/2 teacher", "task 1/2 student"] and len(made) == 4
    for bar in made:
        assert bar.count == bar.total  # it reaches its end
        assert bar.notes[0].startswith("epoch 1/2, loss ") and bar.notes[-1].startswith("epoch 2/2, loss ")
    assert metrics["student"]["loss"]


@pytest.mark.slow
def test_a_resumed_run_takes_its_own_number_of_threads(tmp_path, make_config, monkeypatch):
    """Sums in another order end in other numbers."""
    counts = []
    monkeypatch.setattr(loop.torch, "set_num_threads", counts.append)
    real = loop.save_state

    def stop(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_state", stop)
    config = make_config(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(config, quiet=True)
    monkeypatch.setattr(loop, "save_state", real)
    train(config, resume=True, quiet=True)
    assert counts == [torch.get_num_threads()]


# -- what is refused --------------------------------------------------------------------------------------------------


def test_an_existing_run_is_left_untouched(usual, make_config):
    config, metrics = usual
    out = Path(config.out)
    before = contents(out)
    refused(config, "a run is there already", "--resume")
    refused(make_config(out, epochs=9, seed=1), "a run is there already")
    refused(make_config(out, epochs=9, learner="apt"), "other options", "epochs=9", "learner='apt'", resume=True)
    refused(make_config(out, compat=True), "compat=True", "compat=False", resume=True)
    assert contents(out) == before
    assert train(config, resume=True, quiet=True) == metrics  # finished: nothing to do
    assert contents(out) == before


@pytest.mark.slow
def test_an_unfinished_run_is_left_untouched(tmp_path, make_config, monkeypatch):
    out = tmp_path / "run"
    real = loop.save_state

    def stop(path, state):
        real(path, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_state", stop)
    with pytest.raises(KeyboardInterrupt):
        train(make_config(out), quiet=True)
    before = contents(out)
    assert set(before) == {"config.json", "checkpoint.safetensors"}
    refused(make_config(out), "a run is there already")
    refused(make_config(out, tasks=5), "tasks=5", resume=True)
    assert contents(out) == before


@pytest.mark.slow
def test_another_backbone_under_the_same_name_is_refused_on_resume(tmp_path, make_config, tiny_vit, monkeypatch):
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(Path(tiny_vit().removeprefix("file:")).read_bytes())
    config = make_config(tmp_path / "run", student=f"file:{weights}")
    real = loop.save_state

    def stop(path, state):
        real(path, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_state", stop)
    with pytest.raises(KeyboardInterrupt):
        train(config, quiet=True)
    monkeypatch.setattr(loop, "save_state", real)
    weights.write_bytes(Path(tiny_vit(seed=1).removeprefix("file:")).read_bytes())
    refused(config, "other student weights", resume=True)


@pytest.mark.slow
def test_a_folder_that_is_no_run_is_left_alone(tmp_path, make_config):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("photos", "file"):
        for resume in (False, True):
            refused(make_config(tmp_path / name), "exists and is not a run", resume=resume)
    assert contents(tmp_path / "photos") == {"me.jpg": b"x"}
    (tmp_path / "empty").mkdir()
    train(make_config(tmp_path / "empty", distill="none", epochs=1), quiet=True)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"data": "folder:/nowhere"}, "no such folder"),
        ({"data": "didgits"}, "did you mean 'digits'?"),
        ({"tasks": 11}, "10 classes, 11 tasks"),
        ({"prompt_tasks": 1}, "--prompt-tasks 1: learnt heads learn with the prompts"),
        ({"student": "builtin:studnet"}, "did you mean 'student'?"),
        ({"teacher": "file:/nowhere"}, "no such file"),
    ],
)
def test_bad_input_writes_nothing(tmp_path, make_config, change, word):
    refused(make_config(tmp_path / "run", **change), word)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_said_not_replaced(tmp_path, make_config):
    refused(make_config(tmp_path / "run", devices="cuda"), "no CUDA device", "--devices cpu")


# -- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_corrupt_images_are_skipped_named_and_counted(tmp_path, make_config, image_folder, capfd):
    root = image_folder(tmp_path / "p", train=dict.fromkeys("abcd", 5), val=dict.fromkeys("abcd", 3))
    (root / "train" / "b" / "002.png").write_bytes(b"no image")
    (root / "val" / "d" / "001.png").write_bytes(b"")
    (root / "val" / "d" / "000.png").rename(root / "val" / "d" / "000.jpg")  # a wrong ending is no fault
    metrics = train(make_config(tmp_path / "run", data=f"folder:{root}"))
    assert len(metrics["skipped"]) == 1 and "b/002.png" in metrics["skipped"][0]
    assert metrics["data"]["left_out"] == {
        "empty": 1,
        "unreadable": 1,
    }  # d/001.png is no picture before anybody decodes it
    err = capfd.readouterr().err
    assert err.count("skipped: ") == 1 and "b/002.png" in err and "1 unreadable image(s) skipped" in err


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_class_of_corrupt_images_is_refused_before_the_hours_of_work(tmp_path, make_config, image_folder, part):
    root = image_folder(tmp_path / "p", train=dict.fromkeys("abcd", 3), val=dict.fromkeys("abcd", 2))
    for path in (root / part / "c").iterdir():
        path.write_bytes(b"no image")
    refused(make_config(tmp_path / "run", data=f"folder:{root}"), "class 'c' has no readable image", "c/000.png")
    assert not (tmp_path / "run").exists()


def test_photographs_are_augmented_and_digits_are_not(tmp_path, make_config, image_folder):
    root = image_folder(tmp_path / "p", train=dict.fromkeys("ab", 3), val=dict.fromkeys("ab", 2))
    digits = _Training(make_config(tmp_path / "a"), False, True)
    photos = _Training(make_config(tmp_path / "b", data=f"folder:{root}"), False, True)
    none = _Training(make_config(tmp_path / "c", data=f"folder:{root}", augment="none"), False, True)
    assert (digits.augmented, photos.augmented, none.augmented) == (False, True, False)


# -- compat -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compat_is_the_authors_behaviour(tmp_path, make_config, monkeypatch):
    monkeypatch.setattr(devices_module, "native_bf16", lambda device: True)  # what auto would take
    metrics = train(make_config(tmp_path / "run", compat=True), quiet=True)
    assert metrics["classes"] == list("0123456789")  # trap 4: never shuffled
    assert metrics["precision"] == "fp32"


@pytest.mark.parametrize(("data", "resize"), [("cifar100", 224), ("folder:x", 224), ("imagenet-r:x", 256)])
def test_test_images_as_the_authors_see_them(backbone, data, resize):
    own = replace(backbone, preprocessing=Preprocessing(224, 248))
    theirs = preprocessing_of(own, TrainConfig(data, "x", compat=True))
    assert theirs == Preprocessing(224, resize, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # trap 10
    assert preprocessing_of(own, TrainConfig(data, "x")) == own.preprocessing
    before = TrainConfig.stored({"data": data, "out": "x", "compat": True})
    assert preprocessing_of(own, before) == Preprocessing(
        224, 248, "bicubic", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), decoder=1
    )


def test_compat_preprocessing_reaches_both_sides(tmp_path, make_config):
    made = _Training(make_config(tmp_path / "run", compat=True), False, True)
    assert all(side.preprocessing.mean == (0, 0, 0) for side in made.pipelines.values())


@pytest.mark.slow
@pytest.mark.parametrize("compat", [False, True])
def test_the_prompt_that_apts_teacher_answers_with(tmp_path, make_config, compat, monkeypatch):
    # Trap 2: in the authors' code the teacher distils from the previous merged prompt, zeros in task 1.
    seen = []
    real = Phase._teacher_outputs

    def watch(self, batch):
        seen.append(self.models["teacher"].learner.merged.abs().sum().item())
        return real(self, batch)

    monkeypatch.setattr(Phase, "_teacher_outputs", watch)
    train(make_config(tmp_path / "run", learner="apt", compat=compat), quiet=True)
    assert len(seen) == 2 and (seen[0] == 0) == compat and seen[1] > 0


def test_a_loss_that_is_not_finite_ends_the_run_at_once(tmp_path, make_config, monkeypatch):
    monkeypatch.setattr(Phase, "_loss", lambda self, *_: self.model.head.weight.sum() * float("nan"))
    with pytest.raises(FloatingPointError, match=r"teacher, task 1, epoch 1.*--resume"):
        train(make_config(tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize(("distill", "tau", "expected"), [("kdp", None, 2.0), ("dkd", None, 4.0), ("dkd", 1.5, 1.5)])
def test_the_temperature_is_the_distillers_own_unless_given(tmp_path, make_config, distill, tau, expected):
    made = _Training(make_config(tmp_path / "run", distill=distill, tau=tau), False, True)
    made.close()
    assert made.config.tau == made.distiller.spec.tau == expected
    assert json.loads((tmp_path / "run" / "config.json").read_text())["tau"] == expected
    # Given again as it was given, or as it was stored, it is the same run.
    for same in {tau, expected}:
        _Training(make_config(tmp_path / "run", distill=distill, tau=same), True, True).close()


def test_a_distiller_is_told_the_sizes(tmp_path, make_config, tiny_vit):
    config = make_config(tmp_path / "run", distill="reviewkd", teacher=tiny_vit("teacher", 24, depth=7), alpha=0.3)
    got = _Training(config, False, True).distiller.spec
    assert (got.alpha, got.tau, got.seed, got.classes) == (0.3, 2.0, 0, 10)
    assert (got.student_width, got.student_depth, got.student_grid) == (16, 6, 2)
    assert (got.teacher_width, got.teacher_depth, got.teacher_grid) == (24, 7, 2)
    assert got.class_ranges == ((0, 5), (5, 10))
    alone = _Training(make_config(tmp_path / "none", distill="none"), False, True).distiller.spec
    assert (alone.teacher_width, alone.teacher_depth, alone.teacher_grid) == (0, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("learner", ["l2p", "dualprompt", "coda"])
def test_without_weight_the_one_pass_regulariser_changes_no_number(tmp_path, make_config, learner):
    options = {"learner": learner, "query": "one-pass", "distill": "kd"}
    without, zero, some = (
        train(make_config(tmp_path / name, **options, **more), quiet=True)
        for name, more in (("a", {}), ("b", {"query_regulariser": 0.0}), ("c", {"query_regulariser": 0.5}))
    )
    for side in ("teacher", "student"):
        assert without[side]["loss"] == zero[side]["loss"] != some[side]["loss"]
        assert without[side]["matrix"] == zero[side]["matrix"]
    one, two = (load_file(tmp_path / name / "student.safetensors") for name in "ab")
    assert all(torch.equal(v, two[k]) for k, v in one.items())


def test_leftovers_of_a_killed_write_are_removed(tmp_path, copied):
    config, _ = copied
    (tmp_path / "run" / ".checkpoint.safetensors.x1.part").write_bytes(b"half")
    train(config, resume=True, quiet=True)
    assert not list((tmp_path / "run").glob(".*.part"))


# -- what has no option -----------------------------------------------------------------------------------------------


def test_a_run_keeps_what_has_no_option_as_it_was_when_it_was_started(tmp_path, make_config):
    made = _Training(make_config(tmp_path / "run", decoder=1, token_weight=1.0), False, True)
    stored = json.loads((made.out / "config.json").read_text())
    assert stored.pop("decoder") == 1 and stored.pop("token_weight") == 1
    (made.out / "config.json").write_text(json.dumps(stored))  # as it was before there were rules
    made.close()
    again = _Training(make_config(tmp_path / "run"), True, True)
    assert {side.preprocessing.decoder for side in again.pipelines.values()} == {1}
    stored = json.loads((made.out / "config.json").read_text())
    assert stored["decoder"] == 1 and stored["token_weight"] == 1
    new = _Training(make_config(tmp_path / "new"), False, True)
    assert {side.preprocessing.decoder for side in new.pipelines.values()} == {2}


def test_the_resize_rule_reaches_both_sides_and_the_kept_teacher(tmp_path, make_config):
    keys = []
    for rule in ("cut", "pad"):
        options = {"resize_rule": rule, "teachers": str(tmp_path / "teachers")}
        made = _Training(make_config(tmp_path / rule, **options), False, True)
        assert {side.preprocessing.resize_rule for side in made.pipelines.values()} == {rule}
        keys.append(made.teachers.key.name)
    assert keys[0] != keys[1]
    refused(make_config(tmp_path / "pad", teachers=str(tmp_path / "teachers")), "resize_rule", resume=True)
