"""Folders as people have them: names of parts, levels too high or too low, what is left out."""

import json
import os
import shutil
from pathlib import Path

import pytest

from cdl_edge.data import load_dataset
from cdl_edge.errors import InputError


def refused(source, *words):
    with pytest.raises(InputError) as info:
        load_dataset(source)
    text = str(info.value)
    for word in words:
        assert word in text, text


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Training", None, "Test"),
        ("Train", "Val", None),
        ("training", "validation", None),
        ("train", "valid", "test"),
        ("TRAIN", "VALIDATION", "Testing"),
    ],
)
def test_names_of_parts(tmp_path, image_folder, train, val, test):
    counts = {train: 4, val: 2, test: 3}
    root = image_folder(tmp_path, **{part: dict.fromkeys("ab", n) for part, n in counts.items() if part})
    data = load_dataset(f"folder:{root}")
    assert data.classes == ("a", "b") and not data.held_out
    assert (len(data.train), len(data.val)) == (8, 4 if val else 6)
    if val and test:
        assert len(data.test) == 6 and f"6 in {test}/ kept apart" in data.line
        assert data.scored("test")[0] is data.test and len(data.scored("all")[0]) == 18
    else:
        assert data.test is None and f"({val or test}/)" in data.line
    if not test:
        with pytest.raises(InputError, match="no part for testing"):
            data.scored("test")


def test_a_class_called_train(tmp_path, image_folder):
    root = image_folder(tmp_path, unsplit=dict.fromkeys(("bus", "car", "train", "test"), 5))
    assert load_dataset(f"folder:{root}").classes == ("bus", "car", "test", "train")


def test_parts_beside_classes_are_not_guessed(tmp_path, image_folder):
    root = image_folder(tmp_path, unsplit={"bus": 3}, Training={"a": 2})
    refused(f"folder:{root}", "is Training/ a part of the data, or a class?", "bus/ beside it")
    shutil.rmtree(root / "bus")
    image_folder(root, Other={"a": 1})
    refused(f"folder:{root}", "is Training/ a part", "Other/")
    image_folder(root, Test={"a": 1})
    assert "1 in Other/ beside the parts" in load_dataset(f"folder:{root}").line


def test_two_folders_of_one_part(tmp_path, image_folder):
    root = image_folder(tmp_path, train={"a": 1}, val={"a": 1}, Validation={"a": 1})
    refused(f"folder:{root}", "two folders of one part", "Validation/ and val/")


def test_one_level_too_high(tmp_path, image_folder):
    image_folder(tmp_path / "fruit", train={"a": 1}, val={"a": 1})
    refused(f"folder:{tmp_path}", "one level too high", f"perhaps folder:{tmp_path}/fruit")
    image_folder(tmp_path / "two" / "set", unsplit={"a": 2, "b": 2})
    refused(f"folder:{tmp_path / 'two'}", "one level too high", f"perhaps folder:{tmp_path}/two/set")
    image_folder(tmp_path / "mine" / "learn", unsplit={"a": 2})
    image_folder(tmp_path / "mine" / "check", unsplit={"a": 2})
    refused(f"folder:{tmp_path / 'mine'}", "one level too high", "call the parts train/ and val/")


def test_pictures_inside_of_inner_folders_are_told(tmp_path, image_folder, photo):
    """One level too high, but for a stray picture: everything below would be one class without a word."""
    image_folder(tmp_path / "photos", unsplit={"ant": 3, "bee": 3})
    photo(tmp_path / "photos" / "stray.png", 9)
    line = load_dataset(f"folder:{tmp_path}").line
    assert line.endswith("0 left out; 6 in folders inside class folders (photos/ant/ ...), which count")
    assert load_dataset(f"folder:{tmp_path / 'photos'}").line.endswith("1 left out (1 outside the class folders)")


def test_classes_that_are_called_as_parts(tmp_path, image_folder):
    image_folder(tmp_path, unsplit={"train": 3, "test": 2})
    refused(f"folder:{tmp_path}", "train: no class folder", "3 picture(s) directly in it", "rename train/ if it is a c")


def test_one_level_too_low(tmp_path, image_folder):
    image_folder(tmp_path, unsplit={"a": 2, "b": 2})
    refused(f"folder:{tmp_path / 'a'}", "no class folder", f"perhaps folder:{tmp_path}")


def test_parts_alone(tmp_path, image_folder):
    for part in ("val", "Test"):
        root = image_folder(tmp_path / part, **{part: {"a": 2, "b": 1}})
        refused(f"folder:{root}", "no folder train/", f"{part}/")
        data = load_dataset(f"folder:{root}", learning=False)
        assert len(data.val) == 3 and len(data.train) == 0 and data.scored()[0] is data.val
    root = image_folder(tmp_path / "t", train={"a": 5, "b": 5})
    data = load_dataset(f"folder:{root}")
    assert data.held_out and len(data.val) == 2 and data.classes == ("a", "b")


# -- what is left out -------------------------------------------------------------------------------------------------


def test_what_is_left_out_is_counted_by_reason(tmp_path, image_folder, photo):
    root = image_folder(tmp_path, unsplit={"a": 5, "b": 5})
    for place in (".ipynb_checkpoints", "a/.trash/deep", "a/@eaDir", "__MACOSX/b"):
        photo(root / place / "copy.png", 1)
    (root / "b" / "Thumbs.db").write_bytes(b"x")
    (root / "b" / "notes.txt").write_text("x")
    (root / "b" / "README").write_text("x")
    (root / "b" / "nothing.jpg").write_bytes(b"")
    (root / "b" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (root / "b" / "more").symlink_to(root / "a")
    photo(root / "cover.png", 2)
    data = load_dataset(f"folder:{root}")
    assert data.classes == ("a", "b") and len(data.train) + len(data.val) == 10
    assert data.left_out == {
        "hidden": 5,
        "of type .txt": 1,
        "without a type": 1,
        "empty": 1,
        "behind a broken link": 1,
        "behind a link to a folder": 1,
        "outside the class folders": 1,
    }
    assert data.line.startswith(
        f"folder:{root}: 2 classes, 8 train, 2 validation (a fifth of each class, held out), 11 left out (5 hidden, "
    )
    assert json.loads(json.dumps(data.summary))["left_out"]["hidden"] == 5


@pytest.mark.parametrize("name", ["class", "file", "source"])
def test_names_that_are_not_utf8(tmp_path, image_folder, name):
    root = image_folder(tmp_path, train={"a": 2, "b": 2}, val={"a": 1, "b": 1})
    odd = os.fsdecode(b"caf\xe9")
    if name == "class":
        for part in ("train", "val"):
            (root / part / "b").rename(root / part / odd)
    elif name == "file":
        (root / "val" / "a" / "000.png").rename(root / "val" / "a" / f"{odd}.png")
    else:
        root = shutil.copytree(root, tmp_path / odd)
    refused(f"folder:{root}", "is not UTF-8", r"caf\xe9", "rename it")


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    refused(f"folder:{tmp_path}", f"{tmp_path}: cannot be read", "Permission denied")


def test_test_pictures_without_classes_are_left_out(tmp_path, image_folder):
    """As competitions hand data out: they made a good train/ and val/ unreadable."""
    root = image_folder(tmp_path, train={"a": 5, "b": 5}, val={"a": 2, "b": 2})
    shutil.copytree(root / "val" / "a", root / "test")
    dataset = load_dataset(f"folder:{root}")
    assert (len(dataset.train), len(dataset.val), dataset.test) == (10, 4, None)
    assert dataset.left_out == {"in test/ without class folders": 2}
    shutil.rmtree(root / "val")
    dataset = load_dataset(f"folder:{root}")
    assert dataset.held_out and (len(dataset.train), len(dataset.val)) == (8, 2)


def test_a_class_of_the_test_part_alone_is_said_to_be_there(tmp_path, image_folder):
    root = image_folder(tmp_path, train={"a": 5}, val={"a": 2}, test={"a": 1, "other": 1})
    refused(f"folder:{root}", "1 class(es) of test/ are missing in val/", "or remove test/other")
