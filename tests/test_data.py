"""Image sources: what is complete opens, what is not says so in one message."""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from cdl_edge.data import VAL_SHARE, Fingerprint, Split, load_dataset
from cdl_edge.errors import InputError
from cdl_edge.images import Preprocessing
from cdl_edge.scored import find_scored
from cdl_edge.splits import copies, joined

SMALL = Preprocessing(8, 8, "bilinear")


def refused(source, *words):
    with pytest.raises(InputError) as info:
        load_dataset(source)
    text = str(info.value)
    for word in words:
        assert word in text, text


# -- names ------------------------------------------------------------------------------------------------------------


def test_an_unknown_source_names_the_closest():
    refused("digit", "unknown data source", "'digit'", "cifar100, digits, folder, imagenet-r", "did you mean 'digits'?")
    refused("/some/path", "unknown data source")


def test_a_folder_without_its_kind(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    refused("photos", "unknown data source", "give folder:photos")
    refused(str(tmp_path), f"give folder:{tmp_path}")
    refused("", "unknown data source")


@pytest.mark.parametrize("kind", ["folder", "imagenet-r"])
def test_a_source_that_needs_a_path_says_so(kind):
    refused(kind, "the path is missing", f"{kind}:PATH")
    refused(f"{kind}:", "the path is missing", f"{kind}:PATH")


# -- digits -----------------------------------------------------------------------------------------------------------


def test_digits_are_all_there_once():
    data = load_dataset("digits")
    assert data.classes == tuple("0123456789")
    assert len(data.train) + len(data.val) == 1797
    assert set(data.train.labels) == set(data.val.labels) == set(range(10))
    assert abs(len(data.val) / 1797 - VAL_SHARE) < 0.03
    for split in (data.train, data.val):
        assert split.items.dtype == np.uint8 and split.items.shape[1:] == (8, 8, 3)
        assert split.items.min() == 0 and split.items.max() == 255
        assert np.array_equal(split.items[..., 0], split.items[..., 2])
    again = load_dataset("digits")
    assert np.array_equal(data.val.items, again.val.items)


def test_digits_decode_to_the_input_of_a_backbone():
    decoded = load_dataset("digits").val.decode(Preprocessing(16, 18))
    assert decoded.pixels.shape[1:] == (16, 16, 3) and decoded.pixels.dtype == np.uint8
    assert decoded.skipped == ()


def test_digits_without_scikit_learn_are_one_message():
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "from cdl_edge.data import load_dataset\nfrom cdl_edge.errors import InputError\n"
        "try: load_dataset('digits')\nexcept InputError as e: print(e)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "scikit-learn" in out and "pip install" in out


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_with_train_and_val(tmp_path, image_folder):
    root = image_folder(tmp_path, train={"cat": 3, "ant": 2}, val={"cat": 1, "ant": 2})
    data = load_dataset(f"folder:{root}")
    assert data.classes == ("ant", "cat")  # sorted, whatever the file system says
    assert data.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert data.val.labels.tolist() == [0, 0, 1]
    for split in (data.train, data.val):
        assert [p.parent.name for p in split.items] == [data.classes[i] for i in split.labels]


def test_hidden_and_foreign_files_are_no_images(tmp_path, image_folder):
    root = image_folder(tmp_path, train={"a": 1, "b": 1}, val={"a": 1, "b": 1})
    (root / "train" / "a" / "notes.txt").write_text("x")
    (root / "train" / "a" / ".hidden.png").write_bytes(b"x")
    (root / "train" / ".cache").mkdir()
    (root / "train" / "a" / "more").mkdir()
    shutil.copy(root / "train" / "a" / "000.png", root / "train" / "a" / "more" / "LOUD.PNG")
    data = load_dataset(f"folder:{root}")
    assert data.classes == ("a", "b")
    assert sorted(p.name for p in data.train.items) == ["000.png", "000.png", "LOUD.PNG"]


def test_a_home_path_is_expanded(tmp_path, image_folder, monkeypatch):
    image_folder(tmp_path / "photos", train={"a": 1, "b": 1}, val={"a": 1, "b": 1})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_dataset("folder:~/photos").classes == ("a", "b")


def test_a_missing_path(tmp_path):
    refused(f"folder:{tmp_path}/nowhere", f"{tmp_path}/nowhere", "no such folder", "PATH/train/<class>")


def test_a_folder_without_classes(tmp_path):
    refused(f"folder:{tmp_path}", "no class folder")
    (tmp_path / "a.jpg").write_bytes(b"")
    refused(f"folder:{tmp_path}", "no class folder", "1 entries, none a folder")
    (tmp_path / "train").mkdir()
    refused(f"folder:{tmp_path}", "train: no class folder")
    (tmp_path / "val").mkdir()
    refused(f"folder:{tmp_path}", "train: no class folder")


def test_an_empty_class_is_refused_by_name(tmp_path, image_folder):
    root = image_folder(tmp_path, train={"a": 2, "b": 2}, val={"a": 1, "b": 0})
    refused(f"folder:{root}", "val", "without an image", "b", "add images or remove the folder")
    shutil.rmtree(root / "val")
    (root / "train").rename(root / "x")
    (root / "x" / "c").mkdir()
    refused(f"folder:{root / 'x'}", "1 class folder(s) without an image", "c")


def test_a_class_missing_in_val_and_the_reverse(tmp_path, image_folder):
    one = image_folder(tmp_path / "one", train={"a": 1, "b": 1}, val={"a": 1})
    refused(f"folder:{one}", "1 class(es) of train/ are missing in val/", "b", "add val/b")
    two = image_folder(tmp_path / "two", train={"a": 1}, val={"a": 1, "zebra": 1})
    refused(f"folder:{two}", "1 class(es) of val/ are missing in train/", "zebra", "add train/zebra")
    measured = load_dataset(f"folder:{two}", learning=False)
    assert measured.classes == ("a", "zebra") and measured.train.labels.tolist() == [0]
    assert measured.val.labels.tolist() == [0, 1]
    (two / "train" / "zebra").mkdir()  # a folder says that there should be some
    with pytest.raises(InputError, match="without an image"):
        load_dataset(f"folder:{two}", learning=False)


# -- unsplit folders --------------------------------------------------------------------------------------------------


def test_of_an_unsplit_folder_a_part_of_each_class_is_held_out(tmp_path, image_folder):
    root = image_folder(tmp_path, unsplit={"a": 40, "b": 2, "c": 5})
    data = load_dataset(f"folder:{root}")
    assert set(data.train.items) & set(data.val.items) == set()
    assert len(data.train) + len(data.val) == 47
    for c in range(3):
        assert (data.train.labels == c).any() and (data.val.labels == c).any()
    assert 2 <= int((data.val.labels == 0).sum()) <= 16


def test_an_added_image_moves_few_others(tmp_path, image_folder, photo):
    root = image_folder(tmp_path, unsplit={"a": 40, "b": 40})
    before = load_dataset(f"folder:{root}")
    for i in range(10):
        photo(root / "a" / f"new{i}.png", seed=i)
    after = load_dataset(f"folder:{root}")
    assert len(set(before.val.items) - set(after.val.items)) <= 10
    assert [p for p in after.val.items if "/b/" in str(p)] == [p for p in before.val.items if "/b/" in str(p)]
    assert np.bincount(after.val.labels).tolist() == [10, 8]


def test_a_fifth_of_every_class_is_held_out(tmp_path, image_folder):
    counts = {"a": 40, "b": 2, "c": 3, "d": 5, "e": 12, "f": 13}
    root = image_folder(tmp_path, unsplit=counts)
    assert np.bincount(load_dataset(f"folder:{root}").val.labels).tolist() == [8, 1, 1, 1, 2, 3]


def test_runs_of_early_versions_find_the_images_that_were_held_out_then(tmp_path, image_folder):
    root = image_folder(tmp_path, unsplit={"a": 40, "b": 40})
    early = load_dataset(f"folder:{root}", early=True)
    # by a hash of the name below 0.2, as until 1.9: another number of each class
    ranks = {f"a/{i:03d}.png": hashlib.sha256(f"a/{i:03d}.png".encode()).digest()[:6] for i in range(40)}
    expected = [n for n, r in ranks.items() if int.from_bytes(r, "big") / (1 << 48) < 0.2]
    assert [str(p.relative_to(root)) for p in early.val.items if p.parent.name == "a"] == expected


def test_the_split_does_not_depend_on_where_the_folder_is(tmp_path, image_folder):
    one = image_folder(tmp_path / "one", unsplit={"a": 20, "b": 20})
    shutil.copytree(one, tmp_path / "elsewhere")
    names = [
        [str(p.relative_to(root)) for p in load_dataset(f"folder:{root}").val.items]
        for root in (one, tmp_path / "elsewhere")
    ]
    assert names[0] == names[1]


def test_a_class_of_one_image_cannot_be_split(tmp_path, image_folder):
    root = image_folder(tmp_path, unsplit={"a": 3, "b": 1})
    refused(f"folder:{root}", "b: one image only", "at least two")


# -- unreadable images ------------------------------------------------------------------------------------------------


def test_corrupt_images_are_named_counted_and_skipped(tmp_path, image_folder):
    root = image_folder(tmp_path, train={"a": 4, "b": 3}, val={"a": 1, "b": 1})
    (root / "train" / "a" / "001.png").write_bytes(b"not an image")
    whole = root / "train" / "b" / "002.png"
    whole.write_bytes(whole.read_bytes()[:200])
    data = load_dataset(f"folder:{root}")
    decoded = data.train.decode(SMALL)
    assert decoded.labels.tolist() == [0, 0, 0, 1, 1]
    assert len(decoded.skipped) == 2
    assert all("\n" not in line for line in decoded.skipped)
    assert "a/001.png" in decoded.skipped[0] and "b/002.png" in decoded.skipped[1]
    # The images left are the right ones, in order.
    good = [p for p in data.train.items if str(p) not in " ".join(decoded.skipped)]
    assert np.array_equal(decoded.pixels, np.stack([SMALL.read(p) for p in good]))
    data.train.check_readable(data.classes)


def test_a_class_with_nothing_but_corrupt_images_is_refused(tmp_path, image_folder):
    root = image_folder(tmp_path, train={"a": 2, "b": 2, "c": 1}, val={"a": 1, "b": 1, "c": 1})
    for name in ("a/000.png", "b/000.png", "b/001.png"):
        (root / "train" / name).write_bytes(b"no")
    data = load_dataset(f"folder:{root}")
    with pytest.raises(InputError) as info:
        data.train.decode(SMALL)
    # The file that is named is one of the lost class, not simply the first bad one.
    assert "no readable image is left of 1 class(es)" in str(info.value) and "b/000.png" in str(info.value)
    with pytest.raises(InputError) as info:
        data.train.check_readable(data.classes)
    assert "class 'b' has no readable image" in str(info.value) and "b/000.png" in str(info.value)
    data.val.check_readable(data.classes)


# -- splits -----------------------------------------------------------------------------------------------------------


def test_limited_takes_at_most_so_many_of_each_class():
    train = load_dataset("digits").train
    some = train.limited(7, seed=3)
    assert np.bincount(some.labels).tolist() == [7] * 10
    assert np.array_equal(some.items, train.limited(7, seed=3).items)
    assert not np.array_equal(some.items, train.limited(7, seed=4).items)
    everything = train.limited(10_000, seed=0)
    assert np.array_equal(everything.labels, train.labels) and np.array_equal(everything.items, train.items)


def test_limited_keeps_image_and_label_together(tmp_path, image_folder):
    root = image_folder(tmp_path, train={"a": 5, "b": 2}, val={"a": 1, "b": 1})
    data = load_dataset(f"folder:{root}")
    some = data.train.limited(3, seed=0)
    assert np.bincount(some.labels).tolist() == [3, 2]
    assert [p.parent.name for p in some.items] == [data.classes[i] for i in some.labels]


def test_of_classes_and_take():
    split = Split(np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1), np.array([0, 1, 2, 0, 1, 2]))
    part = split.of_classes([2, 0])
    assert part.labels.tolist() == [0, 2, 0, 2] and part.items.ravel().tolist() == [0, 2, 3, 5]
    assert split.take(np.array([5, 0])).items.ravel().tolist() == [5, 0]
    assert len(split.of_classes([])) == 0


# -- fingerprint ------------------------------------------------------------------------------------------------------


def test_the_fingerprint_of_arrays_is_their_bytes():
    data = load_dataset("digits")
    print_ = data.fingerprint.whole
    assert len(print_) == 64 and load_dataset("digits").fingerprint.whole == print_
    for part in ("train", "val"):
        split = getattr(data, part)
        items, labels = split.items.copy(), split.labels.copy()
        items[3, 0, 0, 0] ^= 1
        labels[0] = (labels[0] + 1) % 10
        for changed in (Split(items, split.labels), Split(split.items, labels), split.take(np.arange(50))):
            assert replace(data, **{part: changed}).fingerprint.whole != print_
    assert replace(data, classes=tuple("ABCDEFGHIJ")).fingerprint.whole != print_
    assert replace(data, source="elsewhere").fingerprint.whole == print_


def change_nothing(root):
    pass


def change_a_byte(root):
    path = root / "train" / "a" / "001.png"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


def exchange_two_pictures(root):
    one, two = root / "train" / "a" / "000.png", root / "train" / "b" / "000.png"
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


def rename_a_class(root):
    for part in ("train", "val"):
        (root / part / "b").rename(root / part / "zebra")


def add_a_class(root):
    for part in ("train", "val"):
        shutil.copytree(root / part / "b", root / part / "c")


def add_a_picture(root):
    shutil.copy(root / "val" / "a" / "000.png", root / "val" / "a" / "more.png")


def rename_a_picture(root):
    (root / "train" / "a" / "000.png").rename(root / "train" / "a" / "zzz.png")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_a_byte, ["other pictures of a in training"]),
        (exchange_two_pictures, ["other pictures of a, b in training"]),
        (rename_a_class, ["without b in training", "new zebra in training", "new zebra in validation"]),
        (add_a_class, ["new c in training"]),
        (add_a_picture, ["other pictures of a in validation"]),
        (rename_a_picture, ["other pictures of a in training"]),
        (change_nothing, []),
    ],
)
def test_the_fingerprint_of_files_is_names_and_bytes(tmp_path, image_folder, change, words):
    root = image_folder(tmp_path / "p", train={"a": 3, "b": 2}, val={"a": 1, "b": 1})
    before = load_dataset(f"folder:{root}").fingerprint
    moved = shutil.copytree(root, tmp_path / "moved")  # where it lies, and when it was made, is of no account
    change(moved)
    after = load_dataset(f"folder:{moved}").fingerprint
    assert (before.whole == after.whole) == (not words)
    text = before.changes(after)
    assert all(word in text for word in words) and bool(text) == bool(words)
    assert Fingerprint.from_json(json.loads(json.dumps(before.to_json()))) == before


def test_a_fingerprint_names_two_pictures_of_each_class_and_part(tmp_path, image_folder):
    root = image_folder(tmp_path / "p", train={"a": 3, "b": 2}, val={"a": 3, "b": 1})
    data = load_dataset(f"folder:{root}")
    named = data.fingerprint.pictures
    held_out, learnt = ({part.digest(i) for i in range(len(part))} for part in (data.val, data.train))
    assert (len(held_out & {*named}), len(learnt & {*named}), len(named)) == (3, 4, 7)
    (root / "val" / "a" / "new.png").write_bytes((root / "train" / "a" / "000.png").read_bytes())
    assert load_dataset(f"folder:{root}").fingerprint.whole != data.fingerprint.whole
    assert replace(data.fingerprint, pictures=()).whole == data.fingerprint.whole  # older runs have none
    assert load_dataset("digits").fingerprint.pictures == ()


def test_copies_of_training_pictures_among_the_validation_pictures(image_folder, tmp_path):
    root = image_folder(tmp_path / "d", train={"a": 3, "b": 3}, val={"a": 2, "b": 2})

    def said(source):
        found = load_dataset(source)
        return copies(found.train, found.val)

    assert said(f"folder:{root}") is None
    for name in ("copy 1.png", "copy 2.png"):
        (root / "val" / "a" / name).write_bytes((root / "train" / "a" / "001.png").read_bytes())
    assert said(f"folder:{root}").startswith(
        "warning: 2 of the 6 validation pictures are training pictures too (a/copy 1.png ...)"
    )
    assert said("digits") is None


def test_a_fingerprint_knows_the_order_of_the_classes():
    one, two = Fingerprint({"a": "1", "b": "2"}, {}), Fingerprint({"b": "2", "a": "1"}, {})
    assert one.changes(two) == "the classes in another order" and one.shares(two)
    assert not one.shares(Fingerprint({"a": "2"}, {"b": "1"}))


# -- CIFAR-100 and ImageNet-R -----------------------------------------------------------------------------------------


def write_cifar(folder, train=(2, 0, 1, 1), test=(0, 1, 2), names="apple\nbear\ncan\n"):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    pixels = {}
    for name, labels in (("train.bin", train), ("test.bin", test)):
        planes = rng.integers(0, 256, (len(labels), 3, 32, 32), dtype=np.uint8)
        records = [bytes([99, label]) + planes[i].tobytes() for i, label in enumerate(labels)]
        (folder / name).write_bytes(b"".join(records))
        pixels[name] = planes
    if names:
        (folder / "fine_label_names.txt").write_text(names)
    return pixels


def test_cifar100_binary(tmp_path):
    pixels = write_cifar(tmp_path)
    data = load_dataset(f"cifar100:{tmp_path}")
    assert data.classes == ("apple", "bear", "can")
    assert data.train.labels.tolist() == [2, 0, 1, 1]  # the fine label is the second byte
    assert data.train.items.shape == (4, 32, 32, 3)
    assert data.train.items[1, 5, 7].tolist() == pixels["train.bin"][1, :, 5, 7].tolist()
    assert np.array_equal(data.val.items[2, :, :, 1], pixels["test.bin"][2, 1])


def test_cifar100_is_found_where_the_archive_unpacks(tmp_path, monkeypatch):
    write_cifar(tmp_path / "cifar-100-binary")
    assert len(load_dataset(f"cifar100:{tmp_path}").train) == 4
    home = tmp_path / "home"
    write_cifar(home / ".cache" / "cdl-edge" / "cifar-100-binary")
    monkeypatch.setenv("HOME", str(home))
    assert len(load_dataset("cifar100").val) == 3


def test_cifar100_truncated(tmp_path):
    write_cifar(tmp_path)
    path = tmp_path / "test.bin"
    path.write_bytes(path.read_bytes()[:-1])
    refused(f"cifar100:{tmp_path}", "test.bin: truncated", str(3 * 3074 - 1), "download it again")
    path.write_bytes(b"")
    refused(f"cifar100:{tmp_path}", "test.bin: truncated", "0 bytes")


def test_cifar100_labels_that_do_not_fit(tmp_path):
    write_cifar(tmp_path, train=(0, 1, 2, 3))
    refused(f"cifar100:{tmp_path}", "train.bin", "label 3", "0 to 2")
    write_cifar(tmp_path, test=(0, 1, 1))
    refused(f"cifar100:{tmp_path}", "test.bin", "1 of 3 classes have no image")


def test_cifar100_missing_and_the_pickled_version(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    refused("cifar100", str(tmp_path), "CIFAR-100 is not there", "cifar-100-binary.tar.gz")
    for name in ("train", "test", "meta"):  # what cifar-100-python.tar.gz holds
        (tmp_path / name).write_bytes(b"\x80\x03}q\x00.")
    refused(f"cifar100:{tmp_path}", "not there", "pickles are not read", "train.bin")


def test_cifar100_as_folders(tmp_path, image_folder):
    root = image_folder(tmp_path, train={"a": 1, "b": 1}, val={"a": 1, "b": 1})
    assert load_dataset(f"cifar100:{root}").classes == ("a", "b")


def test_imagenet_r(tmp_path, image_folder):
    refused(f"imagenet-r:{tmp_path}/x", "ImageNet-R is not there", "imagenet-r.tar")
    root = image_folder(tmp_path, unsplit={"n01443537": 6, "n01484850": 6})
    data = load_dataset(f"imagenet-r:{root}")
    assert data.classes == ("n01443537", "n01484850") and len(data.train) + len(data.val) == 12


def test_a_name_that_is_written_in_two_ways_is_told(tmp_path, image_folder):
    """Both look the same: "a class is missing" beside a folder of that name helped nobody."""
    letter, accent = "\u00fcber", "u\u0308ber"
    apart = image_folder(tmp_path / "apart", train={letter: 2, "b": 2}, val={accent: 1, "b": 1})
    refused(f"folder:{apart}", "reads like the class", "'\\xfcber'", "'u\\u0308ber'", "rename the folder")
    for mine, theirs in ((letter, accent), (accent, letter)):
        source = f"folder:{image_folder(tmp_path / ascii(mine), unsplit={mine: 3, 'b': 3})}"
        assert len(find_scored(source, "auto", None, [mine, "b"]).images)
        with pytest.raises(InputError, match="reads like the class"):
            find_scored(source, "auto", None, [theirs, "b"])


def test_splits_are_joined_in_order(tmp_path):
    arrays = [Split(np.full((n, 2, 2, 3), n, np.uint8), np.full(n, n)) for n in (2, 1, 3)]
    whole = joined(arrays)
    assert whole.labels.tolist() == [2, 2, 1, 3, 3, 3] and whole.items[:, 0, 0, 0].tolist() == whole.labels.tolist()
    paths = [Split([tmp_path / str(n)], np.array([n])) for n in (5, 4)]
    both = joined(paths)
    assert both.items == [tmp_path / "5", tmp_path / "4"] and both.labels.tolist() == [5, 4]
