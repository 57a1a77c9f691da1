"""Accuracies against counts made by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cdl_edge.data import _ranks, load_dataset
from cdl_edge.errors import InputError
from cdl_edge.log import told
from cdl_edge.measurement.evaluate import evaluate, find_images, forgetting
from cdl_edge.runtime import load

COLOURS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250), "grey": (120, 120, 120)}


@pytest.fixture
def folder(tmp_path):
    """Returns make({class: [colours of its validation images]}) -> source string."""

    def make(val):
        for name, shown in val.items():
            for part, colours in (("train", [name if name in COLOURS else "red"]), ("val", shown)):
                (tmp_path / "data" / part / name).mkdir(parents=True)
                for i, colour in enumerate(colours):
                    picture = np.broadcast_to(np.array(COLOURS[colour], np.uint8), (8, 8, 3))
                    Image.fromarray(picture.copy()).save(tmp_path / "data" / part / name / f"{i}.png")
        return f"folder:{tmp_path / 'data'}"

    return make


@pytest.fixture
def runner(bundle):
    with load(bundle, threads=1) as loaded:
        yield loaded


VAL = {
    "red": ["red", "red", "green"],  # 2 of 3
    "green": ["green"],  # 1 of 1    -> task 0: 3 of 4
    "blue": ["blue", "red"],  # 1 of 2
    "grey": ["grey", "blue", "red"],  # 1 of 3 -> task 1: 2 of 5
}


def test_counts(runner, folder):
    lines = []
    with told(lines.append):
        report = evaluate(runner, folder(VAL))
    assert report["per_task"] == [75.0, 40.0]
    assert report["average_accuracy"] == 57.5
    # the run's diagonal: 90 and 70
    assert report["forgetting"] == pytest.approx(((90 - 75) + (70 - 40)) / 2)
    assert report["images"] == 9
    assert (report["backend"], report["precision"], report["skipped"]) == ("onnxruntime", "fp32", [])
    assert report["left_out"] == {"classes": 0, "images": 0}
    assert lines[-1] == "classified: 9 of 9 images"
    assert {"per_task", "average_accuracy", "forgetting"} <= set(report["definitions"])
    json.dumps(report)


def test_classes_are_matched_by_name_not_by_position(make_bundle, tiny, folder):
    """The bundle learnt its classes in another order than the folder's alphabetical one, and not all of them."""
    order = [2, 0, 3, 1]
    bundle = make_bundle(
        graph={"head": tiny.HEAD[:, order], "bias": tiny.BIAS[order]}, classes=[tiny.CLASSES[i] for i in order]
    )
    source = folder({**VAL, "amber": ["red", "blue"], "zebra": ["grey"]})
    with load(bundle, threads=1) as runner:
        report = evaluate(runner, source)
    # tasks are now {blue, red} and {grey, green}
    assert report["per_task"] == [pytest.approx(100 * 3 / 5), pytest.approx(100 * 2 / 4)]
    assert report["images"] == 9
    assert report["left_out"] == {"classes": 2, "images": 3}


def test_a_class_that_is_missing_is_not_measured_and_said(runner, folder):
    lines = []
    source = folder({"red": ["red", "green"], "blue": ["blue"], "grey": ["grey"], "amber": ["red"]})
    with told(lines.append):
        report = evaluate(runner, source)
    assert report["per_task"] == [50.0, 100.0] and report["average_accuracy"] == 75.0 and report["images"] == 4
    assert report["missing"] == ["green"] and report["forgetting"] is None
    assert lines[0].startswith(f"{source}: 4 classes, 4 train, 5 validation, 0 left out")
    assert lines[1:3] == [
        "scored: validation images",
        "1 of the 4 classes have no image here and are not measured: green",
    ]
    json.dumps(report)


def test_a_task_without_any_image_has_no_accuracy(runner, folder):
    report = evaluate(runner, folder({"red": ["red"], "green": ["green"]}))
    assert report["per_task"] == [100.0, None] and report["average_accuracy"] == 100.0


def test_no_class_at_all(runner, folder):
    with pytest.raises(InputError, match="none of the 4 classes") as caught:
        evaluate(runner, folder({"amber": ["red"]}))
    assert "amber" in str(caught.value)


def test_nan_is_no_answer(runner, folder, monkeypatch):
    monkeypatch.setattr(runner, "infer", lambda images: np.full((len(images), 4), np.nan, np.float32))
    with pytest.raises(InputError, match="is no number"):
        evaluate(runner, folder(VAL))


@pytest.fixture
def test_set(tmp_path):
    """PATH/<class>/*: five red and five green pictures, each right."""
    for name in ("red", "green", "blue", "grey"):
        (tmp_path / "t" / name).mkdir(parents=True)
        for i in range(5):
            picture = np.broadcast_to(np.array(COLOURS[name], np.uint8), (8, 8, 3)).copy()
            picture[0, 0, 0] ^= i + 1  # no two files alike
            Image.fromarray(picture).save(tmp_path / "t" / name / f"{i}.png")
    return f"folder:{tmp_path / 't'}"


def record(source):
    dataset = load_dataset(source)
    return {"given": "folder:x", "validation": len(dataset.val), "fingerprint": dataset.fingerprint.to_json()}


def test_of_a_test_set_in_class_folders_all_images_count(make_bundle, test_set, folder):
    trained = {"data": record(folder(VAL))}
    lines = []
    with load(make_bundle(training=trained), threads=1) as runner:
        with told(lines.append):
            report = evaluate(runner, test_set)
        assert (report["images"], report["split"]) == (20, "all images") and "scored: all images" in lines
        assert evaluate(runner, test_set, split="val")["images"] == 4
        assert evaluate(runner, test_set, split="train")["images"] == 16


@pytest.mark.parametrize("grown", [[], ["red"], ["red", "green", "blue", "grey"]], ids=len)
def test_of_the_images_of_the_training_only_those_held_out_count(make_bundle, test_set, tmp_path, grown):
    """Where every class has more pictures since, all were scored, those that the student has learnt from too."""
    trained = {"data": record(test_set)}
    for name in grown:
        first = tmp_path / "t" / name / "0.png"
        names = [f"{name}/new{i}.png" for i in range(400)]
        held_out = names[_ranks(names).argmin()]  # by its name it is the fifth from now on
        (tmp_path / "t" / held_out).write_bytes(first.read_bytes() + b" ")
    (tmp_path / "t").rename(tmp_path / "moved")
    lines = []
    with load(make_bundle(training=trained), threads=1) as runner, told(lines.append):
        assert evaluate(runner, f"folder:{tmp_path / 'moved'}")["images"] == 4
    assert any("changed since the training" in line for line in lines) == bool(grown)


def test_the_training_images_alone_are_no_test_set(make_bundle, test_set, image_folder, tmp_path):
    """Class folders without parts, but those of PATH/train: all were scored, and all were learnt."""
    image_folder(tmp_path / "whole", val=dict.fromkeys(COLOURS, 2))
    (tmp_path / "t").rename(tmp_path / "whole" / "train")
    trained = {"data": record(f"folder:{tmp_path / 'whole'}")}
    lines = []
    with load(make_bundle(training=trained), threads=1) as runner, told(lines.append):
        report = evaluate(runner, f"folder:{tmp_path / 'whole' / 'train'}")
    assert (report["images"], report["split"]) == (4, "validation images, a fifth of each class")
    assert any("it may have learnt some of these" in line for line in lines), lines


@pytest.mark.parametrize("before", [False, True])
def test_of_the_images_that_were_held_out_all_count(make_bundle, test_set, image_folder, tmp_path, before):
    """PATH/val alone: a fifth was scored, with a warning that it may have been learnt. None was."""
    image_folder(tmp_path / "whole", train=dict.fromkeys(COLOURS, 3))
    (tmp_path / "t").rename(tmp_path / "whole" / "val")
    trained = record(f"folder:{tmp_path / 'whole'}")
    if before:  # the run goes on from one that had others of red in `val`: these may have been learnt there
        other = {**trained["fingerprint"], "val": {**trained["fingerprint"]["val"], "red": "0" * 16}}
        trained["before"] = [{**trained, "fingerprint": other}]
    lines = []
    alone = f"folder:{tmp_path / 'whole' / 'val'}"
    with load(make_bundle(training={"data": trained}), threads=1) as runner, told(lines.append):
        report = evaluate(runner, alone)
        assert find_images(runner, alone).comparable != before  # with it, forgetting is known
    assert (report["images"], report["split"]) == (
        (4, "validation images, a fifth of each class") if before else (20, "all images")
    )
    assert any("it may have learnt some" in line for line in lines) == before, lines


def test_copies_of_some_pictures_do_not_make_a_test_set_the_training_folder(make_bundle, test_set, image_folder):
    """One picture that had been learnt from was enough: a fifth of the other ones was scored."""
    train = Path(test_set.removeprefix("folder:"))
    trained = {"data": record(test_set)}
    other = image_folder(train.parent / "other", unsplit=dict.fromkeys(COLOURS, 6))
    for name in ("red", "green"):
        shutil.copy(train / name / "0.png", other / name / "copy.png")
    with load(make_bundle(training=trained), threads=1) as runner:
        assert evaluate(runner, f"folder:{other}")["split"] == "all images"


def test_a_folder_of_the_same_name_elsewhere_is_another(make_bundle, test_set, folder, tmp_path):
    """A bundle keeps no place: `folder:t` of its maker says nothing about `folder:t` of its user."""
    trained = {"data": {**record(folder(VAL)), "given": test_set}}
    with load(make_bundle(training=trained), threads=1) as runner:
        assert evaluate(runner, test_set)["images"] == 20


def test_a_bundle_that_does_not_say_what_it_has_learnt_from(make_bundle, test_set):
    with load(make_bundle(training={"student": None}), threads=1) as runner:
        report = evaluate(runner, test_set)
    assert 4 <= report["images"] < 20  # held out as versions of its time did


def test_unreadable_images_are_named_and_left_out(runner, folder, tmp_path):
    source = folder(VAL)
    broken = tmp_path / "data" / "val" / "red" / "2.png"  # the one that is classified wrongly
    broken.write_bytes(b"no picture")
    report = evaluate(runner, source)
    assert report["images"] == 8
    assert report["per_task"][0] == 100.0
    assert len(report["skipped"]) == 1
    assert str(broken) in report["skipped"][0]


def test_what_is_not_counted_is_said(bundle, folder, cli, tmp_path):
    """Also without --json: pictures that cannot be read, and classes that the student has not learnt."""
    source = folder({**VAL, "Red": ["red", "red"]})  # another spelling is another class
    broken = tmp_path / "data" / "val" / "red" / "2.png"
    broken.write_bytes(b"no picture")
    said = cli("evaluate", bundle.path, "--data", source, "--threads", 1).err.splitlines()
    assert any(line.startswith(f"left out: {broken}: not a readable image") for line in said)
    assert "left out: 2 image(s) of 1 class(es) that the student has not learnt" in said


def test_a_class_loses_all_of_its_images(runner, folder, tmp_path):
    source = folder(VAL)
    (tmp_path / "data" / "val" / "green" / "0.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="without a readable validation image") as caught:
        evaluate(runner, source)
    assert "green" in str(caught.value)


def test_a_limit_per_class(runner, folder):
    report = evaluate(runner, folder(VAL), limit_per_class=1)
    assert report["images"] == 4
    with pytest.raises(InputError, match="limit"):
        evaluate(runner, "digits", limit_per_class=0)


def test_more_images_than_a_chunk(runner, folder):
    report = evaluate(runner, folder({**VAL, "green": ["green"] * 70 + ["blue"] * 10}))
    assert report["per_task"][0] == pytest.approx(100 * 72 / 83)


def test_an_unknown_source(runner, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        evaluate(runner, f"folder:{tmp_path / 'absent'}")


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"student": None},
        {"student": {}},
        {"student": {"matrix": None}},
        {"student": {"matrix": [[90.0]]}},
        {"student": {"matrix": [[90.0, None], [80.0, None]]}},
        {"student": {"matrix": [[90.0], []]}},
    ],
)
def test_forgetting_is_null_without_a_whole_diagonal(training):
    assert forgetting(training, [1.0, 2.0]) is None


def test_forgetting_may_be_negative():
    assert forgetting({"student": {"matrix": [[50.0, None], [0.0, 60.0]]}}, [60.0, 60.0]) == -5.0


def test_a_bundle_without_its_run(make_bundle, folder):
    with load(make_bundle(training=None), threads=1) as runner:
        assert evaluate(runner, folder(VAL))["forgetting"] is None


def test_a_source_of_arrays(make_bundle):
    """The bundled digits are no files; four of their ten classes are learnt."""
    bundle = make_bundle(classes=["0", "1", "2", "3"])
    with load(bundle, threads=1) as runner:
        report = evaluate(runner, "digits", limit_per_class=3)
    assert report["images"] == 12
    assert report["left_out"] == {"classes": 6, "images": 18}


def test_forgetting_is_of_the_images_that_the_run_was_measured_on(make_bundle, folder):
    """Training pictures, or those of another camera, differ for other reasons: -10 points were called forgetting."""
    source = folder(VAL)
    dataset = load_dataset(source)
    training = {
        "student": {"matrix": [[90.0, None], [80.0, 70.0]]},
        "data": {"given": source, "fingerprint": dataset.fingerprint.to_json()},
    }
    with load(make_bundle(training=training), threads=1) as loaded:
        assert evaluate(loaded, source)["forgetting"] == pytest.approx(((90 - 75) + (70 - 40)) / 2)
        assert evaluate(loaded, source, limit_per_class=1)["forgetting"] is None  # a sample of them
        assert evaluate(loaded, source, limit_per_class=99)["forgetting"] is not None
        assert evaluate(loaded, source, split="train")["forgetting"] is None
        assert evaluate(loaded, source, split="all")["forgetting"] is None
        first = next((dataset.val.items[0].parents[1] / "red").glob("*.png"))
        first.write_bytes(first.read_bytes() + b" ")  # the same picture in another file
        assert evaluate(loaded, source)["forgetting"] is None
